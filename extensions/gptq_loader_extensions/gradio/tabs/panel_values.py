"""Read the panel's values, as the page hands them over and as a browser keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptq_loader_extensions.gradio.jobs.reply import ReplySettings
from gptq_loader_extensions.gradio.storage.presets import SAMPLING
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NAMES", "OPTIONS", "PENALTY", "THINKING", "PanelValues", "read_settings"]

DEFAULTS = GenerateOptions()
# In the order in which the page hands them to a reply.
OPTIONS = ("max_new_tokens", *SAMPLING, "seed")
NAMES = ("system", *OPTIONS, "frequency", "presence", "stop", "thinking", "adapter")
THINKING = {"Automatic": None, "On": True, "Off": False}
PENALTY = 2.0  # the largest that OpenAI's API takes


class PanelValues(BaseModel):
    """The panel's values, as a browser keeps them for a conversation; None is an empty field."""

    model_config = ConfigDict(frozen=True)

    system: str | None = ""
    max_new_tokens: int | None = DEFAULTS.max_new_tokens
    temperature: float | None = DEFAULTS.temperature
    top_p: float | None = DEFAULTS.top_p
    top_k: int | None = DEFAULTS.top_k
    min_p: float | None = DEFAULTS.min_p
    repetition_penalty: float | None = DEFAULTS.repetition_penalty
    seed: int | None = None
    frequency: Annotated[float, Field(ge=-PENALTY, le=PENALTY)] | None = 0.0
    presence: Annotated[float, Field(ge=-PENALTY, le=PENALTY)] | None = 0.0
    stop: str | None = ""
    thinking: Literal["Automatic", "On", "Off"] | None = "Automatic"
    adapter: str | None = None


def read_settings(values: Sequence[Any]) -> ReplySettings:
    """Read the panel's values.

    Raises:
        OptionInvalid: a value is out of range.
    """
    named = dict(zip(NAMES, values, strict=True))
    options = GenerateOptions.parse(
        {name: named[name] for name in OPTIONS} | {"stop": _stops(named["stop"] or "")}
    )
    for name in ("frequency", "presence"):
        if not -PENALTY <= (named[name] or 0) <= PENALTY:
            raise OptionInvalid(
                f"the {name} penalty is {named[name]}",
                hint=f"choose one from {-PENALTY} to {PENALTY}",
            )
    return ReplySettings(
        named["system"] or "",
        options,
        presence=named["presence"] or 0.0,
        frequency=named["frequency"] or 0.0,
        thinking=THINKING.get(named["thinking"]),
        adapter=named["adapter"],
    )


def _stops(text: str) -> tuple[str, ...]:
    """Read stop strings, one a line, in which backslash and n are a line break."""
    return tuple(line.replace("\\n", "\n") for line in text.splitlines() if line)
