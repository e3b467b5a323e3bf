"""What a checkpoint is to the loader, whatever its format: layers, tensors by name, a config."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gptq_loader_plugin.checkpoint.card import read_card
from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.model_fields import read_fields
from gptq_loader_plugin.checkpoint.model_sizes import check_sizes
from gptq_loader_plugin.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from gptq_loader_plugin.checkpoint.card import Card
    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["Checkpoint", "Reader", "missing_members"]


class Checkpoint(Protocol):
    """An open checkpoint.

    A reader of another format derives its own class from this one: it must have `path`, `config`,
    `layers`, `headers`, `tensor`, `packed` and `layer_tensors`; the rest has a default.

    Attributes:
        path: its folder, or the one file that was named.
        config: how it was quantised, corrected by its tensors.
        layers: every quantised layer, by its name in the checkpoint.
        headers: every tensor's header, by its name, in the order of the files.
        warnings: what a user should know, one sentence each.
        translated: what config.json says in the words of another transformers class, as which
            the checkpoint is read, or None.
    """

    path: Path
    config: QuantConfig
    layers: Mapping[str, LayerSpec]
    headers: Mapping[str, TensorInfo]
    warnings: tuple[str, ...] = ()
    translated: dict[str, Any] | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor that is not quantised, on the CPU, in the dtype it is stored in."""
        ...

    def packed(self, name: str) -> PackedLinear:
        """Read one layer's tensors, checked, with true zeros.

        Args:
            name: the layer's name in the checkpoint.

        Raises:
            CorruptCheckpoint: a scale is not finite.
        """
        ...

    def layer_tensors(self, name: str) -> Sequence[str]:
        """Return the names of the tensors that make up one layer, its bias among them."""
        ...

    def close(self) -> None:
        """Close its files."""

    @property
    def folder(self) -> Path:
        """The folder with its config and tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def size_bytes(self) -> int:
        """The bytes of its weight files."""
        return sum(file.stat().st_size for file in {info.file for info in self.headers.values()})

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """What `config.json` says of the model's shape.

        Raises:
            ConfigInvalid: there is none, or it does not parse, or it names no model type, or a
                field has a value that no model can have.
        """
        if self.translated is not None:
            return self.translated
        file = self.folder / "config.json"
        if not file.is_file():
            raise ConfigInvalid(
                "there is no config.json, so the model's shape is not known",
                path=self.folder,
                hint="copy config.json (and the tokenizer's files) from the model this was made of",
            )
        config = read_json(file)
        if not isinstance(config.get("model_type"), str):
            raise ConfigInvalid(
                "model_type is missing",
                path=file,
                hint="copy config.json from the model this was made of",
            )
        fields = read_fields(config, file)
        check_sizes(fields, self.headers, self.layers.values(), file)
        return fields

    @cached_property
    def card(self) -> Card:
        """What its model card says."""
        return read_card(self.folder)


@runtime_checkable
class Reader(Protocol):
    """A way to open a checkpoint format."""

    @property
    def name(self) -> str:
        """The format's name."""
        ...

    def open(self, path: Path) -> Checkpoint | None:
        """Open the folder or file at `path`, or return None where it is another format's."""
        ...


def missing_members(checkpoint: object) -> list[str]:
    """Return what a `Checkpoint` must have and an object lacks; nothing of it is evaluated."""
    needed = {*Checkpoint.__annotations__} | {var for var in vars(Checkpoint) if var[0] != "_"}
    absent = object()
    return sorted(
        name for name in needed if inspect.getattr_static(checkpoint, name, absent) is absent
    )
