"""Hold a page's model, and load another in its place: what every holder of one has in common.

`LocalModels` holds one in this process; `ServerModels` asks a server that has its own queue.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.system.memory import resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_extensions.gradio.storage.catalog import CatalogEntry
    from gptq_loader_plugin.chat.thinking import ThinkingMarks
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.planning.plan import Plan

__all__ = [
    "WAIT_SECONDS",
    "EncodedPrompt",
    "Loaded",
    "Models",
    "NoModelLoaded",
    "PlannedLoad",
    "ProgressListener",
    "ReplyStart",
    "Stopped",
    "check_stopped",
    "plan_load",
]

T = TypeVar("T")
WAIT_SECONDS = 0.2  # between two checks whether a load that waits for replies was cancelled


class Stopped(GPTQLoaderError):
    """A person ended a load or a measurement."""

    def __init__(self) -> None:
        super().__init__("stopped", hint="start it again")


class NoModelLoaded(GPTQLoaderError):
    """A request needs a model, and none is loaded."""

    def __init__(self) -> None:
        super().__init__("no model is loaded", hint="choose one in the Model tab")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        name: what a person calls it.
        model: the model.
        options: how it was loaded.
        before: the bytes this process held before the load, where known.
        after: the bytes it held afterwards.
    """

    name: str
    model: LoadedModel
    options: LoadOptions = field(default_factory=LoadOptions)
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as tokens.

    Attributes:
        ids: the tokens.
        stop: the texts that end a reply.
        warning: what a user should know, or "".
        marks: how the model marks a thought; None where it does not think.
        processors: change the logits before a token is picked.
        adapter: the LoRA adapter to write the reply with; None for the model alone.
    """

    ids: Sequence[int]
    stop: Sequence[str] = ()
    warning: str = ""
    marks: ThinkingMarks | None = None
    processors: Sequence[Any] = ()  # transformers' LogitsProcessor
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class ReplyStart:
    """The prompt's turn has come: the reply's pieces follow.

    Attributes:
        prompt_tokens: how many tokens the prompt has.
        context: how many the prompt and the reply may have together.
        warning: what a user should know, or "".
        marks: how the model marks a thought; None where it does not think.
        adapter: the LoRA adapter that writes the reply; None for the model alone.
    """

    prompt_tokens: int
    context: int
    warning: str = ""
    marks: ThinkingMarks | None = None
    adapter: str | None = None

    @classmethod
    def of(cls, prompt: EncodedPrompt, model: LoadedModel) -> ReplyStart:
        """Return the start of the reply to a prompt."""
        return cls(len(prompt.ids), model.context, prompt.warning, prompt.marks, prompt.adapter)


class Models(ABC):
    """One model at a time, shared by everyone who asks.

    Args:
        loaded: the first model.
        environ: where the plugins' settings are looked up.
    """

    def __init__(
        self, loaded: Loaded | None = None, *, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._loaded = loaded
        self._environ = environ

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory."""
        return self._loaded

    def load(
        self,
        entry: CatalogEntry,
        options: LoadOptions,
        on_progress: Callable[[Progress], None],
        *,
        cancel: threading.Event | None = None,
    ) -> Loaded:
        """Load a model in place of the one before, once its replies have ended.

        Raises:
            Stopped: `cancel` was set; until the first weights are read the old one stays.
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        cancel = cancel or threading.Event()
        planned = plan_load(entry, options, on_progress, cancel=cancel, environ=self._environ)

        def replace() -> Loaded:
            loaded = self.loaded
            check_memory(entry.name, planned.plan, replaced=loaded.model.plan if loaded else None)
            before: int | None = None

            def run() -> LoadedModel:
                nonlocal before
                before = resident_memory()
                return planned.run()

            model = self._replace(entry.name, run)
            self._loaded = Loaded(entry.name, model, options, before, resident_memory())
            return self._loaded

        return self._run_alone(replace, on_progress, cancel)

    def unload(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        self._run_alone(self._free, lambda _: None, threading.Event())

    @abstractmethod
    def stream(
        self,
        prepare: Callable[[LoadedModel], EncodedPrompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[ReplyStart | Piece]:
        """Generate the reply to a prompt in its turn: `ReplyStart` first, then the pieces.

        Raises:
            GPTQLoaderError: no model is loaded, or it does not take this prompt.
        """

    @abstractmethod
    def use(self, work: Callable[[LoadedModel], T]) -> T:
        """Run something short on the model, which stays loaded meanwhile.

        Raises:
            GPTQLoaderError: no model is loaded.
        """

    @abstractmethod
    def _run_alone(
        self,
        work: Callable[[], T],
        on_progress: Callable[[Progress], None],
        cancel: threading.Event,
    ) -> T:
        """Run work once no reply is being written, and let none begin meanwhile.

        Raises:
            Stopped: `cancel` was set before it began.
        """

    @abstractmethod
    def _replace(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:
        """Free the model, then load another."""

    @abstractmethod
    def _free(self) -> None:
        """Free the model, where there is one."""


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A load that the checkpoint's headers allow.

    Attributes:
        plan: what will run.
        run: loads it.
    """

    plan: Plan
    run: Callable[[], LoadedModel]


def plan_load(
    entry: CatalogEntry,
    options: LoadOptions,
    on_progress: Callable[[Progress], None],
    *,
    cancel: threading.Event,
    environ: Mapping[str, str] = os.environ,
) -> PlannedLoad:
    """Plan a load before the old model is unloaded.

    Raises:
        Stopped: `cancel` was set.
        GPTQLoaderError: its headers show that it cannot be loaded so.
    """
    import gptq_loader_plugin as gptq

    plugins = gptq.Plugins(ProgressListener(on_progress, cancel), installed=True, environ=environ)
    plan = gptq.explain(entry.target, options=options, plugins=plugins)
    check_stopped(cancel)
    options = replace(options, lora=dict(entry.adapters) or None)

    def run() -> LoadedModel:
        return gptq.load(entry.target, options=options, plugins=plugins)

    return PlannedLoad(plan, run)


class ProgressListener:
    """Report the progress of a load, and end it between two layers.

    Args:
        on_progress: called with the progress.
        cancel: ends it once it is set.
    """

    def __init__(self, on_progress: Callable[[Progress], None], cancel: threading.Event) -> None:
        self._on_progress, self._cancel = on_progress, cancel

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Report the progress.

        Raises:
            Stopped: `cancel` was set.
        """
        check_stopped(self._cancel)
        self._on_progress(progress)


def check_stopped(cancel: threading.Event) -> None:
    """End a load that a person has stopped.

    Raises:
        Stopped: `cancel` was set.
    """
    if cancel.is_set():
        raise Stopped
