"""The form of Open-Assistant's sampling reports, and what in one of ours is not of that form.

It is that of sampling_reports/oasst-sft/2023-08-22_OpenAssistant_llama2-70b-oasst-sft-v10_sampling_
noprefix2_nf4.json, which they published.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gptq_loader_plugin.sampling.settings import Setting

__all__ = ["differences"]

NULL = type(None)
TOP = {"model_name": str, "date": str, "args": dict, "prompts": list}
ARGS: dict[str, tuple[type, ...]] = {
    "device": (str,), "device_index": (int,), "model_name": (str,), "mode": (str,),
    "prompts": (str,), "report": (str,), "seed": (int,), "verbose": (bool,), "n": (int, NULL),
    "num_samples": (int,), "config": (str,), "half": (bool,), "int8": (bool,), "dtype": (str,),
    "skip_special_tokens": (bool,), "model_type": (str,), "max_input_len": (int, NULL),
    "num_threads": (int,), "tgi_generate_url": (str, NULL), "use_tgi": (bool,),
}  # fmt: skip
ENTRY, RESULT = ["prompt", "results"], ["sampling_config", "sampling_params", "outputs"]
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")  # UTC, without a zone
NAME = re.compile(r"\d{4}-\d\d-\d\d_\w+_sampling_\w+\.json")
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>")  # none is in a reply there


def differences(
    file: Path, *, name: str, prompts: Sequence[str], settings: Sequence[Setting], samples: int
) -> list[str]:
    """Say what in a report differs from the form: fields, their order, their types and numbers.

    Args:
        file: the report.
        name: what the model is called.
        prompts: what was asked.
        settings: how.
        samples: the replies of a setting that samples; a greedy one has one.
    """
    report = json.loads(file.read_text(encoding="utf-8"))
    return [
        *([] if NAME.fullmatch(file.name) else [f"the file is called {file.name}"]),
        *_of_types(report, {it: (kind,) for it, kind in TOP.items()}, "the report"),
        *_of_types(report["args"], ARGS, "args"),
        *_of_head(report, file, name, samples),
        *_of_entries(report["prompts"], prompts, settings, samples),
    ]


def _of_types(
    table: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str
) -> Iterator[str]:
    if list(table) != list(kinds):
        yield f"{where} has the fields {list(table)}"
    for field in kinds.keys() & table.keys():
        if type(table[field]) not in kinds[field]:
            yield f"{where} has {table[field]!r} as {field}"


def _of_head(report: Mapping[str, Any], file: Path, name: str, samples: int) -> Iterator[str]:
    args = report["args"]
    if not DATE.fullmatch(report["date"]) or datetime.fromisoformat(report["date"]).tzinfo:
        yield f"the date is {report['date']}"
    for field, found, right in (
        ("model_name", report["model_name"], name),
        ("args.model_name", args["model_name"], name),
        ("args.report", args["report"].rpartition("/")[2], file.name),
        ("args.num_samples", args["num_samples"], samples),
        ("args.skip_special_tokens", args["skip_special_tokens"], True),
    ):
        if found != right:
            yield f"{field} is {found!r} and not {right!r}"


def _of_entries(
    entries: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    settings: Sequence[Setting],
    samples: int,
) -> Iterator[str]:
    if [it["prompt"] for it in entries] != list(prompts):
        yield "the prompts are others"
    for number, entry in enumerate(entries):
        where = f"prompts[{number}]"
        if list(entry) != ENTRY:
            yield f"{where} has the fields {list(entry)}"
        if [it["sampling_config"] for it in entry["results"]] != [it.name for it in settings]:
            yield f"{where} has the settings {[it['sampling_config'] for it in entry['results']]}"
            continue
        for result, setting in zip(entry["results"], settings, strict=True):
            own = f"{where}, {setting.name}:"
            if list(result) != RESULT:
                yield f"{own} the fields are {list(result)}"
            if list(result["sampling_params"].items()) != list(setting.params.items()):
                yield f"{own} the parameters are {result['sampling_params']}"
            yield from (f"{own} {it}" for it in _of_outputs(result["outputs"], setting, samples))


def _of_outputs(outputs: Sequence[Any], setting: Setting, samples: int) -> Iterator[str]:
    if len(outputs) != (samples if setting.is_random else 1):
        yield f"there are {len(outputs)} outputs"
    for text in outputs:
        if not isinstance(text, str) or not text:
            yield f"an output is {text!r}"
        elif found := [mark for mark in MARKS if mark in text]:
            yield f"an output has {found[0]} in it"
