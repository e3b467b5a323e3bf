"""A sampling report: what Open-Assistant's viewer reads, and beside it lengths and speed.

The report has its four keys and nothing else. Tokens and seconds of each reply are in a second
file of the same name that ends in `.stats.json`, with what else decides what is answered.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.atomic_file import write_whole

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Answered", "Report", "Result", "Stat", "read_report", "report_args", "report_name"]

NOT_WORD = re.compile(r"\W")


class Result(BaseModel):
    """What a model answered to a prompt under one setting."""

    sampling_config: str
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    outputs: list[str]


class Answered(BaseModel):
    """A prompt and its results, one for each setting."""

    prompt: str
    results: list[Result]


class Stat(BaseModel):
    """How long a reply is, and how long it took."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    seconds: float
    finish: str


class Report(BaseModel):
    """A sampling report.

    Attributes:
        model_name: the model.
        date: when, in UTC.
        args: how it was made.
        prompts: what was answered.
        stats: of each prompt and setting, each output's; not in the report's own file.
        made: what decides the replies and has no place among `args`: a run that is begun again
            goes on only where it is the same; not in the report's own file.
    """

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    date: str
    args: dict[str, Any]
    prompts: list[Answered]
    stats: list[list[list[Stat]]] = Field(default_factory=list, exclude=True)
    made: dict[str, Any] = Field(default_factory=dict, exclude=True)

    def write(self, file: Path) -> None:
        """Write it, and its stats beside it."""
        write_whole(file, json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n")
        stats = [[[it.model_dump() for it in each] for each in row] for row in self.stats]
        write_whole(_stats_file(file), json.dumps({"made": self.made, "stats": stats}) + "\n")


def read_report(file: Path) -> Report:
    """Read a report of ours or of Open-Assistant's, with its stats where they are beside it.

    Raises:
        OptionInvalid: it is no report.
    """
    try:
        report = Report.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise OptionInvalid(
            f"{file} is no sampling report ({first})",
            hint="name a checkpoint, or the .json file of a report",
        ) from error
    beside = _stats_file(file)
    if beside.is_file():
        try:
            table = json.loads(beside.read_text(encoding="utf-8"))
            report.stats = [
                [[Stat.model_validate(it) for it in each] for each in row] for row in table["stats"]
            ]
            report.made = dict(table["made"])
        except (OSError, ValueError, TypeError, KeyError):  # they are only lengths and speeds
            report.stats = []
    return report


def report_args(
    *,
    model: str,
    prompts: Path,
    report: Path,
    samples: int,
    limit: int | None,
    config: Path | None,
    device: str,
    dtype: str,
    seed: int,
    template: str,
) -> dict[str, Any]:
    """Return a report's arguments: the twenty that Open-Assistant's sampling has."""
    return {
        "device": device,
        "device_index": 0,
        "model_name": model,
        "mode": template,
        "prompts": str(prompts),
        "report": str(report),
        "seed": seed,
        "verbose": False,
        "n": limit,
        "num_samples": samples,
        "config": str(config) if config else "config/noprefix2.json",
        "half": dtype == "float16",
        "int8": False,
        "dtype": dtype,
        "skip_special_tokens": True,
        "model_type": "CausalLM",
        "max_input_len": None,
        "num_threads": 1,
        "tgi_generate_url": None,
        "use_tgi": False,
    }


def report_name(model: str, config: Path | None, *, day: str | None = None) -> str:
    """Return the name Open-Assistant's sampling gives a report."""
    day = day or datetime.now(tz=UTC).date().isoformat()
    name = NOT_WORD.sub("_", model.rstrip("/").removeprefix("./"))
    return f"{day}_{name[-120:]}_sampling_{config.stem if config else 'noprefix2'}.json"


def _stats_file(file: Path) -> Path:
    return file.with_name(f"{file.name.removesuffix('.json')}.stats.json")
