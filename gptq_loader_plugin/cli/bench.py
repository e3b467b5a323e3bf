"""The command that measures: bench."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import JSON, Checkpoint, load_options
from gptq_loader_plugin.cli.output import print_json, reported, say, show
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.measure.speed import Rates, Speed

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Measure a load, a prompt, a reply and their memory.")(reported(bench))


@load_options()
def bench(
    reference: Checkpoint,
    *,
    tokens: Annotated[int, typer.Option("--tokens", help="The reply's length.")] = 128,
    prompt: Annotated[int, typer.Option("--prompt", help="The prompt's length, in tokens.")] = 512,
    depth: Annotated[
        int, typer.Option("--depth", help="Tokens of the prompt before the reply.")
    ] = 16,
    rounds: Annotated[int, typer.Option("--rounds", help="How often to measure.")] = 3,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Measure a load, a prompt, a reply and the memory they take, and say which kernels run."""
    import torch
    import transformers  # noqa: F401 - so that its import is no part of the load

    from gptq_loader_plugin.measure.speed import measure_speed, peak_memory

    before = peak_memory()
    began = time.monotonic()
    model = load_with_bars(reference, load)
    seconds = time.monotonic() - began
    with model:
        say(model.plan.headline())
        speed = measure_speed(
            model, prompt=prompt, tokens=tokens, rounds=rounds, depth=depth, progress=say
        )
    where = model.plan.device
    name = where.name or platform.processor() or platform.machine()
    data: dict[str, Any] = {
        "reference": reference,
        "path": str(model.plan.path),
        "device": str(where),
        "device_name": name,
        "device_features": sorted(where.features),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": model.plan.dtype,
        "kernels": model.plan.kernels(),
        "why": _why(model),
        "notes": list(model.notes),
        "load_seconds": seconds,
        "prompt_tokens": prompt,
        "reply_tokens": tokens,
        "reply_depth": depth,
        "rounds": rounds,
        "peak_bytes_before": before if where.type == "cpu" else None,
        **asdict(speed),
        "weight_bytes_per_second": speed.weight_rate,
        "share_of_memory": speed.weight_rate / speed.memory.median if speed.memory else None,
        "share_of_again": speed.weight_rate / speed.again.median if speed.again else None,
    }
    if as_json:
        print_json(data)
        return
    flags = f" ({' '.join(data['device_features'])})" if where.features else ""
    show(f"{reference} on {where}: {name}{flags}, {data['threads']} threads")
    for label, words in _rows(data, speed):
        show(f"  {label:<24} {words}")
    show(model.explain().partition("\n")[2])


def _why(model: LoadedModel) -> dict[str, str]:
    """Return what each kernel in use said when it accepted its first layer."""
    notes: dict[str, str] = {}
    for choice in model.plan.choices:
        notes.setdefault(choice.chosen.kernel, choice.chosen.note)
    return notes


def _rows(data: dict[str, Any], speed: Speed) -> list[tuple[str, str]]:
    """Lay the result out for a person."""
    rows = [
        ("load", f"{data['load_seconds']:.1f} s"),
        (f"prompt of {data['prompt_tokens']}", _rate(speed.prompt)),
        (f"reply of {data['reply_tokens']} after {data['reply_depth']:,}", _rate(speed.reply)),
    ]
    peak, before = data["peak_bytes"], data["peak_bytes_before"]
    if peak is not None:
        of_it = "" if before is None else f", {write_size(before)} of it before the load"
        rows.append(("most memory held", f"{write_size(peak)}{of_it}"))
    weights = f"{write_size(speed.token_bytes)} of weights, {_gigabytes(speed.weight_rate)}"
    rows.append(("read for each token", weights))
    if speed.memory is not None and speed.again is not None:
        rows += [
            ("of memory's speed", _share(data["share_of_memory"], speed.memory)),
            ("of a cache's speed", _share(data["share_of_again"], speed.again)),
        ]
    return rows


def _rate(rates: Rates) -> str:
    return f"{rates.median:,.1f} tokens a second, at best {rates.best:,.1f}"


def _share(share: float, rates: Rates) -> str:
    return f"{100 * share:.0f} % of {_gigabytes(rates.median)}"


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s"
