"""The command that measures how kernels run best on this machine's GPU: tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import LayerSpec
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["add_to", "tune_kernels"]

# Without a checkpoint: the layers of Llama-2-7B, 4-bit in groups of 128, as most checkpoints are.
USUAL = ((4096, 4096), (4096, 11008), (11008, 4096))


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Measure on this GPU how kernels run best, and keep it.")(reported(tune))


def tune(
    reference: Annotated[
        str | None,
        typer.Argument(metavar="REF", help="Measure this checkpoint's layers; else Llama-2-7B's."),
    ] = None,
    *,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:1.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Measure on this GPU how kernels run best, and keep it for every later load."""
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.plugins import Plugins

    where = find_device(device)
    if where.type == "cpu" or not where.present:
        raise OptionInvalid(
            f"there is no GPU here to measure on: this is {where}"
            if where.present
            else f"{where} is not on this machine, so nothing can be measured on it",
            hint="run it on the machine with the GPU; loading works without it",
        )
    bars = ProgressBars()
    plugins = Plugins(bars, installed=True)
    try:
        layers = _layers(reference, plugins, revision)
        results = tune_kernels(layers, where, plugins)
    finally:
        bars.close()
    if as_json:
        print_json({"device": str(where), "gpu": where.name, "kernels": results})
        return
    for name, words in results.items():
        typer.echo(f"{name}: {words}")


def tune_kernels(layers: Sequence[LayerSpec], device: Device, plugins: Plugins) -> dict[str, str]:
    """Let every kernel that can be tuned measure the layers it accepts; return what each found.

    Raises:
        OptionInvalid: no kernel that can be tuned accepts any of the layers.
    """
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.kernel import Tunable
    from gptq_loader_plugin.verdict import Accepted

    results: dict[str, str] = {}
    reasons: list[str] = []
    for kernel in plugins.kernels():
        if not isinstance(kernel, Tunable):
            continue
        verdicts = [(layer, kernel.consider(layer, device)) for layer in layers]
        taken = [layer for layer, verdict in verdicts if isinstance(verdict, Accepted)]
        if taken:
            results[kernel.name] = kernel.tune(taken, device, plugins.progress)
        elif verdicts and not isinstance(declined := verdicts[0][1], Accepted):
            reasons.append(f"{kernel.name}: {declined.reason}")
    if not results:
        raise OptionInvalid(
            f"no kernel that can be tuned runs these layers on {device}"
            + "".join(f"; {reason}" for reason in reasons),
            hint="ask gptq-loader explain which kernel runs them; it needs no tuning",
        )
    return results


def _layers(reference: str | None, plugins: Plugins, revision: str | None) -> list[LayerSpec]:
    from gptq_loader_plugin.checkpoint.architectures.translate import translate
    from gptq_loader_plugin.checkpoint.reader import open_checkpoint
    from gptq_loader_plugin.kernel import LayerSpec
    from gptq_loader_plugin.reference import resolve

    if reference is not None:
        path = resolve(reference, plugins=plugins, revision=revision)
        checkpoint = translate(open_checkpoint(path, plugins.readers()))
        layers = list(checkpoint.layers.values())
        checkpoint.close()
        return layers
    return [
        LayerSpec(
            name=f"{rows} to {columns}",
            in_features=rows,
            out_features=columns,
            bits=4,
            group_size=128,
            desc_act=False,
            sym=True,
            groups=rows // 128,
            group_rows=(128, 128),
            group_unit=128,
            zero_range=(8, 8),
        )
        for rows, columns in USUAL
    ]
