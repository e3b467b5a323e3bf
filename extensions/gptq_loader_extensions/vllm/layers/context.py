"""Hold what a process of vLLM needs while it loads: the checkpoint, the kernels; imports vLLM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group

from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.planning.checkpoint import open_gptq
from gptq_loader_extensions.vllm.planning.layer_names import LayerNames
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.planning.choose import Choice

__all__ = ["LoadContext"]

OPTIONS = ("backend",)  # of vLLM's additional_config, under our name
logger = logging.getLogger("vllm.gptq_loader")


class LoadContext:
    """An open checkpoint, its layers' names in vLLM's model, the kernels, and what was logged.

    Attributes:
        checkpoint: the open checkpoint.
        names: its layers' names in vLLM's model.
        kernels: every installed kernel.
    """

    def __init__(self, folder: Path) -> None:
        plugins = Plugins(installed=True)
        self.checkpoint = open_gptq(folder, plugins)
        self.names = LayerNames(self.checkpoint.layers, self.checkpoint.path)
        self.kernels = plugins.kernels()
        self._logged: set[object] = set()
        self._checked = False

    def backend(self) -> str | None:
        """Return the kernel that the user names in vLLM's additional_config, if any.

        Raises:
            OptionInvalid: another option is set there.
        """
        options = (get_current_vllm_config().additional_config or {}).get(NAME, {})
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise OptionInvalid(
                f"unknown option of {NAME} in additional_config: {', '.join(unknown)}",
                hint=f"the options are {', '.join(OPTIONS)}",
            )
        backend = options.get("backend")
        return None if backend is None else str(backend)

    def log(self, choice: Choice) -> None:
        """Log a layer's kernel and the reasons, once for layers that are alike."""
        kind = (str(choice.layer), choice.reasons())
        level = logging.DEBUG if kind in self._logged else logging.INFO
        self._logged.add(kind)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons())
        logger.log(
            level,
            "gptq_loader: %s and layers like it (%s): %s",
            choice.layer.name,
            kind[0],
            reasons,
        )

    def log_experts(self, name: str, count: int) -> None:
        """Log once that the experts of a mixture were dequantised."""
        level = logging.DEBUG if "experts" in self._logged else logging.INFO
        self._logged.add("experts")
        logger.log(
            level,
            "gptq_loader: %s, %d layers, and mixtures like it: dequantised once, because vLLM runs "
            "all experts of a layer in one kernel over plain weights",
            name,
            count,
        )

    def log_plain(self, name: str) -> None:
        """Log once that layers which vLLM keeps plain were dequantised."""
        level = logging.DEBUG if "plain" in self._logged else logging.INFO
        self._logged.add("plain")
        logger.log(
            level,
            "gptq_loader: %s, and layers like it: dequantised, because vLLM keeps it plain",
            name,
        )

    def check_claimed(self) -> None:
        """Check once, before the first layer is prepared, that every quantised layer has a place.

        One stage of a pipeline has only some of the layers, and is not checked.
        """
        if self._checked or get_pp_group().world_size > 1:
            return
        self._checked = True
        for warning in self.checkpoint.warnings:
            logger.warning("%s", warning)
        if unclaimed := self.names.check_claimed():
            logger.warning(
                "%d quantised layers are of modules that this model lacks, and were not read: %s",
                len(unclaimed),
                unclaimed[0],
            )
