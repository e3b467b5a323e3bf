"""Load a model for a page: show what it is, what will run, the progress and the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.jobs.models import ProgressListener, Stopped
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.views.facts import facts_html
from gptq_loader_extensions.gradio.views.plan_view import memory_html, memory_of, plan_html
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.gradio.jobs.models import Loaded, Models
    from gptq_loader_extensions.gradio.storage.catalog import CatalogEntry
    from gptq_loader_plugin.catalog.report import CheckpointReport
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["LoadView", "describe", "describe_loaded", "load_with_progress"]


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a page shows of a load as it goes on; None leaves a part as it was.

    Attributes:
        progress: the progress, or the outcome.
        facts: the checkpoint's parameters.
        plan: the kernels and the memory.
        running: whether it goes on.
        loaded: whether it ended with the model loaded.
    """

    progress: str
    facts: str | None = None
    plan: str | None = None
    running: bool = True
    loaded: bool = False


def load_with_progress(
    models: Models, entry: CatalogEntry, options: LoadOptions, cancel: threading.Event
) -> Iterator[LoadView]:
    """Load a model in place of the one before; an error is the last view."""
    before = models.loaded
    yield LoadView(progress_bar(Progress("checkpoint", 0, 0, detail=entry.name)))
    try:
        for described in run_with_progress(partial(describe, entry, options, cancel)):
            if isinstance(described, Finished):
                waiting = progress_bar(Progress("torch", 0, 0, detail=entry.name))
                yield LoadView(waiting, *described.value)
            else:
                yield LoadView(progress_bar(described))
        for event in run_with_progress(partial(models.load, entry, options, cancel=cancel)):
            if isinstance(event, Finished):
                text = f"<p class='done'>Loaded in {event.seconds:.1f} s.</p>"
                plan = _loaded_plan(event.value)
                yield LoadView(text, plan=plan, running=False, loaded=True)
            else:
                yield LoadView(progress_bar(event))
    except Stopped:
        text = f"<p class='done'>Stopped. {escape(_now_loaded(before, models.loaded))}</p>"
        yield LoadView(text, running=False)
    except (GPTQLoaderError, MemoryError, RuntimeError, OSError) as error:
        text = format_error(error)
        if before is not None:
            text += f" {_now_loaded(before, models.loaded)}"
        yield LoadView(alert(text), running=False)


def _now_loaded(before: Loaded | None, loaded: Loaded | None) -> str:
    """Describe what is loaded after a load that failed or was stopped."""
    if loaded is not None:
        return f"{loaded.name} is still loaded."
    unloaded = "" if before is None else f": {before.name} was unloaded for it"
    return f"No model is loaded now{unloaded}."


def describe(
    entry: CatalogEntry,
    options: LoadOptions,
    cancel: threading.Event,
    on_progress: Callable[[Progress], None],
) -> tuple[str, str]:
    """Show what a checkpoint is, and what would run it; no weights are read.

    Raises:
        Stopped: `cancel` was set.
        GPTQLoaderError: it cannot be loaded.
    """
    import gptq_loader_plugin as gptq

    plugins = gptq.Plugins(ProgressListener(on_progress, cancel), installed=True)
    report = gptq.inspect(entry.target, plugins=plugins)
    plan = gptq.explain(
        entry.target, device=options.device, backend=options.backend, plugins=plugins
    )
    return facts_html(report), _plan_with_memory(plan, context=options.context)


def describe_loaded(loaded: Loaded) -> tuple[str, str]:
    """Show what the loaded model's checkpoint is, and what runs it.

    Raises:
        GPTQLoaderError: the checkpoint is gone.
    """
    import gptq_loader_plugin as gptq

    report: CheckpointReport = gptq.inspect(loaded.model.plan.path)
    return facts_html(report), _loaded_plan(loaded)


def _loaded_plan(loaded: Loaded) -> str:
    """Draw the plan of a loaded model, with the memory it takes."""
    plan = loaded.model.plan
    memory = memory_of(plan, context=loaded.model.context)
    return memory_html(memory, before=loaded.before, after=loaded.after) + plan_html(plan)


def _plan_with_memory(plan: Plan, *, context: int | None) -> str:
    return memory_html(memory_of(plan, context=context)) + plan_html(plan)
