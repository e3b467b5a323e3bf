"""The folder that a run writes to: one run at a time, and its finished blocks until the end."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.checkpoint.weight_files import KEPT_LOCK
from gptq_loader_plugin.errors import QuantizeError
from gptq_loader_plugin.hub.cache import lock_of
from gptq_loader_plugin.quantize.algorithm import QuantizedWeight
from gptq_loader_plugin.quantize.widths import Width
from gptq_loader_plugin.quantize.writer import save_tensors
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.file_lock import held, held_and_removed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["KeptBlocks", "only_writer"]

PARTS = ("codes", "scales", "zeros", "g_idx", "loss")
WIDTHS = "widths.json"
TUNING = "tuning.safetensors"
FINGERPRINT = "fingerprint"  # in the metadata of a block's file, and a file beside them


@contextmanager
def only_writer(out: Path) -> Iterator[Path]:
    """Keep every other process that quantises or downloads out of a folder, inside.

    One lock is in the folder, for processes of other machines and containers that share it; the
    other is that of downloads.
    """
    if out.exists() and not out.is_dir():
        raise QuantizeError(f"{out} is a file", hint="name a folder for the checkpoint")
    is_new = not out.exists()

    def refuse(holder: str) -> None:
        raise QuantizeError(
            f"{holder} is writing to {out}",
            hint="wait until it has ended, or name another folder; a run of the same command "
            "afterwards goes on where that one stopped",
        )

    try:
        with (
            held(lock_of(out), waiting=refuse),
            held_and_removed(out / KEPT_LOCK, waiting=refuse),
        ):
            yield out
    finally:
        if is_new:
            with suppress(OSError):  # there is something in it
                out.rmdir()


class KeptBlocks:
    """Finished blocks on disk; each says of which model, options and samples it was made."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FINGERPRINT, fingerprint)  # for people: each block has its own
        for file in folder.glob("block-*.safetensors"):
            if _fingerprint_of(file) != fingerprint:
                file.unlink()

    def read(self, block: int) -> dict[str, QuantizedWeight] | None:
        """Read a finished block, or None where it is not finished."""
        from safetensors.torch import load_file

        file = self._file(block)
        if _fingerprint_of(file) != self._fingerprint:
            return None
        tensors = load_file(file)
        paths = [name.removesuffix("/codes") for name in tensors if name.endswith("/codes")]
        return {
            path: _weight({name: tensors[f"{path}/{name}"] for name in PARTS}) for path in paths
        }

    def read_layer(self, block: int, path: str) -> QuantizedWeight:
        """Read one layer of a finished block."""
        from safetensors import safe_open

        with safe_open(self._file(block), "pt") as tensors:
            parts = {name: tensors.get_tensor(f"{path}/{name}") for name in PARTS}
        return _weight(parts)

    def write(self, block: int, done: dict[str, QuantizedWeight]) -> None:
        """Keep a finished block."""
        tensors = {}
        for path, weight in done.items():
            tensors[f"{path}/codes"] = weight.codes
            tensors[f"{path}/scales"] = weight.scales
            tensors[f"{path}/zeros"] = weight.zeros
            tensors[f"{path}/g_idx"] = weight.g_idx
            tensors[f"{path}/loss"] = torch.tensor(weight.loss, dtype=torch.float64)
        save_tensors(tensors, self._file(block), metadata={FINGERPRINT: self._fingerprint})

    def read_widths(self) -> dict[str, Width]:
        """Read the widths that were chosen, by each layer's path; none where they were not yet."""
        try:
            stored: Any = json.loads((self._folder / WIDTHS).read_text(encoding="utf-8"))
            if stored["of"] == self._fingerprint:
                return {path: Width(*width) for path, width in stored["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # there is none, or of none that can be read
        return {}

    def write_widths(self, layers: Mapping[str, Width]) -> None:
        """Keep the widths that were chosen."""
        content = {"of": self._fingerprint, "layers": {path: [*it] for path, it in layers.items()}}
        write_whole(self._folder / WIDTHS, json.dumps(content))

    def read_tuning(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Read how many steps the tuning of scales has taken, and its state; 0 before the first."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        file = self._folder / TUNING
        if _fingerprint_of(file) != self._fingerprint:
            return 0, {}
        with safe_open(file, "pt") as tensors:
            steps = int(tensors.metadata()["steps"])
        return steps, load_file(file)

    def write_tuning(self, steps: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep how far it is."""
        metadata = {FINGERPRINT: self._fingerprint, "steps": str(steps)}
        save_tensors(dict(tensors), self._folder / TUNING, metadata=metadata)

    def remove(self) -> None:
        """Forget them: the checkpoint is complete."""
        shutil.rmtree(self._folder)

    def _file(self, block: int) -> Path:
        return self._folder / f"block-{block:04}.safetensors"


def _weight(parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    codes, scales, zeros, g_idx, loss = (parts[name] for name in PARTS)
    return QuantizedWeight(codes, scales, zeros, g_idx, float(loss))


def _fingerprint_of(file: Path) -> str | None:
    """Read what a block was made of; None where there is no block that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as block:
            stated: dict[str, str] = block.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return stated.get(FINGERPRINT)
