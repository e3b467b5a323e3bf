"""What a host plugin offers: a way for another program to use loaded models."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Host"]


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
