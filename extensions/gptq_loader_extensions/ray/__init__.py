"""The host "ray": serve one model from many replicas, each a server of ours, on Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import NotReady, check_package

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["RayHost", "gptq_hosts"]

TRIED = "2.60"
EXTRA = "pip install 'gptq-loader-plugin[ray]'"
TAKES = frozenset(
    {
        "allow_host",
        "api_key",
        "as_json",
        "backend",
        "check",
        "context",
        "cors",
        "device",
        "grace",
        "head",
        "host",
        "kv_cache",
        "listen",
        "max_body",
        "max_new_tokens",
        "max_queue",
        "max_num_seqs",
        "no_auth",
        "port",
        "replicas",
        "template",
        "timeout",
    }
)


@dataclass(frozen=True, slots=True)
class RayHost:
    """Serve OpenAI's API from several processes behind one address."""

    name: str = "ray"
    takes: frozenset[str] = TAKES

    def serve(self, reference: str, **options: object) -> None:
        """Start Ray on this machine, serve until Ctrl-C, and end all that was started.

        Args:
            reference: what to serve, as the user wrote it.
            **options: those of `takes` that the user set.

        Raises:
            PluginError: Ray is not installed, is another version, or could not start.
            OptionInvalid: an option is impossible, the address cannot be served on, or it can be
                reached from other machines without a key.
            GPTQLoaderError: there is no such checkpoint, or it cannot be loaded.
        """
        readiness = self.check()
        if isinstance(readiness, NotReady):
            raise PluginError(readiness.reason, hint=readiness.hint)
        from gptq_loader_extensions.ray.serving import serve

        serve(reference, options)

    def install(self, **options: object) -> None:
        """Serve until Ctrl-C: `reference`, and the options of `serve`."""
        self.serve(str(options.pop("reference")), **options)

    def check(self) -> Readiness:
        """Look for Ray, and for the packages that its replicas need."""
        for package, oldest, newest in (
            ("fastapi", "0.115", "0.165"),
            ("llguidance", "1.7", "1.9.1"),
            ("prometheus_client", "0.18", "0.26"),
        ):
            readiness = check_package(package, oldest=oldest, newest=newest, install=EXTRA)
            if isinstance(readiness, NotReady):
                return readiness
        return check_package("ray", oldest=TRIED, newest=TRIED, install=EXTRA)


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer Ray Serve."""
    return [RayHost()]
