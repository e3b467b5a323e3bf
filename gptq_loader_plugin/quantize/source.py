"""Load the model that is to be quantised, with its tokenizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.chat.tokenizer import auto_tokenizer
from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_json
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.transformers_config import UNBUILDABLE
from gptq_loader_plugin.checkpoint.weight_files import WEIGHT_SUFFIXES, find_weight_files
from gptq_loader_plugin.errors import (
    BadReference,
    GPTQLoaderError,
    NotEnoughMemory,
    QuantizeError,
)
from gptq_loader_plugin.model.pictures import auto_class
from gptq_loader_plugin.quantize.streamed import StreamedWeights, stream_model
from gptq_loader_plugin.system.memory import free_addresses, free_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_addresses", "check_there", "load_source"]

# What a model of no size takes beside its weights until its first block: code and threads of
# transformers 0.5 GB, and tokens of the built-in text 0.1 GB (a peak of 616 MB measured).
ADDRESSES = 600 << 20
TOKENIZING = 260  # bytes of addresses for each one of a text, measured with that text


def load_source(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32, with its tokenizer, from a folder or a .gguf file.

    Raises:
        BadReference: there is no such folder or file.
        QuantizeError: it cannot be loaded, or is quantised already, or writes no text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin

    check_there(source)
    folder, file, kind = source, {}, AutoModelForCausalLM
    if source.is_file():
        folder, file = source.parent, {"gguf_file": source.name}
    else:
        _check_plain(folder)
    try:
        if not file:
            kind = auto_class(AutoConfig.from_pretrained(folder))
        model = kind.from_pretrained(
            folder, dtype=torch.float32, **file, **(_unpacked() if file else {})
        )
        tokenizer = (
            AutoTokenizer.from_pretrained(folder, **file) if file else auto_tokenizer(folder)
        )
    except (*UNBUILDABLE, OSError, ImportError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuantizeError(
            f"{source} cannot be loaded ({first[:200]})",
            hint="name the folder of an unquantised model that transformers can load, or a .gguf "
            "file (which needs pip install gguf)",
        ) from error
    if not issubclass(type(model), GenerationMixin):
        raise QuantizeError(
            f"{source}: a {type(model).__name__} does not go on with a text token by token",
            hint="quantise a model for text generation",
        )
    return model.eval(), tokenizer


def open_source(
    source: Path, *, whole: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, StreamedWeights | None]:
    """Open a model to quantise, with its weights left in its files where that can be.

    Args:
        source: a folder or a .gguf file.
        whole: whether to read all weights in any case.

    Returns:
        The model; its tokenizer; and its weights, or None where the model has them all.

    Raises:
        BadReference: there is no such folder or file.
        QuantizeError: it cannot be loaded, or is quantised already, or writes no text.
        NotEnoughMemory: it has to be read whole, and does not fit.
    """
    check_there(source)
    if source.is_dir():
        _check_plain(source)
        streamed = None if whole else stream_model(source)
        if streamed is not None:
            return streamed
        _check_whole(source)
    return *load_source(source), None


def check_there(source: Path) -> None:
    """Raise `BadReference` where there is nothing to quantise."""
    if not source.exists():
        raise BadReference(
            f"there is no {source}",
            reference=str(source),
            tried=[str(source)],
            hint="name the folder of a model that transformers can load, or a .gguf file",
        )


def check_addresses(source: Path, text: Path | None) -> None:
    """Refuse a limit of addresses under which tokenizers' Rust would end the process."""
    free = free_addresses()
    if free is None or not source.exists():
        return
    files = [source] if source.is_file() else source.iterdir()
    suffixes = (*WEIGHT_SUFFIXES, ".gguf")
    weights = sum(it.stat().st_size for it in files if it.suffix in suffixes and it.is_file())
    words = text.stat().st_size if text is not None and text.is_file() else 0
    needed = weights + ADDRESSES + words * TOKENIZING
    if needed > free:
        raise NotEnoughMemory(
            f"quantising {source} needs {write_size(needed)} of addresses, and the limit leaves "
            f"{write_size(free)}",
            needed=needed,
            free=free,
            hint="raise the limit: ulimit -v unlimited",
        )


def _check_whole(folder: Path) -> None:
    """Refuse a model that cannot be streamed and does not fit as float32."""
    try:
        headers = read_headers(find_weight_files(folder).files)
    except (GPTQLoaderError, OSError):  # loading it says what is wrong
        return
    needed, free = 4 * sum(math.prod(it.shape) for it in headers.values()), free_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"{folder} has to be read whole, which takes {write_size(needed)} of memory, and "
            f"{write_size(free)} is free",
            needed=needed,
            free=free,
            hint="free some memory, or quantise it on a machine with more",
        )


def _check_plain(folder: Path) -> None:
    """Refuse a model that is quantised already."""
    config = folder / "config.json"
    stated = read_json(config).get("quantization_config") if config.is_file() else None
    if stated or any((folder / name).is_file() for name in CONFIG_FILES):
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        raise QuantizeError(
            f"{folder} is quantised already ({method or 'gptq'})",
            hint="name the folder of the model it was made of, which is not quantised",
        )


def _unpacked() -> dict[str, Any]:
    """Return the option that has transformers unpack a GGUF file where it could leave it packed."""
    import transformers

    config: Any = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
