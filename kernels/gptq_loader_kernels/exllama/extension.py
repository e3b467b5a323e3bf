"""Find exllamav2's compiled extension without importing it, and load it, compiling it if asked to.

Importing `exllamav2` without the extension starts a compile of several minutes. That happens where
`GPTQ_LOADER_EXLLAMA_BUILD=1` asks for it, when a layer is prepared, and never otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import Any, Literal

from gptq_loader_plugin.errors import PluginError

__all__ = ["BUILD", "find_extension", "load_extension"]

BUILD = "GPTQ_LOADER_EXLLAMA_BUILD"
EXTENSION = "exllamav2_ext"  # a module of its own in the wheels that were compiled
PACKAGE = "exllamav2"

Found = Literal["built", "to be built", "no package", "no extension"]

logger = logging.getLogger(__name__)


def find_extension() -> Found:
    """Look for the extension, and for what could be compiled; import neither.

    Returns:
        "built"; "to be built", where that was asked for; "no package", where it was and there is
        nothing to compile; or "no extension", where nothing was asked for.
    """
    if importlib.util.find_spec(EXTENSION) is not None:
        return "built"
    if os.environ.get(BUILD) != "1":
        return "no extension"
    return "no package" if importlib.util.find_spec(PACKAGE) is None else "to be built"


def load_extension() -> Any:  # noqa: ANN401 - a C module
    """Import the extension; where that was asked for, compile it first.

    Raises:
        PluginError: it was built for another torch, or cannot be compiled here.
    """
    import torch

    if find_extension() == "built":
        try:
            return importlib.import_module(EXTENSION)
        except ImportError as error:
            raise PluginError(
                f"exllama: its compiled extension does not load with torch {torch.__version__} "
                f"({error})",
                hint="install the ExLlamaV2 wheel that was built for this torch, CUDA and Python, "
                'or choose another kernel: backend="triton"',
            ) from error
    logger.warning(
        "compiling ExLlamaV2's extension, as %s=1 asks: minutes the first time, seconds afterwards",
        BUILD,
    )
    try:
        return importlib.import_module(f"{PACKAGE}.ext").ext_c
    except (ImportError, OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PluginError(
            f"exllama: ExLlamaV2's extension could not be compiled ({first})",
            hint="it takes nvcc of the CUDA that torch was built for, a C++ compiler and ninja; or "
            f"unset {BUILD}, and another kernel runs",
        ) from error
