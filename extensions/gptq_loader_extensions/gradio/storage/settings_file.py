"""Store the user's settings for each model in one JSON file, which is never half written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.system.atomic_file import quarantine, write_whole
from gptq_loader_plugin.system.file_lock import changing

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ModelSettings", "SettingsFile"]

FILE = "page-settings.json"


class ModelSettings(BaseModel):
    """What the user chose for one model; None leaves the choice to the loader.

    Attributes:
        device: where it runs.
        backend: the kernel, or fail.
        context: the longest sequence.
        template: the chat template's name.
        system: the system message.
        sampling: how to sample.
        presence: OpenAI's presence penalty.
        frequency: OpenAI's frequency penalty.
        thinking: whether to think.
    """

    model_config = ConfigDict(frozen=True)

    device: str | None = None
    backend: str | None = None
    context: int | None = None
    template: str | None = None
    system: str = ""
    sampling: GenerateOptions = GenerateOptions()
    presence: float = 0.0
    frequency: float = 0.0
    thinking: bool | None = None


class _Stored(BaseModel):
    """The file."""

    models: dict[str, ModelSettings] = Field(default_factory=dict)


class SettingsFile:
    """The settings of every model, in one file.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._writing = threading.Lock()

    def read(self, name: str) -> tuple[ModelSettings | None, str]:
        """Return a model's settings, None where none are saved; and a note for the user, or "".

        A damaged file is renamed, and the next one begins empty.
        """
        with self._writing:
            stored, note = self._read(is_locked=False)
        return stored.models.get(name), note

    def save(self, name: str, settings: ModelSettings) -> str:
        """Save a model's settings; return a note for the user, or "".

        Raises:
            GPTQLoaderError: the file cannot be written.
        """
        with self._writing:
            try:
                with changing(self.path):  # two pages may save at a time
                    stored, note = self._read(is_locked=True)
                    stored.models[name] = settings
                    write_whole(self.path, stored.model_dump_json(indent=2), mode=0o600)
            except OSError as error:
                raise GPTQLoaderError(
                    f"cannot save the settings: {error.strerror} ({self.path})",
                    hint="free some disk space, or make that folder writable; "
                    "GPTQ_LOADER_CONFIG names another one",
                ) from error
        return note

    def _read(self, *, is_locked: bool) -> tuple[_Stored, str]:
        try:
            return _Stored.model_validate_json(self.path.read_bytes()), ""
        except FileNotFoundError:
            return _Stored(), ""
        except OSError as error:
            return _Stored(), f"cannot read the settings: {error.strerror} ({self.path})"
        except ValidationError:
            pass
        try:
            if not is_locked:  # look again, where nobody can have replaced it meanwhile
                with changing(self.path):
                    return self._read(is_locked=True)
            renamed = quarantine(self.path)
        except OSError as error:
            return _Stored(), f"the settings file is damaged: {self.path} ({error.strerror})"
        return _Stored(), f"the settings file was damaged; it was renamed to {renamed.name}"
