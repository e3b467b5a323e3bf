"""How a checkpoint is to be converted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from gptq_loader_plugin.errors import OptionInvalid

__all__ = ["DTYPES", "FORMATS", "ConvertOptions", "Dtype", "Format", "parse_format", "parse_size"]

Format = Literal["gguf", "dense", "compressed-tensors", "awq", "gptq", "gptq_v2", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)I?B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SHARD = 5 * 10**9  # bytes: what the hub's pages and most writers have


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a checkpoint is to be converted.

    Attributes:
        format: what to write.
        dtype: of the weights of `dense`; None is the 16-bit dtype the model was made for.
        shard_bytes: the most bytes of a safetensors file; a larger layer has a file of its own.
        pretokenizer: llama.cpp's name of how the tokenizer splits text; None finds it.
    """

    format: Format
    dtype: Dtype | None = None
    shard_bytes: int = SHARD
    pretokenizer: str | None = None


def parse_format(text: str) -> Format:
    """Read the name of a format.

    Raises:
        OptionInvalid: it is none of ours.
    """
    for known in FORMATS:
        if text.lower() == known:
            return known
    raise OptionInvalid(
        f"{text} is no format to convert to", hint=f"choose one of {', '.join(FORMATS)}"
    )


def parse_size(text: str) -> int:
    """Read a size such as 5GB, 500 MB or 2000000.

    Raises:
        OptionInvalid: it is no size, or none of a file.
    """
    match = SIZE.fullmatch(text.strip())
    size = int(float(match["number"]) * UNITS[match["unit"].upper()]) if match else 0
    if size < 1:
        raise OptionInvalid(f"{text} is no size of a file", hint="write it as 5GB or 500MB")
    return size
