"""The noise floor: how far rounding alone moves a model's predictions.

A divergence between two models says something only where it is larger than what the same model has
from itself when it is computed a little otherwise. That is measured here in one way, for
`compare`, for `verify --reference` and for what `quantize` writes beside its checkpoints, so that
their figures can be laid side by side.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["bfloat16_noise", "find_blocks"]

NAMES = re.compile(r"\b(?:layers|h|blocks|block)\.\d+$")
BITS = 8  # of bfloat16's significand: values of [0.5, 1) are 2**-8 apart
# A rounding error is as likely anywhere within half a step: its variance is a twelfth of a step's
# square, which is that of a whole step taken in one of twelve cases.
WHOLE_STEPS = 1 / 12


def find_blocks(model: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 - transformers' model
    """Find a model's blocks by their names; each comes with its module."""
    return [(name, module) for name, module in model.named_modules() if NAMES.search(name)]


@contextmanager
def bfloat16_noise(model: Any) -> Iterator[None]:  # noqa: ANN401 - transformers' model
    """Add, inside, an error as large as bfloat16's rounding to the hidden states between blocks.

    What the embedding and each block hand on is off by a random error of up to half of bfloat16's
    step; the divergence of these predictions from the undisturbed ones is the noise floor. This is
    what any engine does that keeps hidden states in bfloat16, as nearly all do, and so it is below
    what a user can ever tell.

    It is an error that is added and not a dtype that is computed in, because the model may be
    one whose layers ignore autocast (packed ones do), may be in bfloat16 already, where rounding
    once more changes nothing, and need not be loaded twice. Disturbing the embedding alone, which
    the blocks drown, would put the floor too low.

    The error has a seed, so that a floor can be measured again, and is added only to what this
    thread computes: replies that other threads are writing meanwhile stay as they are.

    Args:
        model: transformers' model, quantised or not, of any dtype, on any device.
    """
    import torch

    seeded = torch.Generator().manual_seed(0)
    own = threading.get_ident()

    def disturb(_module: object, _inputs: object, output: Any) -> Any:  # noqa: ANN401
        if threading.get_ident() != own:
            return output
        if isinstance(output, tuple):
            return (_off(output[0], seeded), *output[1:])
        return _off(output, seeded)

    modules = [model.get_input_embeddings(), *(module for _, module in find_blocks(model))]
    handles = [module.register_forward_hook(disturb) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _off(states: torch.Tensor, seeded: torch.Generator) -> torch.Tensor:
    """Return hidden states that are off by a rounding error."""
    import torch

    chance = torch.rand(states.shape, generator=seeded).to(states.device)
    if states.dtype is torch.bfloat16:  # which has nothing between two steps
        up, down = chance < WHOLE_STEPS / 2, chance >= 1 - WHOLE_STEPS / 2
        steps = up.float() - down.float()
    else:
        steps = chance - 0.5
    exact = states.float()
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - BITS)
    error = torch.where(exact == 0, 0.0, steps * step)
    return (exact + error).to(states.dtype)
