"""Verify a checkpoint: every check in turn, from its files to its text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.architectures.translate import translate
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.device import find_devices
from gptq_loader_plugin.errors import (
    CheckpointError,
    ConfigInvalid,
    PluginError,
    TensorMismatch,
    UnsupportedFormat,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.reference import resolve
from gptq_loader_plugin.verify.against import compare, observe
from gptq_loader_plugin.verify.equal import PROMPT, check_batch, check_split, first_logits
from gptq_loader_plugin.verify.files import check_hashes, check_index, check_labels
from gptq_loader_plugin.verify.kernels import check_kernels
from gptq_loader_plugin.verify.layers import check_layers, check_tensors
from gptq_loader_plugin.verify.report import Finding, Report
from gptq_loader_plugin.verify.text import WINDOW, check_activations, check_text

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.verify.against import Observed
    from gptq_loader_plugin.verify.report import Check

__all__ = ["verify"]

SMALL = 1 << 30  # bytes of weights that may be loaded twice without a word


def verify(
    reference: str,
    *,
    options: LoadOptions,
    plugins: Plugins,
    hashes: bool = True,
    split: bool | None = None,
    against: Path | None = None,
) -> Report:
    """Run every check; the first that makes the others useless ends them.

    Args:
        reference: as for `load`.
        options: how to load it.
        plugins: the plugins in force.
        hashes: whether to hash files whose hash is known.
        split: whether to load it a second time, over two devices; None does where there are two
            accelerators, or the weights are small.
        against: the unquantised model to compare it with: its folder, or its GGUF file.

    Raises:
        BadReference: it names nothing.
        UnsupportedFormat: it is no GPTQ checkpoint, or none that can be loaded.
        QuantizeError: the unquantised model cannot be loaded.
    """
    path = resolve(reference, plugins=plugins, revision=options.revision)
    clock = _Clock()
    try:
        checkpoint = open_checkpoint(path, plugins.readers())
    except UnsupportedFormat:
        raise
    except CheckpointError as error:
        clock.findings.append(Finding("files", True, error.message, str(path), error.hint))  # noqa: FBT003
        return clock.report(reference)
    _verify_files(checkpoint, clock, plugins, hashes=hashes)
    damaged = {finding.check for finding in clock.findings if finding.wrong}
    if not damaged & {"layers", "tensors"}:  # else what it would answer is known already
        clock.findings += check_kernels(translate(checkpoint), options, plugins)
        clock.lap("kernels")
    damaged = {finding.check for finding in clock.findings if finding.wrong}
    if not damaged & {"layers", "tensors", "kernels"}:
        if split is None:
            split = checkpoint.size_bytes < SMALL or len(find_devices()) > 2  # the CPU is one
        extent = _Extent(tuple(checkpoint.layers), split, against)
        observed = _verify_loaded(path, options, plugins, clock, extent)
        if against is not None and observed is not None:
            _verify_against(checkpoint, observed, against, plugins, clock)
    checkpoint.close()
    return clock.report(reference)


@dataclass(frozen=True, slots=True)
class _Extent:
    """What of a loaded model is looked at.

    Attributes:
        layers: the names of its layers.
        split: whether to load it over two devices too.
        against: the unquantised model.
    """

    layers: tuple[str, ...]
    split: bool
    against: Path | None


class _Clock:
    """What the checks found, and when each ended."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 2), now

    def report(self, reference: str) -> Report:
        return Report(reference, tuple(self.findings), self.facts, self.seconds)


def _verify_files(checkpoint: Checkpoint, clock: _Clock, plugins: Plugins, *, hashes: bool) -> None:
    clock.findings += [*check_labels(checkpoint), *check_index(checkpoint)]
    if hashes:
        differing, clock.facts["hashed"] = check_hashes(checkpoint)
        clock.findings += differing
    clock.lap("files")
    total = len(checkpoint.layers)

    def progress(done: int, _: int) -> None:
        plugins.progress(Progress("layers", done, total, "layers"))

    findings, facts = check_layers(checkpoint, progress)
    clock.findings += [*findings, *check_tensors(checkpoint)]
    clock.facts |= facts
    clock.lap("layers")


def _verify_loaded(
    path: Path, options: LoadOptions, plugins: Plugins, clock: _Clock, extent: _Extent
) -> Observed | None:
    """Load the model and run it; return what a comparison needs of it."""
    from gptq_loader_plugin.loading import load
    from gptq_loader_plugin.measure.perplexity import sample_text

    try:
        model = load(path, options=options, plugins=plugins)
    except PluginError as error:
        clock.findings.append(Finding("kernels", True, error.message, "", error.hint))  # noqa: FBT003
        return None
    except CheckpointError as error:
        if isinstance(error, UnsupportedFormat):
            raise
        missing = isinstance(error, TensorMismatch | ConfigInvalid)
        check: Check = "files" if missing else "activations"
        clock.findings.append(Finding(check, True, error.message, "", error.hint))  # noqa: FBT003
        return None
    clock.lap("load")
    observed = whole = None
    with model:
        ids = model.tokenizer(sample_text())["input_ids"][: min(WINDOW, model.context)]
        findings, largest = check_activations(model, ids)
        clock.findings += findings
        clock.facts["largest_hidden"] = largest
        clock.lap("activations")
        if not any(finding.wrong for finding in findings):
            findings, facts = check_text(model)
            clock.findings += findings
            clock.facts |= facts
            clock.lap("text")
            prompts = [ids[at : at + PROMPT] for at in range(0, 3 * PROMPT, PROMPT)]
            clock.findings += check_batch(model, [it for it in prompts if it])
            clock.lap("batch")
            whole = first_logits(model, ids[:PROMPT]) if extent.split else None
            if extent.against is not None:
                plugins.progress(Progress("reference", 0, 1, "layers", "the quantised model"))
                observed = observe(model, list(extent.layers))
    if whole is not None:
        clock.findings += check_split(path, extent.layers, ids[:PROMPT], whole, options, plugins)
        clock.lap("split")
    return observed


def _verify_against(
    checkpoint: Checkpoint, observed: Observed, against: Path, plugins: Plugins, clock: _Clock
) -> None:
    findings, clock.facts["reference"] = compare(checkpoint, observed, against, plugins.progress)
    clock.findings += findings
    clock.lap("reference")
