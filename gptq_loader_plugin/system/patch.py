"""Replace attributes of another program's modules and classes, and put them back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ABSENT", "Patch", "apply_all", "patch_imports", "undo_all"]

ABSENT: Final = object()


class Patch:
    """A replacement for one attribute of a module, a class or an object, or for one key of a dict.

    Nothing is changed until it is applied, so all that a program needs can be made first, and what
    a program lacks is found before any of it is changed.

    Args:
        owner: the module, class, object or dict.
        name: the attribute or the key.
        replacement: the value to put there.

    Attributes:
        original: the value that was there; ABSENT where there was none.
    """

    def __init__(self, owner: Any, name: str, replacement: object) -> None:  # noqa: ANN401 - anything with attributes
        self.owner = owner
        self.name = name
        self.replacement = replacement
        self.original = self._current()

    def apply(self) -> None:
        """Put the replacement there; a second time changes nothing."""
        self._set(self.replacement)

    def undo(self) -> None:
        """Put back the original, unless something else has replaced the replacement."""
        if self.original is ABSENT or self._current() is self.replacement:
            self._set(self.original)

    def _current(self) -> object:
        own: Mapping[str, object] = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return own.get(self.name, ABSENT)

    def _set(self, value: object) -> None:
        if isinstance(self.owner, dict):
            if value is ABSENT:
                self.owner.pop(self.name, None)
            else:
                self.owner[self.name] = value
        elif value is not ABSENT:
            setattr(self.owner, self.name, value)
        elif self._current() is not ABSENT:
            delattr(self.owner, self.name)


def apply_all(patches: Sequence[Patch]) -> None:
    """Apply patches in order; where one cannot be applied, undo those before it."""
    for number, patch in enumerate(patches):
        try:
            patch.apply()
        except BaseException:
            undo_all(patches[:number])
            raise


def undo_all(patches: Sequence[Patch]) -> None:
    """Undo patches, the last one first."""
    for patch in reversed(patches):
        patch.undo()


def patch_imports(original: object, replacement: object) -> list[Patch]:
    """Make a patch for every module that has `original`: the one that defines it and its importers.

    `from models import load` copies a function into another module, where a replacement in `models`
    does not reach it. Modules imported later copy the replacement.
    """
    return [
        Patch(module, name, replacement)
        for module in list(sys.modules.values())
        for name, value in list((getattr(module, "__dict__", None) or {}).items())
        if value is original
    ]
