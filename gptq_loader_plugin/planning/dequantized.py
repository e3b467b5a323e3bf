"""Which packed layers are dequantised as they are loaded: those that belong to no linear layer.

A mixture's router and an embedding have a weight that a kernel has no use for: the module reads it
by itself. Their names tell, since a plan is made without the model; a load, which has the model,
finds the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["dequantized_bytes", "dequantized_note", "is_dequantized"]

# The last part of a module's name: what transformers' embeddings and routers are called.
EMBEDDINGS = (
    "embed_tokens", "tok_embeddings", "word_embeddings", "embed_in", "embed_positions", "wte",
    "wpe",
)  # fmt: skip
ROUTERS = ("gate", "router")
NAMED = 2


def is_dequantized(layer: str) -> bool:
    """Return whether a layer of this name belongs to an embedding or a router."""
    return layer.rpartition(".")[2] in (*EMBEDDINGS, *ROUTERS)


def dequantized_bytes(layer: LayerSpec, dtype: str) -> int:
    """Return what a layer takes once it is dequantised to `dtype`."""
    return layer.in_features * layer.out_features * (4 if dtype == "float32" else 2)


def dequantized_note(layers: Iterable[LayerSpec]) -> str:
    """Name the layers that are dequantised, and say why."""
    names = [layer.name for layer in layers]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    one = len(names) == 1
    return (
        f"{', '.join(names[:NAMED])}{more} {'is' if one else 'are'} quantised and "
        f"{'no linear layer' if one else 'no linear layers'}: dequantised, which no kernel runs"
    )
