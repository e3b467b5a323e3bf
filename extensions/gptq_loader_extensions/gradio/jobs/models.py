"""Hold a page's model, and load another in its place: what every holder of one has in common.

`LocalModels` holds one in this process; `ServerModels` asks a server that has its own queue.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.system.memory import resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_extensions.gradio.storage.catalog import Entry
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.planning.plan import Plan

__all__ = [
    "WAIT_SECONDS",
    "Listener",
    "Loaded",
    "Models",
    "NoModelLoaded",
    "Planned",
    "Prompt",
    "Ready",
    "Stopped",
    "check_stopped",
    "planned",
]

T = TypeVar("T")
WAIT_SECONDS = 0.2  # between two looks whether a load that waits for replies was stopped


class Stopped(GPTQLoaderError):
    """A person ended a load or a measurement."""

    def __init__(self) -> None:
        super().__init__("it was stopped", hint="begin again")


class NoModelLoaded(GPTQLoaderError):
    """Something was asked of a model where none is."""

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
class Prompt:
    """What a model is to go on with.

    Attributes:
        ids: its tokens.
        stop: the texts that end a reply.
        warning: what a user should know, or "".
    """

    ids: Sequence[int]
    stop: Sequence[str] = ()
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A prompt is in its turn: the reply's pieces follow.

    Attributes:
        prompt_tokens: how many tokens the prompt has.
        context: how many the prompt and the reply may have together.
        warning: what a user should know, or "".
    """

    prompt_tokens: int
    context: int
    warning: str = ""


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
        entry: Entry,
        options: LoadOptions,
        tell: Callable[[Progress], None],
        *,
        cancel: threading.Event | None = None,
    ) -> Loaded:
        """Load a model in place of the one before, once its replies have ended.

        Raises:
            Stopped: `cancel` was set; until the first weights are read the old one stays.
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        cancel = cancel or threading.Event()
        load = planned(entry, options, tell, cancel=cancel, environ=self._environ)

        def replace() -> Loaded:
            loaded = self.loaded
            check_memory(entry.name, load.plan, replaced=loaded.model.plan if loaded else None)
            before: int | None = None

            def run() -> LoadedModel:
                nonlocal before
                before = resident_memory()
                return load.run()

            model = self._replace(entry.name, run)
            self._loaded = Loaded(entry.name, model, options, before, resident_memory())
            return self._loaded

        return self._run_alone(replace, tell, cancel)

    def unload(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        self._run_alone(self._free, lambda _: None, threading.Event())

    @abstractmethod
    def ask(
        self,
        prepare: Callable[[LoadedModel], Prompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[Ready | Piece]:
        """Answer a prompt in its turn: `Ready` first, then the pieces.

        Raises:
            GPTQLoaderError: no model is loaded, or it does not take this prompt.
        """

    @abstractmethod
    def use(self, act: Callable[[LoadedModel], T]) -> T:
        """Do something short with the model, which stays loaded meanwhile.

        Raises:
            GPTQLoaderError: no model is loaded.
        """

    @abstractmethod
    def _run_alone(
        self, act: Callable[[], T], tell: Callable[[Progress], None], cancel: threading.Event
    ) -> T:
        """Do something once no reply is written, and let none begin meanwhile.

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
class Planned:
    """A load that its headers allow.

    Attributes:
        plan: what will run.
        run: loads it.
    """

    plan: Plan
    run: Callable[[], LoadedModel]


def planned(
    entry: Entry,
    options: LoadOptions,
    tell: Callable[[Progress], None],
    *,
    cancel: threading.Event,
    environ: Mapping[str, str] = os.environ,
) -> Planned:
    """Plan a load before anything is unloaded for it.

    Raises:
        Stopped: `cancel` was set.
        GPTQLoaderError: its headers show that it cannot be loaded so.
    """
    import gptq_loader_plugin as gptq

    plugins = gptq.Plugins(Listener(tell, cancel), installed=True, environ=environ)
    plan = gptq.explain(entry.target, options=options, plugins=plugins)
    check_stopped(cancel)

    def run() -> LoadedModel:
        return gptq.load(entry.target, options=options, plugins=plugins)

    return Planned(plan, run)


class Listener:
    """Pass on how far a load has come, and end it between two layers.

    Args:
        tell: told how far it is.
        cancel: ends it once it is set.
    """

    def __init__(self, tell: Callable[[Progress], None], cancel: threading.Event) -> None:
        self._tell, self._cancel = tell, cancel

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Pass it on.

        Raises:
            Stopped: `cancel` was set.
        """
        check_stopped(self._cancel)
        self._tell(progress)


def check_stopped(cancel: threading.Event) -> None:
    """End a load that a person has stopped.

    Raises:
        Stopped: `cancel` was set.
    """
    if cancel.is_set():
        raise Stopped
