"""The host "openai": serve a loaded model to clients of OpenAI's API, or Kobold's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import NotReady, check_package

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["OpenAIHost", "gptq_hosts"]

OPTIONS = ("load", "model", "reference", "stop")
EXTRA = "pip install 'gptq-loader-plugin[server]'"


@dataclass(frozen=True, slots=True)
class OpenAIHost:
    """Serve the APIs of OpenAI, Anthropic, Ollama, Kobold and text-generation-webui."""

    name: str = "openai"

    def install(self, **options: Any) -> None:  # noqa: ANN401 - Host's signature; checked here
        """Serve until Ctrl-C.

        Args:
            **options: `reference`, what to load, or None to load the first model that is
                requested; `model`, a LoadedModel where it is loaded already; `load`, a function
                that loads a reference or a folder; `stop`, a threading.Event that ends a load
                under way once it is set; and the fields of `settings.Settings`.

        Raises:
            PluginError: fastapi, prometheus_client or uvicorn is not installed.
            OptionInvalid: an option is unknown, the address cannot be served on, or it can be
                reached from other machines without a key.
        """
        from gptq_loader_extensions.openai.settings import Settings

        model, load = options.pop("model", None), options.pop("load", None)
        reference, stop = options.pop("reference", None), options.pop("stop", None)
        names = {field.name for field in fields(Settings)}
        if unknown := sorted(set(options) - names):
            raise OptionInvalid(
                f"the server has no option {', '.join(unknown)}",
                hint=f"the options are {', '.join(sorted({*OPTIONS, *names}))}",
            )
        settings = Settings(**options)
        settings.check()
        try:
            import fastapi  # noqa: F401 - only whether they are installed
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise PluginError(
                f"the server needs {error.name}, which is not installed", hint=EXTRA
            ) from error
        from gptq_loader_extensions.openai.serving import serve

        serve(settings, model=model, reference=reference, load=load, stop=stop)

    def check(self) -> Readiness:
        """Look for FastAPI, uvicorn and prometheus_client."""
        for package, oldest, newest in (
            ("prometheus_client", "0.18", "0.26"),
            ("uvicorn", "0.30", "0.54"),
        ):
            readiness = check_package(package, oldest=oldest, newest=newest, install=EXTRA)
            if isinstance(readiness, NotReady):
                return readiness
        return check_package("fastapi", oldest="0.115", newest="0.165", install=EXTRA)


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer the server."""
    return [OpenAIHost()]
