"""Plugins: found by entry point, limited and traced by the environment, and faulty ones named."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from altered import DATA, ONE

import gptq_loader_plugin as gptq
from gptq_loader_plugin import PluginError, Plugins, hookimpl

OURS = ["cpu", "cpu-int4", "cpu-int8", "dense", "exllama", "reference", "torch", "triton"]


def test_our_kernels_come_through_the_entry_points() -> None:
    plugins = Plugins(installed=True, environ={})
    assert [kernel.name for kernel in plugins.kernels()] == OURS
    assert plugins.names()["kernel-cpu"] == "gptq-loader-plugin"
    assert [template.name for template in plugins.templates()] == ["chatml"]
    assert [reader.name for reader in plugins.readers()] == ["gptq"]
    assert "gradio" in [host.name for host in plugins.hosts()]


def test_the_environment_limits_them() -> None:
    limited = Plugins(installed=True, environ={"GPTQ_LOADER_PLUGINS": "kernel-dense, core"})
    assert [kernel.name for kernel in limited.kernels()] == ["dense"]
    assert Plugins(installed=True, environ={"GPTQ_LOADER_PLUGINS": ""}).names() == {}


def test_the_environment_names_one_that_is_not_there() -> None:
    with pytest.raises(PluginError, match="names kernel-dens, which is not installed") as caught:
        Plugins(installed=True, environ={"GPTQ_LOADER_PLUGINS": "kernel-dens"})
    assert "kernel-dense" in caught.value.hint


def test_the_environment_traces_them(capsys: pytest.CaptureFixture[str]) -> None:
    Plugins(installed=True, environ={"GPTQ_LOADER_TRACE": "1"}).kernels()
    assert "gptq_kernels" in capsys.readouterr().err


def test_a_plugin_that_misspells_a_hook_is_named() -> None:
    class Misspelt:
        @hookimpl
        def gptq_kernel(self) -> None: ...

    with pytest.raises(PluginError, match="gptq_kernel"):
        Plugins(Misspelt())


def test_a_plugin_that_takes_an_argument_that_is_not_given_is_named() -> None:
    class Greedy:
        @hookimpl
        def gptq_kernels(self, everything: object) -> None: ...

    with pytest.raises(PluginError, match="everything"):
        Plugins(Greedy())


def test_a_plugin_that_fails_is_an_error_with_its_words() -> None:
    class Broken:
        @hookimpl
        def gptq_kernels(self) -> list[object]:
            raise ValueError("no driver")

    with pytest.raises(PluginError, match="no driver"):
        Plugins(Broken()).kernels()


def test_an_offer_that_is_no_kernel_is_named() -> None:
    class Odd:
        @hookimpl
        def gptq_kernels(self) -> list[object]:
            return ["a string"]

    with pytest.raises(PluginError, match="'a string' is not a kernel"):
        Plugins(Odd()).kernels()


def test_one_more_plugin_leaves_the_first_set_alone() -> None:
    class Extra:
        @hookimpl
        def gptq_resolve(self, reference: str) -> None: ...

    first = Plugins(installed=True, environ={})
    second = first.with_plugin(Extra())
    assert "Extra" in second.names()
    assert "Extra" not in first.names()
    assert [kernel.name for kernel in second.kernels()] == OURS


class Failing:
    """A plugin each of whose parts fails as its author never meant it to."""

    name = "failing"

    def __init__(self, how: str) -> None:
        self.how = how

    def consider(self, layer: gptq.LayerSpec, device: gptq.Device) -> gptq.Accepted:
        return gptq.Accepted("failing", rank=99, dtype="float32", prepared_bytes=1)

    def prepare(self, *_: object) -> Any:
        return 3 if self.how == "no module" else {}["gone"]

    def open(self, path: Path) -> Any:
        return 3 if self.how == "no checkpoint" else {}["gone"]

    @hookimpl
    def gptq_kernels(self) -> list[Any]:
        return [self] if self.how in ("no module", "prepare") else []

    @hookimpl
    def gptq_readers(self) -> list[Any]:
        return [self] if self.how in ("no checkpoint", "open") else []

    @hookimpl
    def gptq_resolve(self, reference: str) -> Path | None:
        return Path("nowhere") if self.how == "no path" else None


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no module", "the kernel failing prepared 3 for model.layers.0"),
        ("prepare", "the kernel failing failed to prepare model.layers.0"),
        ("no checkpoint", "the reader failing answered 3"),
        ("open", "the reader failing failed at"),
        ("no path", "a plugin answered nowhere for"),
    ],
)
def test_a_fault_of_a_plugin_is_told_as_its_own(how: str, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        gptq.load(DATA / ONE, device="cpu", plugins=Plugins(Failing(how), installed=True))


def test_an_installed_plugin_that_fails_in_a_hook_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_plugin.py").write_text(
        "from gptq_loader_plugin import hookimpl\n"
        "@hookimpl\n"
        "def gptq_before_load(request):\n"
        "    raise KeyError('quota')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("raising", "raising_plugin", "gptq_loader_plugin")
    monkeypatch.setattr("gptq_loader_plugin.plugins.manager.entry_points", lambda **_: (entry,))
    for plugins in (found := Plugins(installed=True, environ={}), found.with_plugin(object())):
        with pytest.raises(PluginError, match="raising failed in gptq_before_load: 'quota'"):
            plugins.hook.gptq_before_load(request=None)
