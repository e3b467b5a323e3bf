"""Find the cause of a symptom: run what separates the causes, the likeliest first."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.errors import (
    BadReference,
    CheckpointError,
    GPTQLoaderError,
    NotEnoughMemory,
    OptionInvalid,
    TemplateError,
    UnsupportedFormat,
)
from gptq_loader_plugin.opening import plan_load
from gptq_loader_plugin.reference import resolve
from gptq_loader_plugin.system.memory import free_memory
from gptq_loader_plugin.system.units import write_size
from gptq_loader_plugin.verify.chat import (
    diagnose_ends,
    diagnose_template,
    diagnose_tokenizer,
    open_tokenizer,
)
from gptq_loader_plugin.verify.machine import diagnose_machine
from gptq_loader_plugin.verify.positions import diagnose_context, diagnose_epsilon, diagnose_rotary
from gptq_loader_plugin.verify.report import Diagnosis
from gptq_loader_plugin.verify.run import verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.verify.report import Finding, Report, Symptom

__all__ = ["diagnose"]

SLOW_KERNELS = ("reference", "torch")
FLOAT16_MAX = 65504.0
# Notes of `verify` that are no fault of the checkpoint's.
HARMLESS = ("its embeddings are random", "layers have random codes", "a reply ")


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
    try:
        checkpoint = open_checkpoint(path, plugins.readers())
    except GPTQLoaderError as error:
        return [Diagnosis(error.message, f"opening {path}", error.hint)]
    every: list[Diagnosis] = []
    try:
        every.extend(_of_symptom(checkpoint, symptom, options, plugins))
    except (BadReference, CheckpointError, TemplateError) as error:
        every.append(Diagnosis(error.message, f"reading {path}", error.hint))
    finally:
        checkpoint.close()
    return list({diagnosis.cause: diagnosis for diagnosis in reversed(every)}.values())[::-1]


def _of_symptom(
    checkpoint: Checkpoint, symptom: Symptom, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    if symptom == "slow":
        yield from _resources(checkpoint, symptom, options, plugins)
        return
    chat = list(_of_chat(checkpoint, symptom, options, plugins))
    if symptom == "never-stops" and chat:
        yield from chat
        return
    # how it is loaded comes before what it is
    yield from (it for it in diagnose_context(checkpoint, options) if it.about == "options")
    whole = replace(options, context=None)
    try:
        report = verify(str(checkpoint.path), options=whole, plugins=plugins)
    except (OptionInvalid, NotEnoughMemory) as error:
        yield Diagnosis(error.message, "loading it", error.hint, about="options")
        yield from chat
        return
    except GPTQLoaderError as error:
        yield Diagnosis(error.message, "loading it", error.hint)
        yield from chat
        return
    wrong = [finding for finding in report.findings if finding.wrong]
    structural = [finding for finding in wrong if finding.check != "text"]
    yield from map(_of_finding, sorted(structural, key=_order))
    if structural:
        return
    others = [*_of_notes(report, symptom), *chat, *_of_positions(checkpoint)]
    yield from others
    if symptom == "gibberish" and report.facts.get("trained") and not others:
        scored = list(_of_scores(checkpoint, whole, plugins))
        yield from scored
        if not scored:
            yield from map(_of_finding, wrong)
    else:
        yield from map(_of_finding, wrong)
    if symptom == "crash":
        yield from _resources(checkpoint, symptom, options, plugins)


def _order(finding: Finding) -> int:
    """Put what explains the others first: a missing tensor before what its absence does."""
    first = ("files", "layers", "tensors", "zeros", "config", "kernels", "activations")
    return first.index(finding.check) if finding.check in first else len(first)


def _of_finding(finding: Finding) -> Diagnosis:
    return Diagnosis(
        finding.message, f"verify: {finding.check} {finding.where}".rstrip(), finding.fix
    )


def _of_notes(report: Report, symptom: Symptom) -> Iterator[Diagnosis]:
    """Make diagnoses of what `verify` notes and does not call wrong."""
    largest = report.facts.get("largest_hidden", 0.0)
    if largest > FLOAT16_MAX:
        yield Diagnosis(
            "hidden states are too large for float16: programs that compute in it get infinite "
            "values, and answer !!!!",
            f"they reach {largest:.0f}; float16 ends at {FLOAT16_MAX:.0f}",
            "compute in bfloat16: --dtype bfloat16",
        )
    for finding in report.findings:
        notes = finding.check in ("files", "zeros", "config") or symptom == "gibberish"
        if finding.wrong or not notes or finding.check == "activations":
            continue
        if not any(words in finding.message for words in HARMLESS):
            yield Diagnosis(
                finding.message,
                f"verify: {finding.check} {finding.where}".rstrip(),
                finding.fix or "nothing, here: it is read as it should be",
            )


def _of_chat(
    checkpoint: Checkpoint, symptom: Symptom, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    tokenizer = open_tokenizer(checkpoint)
    if isinstance(tokenizer, Diagnosis):
        yield tokenizer
        return
    try:
        yield from diagnose_tokenizer(checkpoint, tokenizer, few=symptom == "crash")
        if symptom in ("gibberish", "never-stops"):
            parts = (diagnose_template, diagnose_ends)
            for part in parts if symptom == "gibberish" else reversed(parts):
                yield from part(checkpoint, tokenizer, options, plugins)
    except GPTQLoaderError as error:  # a template or a config that cannot be read
        yield Diagnosis(error.message, f"reading the template in {checkpoint.folder}", error.hint)


def _of_positions(checkpoint: Checkpoint) -> Iterator[Diagnosis]:
    from gptq_loader_plugin.load_options import LoadOptions

    yield from diagnose_rotary(checkpoint)
    yield from diagnose_epsilon(checkpoint)
    yield from diagnose_context(checkpoint, LoadOptions())


def _of_scores(
    checkpoint: Checkpoint, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    """Load the model, and score a text with one thing changed at a time."""
    from gptq_loader_plugin.loading import load
    from gptq_loader_plugin.verify.rescoring import diagnose_scores

    with load(checkpoint.path, options=replace(options, check=False), plugins=plugins) as model:
        yield from diagnose_scores(model, plugins.progress)


def _resources(
    checkpoint: Checkpoint, symptom: Symptom, options: LoadOptions, plugins: Plugins
) -> Iterator[Diagnosis]:
    try:
        plan = plan_load(checkpoint, options, plugins, reference=str(checkpoint.path))
    except UnsupportedFormat:
        raise
    except GPTQLoaderError as error:
        yield Diagnosis(error.message, "planning its load", error.hint, about="options")
        return
    free = free_memory()
    tokens = options.context or plan.shape.context or 0
    cache = (plan.kv_bytes_per_token or 0) * tokens
    if plan.device.type == "cpu" and plan.memory_bytes > free:
        yield Diagnosis(
            "it does not fit into memory: the system reads it from the disk again and again, or "
            "ends the program",
            f"it takes {write_size(plan.memory_bytes)}, and {write_size(free)} is free",
            "choose a branch of fewer bits (gptq-loader branches), or --device-map auto",
            about="machine",
        )
    elif plan.device.type == "cpu" and plan.memory_bytes + cache > free:
        yield Diagnosis(
            "its weights fit into memory, and a full context does not: it runs out of memory in a "
            "long chat",
            f"weights take {write_size(plan.memory_bytes)}, {tokens:,} tokens of context "
            f"{write_size(cache)}, and {write_size(free)} is free",
            f"use a shorter context: --context {max(tokens // 4, 512)}, or --kv-cache int8",
            about="machine",
        )
    slow = {name: count for name, count in plan.kernels().items() if name in SLOW_KERNELS}
    if symptom == "slow" and slow:
        declined = {it.kernel: it.reason for choice in plan.choices for it in choice.declined}
        yield Diagnosis(
            f"layers run on a slow kernel: {', '.join(slow)}",
            "; ".join(f"{name}: {reason}" for name, reason in sorted(declined.items()))[:300],
            "remove the reason: gptq-loader explain says it for every layer",
            about="options" if options.backend in SLOW_KERNELS else "machine",
        )
    yield from diagnose_machine(folder=Path.cwd(), environ=os.environ)
