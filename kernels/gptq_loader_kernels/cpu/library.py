"""The native CPU library: a plain C interface over ctypes, where one was built (kernels/csrc)."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

from gptq_loader_plugin.errors import OptionInvalid

__all__ = [
    "COLUMNS",
    "Activation",
    "Activations",
    "DecoderLayer",
    "Expert",
    "Isa",
    "KvCache",
    "Latent",
    "LibraryMismatch",
    "Linear",
    "Mixture",
    "Model",
    "Norm",
    "NormKind",
    "Projection",
    "Sequence",
    "choose_code",
    "find_library",
    "held_bits",
    "load_library",
    "unit_rows",
    "unit_words",
    "why_not",
]

COLUMNS = 64  # of a tile


class Isa(IntEnum):
    """The code that runs a product, by the instructions it needs."""

    PLAIN = 0
    AVX2 = 1
    DOTPROD = 1  # on ARM
    AVX_VNNI = 2
    I8MM = 2  # on ARM
    AVX512 = 3
    AVX512_VNNI = 4
    AVX512_BF16 = 5


class Activations(IntEnum):
    """What x is multiplied as."""

    FLOAT32 = 0
    INT16 = 1  # by AVX512-VNNI, AVX2 or ARM's dot products: off by 2**-16 of what is greatest in x
    INT8 = 2  # by the same; rounds x


class NormKind(IntEnum):
    """What the norms of a model compute."""

    RMS = 0
    RMS_ONE = 1  # times 1 + weight
    LAYER = 2  # with the mean taken off first


class Activation(IntEnum):
    """What a feed-forward part's gate goes through."""

    SILU = 0
    GELU_TANH = 1
    GELU = 2
    SWIGLU_OAI = 3  # gate and up are clamped, and 1 is added to up


class Linear(ctypes.Structure):
    """`GptqLinear` of interface.h, field by field."""

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
    """`GptqProjection` of interface.h."""

    _fields_ = (
        ("packed", ctypes.POINTER(Linear)),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("same_rows", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """`GptqNorm` of interface.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Expert(ctypes.Structure):
    """`GptqExpert` of interface.h."""

    _fields_ = (("gate", Projection), ("up", Projection), ("down", Projection))


class Mixture(ctypes.Structure):
    """`GptqMixture` of interface.h."""

    _fields_ = (
        ("expert", ctypes.POINTER(Expert)),
        ("router", ctypes.c_void_p),
        ("router_bias", ctypes.c_void_p),
        ("correction", ctypes.c_void_p),
        ("shared_gate", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "experts", "top_k", "router_type", "shared", "sigmoid", "normalized", "groups",
                "kept_groups",
            )
        ),
        ("scaling", ctypes.c_float),
        ("ranks_groups", ctypes.c_int32),
    )  # fmt: skip


class Latent(ctypes.Structure):
    """`GptqLatent` of interface.h."""

    _fields_ = (
        ("q_a", Projection),
        ("q_norm", Norm),
        ("kv_norm", Norm),
        ("to_keys", ctypes.c_void_p),
        ("to_values", ctypes.c_void_p),
    )


class DecoderLayer(ctypes.Structure):
    """`GptqDecoderLayer` of interface.h."""

    _fields_ = (
        *((name, Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *(
            (name, Norm)
            for name in (
                "input_norm",
                "attention_norm",
                "feed_forward_norm",
                "output_norm",
                "q_norm",
                "k_norm",
            )
        ),
        ("window", ctypes.c_int64),
        ("angles", ctypes.c_int32),
        ("mixture", ctypes.POINTER(Mixture)),
        ("sinks", ctypes.c_void_p),
        ("latent", ctypes.POINTER(Latent)),
    )


class KvCache(ctypes.Structure):
    """`GptqKvCache` of interface.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    )


class Sequence(ctypes.Structure):
    """`GptqSequence` of interface.h."""

    _fields_ = (
        ("past", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("caches", ctypes.POINTER(KvCache)),
    )


class Model(ctypes.Structure):
    """`GptqModel` of interface.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "layers", "hidden", "heads", "kv_heads", "head_dim", "type", "isa", "activations",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("norm", Norm),
        ("layer", ctypes.POINTER(DecoderLayer)),
        *(
            (name, ctypes.c_int32)
            for name in (
                "parameter_type", "norm_kind", "activation", "rotary_dim", "neighbours",
                "all_heads", "parallel",
            )
        ),
        *(
            (name, ctypes.c_float)
            for name in ("residual", "softcap", "swiglu_alpha", "swiglu_limit")
        ),
        *((name, ctypes.c_int32) for name in ("latent_dim", "value_dim", "plain_dim")),
        ("latent_eps", ctypes.c_float),
    )  # fmt: skip


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "GptqLinear": Linear,
    "GptqProjection": Projection,
    "GptqNorm": Norm,
    "GptqExpert": Expert,
    "GptqMixture": Mixture,
    "GptqLatent": Latent,
    "GptqDecoderLayer": DecoderLayer,
    "GptqKvCache": KvCache,
    "GptqSequence": Sequence,
    "GptqModel": Model,
}
LETTERS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "v": None,
}
# Each function's result and arguments, as `gptq_signature` has them.
FUNCTIONS = {
    "gptq_isa": "i",
    "gptq_activations": "ii",
    "gptq_amx": "i",
    "gptq_own_threads": "ii",
    "gptq_pack": "iiipplllpi",
    "gptq_gemv": "ipppliiii",
    "gptq_unpack": "vpllpiii",
    "gptq_gemm_from": "iiiii",
    "gptq_gemm": "ippipliiii",
    "gptq_decode_step": "ippppplpi",
    "gptq_prefill": "ippppppii",
    "gptq_head": "ipppllliii",
    "gptq_quantize_head": "vpllppppiii",
    "gptq_top_logits": "ippfpplpppiiii",
    "gptq_read_bandwidth": "dlii",
}


def choose_code(
    isa: Isa | None = None, activations: Activations | None = None
) -> tuple[Isa, Activations]:
    """Choose what is not given: the best of this processor, and what goes with the instructions.

    `GPTQ_LOADER_ISA` names the best instructions to use, to see what others' processors do.
    """
    library = load_library()
    if isa is None:
        isa = Isa(library.gptq_isa())
        if limit := os.environ.get("GPTQ_LOADER_ISA"):
            if limit.upper() not in Isa.__members__:
                raise OptionInvalid(
                    f"GPTQ_LOADER_ISA is {limit!r}",
                    hint=f"name one of {', '.join(Isa.__members__)}",
                )
            isa = min(isa, Isa[limit.upper()])
    if activations is None:
        activations = Activations(library.gptq_activations(isa))
    return isa, activations


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

    `GPTQ_LOADER_NATIVE=0` has it taken for missing; `GPTQ_LOADER_LIBRARY` names another build.
    """
    if os.environ.get("GPTQ_LOADER_NATIVE") == "0":
        return None
    if other := os.environ.get("GPTQ_LOADER_LIBRARY"):
        return Path(other)
    path = Path(__file__).with_name("_gptq_cpu.dll" if sys.platform == "win32" else "_gptq_cpu.so")
    return path if path.is_file() else None


def why_not() -> str | None:
    """Say in words why the library cannot be used here, or None where it can."""
    if find_library() is None:
        compiler = "a C++ compiler (apt install g++)"
        if sys.platform == "win32":
            compiler = "a compiler (pip install ziglang)"
        return f"its native library is not built: install {compiler} and this package again"
    try:
        load_library()
    except LibraryMismatch as error:
        return f"its native library was built from other sources ({error}): install this again"
    except OSError as error:
        return f"its native library cannot be loaded ({error}): install this again"
    return None


class LibraryMismatch(OSError):
    """A library whose structures or functions are not those that this package calls."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library and declare its functions.

    Raises:
        LibraryMismatch: it was built from other sources than this package's.
        OSError: there is none, or it cannot be loaded.
        OptionInvalid: `GPTQ_LOADER_THREADS` is neither openmp nor own.
    """
    path = find_library()
    if path is None:
        raise FileNotFoundError("the native library was not built")
    library = ctypes.CDLL(str(path))
    size_of = _declare(library, "gptq_sizeof", ctypes.c_int64, ctypes.c_char_p)
    signature_of = _declare(library, "gptq_signature", ctypes.c_char_p, ctypes.c_char_p)
    for name, structure in STRUCTURES.items():
        theirs, ours = size_of(name.encode()), ctypes.sizeof(structure)
        if theirs != ours:
            raise LibraryMismatch(f"its {name} has {theirs} bytes, and {ours} here")
    for name, letters in FUNCTIONS.items():
        if signature_of(name.encode()) != letters.encode():
            raise LibraryMismatch(f"its {name} takes other arguments")
    for name, letters in FUNCTIONS.items():
        _declare(library, name, *(LETTERS[letter] for letter in letters))
    library.gptq_own_threads(_own_threads())
    return library


def _own_threads() -> int:
    """Whether the library's own threads share the work where OpenMP's could, as the user says."""
    kinds = {"": 0, "openmp": 0, "own": 1}
    kind = os.environ.get("GPTQ_LOADER_THREADS", "")
    if kind not in kinds:
        raise OptionInvalid(f"GPTQ_LOADER_THREADS is {kind!r}", hint="it is openmp or own")
    return kinds[kind]


def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:  # noqa: ANN401
    """Tell ctypes the types of a function, and return it."""
    try:
        function = library[name]
    except AttributeError:
        raise LibraryMismatch(f"it has no {name}") from None
    function.restype, function.argtypes = result, arguments
    setattr(library, name, function)
    return function
