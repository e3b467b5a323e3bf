"""Make a model's output head narrower at load: 8 bits, for any kernel that takes them.

A head is read whole for every token, and in a small model it is half of all that is read. It is
quantised as a layer of a checkpoint would be, by rounding; an embedding that shares its weight
keeps the weight as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.kernel import PackedLinear
from gptq_loader_plugin.planning.choose import choose, prepared
from gptq_loader_plugin.planning.top_logits import GROUP_SIZE, ZERO, head_spec
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Device, Kernel

__all__ = ["quantize_head", "quantize_rows"]

MAX_CODE = 127  # codes are 1 to 255
SMALLEST_NORMAL = 2.0**-14  # below, float16 has fewer than 11 bits


def quantize_head(
    model: PreTrainedModel, device: Device, kernels: Sequence[Kernel], *, only: str | None = None
) -> tuple[str, int]:
    """Put an 8-bit head in the place of `model`'s.

    Args:
        model: a filled model.
        device: where it runs.
        kernels: the kernels to ask.
        only: take this kernel, or fail.

    Returns:
        What was done, in words, and by how many bytes the weights grew; fewer than 0 where no
        embedding shares the head's weight.

    Raises:
        OptionInvalid: the head is not a plain linear layer of a width that can be packed.
        NoBackend: no kernel, or not the one named, takes it.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.in_features % 4:
        raise OptionInvalid(
            "this model's head cannot be made 8-bit: it is not a plain linear layer",
            hint="leave the head as it is stored",
        )
    packed = quantize_rows(head.weight.detach(), head.bias)
    layer = head_spec(
        *head.weight.shape,
        scales_dtype=str(packed.scales.dtype).removeprefix("torch."),
        bias=head.bias is not None,
    )
    choice = choose(layer, device, kernels, only=only)
    module = prepared(choice.kernel, layer, packed, device).to(head.weight.device).eval()
    before = head.weight.numel() * head.weight.element_size()
    embedding: Any = model.get_input_embeddings()
    freed = 0 if embedding.weight is head.weight else before
    model.set_output_embeddings(module)
    note = (
        f"the head is 8-bit, groups of {GROUP_SIZE}, made at load, by the kernel "
        f"{choice.kernel.name}: {write_size(choice.chosen.prepared_bytes)} instead of "
        f"{write_size(before)}"
    )
    return note, choice.chosen.prepared_bytes - freed


def quantize_rows(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """Round a weight [N, K] to 8 bits, symmetric, a scale for each row and group of columns."""
    columns, rows = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(-(-rows // GROUP_SIZE), columns, dtype=torch.float32)
    parts = weight.cpu().split(GROUP_SIZE, dim=1)
    for group, part in enumerate(parts):
        scales[group] = part.float().abs().amax(dim=1) / MAX_CODE
    scales.clamp_(min=torch.finfo(torch.float32).tiny)
    if float(scales.min()) >= SMALLEST_NORMAL:
        scales = scales.half()
    for group, part in enumerate(parts):
        rounded = (
            (part.float() / scales[group].float()[:, None]).round_().clamp_(-MAX_CODE, MAX_CODE)
        )
        codes[group * GROUP_SIZE :][: part.shape[1]] = (rounded + ZERO).to(torch.uint8).t()
    return PackedLinear(
        qweight=codes.view(rows // 4, 4, columns).mT.contiguous().view(torch.int32)[..., 0],
        zeros=torch.full(scales.shape, ZERO, dtype=torch.uint8),
        scales=scales,
        g_idx=torch.arange(rows, dtype=torch.int32) // GROUP_SIZE,
        bits=8,
        bias=None if bias is None else bias.detach().cpu(),
    )
