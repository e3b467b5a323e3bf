"""Write qweight and qzeros as the checkpoints' writers do, bit by bit.

The suite packs with these, so that a mistake in `kernel/packing.py` or `checkpoint/zeros.py`
cannot hide by being made in both directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.zeros import ZerosFormat
    from gptq_loader_plugin.kernel.packing import Layout

__all__ = ["write_qweight", "write_qzeros"]

BLOCK = 32  # codes of a planar block
PLANES = (4, 2, 1)  # the widths a planar code is cut into, from its low bits up


def write_qweight(codes: NDArray[np.uint8], bits: int, layout: Layout) -> NDArray[np.int32]:
    """Pack codes, uint8 [K, N], along their rows: int32 [K * bits / 32, N]."""
    if layout == "continuous" or 32 % bits == 0:
        return _stream(codes, bits)
    rows, columns = codes.shape
    blocks = codes.reshape(rows // BLOCK, BLOCK, columns)
    return np.concatenate([_block(block, bits) for block in blocks])


def write_qzeros(
    zeros: NDArray[np.uint8], bits: int, layout: Layout, zeros_format: ZerosFormat
) -> NDArray[np.int32]:
    """Pack true zeros, uint8 [G, N], along their columns, as a writer of that format stores them.

    v1 stores zero - 1: at 2, 4 and 8 bits it is subtracted from a whole word at once, so that a
    zero of 0 borrows from its neighbour; at 3 bits each field wraps by itself. A last word that
    is not full is never written.
    """
    groups, columns = zeros.shape
    if zeros_format == "v1" and bits == 3:
        zeros = (zeros.astype(np.int16) - 1).astype(np.uint8) & np.uint8(7)
    padded = np.zeros((columns + -columns % BLOCK, groups), dtype=np.uint8)
    padded[:columns] = zeros.T
    words = write_qweight(padded, bits, layout)[: columns * bits // 32]
    if zeros_format == "v1" and bits != 3:
        ones = sum(1 << place for place in range(0, 32, bits))
        words = ((words.view(np.uint32).astype(np.int64) - ones) % 2**32).astype(np.uint32)
    return np.ascontiguousarray(words.view(np.int32).T)


def _stream(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Write codes one after another, low bit first, into one stream of bits a column."""
    rows, columns = codes.shape
    stream = np.empty((rows, bits, columns), dtype=np.uint8)
    for place in range(bits):
        stream[:, place] = codes >> place & 1
    octets = np.packbits(stream.reshape(rows * bits, columns), axis=0, bitorder="little")
    words = np.zeros((rows * bits // 32, columns), dtype=np.uint32)
    for place in range(4):
        words |= octets[place::4].astype(np.uint32) << np.uint32(8 * place)
    return words.view(np.int32)


def _block(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Write 32 codes plane by plane: the low bits of all of them first, then higher ones."""
    planes, low = [], 0
    for width in PLANES:
        if bits - low >= width:
            plane = codes >> np.uint8(low) & np.uint8((1 << width) - 1)
            planes.append(_stream(plane, width))
            low += width
    return np.concatenate(planes)
