"""Prompts and sampling settings, in the files Open-Assistant's reports are made from.

https://github.com/LAION-AI/Open-Assistant/tree/main/model/model_eval
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["USUAL", "Setting", "read_prompts", "read_settings", "usual_settings"]

# config/noprefix2.json: what most of Open-Assistant's own reports were made with.
USUAL: dict[str, Any] = {
    "default": {
        "generate_args": {"max_new_tokens": 400, "min_new_tokens": 1},
        "add_prefix_tokens": False,
    },
    "configurations": [
        {
            "name": "nucleus9",
            "generate_args": {
                "do_sample": True,
                "temperature": 0.8,
                "repetition_penalty": 1.2,
                "top_p": 0.9,
            },
        },
        {
            "name": "k50",
            "generate_args": {
                "do_sample": True,
                "temperature": 1.0,
                "repetition_penalty": 1.2,
                "top_k": 50,
                "top_p": 0.95,
            },
        },
        {
            "name": "greedy",
            "generate_args": {
                "do_sample": False,
                "temperature": 1.0,
                "repetition_penalty": 1.2,
                "num_beams": 1,
            },
        },
    ],
}
KNOWN = (
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "repetition_penalty", "top_p",
    "top_k", "num_beams",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to sample.

    Attributes:
        name: what the report calls it.
        params: its arguments, in the order of the file, as transformers names them.
        system: the system message that goes before the prompt, or None.
    """

    name: str
    params: dict[str, Any]
    system: str | None = None

    @property
    def is_random(self) -> bool:
        """Whether two replies may differ."""
        return bool(self.params.get("do_sample"))

    @property
    def min_new_tokens(self) -> int:
        """The fewest tokens of a reply."""
        return int(self.params.get("min_new_tokens") or 0)

    def options(self, seed: int) -> GenerateOptions:
        """Return it as options of a generation."""
        fields: dict[str, Any] = {
            "max_new_tokens": self.params.get("max_new_tokens", 400),
            "repetition_penalty": self.params.get("repetition_penalty", 1.0),
            "temperature": 0.0,
        }
        if self.is_random:
            fields |= {
                "temperature": self.params.get("temperature", 1.0),
                "top_p": self.params.get("top_p", 1.0),
                "top_k": self.params.get("top_k", 0),
                "seed": seed,
            }
        return GenerateOptions.parse(fields)


def usual_settings(**changes: Any) -> tuple[Setting, ...]:  # noqa: ANN401 - arguments of a generation
    """Return Open-Assistant's usual three settings, some arguments changed."""
    return _settings(USUAL, changes, where="the usual settings")


def read_settings(file: Path, **changes: Any) -> tuple[Setting, ...]:  # noqa: ANN401 - as above
    """Read settings from a config file.

    Raises:
        OptionInvalid: it is none, or names arguments that mean nothing here.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return _settings(table, changes, where=str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionInvalid(
            f"{file} is no file of sampling settings ({error})",
            hint='write {"default": {"generate_args": {...}}, "configurations": [{"name": "greedy",'
            ' "generate_args": {"do_sample": false}}]}',
        ) from error


def _settings(
    table: Mapping[str, Any], changes: Mapping[str, Any], *, where: str
) -> tuple[Setting, ...]:
    default = table.get("default") or {}
    settings = []
    for configuration in table["configurations"]:
        params = {
            **(default.get("generate_args") or {}),
            **(configuration.get("generate_args") or {}),
            **changes,
        }
        if unknown := sorted(name for name in params if name not in KNOWN):
            raise OptionInvalid(
                f"{where}: {configuration['name']} has {unknown[0]}, which is not known here",
                hint=f"use {', '.join(KNOWN)}",
            )
        if params.get("num_beams", 1) != 1:
            raise OptionInvalid(
                f"{where}: {configuration['name']} searches with beams, which is not done here",
                hint="leave num_beams out, or set it to 1",
            )
        system = configuration.get("pre_text") or default.get("pre_text") or None
        setting = Setting(str(configuration["name"]), params, _system(system))
        setting.options(0)  # refuses what is out of range
        settings.append(setting)
    if not settings:
        raise OptionInvalid(f"{where} has no settings", hint="name one in configurations")
    return tuple(settings)


def _system(text: str | None) -> str | None:
    """Return the message of a system turn that is written out, in ChatML, or the text."""
    if text is None:
        return None
    start, end = "<|im_start|>system\n", "<|im_end|>"
    if text.startswith(start) and end in text:
        return text.removeprefix(start).partition(end)[0]
    return text


def read_prompts(file: Path, *, limit: int | None = None) -> list[str]:
    """Read prompts: a JSON string, or an object with `text` or `prompt`, on each line; or a text.

    Args:
        file: a .jsonl or a text of one prompt a line, or either as .gz.
        limit: read so many at most.

    Raises:
        OptionInvalid: it cannot be read, or holds none.
    """
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise OptionInvalid(
            f"{file} cannot be read ({error})", hint="name a file of one prompt a line"
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    is_json = ".json" in "".join(file.suffixes)
    prompts = [_prompt(line, file) if is_json else line for line in lines[:limit]]
    if not prompts:
        raise OptionInvalid(f"{file} has no prompts", hint="write one prompt a line")
    return prompts


def _prompt(line: str, file: Path) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise OptionInvalid(
            f"{file} has a line that is no JSON: {line[:60]}",
            hint="write a JSON string on each line, or name the file .txt",
        ) from error
    if isinstance(entry, dict):
        entry = entry.get("text") or entry.get("prompt")
    if not isinstance(entry, str):
        raise OptionInvalid(
            f"{file} has a line without a prompt: {line[:60]}",
            hint='write a JSON string, or an object with "text", on each line',
        )
    return entry
