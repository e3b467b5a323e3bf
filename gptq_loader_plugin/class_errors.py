"""Turn what transformers' classes raise into errors that name the class and its version."""

from __future__ import annotations

import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import GPTQLoaderError, UnsupportedFormat, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["class_error", "class_errors", "raised_in_transformers"]

# What transformers calls, and never calls us back from: its errors are those of its caller.
BENEATH = {"torch", "numpy", "huggingface_hub", "safetensors", "tokenizers", "accelerate"}


@contextmanager
def class_errors(model_type: str, path: Path) -> Iterator[None]:
    """Raise `UnsupportedFormat` for whatever is raised inside transformers.

    Args:
        model_type: of the model that is built, filled or run.
        path: the checkpoint.
    """
    try:
        yield
    except Exception as error:
        refusal = class_error(error, model_type, path)
        if refusal is None:
            raise
        raise refusal from error


def class_error(error: Exception, model_type: str, path: Path) -> UnsupportedFormat | None:
    """Return the error to raise for one that was raised inside transformers; None for others.

    Args:
        error: what was raised.
        model_type: of the model that is built, filled or run.
        path: the checkpoint.
    """
    if isinstance(error, GPTQLoaderError) or is_out_of_memory(error):
        return None
    return _refusal(model_type, path, error) if raised_in_transformers(error) else None


def raised_in_transformers(error: BaseException) -> bool:
    """Whether transformers' code raised it, and neither ours nor a kernel's that it called."""
    beneath = BENEATH | sys.stdlib_module_names
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in beneath:
            return package == "transformers"
    return False


def _refusal(model_type: str, path: Path, error: Exception) -> UnsupportedFormat:
    from transformers import __version__ as version

    words = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError) and error.name:
        return UnsupportedFormat(
            f"{_class_name(model_type)} of transformers {version} needs {error.name}, which is "
            "not installed",
            path=path,
            hint="install it, as its own documentation says",
        )
    return UnsupportedFormat(
        f"{_class_name(model_type)} of transformers {version} fails with this checkpoint "
        f"({type(error).__name__}: {words})",
        path=path,
        hint="update transformers: pip install -U transformers; or use another version of this "
        "model, its GGUF version say, which llama.cpp runs",
    )


def _class_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    names = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return next((str(it[model_type]) for it in names if model_type in it), model_type)
