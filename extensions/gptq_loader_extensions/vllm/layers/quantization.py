"""Define vLLM's quantization method `gptq_loader`: its checkpoints and its layers; imports vLLM.

The checkpoint is read from its own files by `gptq_loader_plugin.checkpoint`; vLLM's reading of its
config only decides whether vLLM would refuse it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from gptq_loader_extensions.vllm.error_messages import as_value_error
from gptq_loader_extensions.vllm.layers.context import LoadContext
from gptq_loader_extensions.vllm.layers.experts import GPTQLoaderExpertsMethod, expert_names
from gptq_loader_extensions.vllm.layers.folder import find_folder
from gptq_loader_extensions.vllm.layers.linear import GPTQLoaderLinearMethod
from gptq_loader_extensions.vllm.layers.plain_layers import PlainLayers
from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.planning.checkpoint import open_gptq
from gptq_loader_extensions.vllm.planning.eligibility import METHODS, refusal
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["GPTQLoaderConfig"]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
logger = logging.getLogger("vllm.gptq_loader")


class GPTQLoaderConfig(QuantizationConfig):  # type: ignore[misc] # vLLM is not there when checked
    """How vLLM loads a GPTQ checkpoint with gptq_loader.

    vLLM pickles one for each of its processes, so the open checkpoint is opened again there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._model = ""
        self._revision: str | None = None
        self._context: LoadContext | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open checkpoint."""
        return {**self.__dict__, "_context": None}

    def get_name(self) -> str:
        """Return the method's name."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """List the dtypes that the model may compute in: all that kernels take."""
        return DTYPES

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU: any, because each layer's kernel decides."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no config file, so that vLLM requires none: the reader finds them."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GPTQLoaderConfig:
        """Return a new one: the config is read from the files, and corrected by the tensors."""
        del config
        return cls()

    def get_checkpoint_weight_mapper(self) -> PlainLayers:
        """Drop nothing: vLLM's own drops every g_idx here."""
        with as_value_error():
            return PlainLayers(context=self._open())

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: object = None
    ) -> str | None:
        """Take a GPTQ checkpoint if named by the user, or if vLLM would refuse or misread it."""
        if str(hf_quant_cfg.get("quant_method", "")).lower() not in METHODS:
            return None
        if user_quant is not None:
            return NAME if user_quant == NAME else None
        reason = _vllm_refusal(hf_quant_cfg)
        path = Path(getattr(hf_config, "_name_or_path", "") or "")
        if path.is_dir():
            try:
                checkpoint = open_gptq(path, Plugins(installed=True))
            except GPTQLoaderError as error:
                logger.info("gptq_loader leaves this checkpoint to vLLM: %s", error.message)
                return None
            corrected = {
                name: getattr(checkpoint.config, name)
                for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format")
            }
            checkpoint.close()
            reason = reason or _vllm_refusal({**hf_quant_cfg, **corrected})
            # what it accepts and gets wrong, such as a short last group
            device = find_device("cpu") if current_platform.is_cpu() else None
            reason = reason or refusal(checkpoint, checkpoint.layers.values(), device)
        if reason is None:
            return None
        logger.info("gptq_loader takes this checkpoint, because vLLM would not: %s", reason)
        return NAME

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Note which checkpoint it is, and open it where it is on this machine."""
        del hf_config
        self._model, self._revision = model_name, revision
        if Path(model_name).is_dir():
            with as_value_error():
                self._open()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the checkpoint's layers as the model renames its tensors."""
        with as_value_error():
            self._open().names.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:  # noqa: ANN401 - vLLM's
        """Return the method that loads and runs a layer; None where it is no linear layer."""
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        head = isinstance(layer, ParallelLMHead)
        if not head and not isinstance(layer, LinearBase):
            return None
        with as_value_error():
            names = self._open().names.claim(prefix, self.packed_modules_mapping)
        if names:
            return GPTQLoaderLinearMethod(self._open(), prefix, names)
        return UnquantizedEmbeddingMethod() if head else UnquantizedLinearMethod()

    def _open(self) -> LoadContext:
        if self._context is None:
            self._context = LoadContext(find_folder(self._model, self._revision))
        return self._context

    def _experts(self, layer: Any, prefix: str) -> UnquantizedFusedMoEMethod:  # noqa: ANN401 - vLLM's
        with as_value_error():
            model_names = expert_names(layer, prefix)
            stored = self._open().names.claim_all(list(model_names.values()))
        if not stored:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        names = dict(zip(model_names, stored, strict=True))
        return GPTQLoaderExpertsMethod(self._open(), names, layer.moe_config)


def _vllm_refusal(config: dict[str, Any]) -> str | None:
    """Return why vLLM's own GPTQ refuses a config; None where it accepts it."""
    try:
        AutoGPTQConfig.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # it raises any of them
        return str(error)
    return None
