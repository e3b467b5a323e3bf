"""Read `.pt` and `.bin` files with torch's weights-only unpickler, and with nothing else.

A pickle can run any code when it is opened. `weights_only=True` builds tensors and plain
containers and refuses the rest, before anything of it runs.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.pickle_limits import check_pickle
from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
from gptq_loader_plugin.errors import CorruptCheckpoint, UnsafeFile

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["load_pickle", "read_pickle_headers"]

# What torch's unpickler raises of a file that is not what it takes it for.
DAMAGED = (
    RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, ImportError, struct.error,
)  # fmt: skip
NESTED_UNDER = ("state_dict", "model", "module")  # where training code puts the tensors
DEEPEST_TABLE = 10  # tables in tables
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a pickle's tensors, memory-mapped where its format allows.

    Raises:
        UnsafeFile: it holds something other than tensors and plain containers.
        CorruptCheckpoint: it is cut short, or is no torch file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols
            check_pickle(file)
            content = _unpickle(file)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower():
            raise CorruptCheckpoint(
                "not a readable torch file", path=file, hint="download it again"
            ) from error
        raise UnsafeFile(
            "this pickle wants more than tensors: opening it fully could run code; it was not run",
            path=file,
            hint="use a .safetensors version of this checkpoint, or ask its author for one",
        ) from error
    except DAMAGED as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptCheckpoint(
            f"not a readable torch file ({first})", path=file, hint="download it again"
        ) from error
    for _ in range(DEEPEST_TABLE):  # a table may hold itself
        if not isinstance(content, dict):
            break
        inner = next(
            (content[key] for key in NESTED_UNDER if isinstance(content.get(key), dict)), None
        )
        if inner is None:
            return _checked(_tensors(content), file)
        content = inner
    raise CorruptCheckpoint(
        "it holds no table of tensors", path=file, hint="name a file that holds a model's weights"
    )


def _checked(tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors, where each one's numbers are in the file: some say they are larger."""
    import torch

    size = file.stat().st_size
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > size:
            raise CorruptCheckpoint(
                f"{name} is {list(tensor.shape)}, whose numbers are not in the file",
                path=file,
                tensor=name,
                hint="use a .safetensors version of this checkpoint",
            )
    return tensors


def _tensors(content: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Name the tensors of a table, and those of tables in it, as HQQ's qmodel.pt has them."""
    import torch

    named: dict[str, torch.Tensor] = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            named[str(name)] = value
        elif isinstance(value, dict):
            named |= {
                f"{name}.{inner}": tensor
                for inner, tensor in value.items()
                if isinstance(tensor, torch.Tensor)
            }
    return named


def _unpickle(file: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError) as error:
        if "mmap" not in str(error):
            raise
        # torch files from before version 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def read_pickle_headers(file: Path) -> list[TensorInfo]:
    """List the tensors of a pickle.

    Raises:
        UnsafeFile: it holds something other than tensors and plain containers.
        CorruptCheckpoint: it is cut short, or is no torch file.
    """
    headers = []
    for name, tensor in load_pickle(file).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise CorruptCheckpoint(
                f"{name} has the dtype {dtype}, which no checkpoint has",
                path=file,
                tensor=name,
                hint="use a .safetensors version of this checkpoint",
            )
        headers.append(TensorInfo(name, DTYPES[dtype], tuple(tensor.shape), file, -1))
    return headers
