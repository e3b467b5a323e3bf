"""What a caller may ask of a generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GenerateOptions"]


class GenerateOptions(BaseModel):
    """How to sample. The defaults are those of the model cards of 2023: 0.7, 0.95, 40, 512.

    Attributes:
        max_new_tokens: the most tokens to generate; cut to what the context leaves.
        temperature: 0 takes the likeliest token every time.
        top_p: keep the likeliest tokens that together have this probability.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest.
        repetition_penalty: above 1, make tokens that were there before less likely.
        stop: texts that end the reply, besides the template's; they are not part of it.
        stop_ids: tokens that do.
        seed: makes sampling repeatable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Field(ge=0)] = 40
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, tuple | list) and not all(texts):
            raise ValueError("a stop text is empty")
        return texts

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> GenerateOptions:
        """Make options of outside data.

        Raises:
            OptionInvalid: a name is unknown or a value out of range.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise OptionInvalid(
                f"the option {name}: {first['msg'][0].lower()}{first['msg'][1:]}",
                hint=f"the options are {', '.join(cls.model_fields)}",
            ) from error
