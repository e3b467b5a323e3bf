"""The command that keeps replies under several sampling settings: sample."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.options import JSON, System, load_options
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.sampling.report import Report
    from gptq_loader_plugin.sampling.settings import Setting

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Keep replies under several sampling settings, to read side by side.")(
        reported(sample)
    )


@load_options("device", "backend", "dtype", "template", "revision", "context", "check")
def sample(
    references: Annotated[
        list[str],
        typer.Argument(metavar="REF...", help="Checkpoints, and .json files of earlier reports."),
    ],
    *,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A .jsonl of one JSON string a line, or a text; .gz too."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Settings, as Open-Assistant writes them; else its three."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="The folder for a report of each checkpoint.")
    ] = Path(),
    page: Annotated[
        Path | None, typer.Option("--html", help="Write all reports to this page, side by side.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Replies where a setting samples.")
    ] = 2,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Answer so many prompts at most.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="The most tokens of a reply.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first reply.")] = 42,
    system: System = None,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Answer prompts under several sampling settings, and keep the replies to read side by side.

    Each checkpoint's report has the form of Open-Assistant's, whose viewer reads it; --html writes
    all of them to one page. An interrupted run goes on where it stopped.
    """
    from gptq_loader_plugin.sampling.report import read_report
    from gptq_loader_plugin.sampling.settings import read_prompts, read_settings, usual_settings
    from gptq_loader_plugin.sampling.viewer import viewer_page
    from gptq_loader_plugin.system.atomic_file import write_whole

    changes = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    settings = read_settings(config, **changes) if config else usual_settings(**changes)
    reports: list[Report] = []
    files: list[str] = []
    for reference in references:
        if reference.endswith(".json"):
            reports.append(read_report(Path(reference)))
            files.append(reference)
            continue
        if prompts is None:
            raise OptionInvalid("there are no prompts to answer", hint="name a file: --prompts")
        options = {"samples": samples, "seed": seed}
        report, file = _answer(
            reference, read_prompts(prompts, limit=limit), settings, load, options,
            prompts_file=prompts, config=config, out=out, limit=limit, system=system,
        )  # fmt: skip
        reports.append(report)
        files.append(str(file))
        gc.collect()
    if page is not None:
        write_whole(page, viewer_page(reports))
        say(f"written: {page}")
    if as_json:
        print_json({"reports": files, "page": None if page is None else str(page)})
        return
    for written in files:
        typer.echo(written)


def _answer(
    reference: str,
    prompts: list[str],
    settings: tuple[Setting, ...],
    load: LoadOptions,
    options: dict[str, Any],
    *,
    prompts_file: Path,
    config: Path | None,
    out: Path,
    limit: int | None,
    system: str | None,
) -> tuple[Report, Path]:
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.cli.reply import system_message
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.sampling.report import report_args, report_name
    from gptq_loader_plugin.sampling.run import sample_replies

    file = out / report_name(reference, config)
    bars = ProgressBars()
    try:
        plugins = Plugins(bars, installed=True)
        with gptq.load(reference, options=load, plugins=plugins) as model:
            args = report_args(
                model=reference, prompts=prompts_file, report=file, samples=options["samples"],
                limit=limit, config=config, device=str(model.plan.device),
                dtype=model.plan.dtype, seed=options["seed"], template=model.template.name,
            )  # fmt: skip
            messages = system_message(model, system)
            report = sample_replies(
                model, prompts, settings, file, name=reference, args=args,
                system=messages[0]["content"] if messages else None,
                progress=plugins.progress, **options,
            )  # fmt: skip
    finally:
        bars.close()
    return report, file
