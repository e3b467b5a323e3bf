"""Check a tensor before its address goes to the native library, which cannot; imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["check_packed", "check_range", "check_tensor", "describe_tensor"]


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
    contiguous: bool = True,
) -> None:
    """Check that a tensor is what the native library will read it as.

    Args:
        name: what the error calls it.
        tensor: the tensor.
        shape: the shape that it must have.
        dtypes: those that it may have.
        contiguous: whether its elements must lie in order, without gaps.

    Raises:
        ValueError: it has another shape or dtype, is not on the CPU, or is not contiguous.
    """
    if tensor.shape != shape or tensor.dtype not in dtypes:
        expected = " or ".join(_write_dtype(it) for it in dtypes)
        raise ValueError(f"{name} is {describe_tensor(tensor)}, and must be {expected} {[*shape]}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, and must be on the CPU")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, and must be contiguous")


def check_range(name: str, tensor: torch.Tensor, first: int, end: int) -> None:
    """Check that integers, which the library takes for places, are from `first` to below `end`.

    Raises:
        ValueError: one of them is not.
    """
    if tensor.numel() == 0:
        return
    lowest, highest = (int(it) for it in torch.aminmax(tensor))
    if lowest < first or highest >= end:
        raise ValueError(
            f"{name} goes from {lowest} to {highest}, and must from {first} to {end - 1}"
        )


def check_packed(packed: PackedLinear, rows: int, columns: int) -> None:
    """Check a layer's tensors against its size, in_features and out_features, and each other.

    Raises:
        ValueError: one of them does not fit.
    """
    bits, (groups, *_) = packed.bits, packed.scales.shape
    if not 2 <= bits <= 8 or (packed.layout == "continuous" and bits in (5, 6, 7)):
        raise ValueError(f"{bits}-bit codes have no {packed.layout} layout")
    block = 32 if 32 % bits else 32 // bits
    if rows <= 0 or columns <= 0 or rows % block:
        raise ValueError(f"a layer of {rows}x{columns} does not fill words of {bits}-bit codes")
    floats = torch.float16, torch.bfloat16, torch.float32
    anyhow = {"contiguous": False}  # these are copied
    check_tensor("qweight", packed.qweight, (rows * bits // 32, columns), torch.int32, **anyhow)
    check_tensor("scales", packed.scales, (groups, columns), *floats, **anyhow)
    check_tensor("zeros", packed.zeros, (groups, columns), torch.uint8, **anyhow)
    check_tensor("g_idx", packed.g_idx, (rows,), torch.int32, **anyhow)
    check_range("g_idx", packed.g_idx, 0, groups)
    if packed.bias is not None:
        check_tensor("bias", packed.bias, (columns,), *floats, torch.float64, **anyhow)


def describe_tensor(tensor: torch.Tensor) -> str:
    """Write a tensor's dtype and shape."""
    return f"{_write_dtype(tensor.dtype)} {[*tensor.shape]}"


def _write_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
