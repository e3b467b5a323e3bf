"""Show what a checkpoint is: each parameter with the file or the tensors that it was read from."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.report import CheckpointReport

__all__ = ["facts_html"]


def facts_html(report: CheckpointReport) -> str:
    """Draw the table of a checkpoint's parameters."""
    groups = "none" if report.group_size < 0 else f"{report.group_size} rows"
    exllama = f"{'yes' if report.exllama.compatible else 'no'}: {report.exllama.reason}"
    stops = ", ".join(report.template.stop)
    rows = [
        ("Bits", str(report.bits), "bits"),
        ("Group size", groups, "group_size"),
        ("Act-order", _yes(report.desc_act), "desc_act"),
        ("Symmetric", _yes(report.sym), "sym"),
        ("Damping", _or_unknown(report.damp_percent), "damp_percent"),
        ("Calibrated on", _or_unknown(report.dataset), "dataset"),
        ("Calibration length", _or_unknown(report.seq_len), "model_seqlen"),
        ("Format", f"{report.checkpoint_format}, zeros {report.zeros}", "checkpoint_format"),
        ("Layers", f"{report.quantized_layers:,} quantised, of a {report.model_type}", ""),
        ("Weights", f"{write_size(report.size_bytes)} on disk", ""),
        ("ExLlama", exllama, ""),
        ("Template", report.template.name + (f", stops at {stops}" if stops else ""), ""),
    ]
    named = {"Template": report.template.source, "Layers": "tensors", "Weights": "files"}
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td>"
        f"<td>{escape(report.sources.get(field) or named.get(name, ''))}</td></tr>"
        for name, value, field in rows
    ]
    notes = "".join(
        f"<p role='note'>{escape(warning)}</p>" for warning in dict.fromkeys(report.warnings)
    )
    return (
        "<table><caption>Read from the checkpoint</caption><thead><tr><th scope='col'>Parameter"
        "</th><th scope='col'>Value</th><th scope='col'>Source</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>{notes}"
    )


def _yes(value: bool) -> str:  # noqa: FBT001 - the value itself
    return "yes" if value else "no"


def _or_unknown(value: object) -> str:
    return "not said" if value is None else str(value)
