"""The command that makes a GPTQ checkpoint: quantize."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptq_loader_plugin.cli.options import JSON
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.quantize.mix import CalibrationMix

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Quantise a model with GPTQ; an interrupted run goes on.")(
        reported(quantize)
    )


def quantize(  # noqa: PLR0913 - each is an option a user may want
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or a .gguf file.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write the checkpoint to.")
    ],
    *,
    bits: Annotated[int | None, typer.Option("--bits", help="2, 3, 4 or 8; else 4.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Input rows that share a scale, -1 for none; else 128."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="Bits by layer, to fit: 3.5bpw (of a weight), or 4GB of files."
        ),
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", help="Bits that --size chooses from; vLLM takes 4,8.")
    ] = "2,3,4,8",
    order: Annotated[
        str,
        typer.Option("--order", help="static, group-aware, act (few engines read it) or none."),
    ] = "static",
    desc_act: Annotated[
        bool,
        typer.Option("--desc-act/--no-desc-act", "--act-order", help="The same as --order act."),
    ] = False,
    effort: Annotated[
        str,
        typer.Option(
            "--effort",
            help="fast: GPTQ; standard: refined, and all scales tuned together where the model "
            "fits into memory; best: blocks tuned too.",
        ),
    ] = "standard",
    sym: Annotated[
        bool, typer.Option("--sym/--asym", help="Symmetric: more kernels can run it.")
    ] = True,
    damp: Annotated[float, typer.Option("--damp", help="Damping of the Hessian.")] = 0.01,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Calibration: a text, or a .jsonl of chats; else built in."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="A .yaml that lists data sets to mix; it may hold out."),
    ] = None,
    own_chats: Annotated[
        bool,
        typer.Option("--own-chats", help="Calibrate on chats the model writes: slower, better."),
    ] = False,
    samples: Annotated[int, typer.Option("--samples", help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sample.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens from one sample's start to the next; else spread."),
    ] = None,
    offset: Annotated[int, typer.Option("--offset", help="Tokens before the first sample.")] = 0,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="A text to measure the result on; else a short sample."),
    ] = None,
    checkpoint_format: Annotated[
        str | None,
        typer.Option("--format", help="gptq (zeros stored minus one) or gptq_v2; else by --sym."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="The most memory to take: 8GB; else what is free."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Quantise a model with GPTQ; an interrupted run goes on where it stopped."""
    import time

    from pydantic import ValidationError

    from gptq_loader_plugin.catalog.where import find_where
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.measure.perplexity import sample_text
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model
    from gptq_loader_plugin.quantize.mix import CalibrationMix
    from gptq_loader_plugin.system.paths import read_words
    from gptq_loader_plugin.system.units import parse_size

    fields: dict[str, Any] = {
        "bits": 4 if bits is None else bits,
        "group_size": 128 if group_size is None else group_size,
        "size": size,
        "widths": tuple(int(it) if it.strip().isdigit() else it for it in widths.split(",")),
        "order": "act" if desc_act else order,
        "effort": effort,
        "sym": sym,
        "damp_percent": damp,
        "samples": samples,
        "seq_len": seq_len,
        "stride": stride,
        "offset": offset,
        "checkpoint_format": checkpoint_format,
    }
    try:
        options = QuantizeOptions(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise OptionInvalid(
            f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ').lower()}",
            hint="see gptq-loader quantize --help",
        ) from error
    if size is not None and (bits is not None or group_size is not None):
        raise OptionInvalid(
            "--size chooses bits and groups by layer; --bits and --group-size give all the same",
            hint="leave them out; --widths 3,4 narrows the choice",
        )
    content = _calibration(text, calibration, own_chats=own_chats)
    held_out_text = (
        None if isinstance(content, CalibrationMix) and content.holds_out else sample_text()
    )
    if held_out is not None:
        held_out_text = read_words(held_out)
    bars = ProgressBars()

    def tell(line: str) -> None:
        bars.close()
        say(line)

    began = time.monotonic()
    try:
        listening = Plugins(bars, installed=True)
        folder = quantize_model(
            model,
            out,
            options=options,
            text=content,
            held_out=held_out_text,
            max_memory=None if max_memory is None else parse_size(max_memory),
            progress=listening.progress,
            tell=tell,
        )
    finally:
        bars.close()
    where = find_where(str(folder), plugins=listening)
    _report(folder, time.monotonic() - began, where, as_json=as_json)


def _calibration(
    text: Path | None, calibration: str | None, *, own_chats: bool
) -> Path | Literal["own"] | CalibrationMix | None:
    """Find the one thing to calibrate on."""
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.quantize.mix import read_mix

    given = {"--text": text, "--calibration": calibration, "--own-chats": own_chats}
    names = [name for name, value in given.items() if value not in (None, False)]
    if len(names) > 1:
        raise OptionInvalid(
            f"{' and '.join(names)} both say what to calibrate on", hint="give one of them"
        )
    if calibration is not None:
        mix = read_mix(calibration)
        if mix.unused:
            say(f"not used here: {', '.join(mix.unused)}")
        return mix
    if text is not None and not text.is_file():
        raise OptionInvalid(f"there is no file {text}", hint="name a text, or a .jsonl of chats")
    return "own" if own_chats else text


def _report(folder: Path, seconds: float, where: Sequence[Answer], *, as_json: bool) -> None:
    """Say what was made, how good it is, and who loads it."""
    from gptq_loader_plugin.catalog.engines.engine import engines_of
    from gptq_loader_plugin.checkpoint.config import read_json
    from gptq_loader_plugin.quantize.quality import QUALITY_FILE
    from gptq_loader_plugin.quantize.writer import left_of
    from gptq_loader_plugin.system.units import write_size

    left = left_of(folder)
    quality = read_json(folder / QUALITY_FILE)
    if as_json:
        data = {
            "path": str(folder),
            "seconds": round(seconds, 1),
            "not_quantized": left,
            "quality": {name: quality[name] for name in ("compared", "noise_floor")},
            "engines": [it.engine for it in where if it.takes],
            "bytes": quality["bytes"],
            "layer_widths": quality.get("widths", {}),
        }
        print_json({**data, **quality["options"]})
        return
    for name, why in left.items():
        say(f"not quantised: {name} ({why})")
    compared, floor = quality["compared"], quality["noise_floor"]
    say(
        f"KL divergence from the unquantised model: {compared['kl']:.4f} "
        f"± {compared['kl_error']:.4f}, where rounding to bfloat16 alone makes {floor['kl']:.1e}"
    )
    say(
        f"the same likeliest token: {compared['top1']:.1%} of {compared['tokens']:,}, "
        f"where rounding alone keeps {floor['top1']:.1%}"
    )
    say(f"{write_size(quality['bytes'])} of weights; each layer's error is in {QUALITY_FILE}")
    say(f"other programs that load it: {engines_of(where)}; why not another: gptq-loader where")
    say(f"quantised in {seconds:.0f} s; chat with it: gptq-loader chat {folder}")
    typer.echo(folder)
