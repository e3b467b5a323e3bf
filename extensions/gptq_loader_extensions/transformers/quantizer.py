"""Tell transformers how a model is quantised, and save it.

A kernel keeps a layer as it multiplies it, not as the checkpoint stores it. So a save copies the
layers' tensors from the checkpoint's own files, mapped and not read into memory, bit for bit; and
tensors that are not quantised from the model, where they have changed since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors
import torch
from packaging.version import Version
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from gptq_loader_plugin.errors import CheckpointError
from gptq_loader_plugin.model.tensor_names import Names

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.model.build import FilledModel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["QuantizationConfig", "Quantizer"]

# Older ones write into a file that they replace, which may be the one the tensors are mapped from.
RENAMES = Version("0.8")
# Fields that describe how the config was read, or files that a save names anew.
NOT_SAVED = {"sources", "zeros", "model_file_base_name", "model_name_or_path", "format"}


class QuantizationConfig(QuantizationConfigMixin):
    """How the checkpoint was quantised, as its tensors say, in the names of config.json.

    transformers' own class refuses 5, 6 and 7 bits.
    """

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401 - as config.json has them
        self.quant_method = QuantizationMethod.GPTQ
        self.__dict__.update(fields)
        self.quant_method = QuantizationMethod.GPTQ

    @classmethod
    def of(cls, config: QuantConfig) -> QuantizationConfig:
        """Make the config of a checkpoint."""
        fields = config.model_dump(exclude=NOT_SAVED, exclude_none=True)
        return cls(**{key: value for key, value in fields.items() if value != {}})


class Quantizer(HfQuantizer):
    """The `hf_quantizer` of a loaded model, for transformers, PEFT and Trainer.

    Args:
        quantization_config: how the checkpoint was quantised.
        filled: the model as it was loaded.

    Attributes:
        checkpoint: the checkpoint that was loaded.
        plan: which kernel runs which layer, and why: `plan.explain()`.
        warnings: what a user should know, one sentence each.
        notes: what kernels changed in the model as a whole.
    """

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfig, *, filled: FilledModel) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.checkpoint: Checkpoint = filled.checkpoint
        self._stamps = _stamps(filled.checkpoint)
        self.plan: Plan = filled.plan
        self.warnings, self.notes = filled.warnings, filled.notes

    def read_weight(self, layer: str) -> torch.Tensor:
        """Read a layer's weight from the checkpoint, dequantised: float32 [N, K]."""
        return self._opened().packed(layer).dequantize()

    @property
    def is_trainable(self) -> Any:  # noqa: ANN401 - it has no type in transformers
        """Whether adapters can be trained on top: the quantised weights have no gradient."""
        return True

    def is_serializable(self, **_: object) -> Any:  # noqa: ANN401 - nor has it
        """Return True: the model can be saved."""
        return True

    def get_state_dict_and_metadata(
        self,
        model: Any,  # noqa: ANN401 - transformers' own
        **_: object,
    ) -> Any:  # noqa: ANN401 - a state dict or None, and metadata
        """Return the tensors to save, by the names they have in the checkpoint.

        Raises:
            CheckpointError: the checkpoint's files have changed since they were loaded.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        checkpoint = self._opened()
        names = Names(model)
        state: dict[str, torch.Tensor] = {}
        packed = {part for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}
        for name in checkpoint.headers:
            if name in packed:
                state[name] = checkpoint.tensor(name)
            else:
                key, tensor = _current_tensor(name, checkpoint, model, names)
                state[key] = tensor
        for name in checkpoint.layers:
            # GPTQ-for-LLaMa left it out where rows are in order; other loaders need it.
            state.setdefault(f"{name}.g_idx", checkpoint.packed(name).g_idx)
        checkpoint.close()
        if Version(safetensors.__version__) < RENAMES:
            state = {name: tensor.clone() for name, tensor in state.items()}
        return state, {}

    def _opened(self) -> Checkpoint:
        """Return the checkpoint, if its files are those that were loaded."""
        if _stamps(self.checkpoint) != self._stamps:
            raise CheckpointError(
                "the checkpoint's files are gone or were changed since it was loaded, and its "
                "tensors are needed",
                path=self.checkpoint.path,
                hint="load the model again from where its files are now, and retry",
            )
        return self.checkpoint


def _stamps(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int] | None]:
    """Return what identifies the files of a checkpoint: inode, size and time of each."""
    stamps: dict[str, tuple[int, int, int] | None] = {}
    for file in {info.file for info in checkpoint.headers.values()}:
        try:
            status = file.stat()
        except OSError:
            stamps[str(file)] = None
        else:
            stamps[str(file)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return stamps


def _current_tensor(
    name: str,
    checkpoint: Checkpoint,
    model: Any,  # noqa: ANN401
    names: Names,
) -> tuple[str, torch.Tensor]:
    """Return a tensor that is not quantised, as stored or as it is now where it was changed.

    A tensor that transformers fuses with others keeps its name in the model: a save splits it.
    """
    stored = checkpoint.tensor(name)
    target, converter, _ = names.target(name)
    if not names.exists(target):
        return name, stored  # of a part that this model lacks, or inside an adapter's layer
    now: torch.Tensor = _value(model, target)
    if converter is not None:
        return target, now.detach()
    same = now.shape == stored.shape and bool(
        torch.equal(stored.to(now.dtype), now.detach().to("cpu"))
    )
    return name, stored if same else now.detach()


def _value(model: Any, path: str) -> Any:  # noqa: ANN401
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
