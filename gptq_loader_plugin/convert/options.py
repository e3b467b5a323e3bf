"""How a checkpoint is to be converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gptq_loader_plugin.errors import OptionInvalid

__all__ = ["DTYPES", "FORMATS", "ConvertOptions", "Dtype", "Format", "parse_format"]

Format = Literal["gguf", "dense", "compressed-tensors", "awq", "gptq", "gptq_v2", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
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

    def __post_init__(self) -> None:
        """Refuse a file that can hold nothing."""
        if self.shard_bytes < 1:
            raise OptionInvalid("a file of no bytes holds nothing", hint="write it as 5GB or 500MB")


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
