"""Make the engine of a model, where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.engine.attention import NotPaged
from gptq_loader_plugin.engine.paged_engine import PagedEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import PagedAttention

__all__ = ["make_engine"]


def make_engine(
    model: PreTrainedModel, attention: PagedAttention, context: int, *, int8: bool = False
) -> tuple[PagedEngine | None, str]:
    """Make the engine of a model, where its class keeps plain keys and values.

    A few tokens are read with the engine and without it; it must answer alike.

    Args:
        model: a causal language model, every tensor on one device.
        attention: how to attend to blocks.
        context: the longest sequence.
        int8: whether keys and values are kept in 8 bits.

    Returns:
        The engine or None, and what was found in words, as part of a sentence.
    """
    try:
        engine = PagedEngine(model, attention, context, int8=int8)
        engine.probe()
        layers = engine.fuse()
    except NotPaged as reason:
        return None, f"replies are written one after the other: {reason}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        problem = str(error).partition("\n")[0][:200]
        return None, f"replies are written one after the other: its class has {problem}"
    bits = " of 8 bits" if int8 else ""
    return (
        engine,
        f"several replies are written in one pass, keys and values in blocks{bits}; {layers}",
    )
