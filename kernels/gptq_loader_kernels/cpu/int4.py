"""Layers of up to 4 bits on the CPU without a native library: torch's int4 operator, bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.kernel import Accepted, Declined

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.kernel import Device, LayerSpec, PackedLinear, Verdict

__all__ = ["Int4Kernel"]

RANK = 50  # below cpu (70)
BITS = 4  # narrower codes are widened to it
GROUP_SIZES = (32, 64, 128, 256)  # what aten::_weight_int4pack_mm_for_cpu takes
COLUMNS_MULTIPLE = 16
MIDDLE = 8  # the operator's codes are around 8: weight = (code - 8) * scale + offset


@dataclass(frozen=True, slots=True)
class Int4Kernel:
    """Multiply by the packed weight with `aten::_weight_int4pack_mm_for_cpu`."""

    name: str = "cpu-int4"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept 4-bit layers whose groups the operator takes, on a CPU."""
        if device.type != "cpu":
            return Declined(self.name, f"runs on a CPU; this is {device}")
        if "avx512f" not in device.features and "avx2" not in device.features:
            return Declined(self.name, "needs AVX2 or AVX-512; this CPU has neither")
        if layer.bits > BITS:
            return Declined(
                self.name,
                f"{layer.bits}-bit; torch's packed CPU operator takes up to {BITS} bits",
            )
        if layer.out_features % COLUMNS_MULTIPLE:
            return Declined(
                self.name,
                f"{layer.out_features} outputs; torch's packed CPU operator takes multiples of "
                f"{COLUMNS_MULTIPLE}",
            )
        size = _operator_group(layer)
        if size is None:
            smallest, largest = layer.group_rows
            rows = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
            return Declined(
                self.name,
                f"groups of {rows} rows; torch's packed CPU operator takes multiples of "
                f"{GROUP_SIZES[0]}",
            )
        widened = "" if layer.bits == BITS else f", codes widened from {layer.bits} bits"
        return Accepted(
            self.name,
            RANK,
            dtype="bfloat16",
            prepared_bytes=layer.in_features * layer.out_features // 2
            + 4 * layer.out_features * (layer.in_features // size)
            + (8 * layer.in_features if layer.desc_act and layer.groups > 1 else 0),
            note=f"weights stay packed; torch's 4-bit operator, in bfloat16{widened}",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group and pack them as the operator wants them."""
        del device
        import torch

        from gptq_loader_kernels.cpu.int4_linear import Int4Linear

        size = _operator_group(layer)
        if size is None:
            raise ValueError(f"{layer.name} was declined: {layer}")
        permutation = packed.permutation()
        # Widened codes are moved so that their middle is the operator's: symmetric layers then
        # need no offset, which bfloat16 would round.
        middle = 1 << (layer.bits - 1)
        codes = packed.codes(permutation).t().contiguous().to(torch.int32)  # [N, K]
        codes += MIDDLE - middle
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)  # noqa: SLF001
        del codes
        scales = packed.scales.to(torch.float32)  # [G, N]
        offsets = (middle - packed.zeros.to(torch.float32)) * scales
        table = torch.stack((scales, offsets), dim=-1).to(torch.bfloat16)  # [G, N, 2]
        rows = torch.bincount(packed.g_idx.long(), minlength=layer.groups)
        table = table.repeat_interleave(rows // size, dim=0)  # a group is one or several of its
        return Int4Linear(
            words,
            table.contiguous(),
            group_size=size,
            in_features=layer.in_features,
            out_features=layer.out_features,
            permutation=permutation,
            bias=None if packed.bias is None else packed.bias.to(torch.bfloat16),
        )


def _operator_group(layer: LayerSpec) -> int | None:
    """Find the operator's largest group size that divides every group of the layer."""
    return next((it for it in reversed(GROUP_SIZES) if layer.group_unit % it == 0), None)
