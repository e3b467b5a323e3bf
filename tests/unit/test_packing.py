"""Codes and zeros: packed and unpacked against an independent reading of the formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_loader_plugin.checkpoint.zeros import decide_format, stored_zeros, true_zeros
from gptq_loader_plugin.errors import CodeTooLarge
from gptq_loader_plugin.kernel.packing import (
    BITS,
    CONTINUOUS_BITS,
    Layout,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
    words,
)

LAYOUTS = [
    *((bits, "continuous") for bits in CONTINUOUS_BITS),
    *((bits, "planar") for bits in BITS),
]


def some_codes(bits: int, rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS)
@given(blocks=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_what_is_packed_is_unpacked(
    bits: int, layout: str, blocks: int, columns: int, seed: int
) -> None:
    codes = some_codes(bits, 32 * blocks, columns, seed)
    packed = pack_rows(codes, bits, layout)
    assert packed.dtype == np.int32
    assert packed.shape == (blocks * bits, columns)
    np.testing.assert_array_equal(unpack_rows(packed, bits, layout), codes)


@pytest.mark.parametrize("bits", CONTINUOUS_BITS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_continuous_codes_are_one_little_endian_stream(bits: int, seed: int) -> None:
    codes = some_codes(bits, 64, 3, seed)
    packed = pack_rows(codes, bits, "continuous")
    for column in range(3):
        stream = int.from_bytes(np.ascontiguousarray(packed[:, column]).tobytes(), "little")
        found = [(stream >> (bits * i)) & (2**bits - 1) for i in range(64)]
        assert found == codes[:, column].tolist()


def test_three_bit_codes_straddle_words_where_the_format_says() -> None:
    """Codes 10 and 21 of each 32 lie in two words each."""
    for code, low_word, low_bits in ((10, 0, 2), (21, 1, 1)):
        codes = np.zeros((32, 1), dtype=np.uint8)
        codes[code] = 7
        packed = pack_rows(codes, 3, "continuous").view(np.uint32)[:, 0]
        assert packed[low_word].bit_count() == low_bits
        assert packed[low_word + 1].bit_count() == 3 - low_bits


@pytest.mark.parametrize(
    ("bits", "code", "where"),
    [
        (5, 0b10001, {0: 1, 4: 1}),  # 4 low bits in words 0 to 3, then a plane of single bits
        (6, 0b110000, {4: 0b11}),
        (7, 0b1110001, {0: 1, 4: 0b11, 6: 1}),
        (3, 0b101, {0: 1, 2: 1}),
    ],
)
def test_planar_codes_lie_in_planes(bits: int, code: int, where: dict[int, int]) -> None:
    codes = np.zeros((32, 1), dtype=np.uint8)
    codes[0] = code
    packed = pack_rows(codes, bits, "planar").view(np.uint32)[:, 0]
    assert {i: int(word) for i, word in enumerate(packed) if word} == where


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS)
@pytest.mark.parametrize("columns", [32, 64, 100, 136])
def test_zeros_lose_only_what_the_writers_drop(bits: int, layout: str, columns: int) -> None:
    codes = some_codes(bits, 3, columns, 0)
    packed = pack_columns(codes, bits, layout)
    assert packed.shape == (3, words(columns, bits))
    found = unpack_columns(packed, bits, layout, columns)
    assert found.shape == codes.shape
    whole = columns if columns % 32 == 0 else columns // 32 * 32
    np.testing.assert_array_equal(found[:, :whole], codes[:, :whole])


@pytest.mark.parametrize("bits", CONTINUOUS_BITS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_every_zero_survives_the_borrow_of_v1(bits: int, seed: int) -> None:
    """The writers subtract one from every field of a word at once: a 0 borrows from the next."""
    zeros = some_codes(bits, 2, 64, seed)
    if bits == 3:  # each field by itself
        stored = pack_columns((zeros - 1) & np.uint8(7), bits, "continuous")
    else:
        ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        packed = pack_columns(zeros, bits, "continuous").view(np.uint32)
        stored = (packed - ones).view(np.int32)
    read = {"bits": bits, "layout": "continuous", "columns": 64}
    np.testing.assert_array_equal(true_zeros(stored, zeros_format="v1", **read), zeros)
    plain = pack_columns(zeros, bits, "continuous")
    np.testing.assert_array_equal(true_zeros(plain, zeros_format="v2", **read), zeros)


@pytest.mark.parametrize("bits", CONTINUOUS_BITS)
@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("highest", [None, 1])
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_zeros_are_summed_up_as_they_are_unpacked(
    bits: int, columns: int, highest: int | None, seed: int
) -> None:
    codes = some_codes(bits, 3, columns, seed)[:, :columns]
    stored = pack_columns(codes if highest is None else codes.clip(0, highest), bits, "continuous")
    read = {"bits": bits, "layout": "continuous", "columns": columns}
    found, ranges = stored_zeros(stored, **read)
    whole = stored.shape[1] * 32 // bits
    plain = unpack_columns(stored, bits, "continuous", min(columns, whole)).astype(int)
    assert (found.count, found.total) == (plain.size, plain.sum())
    assert (found.squares, found.minimum, found.maximum) == (
        (plain**2).sum(), plain.min(), plain.max(),
    )  # fmt: skip
    for how in ("v1", "v2"):
        true = true_zeros(stored, zeros_format=how, **read)
        assert ranges[how] == (true.min(), true.max())


def summed(bits: int, zeros: np.ndarray, *, minus: int) -> object:
    stored = pack_columns((zeros - np.uint8(minus)) & np.uint8(2**bits - 1), bits, "continuous")
    return stored_zeros(stored, bits=bits, layout="continuous", columns=zeros.shape[1])[0]


@pytest.mark.parametrize("bits", CONTINUOUS_BITS)
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("written", ["v1", "v2"])
def test_the_zeros_tell_their_format_whatever_the_label(
    bits: int, label: str | None, written: str
) -> None:
    middle = 2 ** (bits - 1)
    noise = np.random.default_rng(0).normal(middle - 0.5, 2**bits / 12, (64 * bits, 640)).round()
    minus = 1 if written == "v1" else 0
    plain = np.full((4, 64), middle)
    for zeros in (plain, noise.clip(1, 2**bits - 1) if bits > 2 else plain):
        sums = [summed(bits, zeros.astype(np.uint8), minus=minus)]
        found, warning = decide_format(sums, label=label)
        assert found == written
        labelled = {"gptq": "v1", "gptq_v2": "v2", None: written}[label]
        assert (warning is None) == (labelled == written)


@pytest.mark.parametrize(
    ("label", "minus", "right"), [("gptq", 1, "v1"), ("gptq_v2", 0, "v2"), (None, 1, "v1")]
)
def test_a_small_layer_of_8_bits_does_not_overrule_a_true_label(
    label: str | None, minus: int, right: str
) -> None:
    """Its mean may be off by more than what tells the formats apart, one way or the other."""
    for seed in range(40):
        zeros = np.random.default_rng(seed).normal(127.5, 21, (4, 512)).round().astype(np.uint8)
        assert decide_format([summed(8, zeros, minus=minus)], label=label) == (right, None)


def test_too_few_zeros_do_not_overrule_a_label() -> None:
    zeros = np.random.default_rng(0).integers(6, 11, (1, 32), dtype=np.uint8)
    for label in ("gptq", "gptq_v2"):
        found, warning = decide_format([summed(4, zeros, minus=0)], label=label)
        assert (found, warning) == ("v1" if label == "gptq" else "v2", None)


@pytest.mark.parametrize(("bits", "layout"), [(2, "continuous"), (3, "continuous"), (4, "planar")])
def test_a_code_that_does_not_fit_is_refused(bits: int, layout: Layout) -> None:
    codes = np.zeros((64, 32), dtype=np.uint8)
    codes[5, 3] = 1 << bits
    for pack in (pack_rows, pack_columns):
        with pytest.raises(CodeTooLarge, match=f"a code of {1 << bits} does not fit into {bits}"):
            pack(codes, bits, layout)
        pack(codes.clip(max=(1 << bits) - 1), bits, layout)
