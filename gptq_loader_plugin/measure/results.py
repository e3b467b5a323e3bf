"""Keep the perplexities a person has measured: a small file for each checkpoint."""

from __future__ import annotations

import hashlib
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.system.atomic_file import is_quarantined, quarantine, write_whole
from gptq_loader_plugin.system.file_lock import changing

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.measure.perplexity import Perplexity
    from gptq_loader_plugin.planning.plan import Plan

__all__ = [
    "Measured",
    "MeasuredFiles",
    "MeasuredText",
    "measurement",
]

FOLDER = "perplexity"
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class MeasuredText(BaseModel):
    """What was predicted: figures on the same text, cut the same way, can be compared.

    Attributes:
        name: what a person calls the text.
        digest: tells its content from another's.
        windows: how many windows of it were read.
        window_tokens: the tokens of each.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    windows: int
    window_tokens: int

    @property
    def key(self) -> str:
        """What texts that can be compared have in common, and no others."""
        return f"{self.digest}/{self.windows}/{self.window_tokens}"


class Measured(BaseModel):
    """A perplexity that was measured.

    Attributes:
        name: what a person calls the checkpoint.
        path: where it was.
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1.
        desc_act: act-order.
        size_bytes: its weight files together.
        text: what was predicted.
        perplexity: the figure; lower is better.
        kernels: what ran it.
        seconds: when it was, in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    path: str
    bits: int = Field(ge=1, le=16)
    group_size: int
    desc_act: bool
    size_bytes: int = Field(ge=0)
    text: MeasuredText
    perplexity: float = Field(gt=0, allow_inf_nan=False)
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0


class _Stored(BaseModel):
    """A file: the figures of one checkpoint, one for each text."""

    measured: list[Measured] = Field(default_factory=list)


def measurement(
    model: LoadedModel,
    perplexity: Perplexity,
    *,
    text: str,
    text_name: str,
    name: str | None = None,
) -> Measured:
    """Describe what was measured of which checkpoint on which text.

    Args:
        model: the model.
        perplexity: its perplexity.
        text: what was read.
        text_name: what a person calls the text.
        name: what a person calls the checkpoint; None takes the reference, or its folder's name.

    Raises:
        GPTQLoaderError: the perplexity is no number.
    """
    if not math.isfinite(perplexity.perplexity):
        raise GPTQLoaderError(
            f"the perplexity is {perplexity.perplexity}: the model answers with what is no number",
            hint="download the checkpoint again, or try the kernel called reference",
        )
    plan, config = model.plan, model.config
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Measured(
        name=name or _name(plan),
        path=str(plan.path.resolve()),
        bits=config.bits,
        group_size=config.group_size,
        desc_act=bool(config.desc_act),
        size_bytes=plan.checkpoint_bytes,
        text=MeasuredText(
            name=text_name,
            digest=digest,
            windows=perplexity.windows,
            window_tokens=perplexity.window_tokens,
        ),
        perplexity=perplexity.perplexity,
        kernels=tuple(plan.kernels()),
        seconds=time.time(),
    )


class MeasuredFiles:
    """The figures, a file for each checkpoint, so that two programs do not write to the same.

    Args:
        folder: the folder for a person's data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def read(self) -> tuple[list[Measured], str]:
        """Read all figures, the newest first; and what a user should know, or "".

        A damaged file is put aside under another name; it costs no figure of another checkpoint.
        """
        kept: list[Measured] = []
        notes: list[str] = []
        for file in sorted(self.folder.glob("*.json")):
            if is_quarantined(file) or file.name.startswith("."):
                continue
            figures, note = _read(file)
            kept += figures
            notes += [note] if note else []
        kept.sort(key=lambda figure: -figure.seconds)
        return kept, "; ".join(notes)

    def keep(self, measured: Measured) -> Path:
        """Keep a figure in place of the one before on the same text; tell the file.

        Raises:
            GPTQLoaderError: the file cannot be written.
        """
        file = self.folder / _file_name(measured)
        try:
            with changing(file):
                figures, _ = _read(file, is_locked=True)
                others = [figure for figure in figures if figure.text.key != measured.text.key]
                stored = _Stored(measured=[*others, measured])
                write_whole(file, stored.model_dump_json(indent=2))
        except OSError as error:
            raise GPTQLoaderError(
                f"the figure cannot be kept: {error.strerror} ({file})",
                hint="free some disk space, or let that folder be written to; "
                "GPTQ_LOADER_DATA names another",
            ) from error
        return file


def _name(plan: Plan) -> str:
    is_path = plan.reference != "demo" and Path(plan.reference).exists()
    return plan.path.resolve().name if is_path else plan.reference


def _file_name(measured: Measured) -> str:
    """Name a checkpoint's file for people, and apart from those of others of that name."""
    folder = NOT_IN_A_NAME.sub("-", measured.name)[-80:].strip("-.")
    digest = hashlib.sha256(measured.path.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{folder or 'checkpoint'}-{digest}.json"


def _read(file: Path, *, is_locked: bool = False) -> tuple[list[Measured], str]:
    """Read a file's figures; and what became of a damaged one, or ""."""
    try:
        return _Stored.model_validate_json(file.read_bytes()).measured, ""
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"a file of figures cannot be read: {error.strerror} ({file})"
    except ValidationError:
        pass
    try:
        if not is_locked:  # look again, where nobody can have replaced it meanwhile
            with changing(file):
                return _read(file, is_locked=True)
        quarantined = quarantine(file)
    except OSError as error:
        return [], f"a file of figures is damaged: {file} ({error.strerror})"
    return [], f"a file of figures was damaged; it was put aside as {quarantined.name}"
