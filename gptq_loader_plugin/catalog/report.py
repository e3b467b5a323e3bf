"""What `inspect` says of a checkpoint, from its headers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.exllama import ExllamaReport, ask_exllama
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.checkpoint.vocabulary import embedding_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["CheckpointReport", "ExllamaReport", "TemplateReport", "make_report"]


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """Which chat template is used, where it came from, and what ends a reply."""

    name: str
    source: str
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint, by its headers.

    Attributes:
        reference: what the user typed.
        path: the folder or file.
        model_type: the architecture, or "unknown" without a config.json.
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1.
        desc_act: act-order.
        sym: whether every zero is the same.
        damp_percent: the damping GPTQ used, where the config tells.
        checkpoint_format: "gptq", "gptq_v2" or "gptq_p", as it is read.
        zeros: "v1" where zeros are stored minus one, else "v2".
        size_bytes: its weight files together.
        quantized_layers: how many layers are quantised.
        exllama: whether ExLlama could run it.
        template: the chat template.
        dataset: the calibration data, where the config tells.
        seq_len: the calibration samples' length, where the config tells.
        sources: where each field came from.
        warnings: what a user should know.
    """

    reference: str
    path: Path
    model_type: str
    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    damp_percent: float | None
    checkpoint_format: str
    zeros: str
    size_bytes: int
    quantized_layers: int
    exllama: ExllamaReport
    template: TemplateReport
    dataset: str | None = None
    seq_len: int | None = None
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, for `inspect --json`."""
        return {**asdict(self), "path": str(self.path)}


def make_report(
    checkpoint: Checkpoint, kernels: Sequence[Kernel], *, reference: str
) -> CheckpointReport:
    """Report on an open checkpoint.

    Args:
        checkpoint: the open checkpoint.
        kernels: the installed kernels; the one named exllama is asked about every layer.
        reference: what the user typed.
    """
    config = checkpoint.config
    template = find_template(
        checkpoint.folder, card=checkpoint.card, rows=embedding_rows(checkpoint.headers)
    )
    extra = {**(config.model_extra or {})}
    dataset, seq_len = extra.get("dataset"), extra.get("model_seqlen") or extra.get("seq_len")
    has_config = (checkpoint.folder / "config.json").is_file()
    warnings = checkpoint.warnings
    if not has_config:
        warnings = (*warnings, "there is no config.json: the model cannot be loaded without it")
    return CheckpointReport(
        reference=reference,
        path=checkpoint.path,
        model_type=checkpoint.model_config["model_type"] if has_config else "unknown",
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        damp_percent=config.damp_percent,
        checkpoint_format=config.checkpoint_format,
        zeros=config.zeros,
        size_bytes=checkpoint.size_bytes,
        quantized_layers=len(checkpoint.layers),
        exllama=ask_exllama(checkpoint, kernels),
        template=TemplateReport(template.name, template.source, tuple(template.stop)),
        dataset=dataset if isinstance(dataset, str) else None,
        seq_len=seq_len if isinstance(seq_len, int) else None,
        sources=config.sources,
        warnings=warnings,
    )
