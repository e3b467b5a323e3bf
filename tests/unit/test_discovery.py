"""What `gptq-loader plugins` finds: each offer, whether it works here, and what is broken."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, version
from typing import TYPE_CHECKING

import pytest
from processes import run_process

from gptq_loader_plugin.cli.plugins import describe
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import PluginError
from gptq_loader_plugin.host import NotReady, Ready, check_package
from gptq_loader_plugin.plugins.discovery import discover, to_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_plugin.plugins.discovery import InstalledPlugin, Offer

    Discover = Callable[..., dict[str, InstalledPlugin]]

HEAD = "from gptq_loader_plugin import Accepted, Declined, hookimpl\n"
KERNEL = (
    HEAD
    + """
class Kernel:
    name = "{name}"
    def consider(self, layer, device):
        {consider}
    def prepare(self, layer, packed, device): ...

@hookimpl
def gptq_kernels():
    return [Kernel()]
"""
)
HOST = (
    HEAD
    + """
from gptq_loader_plugin.host import NotReady, Ready
class Host:
    name = "{name}"
    def install(self, **options): ...
    {check}

@hookimpl
def gptq_hosts():
    return [Host()]
"""
)


@pytest.fixture
def discover_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Discover:
    """Write modules, and discover the plugins they are, by name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        "gptq_loader_plugin.plugins.discovery.find_devices", lambda: (find_device("cpu"),)
    )

    def write(environ: dict[str, str] | None = None, **sources: str) -> dict[str, InstalledPlugin]:
        entries = []
        for name, source in sources.items():
            module = f"found_{tmp_path.name}_{name}".replace("-", "_").replace("[", "_")
            (tmp_path / f"{module}.py").write_text(source)
            entries.append(EntryPoint(name, module, "gptq_loader_plugin"))
        return {it.name: it for it in discover(entries=entries, environ=environ or {})}

    return write


def only(plugin: InstalledPlugin) -> Offer:
    (offer,) = plugin.offers
    return offer


def test_ours_are_all_found_and_say_how_they_are() -> None:
    plugins = {it.name: it for it in discover(environ={})}
    assert plugins["core"].source == f"gptq-loader-plugin {version('gptq-loader-plugin')}"
    assert {it.state for it in plugins.values()} == {"in force"}
    offers = {(it.kind, it.name): it for plugin in plugins.values() for it in plugin.offers}
    assert offers["kernel", "reference"].works
    assert "2 to 8 bits on cpu" in offers["kernel", "reference"].detail
    assert offers["template", "chatml"].works
    assert offers["reader", "gptq"].works
    assert ("host", "gradio") in offers


def test_looking_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from gptq_loader_plugin.plugins.discovery import discover\n"
        "assert len(discover(environ={})) > 5\n"
        "print({'torch', 'transformers', 'gradio', 'llm', 'lm_eval'} & set(sys.modules))\n"
    )
    completed = run_process([sys.executable, "-c", code], check=True)
    assert completed.stdout == "set()\n"


def test_a_broken_one_hides_no_other(discover_written: Discover) -> None:
    plugins = discover_written(
        missing="import a_module_that_is_not_there",
        raising="raise RuntimeError('no driver')",
        misspelt=HEAD + "@hookimpl\ndef gptq_kernel(): ...",
        failing=HEAD + "@hookimpl\ndef gptq_hosts(): raise OSError('no screen')",
        odd=HEAD + "@hookimpl\ndef gptq_kernels(): return ['a string']",
        fine=KERNEL.format(name="fine", consider="return Accepted('fine', 1, 'float32', 1)"),
    )
    assert plugins["fine"].state == "in force"
    assert only(plugins["fine"]).detail == "2 to 8 bits on cpu"
    errors = {name: it.error for name, it in plugins.items() if it.state == "broken"}
    assert set(errors) == {"missing", "raising", "misspelt", "failing", "odd"}
    assert "a_module_that_is_not_there" in errors["missing"]
    assert "no driver" in errors["raising"]
    assert "gptq_kernel" in errors["misspelt"]
    assert "no screen" in errors["failing"]
    assert "'a string' is not a kernel" in errors["odd"]
    text = describe(plugins.values(), width=10_000)
    assert all(error in text for error in errors.values())


def test_a_kernel_says_which_widths_it_takes_or_why_none(discover_written: Discover) -> None:
    takes_8 = (
        "return Accepted('a', 1, 'float32', 1) if layer.bits == 8 else Declined('a', '8 only')"
    )
    takes_some = (
        "return Accepted('b', 1, 'float32', 1) if layer.bits in (2, 4) else Declined('b', '2, 4')"
    )
    plugins = discover_written(
        a=KERNEL.format(name="a", consider=takes_8),
        b=KERNEL.format(name="b", consider=takes_some),
        c=KERNEL.format(name="c", consider="return Declined('c', f'{layer.bits}-bit: not today')"),
        d=KERNEL.format(name="d", consider="raise ValueError('a fault')"),
    )
    answers = {name: (only(it).works, only(it).detail) for name, it in plugins.items()}
    assert answers == {
        "a": (True, "8 bits on cpu"),
        "b": (True, "2, 4 bits on cpu"),
        "c": (False, "4-bit: not today"),
        "d": (False, "it failed: a fault"),
    }


def test_a_host_says_whether_its_program_is_here(discover_written: Discover) -> None:
    plugins = discover_written(
        here=HOST.format(name="here", check="def check(self): return Ready('it 1.2', 'new')"),
        gone=HOST.format(name="gone", check="def check(self): return NotReady('gone', 'get it')"),
        bad=HOST.format(name="bad", check="def check(self): raise ValueError('a fault')"),
        mute=HOST.format(name="mute", check=""),
    )
    answers = {name: (only(it).works, only(it).detail) for name, it in plugins.items()}
    assert answers == {
        "here": (True, "it 1.2; new"),
        "gone": (False, "gone; get it"),
        "bad": (False, "it failed: a fault"),
        "mute": (None, "it does not say"),
    }


def test_one_name_twice_works_for_neither(discover_written: Discover) -> None:
    plugins = discover_written(
        one=HOST.format(name="page", check=""),
        two=HOST.format(name="page", check=""),
        three=HOST.format(name="other", check=""),
    )
    for name in ("one", "two"):
        assert plugins[name].state == "broken"
        assert plugins[name].error == "one and two offer a host named page"
        assert only(plugins[name]).works is False
    assert plugins["three"].state == "in force"


def test_what_the_environment_leaves_out_is_not_imported(discover_written: Discover) -> None:
    environ = {"GPTQ_LOADER_PLUGINS": "fine"}
    plugins = discover_written(environ, fine=HEAD, broken="raise RuntimeError")
    assert plugins["broken"].state == "left out"
    assert plugins["broken"].offers == ()
    assert "left out by GPTQ_LOADER_PLUGINS" in describe(plugins.values())
    with pytest.raises(PluginError, match="names nope, which is not installed"):
        discover_written({"GPTQ_LOADER_PLUGINS": "nope"}, fine=HEAD)


def test_the_same_as_json(discover_written: Discover) -> None:
    fine = HOST.format(name="page", check="")
    plugins = discover_written(broken="raise RuntimeError('no')", fine=fine)
    listed = to_json(plugins.values())
    assert [it["name"] for it in listed["hosts"]] == ["page"]
    assert listed["hosts"][0]["works"] is None
    assert [(it["name"], it["state"]) for it in listed["plugins"]] == [
        ("broken", "broken"),
        ("fine", "in force"),
    ]
    assert "no" in listed["plugins"][0]["error"]
    assert listed["plugins"][1]["error"] is None


@pytest.mark.parametrize(
    ("oldest", "newest", "ready", "note"),
    [
        ("1.0", "1000.0", True, ""),
        ("1.0", "2.0", True, "newer than 2.0, the last one tried"),
        ("1000.0", "1001.0", False, ""),
    ],
)
def test_a_package_is_looked_for_by_its_version(
    oldest: str, newest: str, ready: bool, note: str
) -> None:
    found = check_package("pytest", oldest=oldest, newest=newest)
    here = version("pytest")
    if ready:
        assert found == Ready(f"pytest {here}", note)
    else:
        reason = f"pytest {here} is too old; 1000.0 or newer is needed"
        assert found == NotReady(reason, "pip install --upgrade pytest")


def test_a_package_that_is_not_there() -> None:
    found = check_package("no-such-package", oldest="1", newest="2", install="get it elsewhere")
    assert found == NotReady("no-such-package is not installed", "get it elsewhere")


@pytest.mark.parametrize("module", ["llm", "lm_eval"])
def test_our_hosts_do_no_harm_where_their_programs_are_not(module: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules['{module}'] = None\n"
        f"import gptq_loader_extensions.{module} as host\n"
        "(offer,) = host.gptq_hosts()\n"
        "print(offer.name, type(offer.check()).__name__ != '')\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    completed = run_process([sys.executable, "-c", code], check=True)
    assert completed.stdout == f"{module.replace('_', '-')} True\nset()\n"
