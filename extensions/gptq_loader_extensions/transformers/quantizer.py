"""What transformers keeps beside a quantised model: how it was quantised, and how it is saved.

A kernel keeps a layer as it multiplies it and not as the checkpoint has it. So a save copies the
layers' tensors from the checkpoint's own files, mapped and not read into memory, bit for bit; and
what is not quantised from the model, where it has changed since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.errors import CheckpointNotFound, CorruptCheckpoint
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.skeleton import Names

if TYPE_CHECKING:
    from gptq_loader_plugin.build import FilledModel
    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.plan import Plan

__all__ = ["Quantizer", "StoredConfig"]

ABSENT = {"sources", "zeros", "model_file_base_name", "model_name_or_path", "format"}


class StoredConfig(QuantizationConfigMixin):
    """How the checkpoint was quantised, as its tensors say, in the names of config.json.

    transformers' own class refuses 5, 6 and 7 bits.
    """

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401 - as config.json has them
        self.quant_method = QuantizationMethod.GPTQ
        self.__dict__.update(fields)
        self.quant_method = QuantizationMethod.GPTQ

    @classmethod
    def of(cls, config: QuantConfig) -> StoredConfig:
        """Take over what is known of a checkpoint."""
        fields = config.model_dump(exclude=ABSENT, exclude_none=True)
        return cls(**{key: value for key, value in fields.items() if value != {}})


class Quantizer(HfQuantizer):
    """What a quantised model answers with where transformers, PEFT or Trainer ask.

    Args:
        quantization_config: how the checkpoint was quantised.
        filled: the model as it was loaded.

    Attributes:
        plan: which kernel runs which layer, and why: `plan.explain()`.
        warnings: what a user should know, one sentence each.
        notes: what kernels did for the model as a whole.
    """

    requires_calibration = True
    is_trainable = True  # adapters on top: the quantised weights have no gradient

    def __init__(self, quantization_config: StoredConfig, *, filled: FilledModel) -> None:
        super().__init__(quantization_config, pre_quantized=True)
        self.plan: Plan = filled.plan
        self.warnings, self.notes = filled.warnings, filled.notes

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    def get_state_dict_and_metadata(
        self,
        model: Any,  # noqa: ANN401 - transformers' own
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Give the tensors to save, by the names they have in the checkpoint.

        Raises:
            CheckpointNotFound: the checkpoint is no longer where it was loaded from.
            CorruptCheckpoint: another one is there now.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        checkpoint = self._reopened()
        names = Names(model)
        state: dict[str, torch.Tensor] = {}
        packed = {part for name in checkpoint.layers for part in checkpoint.parts(name)}
        for name in checkpoint.headers:
            if name in packed:
                state[name] = checkpoint.tensor(name)
            else:
                key, tensor = _present(name, checkpoint, model, names)
                state[key] = tensor
        for name in checkpoint.layers:
            # GPTQ-for-LLaMa left it out where rows are in order; others ask for it.
            state.setdefault(f"{name}.g_idx", checkpoint.packed(name).g_idx)
        return state, {}

    def _reopened(self) -> Checkpoint:
        path = self.plan.path
        hint = "put it back; or load the model from where it is now, and save that"
        if not path.exists():
            raise CheckpointNotFound(
                f"the checkpoint is not at {path} any more, and its tensors are needed to save it",
                reference=str(path),
                tried=[str(path)],
                hint=hint,
            )
        checkpoint = open_checkpoint(path, Plugins(installed=True).readers())
        if list(checkpoint.layers.values()) != [it.layer for it in self.plan.choices]:
            raise CorruptCheckpoint(
                "another checkpoint is here than the one that was loaded", path=path, hint=hint
            )
        return checkpoint


def _present(
    name: str,
    checkpoint: Checkpoint,
    model: Any,  # noqa: ANN401
    names: Names,
) -> tuple[str, torch.Tensor]:
    """Give a tensor that is not quantised: as it is stored, or as it is now where it was changed.

    What transformers fuses with others keeps its name in the model: transformers parts it again.
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
