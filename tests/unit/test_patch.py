"""What is patched in another program's modules is put back as it was."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gptq_loader_plugin.system.patch import ABSENT, Patch, apply_all, patch_imports, undo_all


class Owner:
    @classmethod
    def load(cls) -> str:
        return "original"


class Heir(Owner):
    pass


def module(**content: object) -> ModuleType:
    made = ModuleType("patched")
    vars(made).update(content)
    return made


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (module(load=len), "load"),
        (module(), "load"),
        (SimpleNamespace(load=None), "load"),
        ({"load": None}, "load"),
        ({}, "load"),
        (Owner, "load"),
        (Heir, "load"),
    ],
)
def test_what_is_undone_is_as_it_was(owner: Any, name: str) -> None:
    def content() -> dict[str, object]:
        return dict(owner if isinstance(owner, dict) else vars(owner))

    before = content()
    patch = Patch(owner, name, replacement := staticmethod(len))
    assert content() == before, "not until it is applied"
    patch.apply()
    patch.apply()
    assert content() == before | {name: replacement}
    assert patch.original is before.get(name, ABSENT)
    patch.undo()
    patch.undo()
    assert content() == before


def test_what_others_have_replaced_since_is_theirs() -> None:
    owner = SimpleNamespace(load="original")
    patch = Patch(owner, "load", "ours")
    patch.apply()
    owner.load = "theirs"
    patch.undo()
    assert owner.load == "theirs"


def test_all_are_applied_or_none() -> None:
    """A class that is built in takes no attribute."""
    owner = SimpleNamespace(load="original")
    patches = [Patch(owner, "load", "ours"), Patch(dict, "load", "ours")]
    with pytest.raises(TypeError, match="cannot set"):
        apply_all(patches)
    assert owner.load == "original"


def test_whoever_has_imported_a_function_gets_the_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load() -> None: ...

    def other() -> None: ...

    defining, importing = module(load=load, other=other), module(renamed=load)
    monkeypatch.setitem(sys.modules, "patched_models", defining)
    monkeypatch.setitem(sys.modules, "patched_server", importing)
    patches = patch_imports(load, other)
    apply_all(patches)
    assert vars(defining)["load"] is other
    assert vars(importing)["renamed"] is other
    undo_all(patches)
    assert vars(defining)["load"] is vars(importing)["renamed"] is load
    assert vars(defining)["other"] is other
