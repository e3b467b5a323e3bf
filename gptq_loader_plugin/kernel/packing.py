"""Pack small integers into 32-bit words, and unpack them, in both layouts GPTQ files use.

*continuous* (formats `gptq` and `gptq_v2`): the codes are one little-endian stream of bits. With
2, 4 and 8 bits a word holds a whole number of codes; with 3 bits, 32 codes fill three words and
codes 10 and 21 straddle two.

*planar* (format `gptq_p`; 5, 6 and 7 bits always): each 32 codes take `bits` words, first a plane
of the codes' low bits, then planes of the higher ones.

Everything here is numpy on the CPU, so that `explain` needs no torch; a torch tensor on the CPU
shares its memory with its numpy array. Codes run along axis 0, as `qweight` has them; `qzeros`
packs along its columns, so it is transposed on the way in and out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gptq_loader_plugin.errors import CodeTooLarge

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BITS",
    "CONTINUOUS_BITS",
    "Bits",
    "Layout",
    "pack_columns",
    "pack_rows",
    "unfilled_words",
    "unpack_columns",
    "unpack_rows",
    "words",
]

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Layout = Literal["continuous", "planar"]
BITS: tuple[int, ...] = get_args(Bits)
CONTINUOUS_BITS = (2, 3, 4, 8)

BLOCK = 32  # codes that fill a whole number of words at every width
PLANES: dict[int, tuple[tuple[int, int], ...]] = {  # bits: (width of a plane, its lowest bit), ...
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
    8: ((8, 0),),
}


def words(codes: int, bits: int) -> int:
    """Count the 32-bit words that `codes` codes take: the writers drop a last, partial word."""
    return codes * bits // 32


def unpack_rows(packed: NDArray[np.int32], bits: int, layout: Layout) -> NDArray[np.uint8]:
    """Unpack a `qweight`.

    Args:
        packed: int32 [rows * bits / 32, columns].
        bits: the width of a code.
        layout: how codes lie in words.

    Returns:
        uint8 [rows, columns], each value below 2**bits.
    """
    columns = packed.shape[1]
    if 32 % bits == 0:  # in both layouts a word is codes side by side, and so is a byte
        return _bytes_to_codes(packed, bits)
    stream = packed.view(np.uint32).reshape(-1, bits, columns)  # [blocks, words, columns]
    codes = np.zeros((stream.shape[0], BLOCK, columns), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    if layout == "continuous":
        for i in range(BLOCK):
            word, shift = divmod(i * bits, 32)
            value = stream[:, word] >> np.uint32(shift)
            if shift + bits > 32:
                value = value | (stream[:, word + 1] << np.uint32(32 - shift))
            codes[:, i] = value & mask
        return codes.reshape(-1, columns)
    for code, width, offset, word, shift in _planes(bits):
        field = (stream[:, word] >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        codes[:, code] |= (field << np.uint32(offset)).astype(np.uint8)
    return codes.reshape(-1, columns)


def pack_rows(codes: NDArray[np.uint8], bits: int, layout: Layout) -> NDArray[np.int32]:
    """Pack a `qweight`: the inverse of `unpack_rows`.

    Args:
        codes: uint8 [rows, columns]; rows a multiple of 32, or of 32 / bits where that is whole.
        bits: the width of a code.
        layout: how codes lie in words.

    Returns:
        int32 [rows * bits / 32, columns].

    Raises:
        CodeTooLarge: a code does not fit; it would change the codes beside it.
    """
    rows, columns = codes.shape
    if codes.size and (largest := int(codes.max())) >> bits:
        raise CodeTooLarge(
            f"a code of {largest} does not fit into {bits} bits",
            hint="pack codes in the width that they were made for",
        )
    if 32 % bits == 0:
        per_word = 32 // bits
        fields = codes.reshape(rows // per_word, per_word, columns).astype(np.uint32)
        out = np.zeros((rows // per_word, columns), dtype=np.uint32)
        for j in range(per_word):
            out |= fields[:, j] << np.uint32(bits * j)
        return out.view(np.int32)
    fields = codes.reshape(-1, BLOCK, columns).astype(np.uint32)
    stream = np.zeros((fields.shape[0], bits, columns), dtype=np.uint32)
    if layout == "continuous":
        for i in range(BLOCK):
            word, shift = divmod(i * bits, 32)
            stream[:, word] |= fields[:, i] << np.uint32(shift)
            if shift + bits > 32:
                stream[:, word + 1] |= fields[:, i] >> np.uint32(32 - shift)
    else:
        for code, width, offset, word, shift in _planes(bits):
            field = (fields[:, code] >> np.uint32(offset)) & np.uint32((1 << width) - 1)
            stream[:, word] |= field << np.uint32(shift)
    return stream.reshape(-1, columns).view(np.int32)


def unpack_columns(
    packed: NDArray[np.int32], bits: int, layout: Layout, columns: int
) -> NDArray[np.uint8]:
    """Unpack a `qzeros` into uint8 [groups, columns].

    `columns` may be more than the words hold, because the writers drop a last, partial word
    (N * bits / 32 rounded down), or fewer; what is missing reads as zero, as an empty word would.
    """
    missing = -(-columns * bits // 32) - packed.shape[1]
    whole = BLOCK * bits // 32 if 32 % bits else 1  # words that end on a code's boundary
    padding = max(missing, 0)
    padding += -(packed.shape[1] + padding) % whole
    if padding:
        packed = np.pad(packed, ((0, 0), (0, padding)))
    codes = unpack_rows(np.ascontiguousarray(packed.T), bits, layout)
    return np.ascontiguousarray(codes[:columns].T)


def pack_columns(codes: NDArray[np.uint8], bits: int, layout: Layout) -> NDArray[np.int32]:
    """Pack zeros into a `qzeros`, int32 [groups, columns * bits / 32 rounded down]."""
    groups, columns = codes.shape
    padded = np.zeros((-(-columns // BLOCK) * BLOCK, groups), dtype=np.uint8)
    padded[:columns] = codes.T
    packed = pack_rows(padded, bits, layout)
    return np.ascontiguousarray(packed[: words(columns, bits)].T)


def _bytes_to_codes(packed: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Unpack 2, 4 or 8 bits a byte at a time: a fourth of the memory traffic of whole words."""
    rows, columns = packed.shape
    per_byte = 8 // bits
    octets = np.ascontiguousarray(packed).view(np.uint8).reshape(rows, columns, 4)
    codes = np.empty((rows, 4, per_byte, columns), dtype=np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for byte in range(4):
        octet = octets[:, :, byte]
        for j in range(per_byte):
            codes[:, byte, j] = (octet >> np.uint8(bits * j)) & mask
    return codes.reshape(rows * 4 * per_byte, columns)


def _planes(bits: int) -> list[tuple[int, int, int, int, int]]:
    """List (code, plane's width, its lowest bit, word, shift) of every field of a planar block."""
    fields = []
    first_word = 0
    for width, offset in PLANES[bits]:
        per_word = 32 // width
        for code in range(BLOCK):
            word, j = divmod(code, per_word)
            fields.append((code, width, offset, first_word + word, width * j))
        first_word += width
    return fields


def unfilled_words(shape: tuple[int, int], bits: int) -> str | None:
    """Say why codes of this width do not fill whole words, or None where they do."""
    multiple = BLOCK if BLOCK % bits else BLOCK // bits
    sides = [side for side in shape if side % multiple]
    if not sides:
        return None
    return f"{shape[0]}x{shape[1]}: {sides[0]} is no multiple of {multiple}, as {bits} bits need"
