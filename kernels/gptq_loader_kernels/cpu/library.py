"""The native CPU library: a plain C interface over ctypes, where one was built (kernels/csrc)."""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntEnum
from pathlib import Path

__all__ = [
    "NORMS",
    "PARTS",
    "Block",
    "Cache",
    "Isa",
    "Layer",
    "Model",
    "Projection",
    "Sequence",
    "find_library",
    "held_bits",
    "load_library",
    "unit_rows",
    "unit_words",
    "why_not",
]

COLUMNS = 64  # of a tile
INTERFACE = 3  # of the library: one that was built from other sources would be called wrongly


class Isa(IntEnum):
    """The code that runs a product, by what it asks of the processor."""

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2
    BF16 = 3
    TWO_BYTES = 4  # of x, in BF16's place where that is faster
    ONE_BYTE = 5  # of x, which rounds it


class Layer(ctypes.Structure):
    """`GptqLayer` of gptq_cpu.h, field by field."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("units", ctypes.c_int32),
        ("segments", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("float_scales", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("segment_units", ctypes.c_void_p),
        ("segment_group", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Projection(ctypes.Structure):
    """`GptqProjection` of gptq_model.h."""

    _fields_ = (
        ("packed", ctypes.POINTER(Layer)),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("same_rows", ctypes.c_int32),
    )


PARTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "input_norm": "input_layernorm",
    "inner_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class Block(ctypes.Structure):
    """`GptqBlock` of gptq_model.h."""

    _fields_ = (
        *((name, Projection) for name in PARTS),
        *((name, ctypes.c_void_p) for name in NORMS),
        ("window", ctypes.c_int64),
    )


class Cache(ctypes.Structure):
    """`GptqCache` of gptq_model.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    )


class Sequence(ctypes.Structure):
    """`GptqSequence` of gptq_model.h."""

    _fields_ = (
        ("past", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("caches", ctypes.POINTER(Cache)),
    )


class Model(ctypes.Structure):
    """`GptqModel` of gptq_model.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "blocks", "hidden", "heads", "kv_heads", "head_dim", "inner", "type", "isa",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("norm", ctypes.c_void_p),
        ("block", ctypes.POINTER(Block)),
    )  # fmt: skip


def held_bits(bits: int) -> int:
    """Give the width at which the library holds a code: 5, 6 and 7 bits are widened to 8."""
    return bits if bits in (2, 3, 4, 8) else 8


def unit_rows(bits: int) -> int:
    """Give the rows that a unit of packed words holds for one column."""
    return 32 if bits == 3 else 32 // bits


def unit_words(bits: int) -> int:
    """Give the words of a unit."""
    return 3 if bits == 3 else 1


def find_library() -> Path | None:
    """Find the library beside this module, or None where none was built. Loads nothing.

    `GPTQ_LOADER_NATIVE=0` has it taken for missing.
    """
    if os.environ.get("GPTQ_LOADER_NATIVE") == "0":
        return None
    return next(iter(sorted(Path(__file__).parent.glob("_gptq_cpu*.so"))), None)


def why_not() -> str | None:
    """Say in words why the library cannot be used here, or None where it can."""
    if find_library() is None:
        return (
            "its native library is not built: install a C++ compiler (apt install g++) and this "
            "package again"
        )
    try:
        load_library()
    except (OSError, AttributeError) as error:
        return f"its native library cannot be loaded ({error}): install this again"
    return None


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library and declare its functions.

    Raises:
        OSError: there is none, it cannot be loaded, or it was built from other sources.
        AttributeError: the same, from sources of long ago.
    """
    found = find_library()
    if found is None:
        raise FileNotFoundError("the native library was not built")
    library = ctypes.CDLL(str(found))
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.gptq_interface.argtypes = ()
    library.gptq_interface.restype = number
    if library.gptq_interface() != INTERFACE:
        raise OSError("it is another version's")
    library.gptq_isa.argtypes = ()
    library.gptq_isa.restype = number
    library.gptq_pack.argtypes = (number,) * 2 + (pointer,) * 2 + (count,) * 3 + (pointer, number)
    library.gptq_pack.restype = number
    library.gptq_matmul.argtypes = (pointer, pointer, pointer, count, number, number, number)
    library.gptq_matmul.restype = number
    library.gptq_unpack.argtypes = (pointer, count, count, pointer, number, number, number)
    library.gptq_unpack.restype = None
    library.gptq_amx.argtypes = ()
    library.gptq_amx.restype = number
    library.gptq_gemm.argtypes = (pointer, pointer, number, pointer, count, number, number)
    library.gptq_gemm.restype = number
    library.gptq_step.argtypes = (pointer,) * 5 + (count, pointer, number)
    library.gptq_step.restype = number
    library.gptq_prompt.argtypes = (pointer,) * 6 + (number, number)
    library.gptq_prompt.restype = number
    library.gptq_rows.argtypes = (pointer,) * 3 + (count,) * 3 + (number,) * 3
    library.gptq_rows.restype = number
    library.gptq_narrow.argtypes = (pointer, count, count, *(pointer,) * 4, number, number, number)
    library.gptq_narrow.restype = None
    library.gptq_likeliest.argtypes = (
        pointer, pointer, ctypes.c_float, pointer, pointer, count, pointer, pointer, pointer,
        number, number, number,
    )  # fmt: skip
    library.gptq_likeliest.restype = number
    library.gptq_read_bandwidth.argtypes = (count, number, number)
    library.gptq_read_bandwidth.restype = ctypes.c_double
    return library
