"""Parameters that are one in the model and several in the files, or the other way round."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedModel

__all__ = ["JoinedLinears", "fused_tensors", "tie_weights"]


def fused_tensors(
    model: PreTrainedModel,
    target: str,
    converter: Any,  # noqa: ANN401 - transformers' WeightConverter
    collected: Mapping[str, list[tuple[str, torch.Tensor]]],
) -> dict[str, torch.Tensor]:
    """Join tensors that transformers keeps as one, by its own operations.

    Args:
        model: the model.
        target: the parameter's name.
        converter: what transformers makes it by.
        collected: the tensors of each of the converter's patterns, with their names.

    Returns:
        The joined tensors by their parameters' names.
    """
    tensors: Any = {
        pattern: [tensor for _, tensor in sorted(parts, key=_natural)]
        for pattern, parts in collected.items()
    }
    for operation in converter.operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=target,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    end = target.index(converter.target_patterns[0])
    suffix = target[end + len(converter.target_patterns[0]) :]
    return {
        target[:end] + pattern + suffix: value[0] if isinstance(value, list) else value
        for pattern, value in tensors.items()
    }


class JoinedLinears(nn.Module):
    """Several layers that read the same and whose answers stand side by side, as one linear.

    Args:
        in_features: of each.
        out_features: of all of them.
        count: how many they are.
    """

    def __init__(self, in_features: int, out_features: int, count: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.parts = nn.ModuleList(nn.Identity() for _ in range(count))
        self._widths: dict[int, int] = {}

    def place(self, index: int, module: nn.Module, width: int) -> None:
        """Put a layer of so many outputs in its place."""
        self.parts[index] = module
        self._widths[index] = width

    @property
    def width(self) -> int | None:
        """The outputs of all layers, once every one is in its place."""
        whole = len(self._widths) == len(self.parts)
        return sum(self._widths.values()) if whole else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by all of them: [..., out_features]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def tie_weights(
    model: PreTrainedModel,
    tied: Mapping[str, str],
    translated: Mapping[str, Any],
    *,
    prepared: Collection[str],
) -> None:
    """Let parameters that a config ties be one, where the checkpoint has one of them.

    Args:
        model: is changed.
        tied: the names of parameters, and of those that they are tied to.
        translated: the config of a checkpoint that is read as another class.
        prepared: the modules that kernels have made.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not isinstance(head, nn.Linear):  # a quantised head is tied to nothing
        model.config.tie_word_embeddings = False
    for target, source in tied.items():  # some writers kept the other name of the two
        _share(model, source, target, prepared)
        _share(model, target, source, prepared)
    silent = bool(translated) and "tie_word_embeddings" not in translated
    if isinstance(head, nn.Linear) and head.weight.is_meta and silent:
        # The config around the language model's own ties them.
        head.weight = embedding.weight  # type: ignore[assignment]
        model.config.tie_word_embeddings = True


def _share(model: PreTrainedModel, source: str, target: str, prepared: Collection[str]) -> None:
    """Let one parameter be another where the checkpoint has that one alone."""
    (source_path, _, source_leaf), (path, _, leaf) = (
        name.rpartition(".") for name in (source, target)
    )
    module, other = model.get_submodule(path), model.get_submodule(source_path)
    if not getattr(getattr(module, leaf, None), "is_meta", False):
        return
    value = getattr(other, source_leaf, None)
    if isinstance(value, nn.Parameter) and not value.is_meta:
        setattr(module, leaf, value)
    elif isinstance(module, nn.Linear) and source_path in prepared:
        model.set_submodule(path, other)


def _natural(part: tuple[str, torch.Tensor]) -> list[int | str]:
    """Order names with numbers in them as people do: experts.2 before experts.10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", part[0])]
