"""Find the cause of a symptom: run what separates the causes, the likeliest first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.checkpoint.vocabulary import embedding_rows
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.opening import plan_load
from gptq_loader_plugin.reference import resolve
from gptq_loader_plugin.system.memory import free_memory
from gptq_loader_plugin.system.units import write_size
from gptq_loader_plugin.verify.machine import Diagnosis, diagnose_machine
from gptq_loader_plugin.verify.run import verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.verify.report import Symptom

__all__ = ["diagnose"]

SLOW_KERNELS = ("reference", "torch")
FLOAT16_MAX = 65504.0


def diagnose(
    reference: str, symptom: Symptom, *, options: LoadOptions, plugins: Plugins
) -> list[Diagnosis]:
    """Find what explains a symptom; an empty list where nothing does.

    Args:
        reference: as for `load`.
        symptom: what a user sees.
        options: how it is loaded.
        plugins: the plugins in force.

    Raises:
        BadReference: the reference names nothing.
    """
    path = resolve(reference, plugins=plugins, revision=options.revision)
    if symptom in ("gibberish", "nan"):
        return list(_wrong(str(path), symptom, options, plugins))
    try:
        checkpoint = open_checkpoint(path, plugins.readers())
        if symptom == "never-stops":
            return list(_stops(checkpoint))
        return list(_resources(checkpoint, symptom, options, plugins))
    except GPTQLoaderError as error:
        return [Diagnosis(error.message, f"opening {path}", error.hint)]


def _wrong(
    reference: str, symptom: Symptom, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    report = verify(reference, options=options, plugins=plugins)
    for finding in report.findings:
        if finding.wrong:
            yield Diagnosis(
                finding.message, f"verify: {finding.check} {finding.where}", finding.fix
            )
    if not report.right:
        return
    largest = report.facts.get("largest_hidden", 0.0)
    if largest > FLOAT16_MAX:
        yield Diagnosis(
            "hidden states are too large for float16: programs that compute in it answer !!!!",
            f"they reach {largest:.0f}; float16 ends at {FLOAT16_MAX:.0f}",
            "compute in bfloat16: --dtype bfloat16",
        )
    checkpoint = open_checkpoint(Path(reference), plugins.readers())
    if symptom == "gibberish":
        yield from _template(checkpoint)


def _template(checkpoint: Checkpoint) -> Iterator[Diagnosis]:
    template = find_template(
        checkpoint.folder, card=checkpoint.card, rows=embedding_rows(checkpoint.headers)
    )
    if template.name not in ("checkpoint", "card"):
        yield Diagnosis(
            "the checkpoint brings no chat template, and another program may use a wrong one",
            f"ours is {template.name}: {template.source}",
            "name the template that the model was trained on: --template",
        )


def _stops(checkpoint: Checkpoint) -> Iterator[Diagnosis]:
    from gptq_loader_plugin.chat.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(checkpoint)
    template = find_template(
        checkpoint.folder, card=checkpoint.card, rows=embedding_rows(checkpoint.headers)
    )
    for stop in template.stop:
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            yield Diagnosis(
                f"{stop} is no token: the model writes it in {len(ids)} pieces, and programs that "
                "wait for one id go on",
                f"the tokenizer makes {ids} of it; the template is {template.name}",
                f"copy the tokenizer's files of the model this was made of, or stop at the text "
                f"{stop!r}",
            )
    end = tokenizer.eos_token
    if template.stop and end not in template.stop:
        yield Diagnosis(
            f"the tokenizer's end token is {end}, and a turn ends with {template.stop[0]}",
            f"tokenizer_config.json; the template is {template.name}",
            f"add {template.stop[0]} to eos_token_id in generation_config.json",
        )


def _resources(
    checkpoint: Checkpoint, symptom: Symptom, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    plan = plan_load(checkpoint, options, plugins, reference=str(checkpoint.path))
    free = free_memory()
    if plan.device.type == "cpu" and plan.memory_bytes > free:
        yield Diagnosis(
            "it does not fit into memory: the system reads it from the disk again and again, or "
            "ends the program",
            f"it takes {write_size(plan.memory_bytes)}, and {write_size(free)} is free",
            "choose a branch of fewer bits (gptq-loader branches), or --device-map auto",
        )
    slow = {name: count for name, count in plan.kernels().items() if name in SLOW_KERNELS}
    if symptom == "slow" and slow:
        declined = {it.kernel: it.reason for choice in plan.choices for it in choice.declined}
        yield Diagnosis(
            f"layers run on a slow kernel: {', '.join(slow)}",
            "; ".join(f"{name}: {reason}" for name, reason in sorted(declined.items()))[:300],
            "remove the reason: gptq-loader explain says it for every layer",
        )
    yield from diagnose_machine(folder=Path.cwd(), environ=os.environ)
