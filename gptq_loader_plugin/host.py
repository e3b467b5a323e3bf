"""What a host plugin offers: a way for another program to use loaded models.

A host may also say whether its program is here (`Checkable`); `gptq-loader plugins` asks it. One
that serves a checkpoint to OpenAI's clients in its own way is an `Engine`, which `gptq-loader serve
--engine` names; one whose page the server can show beside its API is `Mountable`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, runtime_checkable

__all__ = [
    "Checkable",
    "Engine",
    "Host",
    "Mountable",
    "NotReady",
    "Readiness",
    "Ready",
    "check_package",
]


@runtime_checkable
class Host(Protocol):
    """A way into a host, by the name users give it: "gradio", "transformers"."""

    @property
    def name(self) -> str:
        """The host's name."""
        ...

    def install(self, **options: object) -> object:
        """Make the host able to use us: open its page, or register with it."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A host that serves OpenAI's API by itself, as `gptq-loader serve --engine NAME` asks it to.

    Attributes:
        name: the host's name.
        takes: the options of `gptq-loader serve` it can follow, by the names of its parameters; a
            user who gives another one is told so.
    """

    @property
    def name(self) -> str:
        """The host's name."""
        ...

    @property
    def takes(self) -> frozenset[str]:
        """The options of `gptq-loader serve` that it can follow."""
        ...

    def serve(self, reference: str, **options: object) -> None:
        """Serve until Ctrl-C.

        Args:
            reference: what to serve, as the user wrote it.
            **options: those of `takes` that the user gave, and no others.

        Raises:
            PluginError: its program is not installed, or is one it does not know.
            OptionInvalid: it cannot serve so.
        """
        ...


@runtime_checkable
class Mountable(Protocol):
    """A host with a page that the server of the host "openai" shows at "/", behind its routes."""

    def mount(self, app: object, server: object) -> None:
        """Add the page to the server's application.

        Args:
            app: a `fastapi.FastAPI`.
            server: a `gptq_loader_extensions.openai.server.Server`: the model and its queue.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """The host can be used here.

    Attributes:
        program: what was found, such as "llm 0.36".
        note: what a user should know about it, or "".
    """

    program: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class NotReady:
    """The host cannot be used here, and why, in words for the user.

    Attributes:
        reason: what is missing or wrong.
        hint: what to do about it, in the imperative.
    """

    reason: str
    hint: str


Readiness = Ready | NotReady


@runtime_checkable
class Checkable(Protocol):
    """A host that can tell whether its program is here, is one it knows, and can be used."""

    def check(self) -> Readiness:
        """Look, without importing or starting the program."""
        ...


def check_package(
    package: str, *, oldest: str, newest: str, install: str | None = None
) -> Readiness:
    """Look for a host that is a Python package, by its metadata: nothing is imported.

    Args:
        package: its name, as pip knows it.
        oldest: the oldest version the host plugin was tried with; an older one is not ready.
        newest: the newest version it was tried with; a newer one is ready, with a note.
        install: what a user runs to get it; None is pip with the package's name.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        return NotReady(f"{package} is not installed", install or f"pip install {package}")
    if _numbers(installed) < _numbers(oldest):
        return NotReady(
            f"{package} {installed} is too old; {oldest} or newer is needed",
            install or f"pip install --upgrade {package}",
        )
    newer = _numbers(installed) > _numbers(newest)
    return Ready(
        f"{package} {installed}", f"newer than {newest}, the last one tried" if newer else ""
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Read the numbers of a version, as far as they are numbers: 5.6.0.dev0 is (5, 6)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
