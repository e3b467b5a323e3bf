"""LoRA adapters beside a model: each reply its own, or none (arXiv:2106.09685).

An adapter adds `scaling * B @ (A @ x)` to what a linear writes. A and B stay apart from the packed
weights, which are the same for all; a forward pass adds each sequence's own where it runs with
`Adapters.applied`, and no other pass knows of them. Numbers are those of the package peft: A and B
in float32, the sum in the layer's dtype.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from gptq_loader_plugin.model.adapter_files import AdapterFile

__all__ = ["Adapters"]

# Of the pass that this thread runs: an adapter for each part of it, and the parts' tokens.
_applied: ContextVar[tuple[Sequence[str | None], Sequence[int]] | None] = ContextVar(
    "applied", default=None
)


@dataclass(frozen=True, slots=True)
class _Update:
    """What an adapter adds to one linear."""

    down: torch.Tensor  # A: float32 [rank, in_features]
    up: torch.Tensor  # B: float32 [out_features, rank]
    scaling: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return what it adds for x [.., in_features]."""
        return (x.to(self.down) @ self.down.T) @ self.up.T * self.scaling


@dataclass(slots=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        updates: of each adapter, what it adds to which linear.
        notes: what each is, in words.
        head: the output head.
        folders: where each lies, to load it again.
    """

    updates: dict[str, dict[nn.Module, _Update]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    head: nn.Module | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, files: Mapping[str, AdapterFile]) -> Adapters:
        """Make the adapters of a model.

        Args:
            model: the model, its weights in place.
            files: the adapters by name.

        Raises:
            OptionInvalid: one of them is for another model.
        """
        adapters = cls(head=model.get_output_embeddings())
        linears = {
            name: module for name, module in model.named_modules() if _sizes(module) is not None
        }
        for name, file in files.items():
            _check_whole(model, name, file)
            updates = {}
            for path, (down, up, scaling) in file.pairs.items():
                linear = _find(linears, path)
                if linear is None or _sizes(linear) != (down.shape[1], up.shape[0]):
                    shape = f"{down.shape[1]} to {up.shape[0]}"
                    raise OptionInvalid(
                        f"the adapter {name} has a pair for {path} ({shape}), which this model "
                        "does not have",
                        hint="load it with the model that it was trained on"
                        + (f": {file.base}" if file.base else ""),
                    )
                device = _device(linear, model)
                updates[linear] = _Update(
                    down.to(device, torch.float32), up.to(device, torch.float32), scaling
                )
            adapters.updates[name] = updates
            if file.folder is not None:
                adapters.folders[name] = file.folder
            adapters.notes.append(f"LoRA {name}: rank {file.rank}, on {len(updates)} layers")
        return adapters

    def check(self, name: str | None) -> None:
        """Refuse a name that none of them has.

        Raises:
            OptionInvalid: none has it.
        """
        if name is not None and name not in self.updates:
            raise OptionInvalid(
                f"there is no adapter {name}",
                hint=f"name one of {', '.join(self.updates)}"
                if self.updates
                else "load it beside the model: lora={'NAME': FOLDER}, or --lora NAME=REF",
            )

    def changes_head(self, name: str | None) -> bool:
        """Return whether an adapter changes the output head."""
        return name is not None and self.head in self.updates[name]

    def number(self, name: str | None) -> tuple[int, ...]:
        """Return what keys and values of this adapter's sequences differ by from others'."""
        return () if name is None else (list(self.updates).index(name),)

    @contextmanager
    def applied(self, names: Sequence[str | None], counts: Sequence[int]) -> Iterator[None]:
        """Have the forward passes of this thread add what adapters do.

        Args:
            names: the adapter of each sequence in the pass; None adds nothing.
            counts: the tokens of each, which follow each other in the one row of the pass.
        """
        if not any(names):
            yield
            return
        linears = {linear for name in names if name for linear in self.updates[name]}
        token = _applied.set((names, counts))
        handles = [it.register_forward_hook(self._add) for it in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            _applied.reset(token)

    def _add(self, linear: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:  # noqa: ANN401 - torch's
        """Add to what a linear writes, [1, tokens, out_features] or [tokens, out_features]."""
        applied = _applied.get()
        if applied is None:  # another thread's pass
            return None
        names, counts = applied
        x = inputs[0]
        if len(names) == 1 and names[0] is not None:
            return (output + self.updates[names[0]][linear].of(x)).to(output.dtype)
        rows, added = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1]).clone()
        if len(rows) == len(names):  # the output head's: each one's last token
            counts = [1] * len(names)
        first = 0
        for name, count in zip(names, counts, strict=True):
            update = self.updates[name].get(linear) if name is not None else None
            if update is not None:
                part = slice(first, first + count)
                added[part] = (added[part] + update.of(rows[part])).to(output.dtype)
            first += count
        return added.reshape(output.shape)


def _check_whole(model: PreTrainedModel, name: str, file: AdapterFile) -> None:
    """Refuse an adapter whose embeddings are others than the model's.

    Raises:
        OptionInvalid: they are.
    """
    modules = dict(model.named_modules())
    for path, saved in file.whole.items():
        weight = getattr(modules.get(path), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.shape == saved.shape:
            known = weight.detach().cpu()
            if torch.allclose(saved.to(known.dtype), known, rtol=0.02, atol=1e-3):
                continue
        raise OptionInvalid(
            f"the adapter {name} has its own {path}, and no pair for it",
            hint="merge it into its model with peft, and quantise that",
        )


def _find(linears: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """Find a linear by the name it had when the adapter was trained."""
    if path in linears:
        return linears[path]
    end = f".{path.removeprefix('model.')}"  # below another name in newer versions
    found = [linear for name, linear in linears.items() if name.endswith(end)]
    return found[0] if len(found) == 1 else None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    whole = [it for it in sizes if isinstance(it, int)]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def _device(linear: nn.Module, model: PreTrainedModel) -> torch.device:
    tensors = (*linear.parameters(), *linear.buffers())
    device = next((it.device for it in tensors if it.device.type != "meta"), None)
    return device or torch.device(model.device)
