"""Open the files that hold a checkpoint's tensors, and read single tensors from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.headers import TensorInfo

__all__ = ["TensorFiles"]


class TensorFiles:
    """The tensors of a checkpoint's files, each read when it is asked for.

    safetensors files are memory-mapped: a tensor is a view of the file until something writes it.

    Args:
        headers: every tensor's header, by its name.
    """

    def __init__(self, headers: dict[str, TensorInfo]) -> None:
        self.headers = headers
        self._open: dict[Path, Any] = {}

    def integers(self, name: str) -> NDArray[np.int32]:
        """Map an int32 tensor as a read-only numpy array; imports no torch for safetensors."""
        info = self.headers[name]
        if info.start < 0:
            array: NDArray[np.int32] = self.tensor(name).numpy()
            return array
        return np.memmap(info.file, dtype=np.int32, mode="r", offset=info.start, shape=info.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype it is stored in.

        Raises:
            CorruptCheckpoint: its file cannot be read any more.
        """
        info = self.headers[name]
        try:
            file = self._file(info.file)
            tensor: torch.Tensor = file[name] if info.start < 0 else file.get_tensor(name)
        except Exception as error:
            if type(error).__name__ not in ("SafetensorError", "OSError", "KeyError"):
                raise
            raise CorruptCheckpoint(
                f"{name} cannot be read ({error})",
                path=info.file,
                tensor=name,
                hint="download the file again",
            ) from error
        return tensor

    def close(self) -> None:
        """Close the files; tensors read so far stay valid."""
        self._open.clear()

    def _file(self, path: Path) -> Any:  # noqa: ANN401 - a dict or a safetensors handle
        if path not in self._open:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                self._open[path] = safe_open(path, framework="pt", device="cpu")
            else:
                from gptq_loader_plugin.checkpoint.pickles import load_pickle

                self._open[path] = load_pickle(path)
        return self._open[path]
