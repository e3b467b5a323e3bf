"""Read what a model card (README.md) says to a loader: its prompt template and system message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Card", "read_card"]

CARD_BYTES = 1 << 20  # of a card that are read
FRONT_BYTES = 1 << 16
FRONT_MATTER = re.compile(r"\A---\s*\n(?P<yaml>.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
# "recommended system message" and such, then the first fenced block within a few lines of it.
RECOMMENDED = re.compile(
    r"(?:recommend|suggest|official|default)[^\n]*?system[ -](?:message|prompt)[^\n]*\n"
    r"(?:[^\n`]*\n){0,4}?```[^\n]*\n(?P<block>.*?)```",
    re.IGNORECASE | re.DOTALL,
)
SYSTEM_TURN = re.compile(r"<\|im_start\|>system\n(?P<text>.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says to a loader.

    Attributes:
        prompt_template: the front matter's `prompt_template`, with `{prompt}` and maybe
            `{system_message}` in it, or None.
        system: the system message the card recommends, byte for byte as the model is to read it,
            or None.
        base_model: the repository of the model this was made of.
        license: the licence's name.
        datasets: what the model was trained on.
        languages: what it reads and writes.
        model_creator: who made the model.
        model_name: what they call it.
    """

    prompt_template: str | None = None
    system: str | None = None
    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    model_creator: str | None = None
    model_name: str | None = None


def read_card(folder: Path) -> Card:
    """Read a checkpoint's README.md; a folder without one, or with broken YAML, says nothing."""
    file = folder / "README.md"
    if not file.is_file():
        return Card()
    with file.open("rb") as stream:
        text = stream.read(CARD_BYTES).decode("utf-8", errors="replace")
    front = _front_matter(text)
    template = _text(front.get("prompt_template"))
    return Card(
        prompt_template=template if template and "{prompt}" in template else None,
        system=_recommended(text),
        base_model=next(iter(_texts(front.get("base_model"))), None),
        license=_text(front.get("license_name")) or _text(front.get("license")),
        datasets=_texts(front.get("datasets")),
        languages=_texts(front.get("language")),
        model_creator=_text(front.get("model_creator")),
        model_name=_text(front.get("model_name")),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> tuple[str, ...]:
    """Return what may be one text or a list of them."""
    entries = value if isinstance(value, list) else [value]
    return tuple(entry for entry in entries if isinstance(entry, str) and entry)


def _front_matter(text: str) -> dict[str, Any]:
    import yaml

    match = FRONT_MATTER.match(text)
    if match is None or len(match["yaml"]) > FRONT_BYTES:
        return {}
    try:
        content = yaml.safe_load(match["yaml"])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _recommended(text: str) -> str | None:
    """Find the recommended system message: the text of its ChatML turn, else the whole block."""
    match = RECOMMENDED.search(text)
    if match is None:
        return None
    block = match["block"]
    turn = SYSTEM_TURN.search(block)
    return turn["text"] if turn else block.rstrip("\n")
