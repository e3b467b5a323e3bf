"""Load a model for a page: say what it is, what will run, how far the load is, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.error_messages import alert, as_words
from gptq_loader_extensions.gradio.jobs.models import Listener, Stopped
from gptq_loader_extensions.gradio.jobs.progress import Done, progress_bar, watched
from gptq_loader_extensions.gradio.views.facts import facts_html
from gptq_loader_extensions.gradio.views.plan_view import memory_html, memory_of, plan_html
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.gradio.jobs.models import Loaded, Models
    from gptq_loader_extensions.gradio.storage.catalog import Entry
    from gptq_loader_plugin.catalog.report import CheckpointReport
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["LoadView", "describe", "describe_loaded", "load_watched"]


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a page shows of a load at one moment; None leaves a part as it was.

    Attributes:
        progress: how far it is, or how it ended.
        facts: the checkpoint's parameters.
        plan: the kernels and the memory.
        running: whether it goes on.
        stopped: whether a person ended it.
    """

    progress: str
    facts: str | None = None
    plan: str | None = None
    running: bool = True
    stopped: bool = False


def load_watched(
    models: Models, entry: Entry, options: LoadOptions, cancel: threading.Event
) -> Iterator[LoadView]:
    """Load a model in place of the one before; every error ends in words."""
    before = models.loaded
    yield LoadView(progress_bar(Progress("checkpoint", 0, 0, detail=entry.name)))
    try:
        for looked in watched(lambda tell: describe(entry, options, tell, cancel)):
            if isinstance(looked, Done):
                waiting = progress_bar(Progress("weights", 0, 0, detail=entry.name))
                yield LoadView(waiting, *looked.value)
            else:
                yield LoadView(progress_bar(looked))
        for event in watched(lambda tell: models.load(entry, options, tell, cancel=cancel)):
            if isinstance(event, Done):
                said = f"<p class='done'>Loaded in {event.seconds:.1f} s.</p>"
                yield LoadView(said, plan=_loaded_plan(event.value), running=False)
            else:
                yield LoadView(progress_bar(event))
    except Stopped:
        said = f"<p class='done'>Stopped. {escape(_now(before, models.loaded))}</p>"
        yield LoadView(said, running=False, stopped=True)
    except (GPTQLoaderError, MemoryError, RuntimeError, OSError) as error:
        words = as_words(error)
        if before is not None:
            words += f" {_now(before, models.loaded)}"
        yield LoadView(alert(words), running=False)


def _now(before: Loaded | None, loaded: Loaded | None) -> str:
    """Say what is loaded after a load that came to nothing."""
    if loaded is not None:
        return f"{loaded.name} is still loaded."
    gone = "" if before is None else f": {before.name} was unloaded for it"
    return f"No model is loaded now{gone}."


def describe(
    entry: Entry,
    options: LoadOptions,
    tell: Callable[[Progress], None],
    cancel: threading.Event,
) -> tuple[str, str]:
    """Say what a checkpoint is, and what would run it; reads no weights.

    Raises:
        Stopped: `cancel` was set.
        GPTQLoaderError: it cannot be loaded.
    """
    import gptq_loader_plugin as gptq

    plugins = gptq.Plugins(Listener(tell, cancel), installed=True)
    report = gptq.inspect(entry.target, plugins=plugins)
    plan = gptq.explain(
        entry.target, device=options.device, backend=options.backend, plugins=plugins
    )
    return facts_html(report), _planned(plan, context=options.context)


def describe_loaded(loaded: Loaded) -> tuple[str, str]:
    """Say what the loaded model's checkpoint is, and what runs it.

    Raises:
        GPTQLoaderError: the checkpoint is not there any more.
    """
    import gptq_loader_plugin as gptq

    report: CheckpointReport = gptq.inspect(loaded.model.plan.path)
    return facts_html(report), _loaded_plan(loaded)


def _loaded_plan(loaded: Loaded) -> str:
    """Draw the plan of a loaded model, with the memory it took."""
    plan = loaded.model.plan
    memory = memory_of(plan, context=loaded.model.context)
    return memory_html(memory, before=loaded.before, after=loaded.after) + plan_html(plan)


def _planned(plan: Plan, *, context: int | None) -> str:
    return memory_html(memory_of(plan, context=context)) + plan_html(plan)
