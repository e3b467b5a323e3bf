"""Pack codes in bytes by planes, and unpack them to weights, by plain operators; imports torch."""

from __future__ import annotations

import torch

from gptq_loader_plugin.kernel.packing import PLANES

__all__ = ["pack_planes", "unpack_weight"]

BYTE = 8


def pack_planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Pack codes, uint8 [N, K], into planes: uint8 [N, K * width / 8] each."""
    planes = []
    for width, lowest in PLANES[bits]:
        fields = (codes >> lowest) & ((1 << width) - 1)
        stretches = fields.view(len(codes), BYTE // width, -1)  # [N, codes in a byte, bytes]
        plane = stretches[:, 0].clone()
        for which in range(1, BYTE // width):
            plane |= stretches[:, which] << which * width
        planes.append(plane)
    return planes


def unpack_weight(
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor | None,
    shifts: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Unpack some columns of a layer's weight, rounded once to a dtype: [n, K].

    A code less its zero is a whole number of at most 255, exact in each dtype; its product with the
    scale is rounded, and nothing else is.

    Args:
        planes: of `pack_planes`, [n, K * width / 8] each.
        scales: [n, G], as stored.
        zeros: uint8 [n, G], or [1, 1] where all are the same.
        groups: int32 [K / unit], the group of each unit of rows; None where groups are of one size.
        shifts: uint8, 0 to 7.
        bits: the width of a code.
        dtype: of the weight.
    """
    if groups is not None:
        scales = scales.index_select(1, groups)
        zeros = zeros if zeros.shape[1] == 1 else zeros.index_select(1, groups)
    codes = _unpack_codes(planes, shifts, bits).unflatten(1, (scales.shape[1], -1))
    weight = torch.sub(codes, zeros.to(dtype).unsqueeze(2))  # [n, units, rows of a unit]
    del codes
    return weight.mul_(scales.unsqueeze(2)).flatten(1)


def _unpack_codes(planes: list[torch.Tensor], shifts: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack and join the planes: uint8 [n, K]."""
    fields = []
    for plane, (width, _) in zip(planes, PLANES[bits], strict=True):
        if width == BYTE:
            return plane
        stretches = plane.unsqueeze(1) >> shifts[::width].unsqueeze(1)  # [n, in a byte, bytes]
        fields.append(stretches.bitwise_and_((1 << width) - 1).flatten(1))
    codes = fields[0]
    for field, (_, lowest) in zip(fields[1:], PLANES[bits][1:], strict=True):
        codes.add_(field, alpha=1 << lowest)
    return codes
