"""The code in README and docs runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_loader_plugin import Plugins

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A file of the sources, in a comment or a docstring; and others' files.
NAMED = re.compile(r"(?<![\w/.{<-])((?:\w[\w-]*/)*\w+\.(?:py|cpp|h))\b(?!\()")
OTHERS = {
    "core.py", "ext_qmatrix.cpp", "kernels/linear/mixed_precision", "layers/quantization",
    "llama.cpp", "ik_llama.cpp", "malloc.h", "modules", "server.py", "setup.py",
}  # fmt: skip
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "gptq-2bit-64g-noact-sym"


def blocks(file: str) -> list[str]:
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", blocks("docs/hooks.md"), ids=range(len(blocks("docs/hooks.md"))))
def test_a_block_of_the_hooks_page_is_a_plugin_that_works(code: str, tmp_path: Path) -> None:
    import types

    import gptq_loader_plugin as gptq

    plugin = types.ModuleType("documented")
    exec(code, plugin.__dict__)
    plugins = Plugins(installed=True).with_plugin(plugin)
    folder = CHECKPOINT
    if hasattr(plugin, "gptq_readers"):
        folder = tmp_path
        (folder / "gptq").symlink_to(CHECKPOINT)
    template = plugin.gptq_templates()[0] if hasattr(plugin, "gptq_templates") else None
    with gptq.load(
        folder,
        plugins=plugins,
        device="cpu",
        backend=_kernel(plugin),
        template=template and template.name,
    ) as model:
        options = gptq.GenerateOptions(max_new_tokens=2)
        assert list(model.chat([{"role": "user", "content": "hi"}], options))[-1].tokens
        assert template is None or model.template.name == template.name


def _kernel(plugin: object) -> str | None:
    offer = getattr(plugin, "gptq_kernels", None)
    return offer()[0].name if offer else None


PLAIN = [*blocks("README.md"), *blocks("docs/memory.md")]


@pytest.mark.parametrize("code", PLAIN, ids=range(len(PLAIN)))
def test_a_block_of_the_readme_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code.replace('"demo"', repr(str(CHECKPOINT))), {})
    assert capsys.readouterr().out


def test_the_ranks_in_the_docs_are_the_kernels() -> None:
    from gptq_loader_kernels.cpu.library import find_library
    from gptq_loader_plugin.conformance.layers import Case, make_layer
    from gptq_loader_plugin.device import Device, find_device
    from gptq_loader_plugin.kernel import Accepted

    table = re.findall(
        r"^\| (\d+) \| `([\w-]+)` \|", (ROOT / "docs/hooks.md").read_text(), re.MULTILINE
    )
    documented = {name: int(rank) for rank, name in table}
    layer = make_layer(Case())[0]
    here = find_device("cpu")
    # the features of a processor on which every kernel of the CPU's is in the running
    vnni = replace(here, features=here.features - {"amx_bf16"} | {"avx512_vnni"})
    gpu = Device("cuda", capability=(8, 6), present=False, assume_built=True)
    found = {
        verdict.kernel: verdict.rank
        for kernel in Plugins(installed=True).kernels()
        for device in (here, vnni, gpu)
        if isinstance(verdict := kernel.consider(layer, device), Accepted)
    }
    if find_library() is None:
        del documented["cpu"], documented["cpu-int8"]  # decline, without a C++ compiler
    assert found == documented


def test_files_that_comments_name_are_there() -> None:
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in ("gptq_loader_plugin", "kernels", "extensions", "tools", "bench", "tests")
        for path in (ROOT / folder).rglob("*")
    ]
    missing = [
        f"{file}: {name}"
        for file in files
        if file.endswith((".py", ".cpp", ".h"))
        and not file.startswith("tests/")
        and not file.endswith("engines/table.py")  # which names files of the engines
        for name in NAMED.findall((ROOT / file).read_text(encoding="utf-8"))
        if not any(f"/{other}".endswith(f"/{name}") for other in files)
        and not any(f"{folder}/" in name for folder in OTHERS)
        and name not in OTHERS
    ]
    assert not missing
