"""List the checkpoints that llm shows as gptq/NAME: those added by name, and those on this machine.

Added names are kept in llm's own folder, in `gptq-loader.json`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import CheckpointNotFound, ConfigInvalid
from gptq_loader_plugin.quantize.demo import demo_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["PREFIX", "ListedModel", "find_listed", "list_models", "read_added", "write_added"]

PREFIX = "gptq/"
FILE = "gptq-loader.json"
Source = Literal["added", "models directory", "Hugging Face cache", "demo"]


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A checkpoint that llm lists.

    Attributes:
        name: what follows gptq/.
        reference: what to load: a folder, or what the user typed when it was added.
        source: where it was found.
    """

    name: str
    reference: str
    source: Source


class _Added(BaseModel):
    """The file: added references, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, str] = {}


def list_models(
    added: Mapping[str, str], *, environ: Mapping[str, str] = os.environ
) -> list[ListedModel]:
    """List what was added, then what is in the models directories and the hub's cache.

    Of two with one name, the first is listed.
    """
    listed = {name: ListedModel(name, reference, "added") for name, reference in added.items()}
    for model in local_models(environ=environ):
        listed.setdefault(model.name, ListedModel(model.name, str(model.path), model.source))
    if demo_available(environ):
        listed.setdefault("demo", ListedModel("demo", "demo", "demo"))
    return list(listed.values())


def find_listed(name: str, models: list[ListedModel]) -> ListedModel:
    """Find a model by its name, with or without gptq/.

    Raises:
        CheckpointNotFound: there is none with that name.
    """
    name = name.removeprefix(PREFIX)
    for model in models:
        if model.name == name:
            return model
    raise CheckpointNotFound(
        f"there is no model {PREFIX}{name}",
        reference=name,
        tried=[model.name for model in models],
        hint="see llm gptq list, or add it: llm gptq add REF",
    )


def demo_available(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the demo model is prepared, or can be."""
    prepared = (demo_folder(environ) / "config.json").is_file()
    return prepared or importlib.util.find_spec("gguf") is not None


def read_added(folder: Path) -> dict[str, str]:
    """Read the added references, by name.

    Raises:
        ConfigInvalid: the file cannot be parsed.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        return dict(_Added.model_validate_json(file.read_bytes()).models)
    except (ValidationError, OSError) as error:
        raise ConfigInvalid(
            "the list of added models cannot be read",
            path=file,
            hint="delete it, and add them again: llm gptq add REF",
        ) from error


def write_added(folder: Path, models: Mapping[str, str]) -> None:
    """Write the added references, whole or not at all."""
    file = folder / FILE
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"models": dict(models)}, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
