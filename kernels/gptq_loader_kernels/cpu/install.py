"""Have a model decode natively, after its first tokens were compared with transformers'.

Imports torch.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_kernels.cpu.decoder import CACHE, NativeDecoder
from gptq_loader_kernels.cpu.describe import all_packed
from gptq_loader_kernels.cpu.fitting import why_not
from gptq_loader_kernels.cpu.head import RowsLinear
from gptq_loader_kernels.cpu.library import Activations, Isa
from gptq_loader_kernels.cpu.mixtures import is_mixture
from gptq_loader_kernels.cpu.parts import embed
from gptq_loader_plugin.generation.kv_cache import make_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["install"]

PROBE = (9, 1)  # tokens: a prompt where there can be one, and a step
FEW = (5, 5)  # the same as steps alone
# A step in float32 differs from transformers' by the order of its sums: 1e-6 to 1e-5 measured. In
# bfloat16 some tokens' states are 0.4 off whoever computes them (SmolLM2-135M, tokens 3 to 8), so a
# step may be as far from float32 as transformers itself is, and half as far again.
TOLERANCE, ROUNDING, SPREAD = 1e-3, 8e-2, 1.5
INT16_TOLERANCE = 1e-2  # 1e-3 was measured, most of it where one feature is far greater than others


def install(model: Any) -> NativeDecoder | str:  # noqa: ANN401 - a transformers model
    """Have a model decode natively, where its first steps answer as transformers' own do.

    Returns:
        What decodes it, or in words why nothing was changed.
    """
    decoder: Any = getattr(model, "base_model", None)
    if (reason := why_not(decoder)) is not None:
        return reason
    step = NativeDecoder(decoder)
    decoder.forward = step.forward
    if (reason := _difference(step)) is not None:
        decoder.forward = step.otherwise
        return reason
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        model.set_output_embeddings(RowsLinear.of(head))
    return step


def _difference(step: NativeDecoder) -> str | None:
    """Compare a prompt and a step with transformers' own forward; say what differs.

    Where every layer is packed, both compute in float32 too, which tells a mistake from rounding.
    """
    decoder = step.decoder
    rounds = step.activations is Activations.INT16 and step.isa < Isa.AVX512_BF16
    tolerance = INT16_TOLERANCE if rounds else TOLERANCE
    ids = torch.arange(3, 3 + sum(PROBE), device="cpu")[None] % decoder.config.vocab_size
    with torch.inference_mode():
        x = embed(decoder, step.family, ids)
        theirs = exact = _answer(step.otherwise, x)
        if x.dtype != torch.float32 and all_packed(decoder, step.family):
            with _float32_parts(step):
                exact = _answer(step.otherwise, x.float())
            if not _apart(_steps(step, x.float(), FEW), exact) <= tolerance:
                return "in float32, its first steps differ from transformers'"
        rounded = x.dtype != torch.float32
        # Where two experts are nearly as good, rounding sends a token to another one: a third of
        # its states were off, and of no others.
        apart = _apart_mostly if rounded and _has_mixtures(step) else _apart
        allowed = max(ROUNDING if rounded else tolerance, SPREAD * apart(theirs, exact))
        error = apart(_steps(step, x, PROBE if step.takes_prompts() else FEW), exact)
    if not error <= allowed:
        return f"its first steps differ from transformers' by {error:.1%}"
    return None


@contextmanager
def _float32_parts(step: NativeDecoder) -> Iterator[None]:
    """Have what is not packed, and takes x in the dtype of its own weight alone, read float32.

    That is what chooses experts, and torch's norms.
    """
    mixtures = [it.mlp for it in step.decoder.layers if is_mixture(it, step.family)]
    names = step.family.router, "shared_expert_gate"
    gates = [getattr(it, name, None) for it in mixtures for name in names]
    norms = [it for it in step.decoder.modules() if isinstance(it, nn.LayerNorm)]
    kept = [
        (part, name, parameter)
        for part in (*gates, *norms)
        if part is not None
        for name, parameter in part.named_parameters(recurse=False)
    ]
    try:
        for part, name, parameter in kept:
            setattr(part, name, nn.Parameter(parameter.float(), requires_grad=False))
        yield
    finally:
        for part, name, parameter in kept:
            setattr(part, name, parameter)


def _answer(forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = forward(inputs_embeds=x, use_cache=False).last_hidden_state
    return states.float()


def _steps(step: NativeDecoder, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Give the states after so many tokens at a time, or not a number where one was not native."""
    cache, taken = make_cache(step.decoder), step.steps + step.prompts
    parts = [
        step.forward(inputs_embeds=part, use_cache=True, **{CACHE: cache}).last_hidden_state
        for part in x.split(sizes, dim=1)
    ]
    states = torch.cat(parts, dim=1).float()
    native = step.steps + step.prompts == taken + len(parts)
    return states if native else states * torch.nan


def _has_mixtures(step: NativeDecoder) -> bool:
    return any(is_mixture(it, step.family) for it in step.decoder.layers)


def _apart_mostly(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far apart the states [1, tokens, hidden] of the token in the middle are."""
    errors = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)
    return float(errors.median())


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-12))
