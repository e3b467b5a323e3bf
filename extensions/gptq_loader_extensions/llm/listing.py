"""List the checkpoints that llm shows as gptq/NAME: those added by name, and those on this machine.

Added names are kept in llm's own folder, in `gptq-loader.json`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import (
    CheckpointNotFound,
    ConfigInvalid,
    GPTQLoaderError,
    OptionInvalid,
)
from gptq_loader_plugin.quantize.demo import demo_folder
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.file_lock import changing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = [
    "PREFIX",
    "ListedModel",
    "add_to_list",
    "find_listed",
    "list_models",
    "read_added",
    "remove_from_list",
]

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


def add_to_list(folder: Path, name: str, reference: str) -> None:
    """Add a reference to the list, whole or not at all.

    Raises:
        OptionInvalid: another one is called so.
    """
    with _changed(folder) as models:
        if models.get(name, reference) != reference:
            raise OptionInvalid(
                f"{PREFIX}{name} is already {models[name]}",
                hint="choose another name with --name, or remove that one: llm gptq remove",
            )
        models[name] = reference


def remove_from_list(folder: Path, name: str) -> None:
    """Remove a reference from the list, whole or not at all.

    Raises:
        OptionInvalid: none is called so.
    """
    with _changed(folder) as models:
        if name not in models:
            raise OptionInvalid(
                f"{PREFIX}{name} was not added",
                hint="only models that llm gptq list shows as added can be removed; to remove "
                "another, delete its folder",
            )
        del models[name]


@contextmanager
def _changed(folder: Path) -> Iterator[dict[str, str]]:
    """Change the added references, inside, while no other process does."""
    file = folder / FILE
    try:
        with changing(file):
            models = read_added(folder)
            yield models
            write_whole(file, json.dumps({"models": models}, indent=2) + "\n")
    except OSError as error:
        raise GPTQLoaderError(
            f"the list of added models cannot be written: {error.strerror} ({file})",
            hint="free some disk space, or make that folder writable; LLM_USER_PATH names another",
        ) from error
