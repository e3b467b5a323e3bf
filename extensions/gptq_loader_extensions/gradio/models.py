"""Hold the model that a page talks to, put another in its place, and ask it.

`Models` is all that the page needs: a server that has its own queue implements it too.
"""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from gptq_loader_extensions.gradio.machine import free_bytes, resident_bytes
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.plan import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_extensions.gradio.catalog import Entry
    from gptq_loader_plugin.generate import Piece
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.options import GenerateOptions
    from gptq_loader_plugin.plan import Plan

__all__ = [
    "Listener",
    "LoadOptions",
    "Loaded",
    "Models",
    "OneModel",
    "Planned",
    "Prompt",
    "Ready",
    "check_memory",
    "planned",
]

T = TypeVar("T")
SPARE = 1.1  # of a model's weights: what a prompt's activations and the load itself take besides


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model; None leaves the choice to the loader.

    Attributes:
        device: where it runs.
        backend: the kernel, or fail.
        context: the longest sequence.
        template: the chat template's name.
    """

    device: str | None = None
    backend: str | None = None
    context: int | None = None
    template: str | None = None


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
    options: LoadOptions = LoadOptions()
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
        model: the name of the model that answers.
        prompt_tokens: how many tokens the prompt has.
        context: how many the prompt and the reply may have together.
        warning: what a user should know, or "".
    """

    model: str
    prompt_tokens: int
    context: int
    warning: str = ""


class Models(Protocol):
    """One model at a time, shared by everyone who asks."""

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory."""
        ...

    def put(self, entry: Entry, options: LoadOptions, tell: Callable[[Progress], None]) -> Loaded:
        """Load a model in place of the one before, whose replies may end first.

        Raises:
            GPTQLoaderError: it cannot be loaded. What `explain` finds wrong leaves the old one.
        """
        ...

    def drop(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        ...

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
        ...

    def use(self, act: Callable[[LoadedModel], T]) -> T:
        """Do something short with the model, which stays loaded meanwhile.

        Raises:
            GPTQLoaderError: no model is loaded.
        """
        ...


class OneModel:
    """A model in this process; replies run at once, and a change of the model waits for them.

    Args:
        loaded: the first model.
        environ: where the plugins' settings are looked up.
    """

    def __init__(
        self, loaded: Loaded | None = None, *, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._loaded = loaded
        self._environ = environ
        self._changed = threading.Condition()
        self._replies = 0
        self._changing = False

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory."""
        return self._loaded

    def put(self, entry: Entry, options: LoadOptions, tell: Callable[[Progress], None]) -> Loaded:
        """Load a model in place of the one before.

        Raises:
            GPTQLoaderError: it cannot be loaded; what its headers show leaves the old one there.
        """
        load = planned(entry, options, tell, environ=self._environ)
        with self._change(tell):
            check_memory(entry, load.plan, self._loaded)
            self._free()
            before = resident_bytes()
            model = load.run()
            self._loaded = Loaded(entry.name, model, options, before, resident_bytes())
            return self._loaded

    def drop(self) -> None:
        """Free the memory of the model, once its replies have ended."""
        with self._change(lambda _: None):
            self._free()

    def ask(
        self,
        prepare: Callable[[LoadedModel], Prompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[Ready | Piece]:
        """Answer a prompt: `Ready` first, then the pieces.

        Raises:
            GPTQLoaderError: no model is loaded, or it does not take this prompt.
        """
        with self._reply() as loaded:
            prompt = prepare(loaded.model)
            yield Ready(loaded.name, len(prompt.ids), loaded.model.context, prompt.warning)
            yield from loaded.model.stream_ids(prompt.ids, options, stop=prompt.stop, cancel=cancel)

    def use(self, act: Callable[[LoadedModel], T]) -> T:
        """Do something short with the model, which stays loaded meanwhile.

        Raises:
            GPTQLoaderError: no model is loaded.
        """
        with self._reply() as loaded:
            return act(loaded.model)

    @contextmanager
    def _reply(self) -> Iterator[Loaded]:
        """Keep the model loaded, inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._changing)
            loaded = self._loaded
            if loaded is None:
                raise GPTQLoaderError("no model is loaded", hint="choose one in the Model tab")
            self._replies += 1
        try:
            yield loaded
        finally:
            with self._changed:
                self._replies -= 1
                self._changed.notify_all()

    @contextmanager
    def _change(self, tell: Callable[[Progress], None]) -> Iterator[None]:
        """Have the model to oneself: no reply runs, and new ones wait."""
        with self._changed:
            self._changed.wait_for(lambda: not self._changing)
            self._changing = True
            if self._replies:
                tell(Progress("waiting", 0, 0, "replies", "a reply is still being written"))
            self._changed.wait_for(lambda: not self._replies)
        try:
            yield
        finally:
            with self._changed:
                self._changing = False
                self._changed.notify_all()

    def _free(self) -> None:
        if self._loaded is None:
            return
        from gptq_loader_plugin.memory import release_freed

        loaded, self._loaded = self._loaded, None
        loaded.model.close()
        del loaded
        gc.collect()
        release_freed()


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
    environ: Mapping[str, str] = os.environ,
) -> Planned:
    """Plan a load before anything is unloaded for it.

    Raises:
        GPTQLoaderError: its headers show that it cannot be loaded so.
    """
    import gptq_loader_plugin as gptq

    plugins = gptq.Plugins(Listener(tell), installed=True, environ=environ)
    plan = gptq.explain(
        entry.target, device=options.device, backend=options.backend, plugins=plugins
    )

    def run() -> LoadedModel:
        return gptq.load(
            entry.target,
            device=options.device,
            backend=options.backend,
            context=options.context,
            template=options.template,
            plugins=plugins,
        )

    return Planned(plan, run)


class Listener:
    """Pass on how far a load has come."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Pass it on."""
        self._tell(progress)


def check_memory(entry: Entry, plan: Plan, loaded: Loaded | None) -> None:
    """Refuse a model that would not fit, before the system ends this process for it.

    Raises:
        GPTQLoaderError: says what it takes and what there is.
    """
    free = free_bytes()
    if plan.device.type != "cpu" or free is None:
        return
    if loaded is not None and loaded.model.plan.device.type == "cpu":
        free += loaded.model.plan.weight_bytes
    needed = int(plan.weight_bytes * SPARE)
    if needed > free:
        raise GPTQLoaderError(
            f"{entry.name} needs {write_size(needed)} of memory, and {write_size(free)} is free",
            hint="choose a smaller one: fewer bits, or a smaller model",
        )
