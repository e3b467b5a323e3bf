"""`make gpu` on this machine, where the CPU stands in for a GPU: every part, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import run_process

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).parents[2]
GPU = ROOT / "bench" / "gpu"
PAGE = ROOT / "docs" / "kernels" / "gpu.md"


def module(file: Path) -> Any:
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # as where it runs itself
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def run(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Run `make gpu` into a folder; return what it wrote to the terminal, and its JSON."""
    file = folder / "gpu.json"
    command = [sys.executable, "-W", "ignore", GPU / "run.py", "--folder", folder / "run"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = run_process([*command, "--json", file, *arguments], env=environ)
    assert file.is_file(), done.stderr
    return done, json.loads(file.read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Any]:
    pytest.importorskip("triton")
    return run(tmp_path_factory.mktemp("gpu"), "--together")


def test_every_part_runs_and_no_check_fails(
    ran: tuple[subprocess.CompletedProcess[str], Any],
) -> None:
    done, found = ran
    parts = found["parts"]
    assert list(parts) == ["conformance", "models", "capture", "bounds", "layers", "llama", "tune"]
    assert {it["state"] for it in parts.values()} == {"done"}, parts
    failed = [it for part in parts.values() for it in part["checks"] if it["passed"] is False]
    assert (failed, done.returncode) == ([], 0)
    assert found["tiny"]
    assert found["machine"]["device"] == "cpu"
    assert 0 < found["seconds"] < found["budget"]


def test_what_is_checked(ran: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    parts = ran[1]["parts"]
    passed = {
        name: [it["name"] for it in part["checks"] if it["passed"]] for name, part in parts.items()
    }
    kernels = {it.split(":")[0] for it in passed["conformance"]}
    assert {"reference", "dense", "triton"} <= kernels
    assert all(int(it.split()[1]) > 0 for it in passed["conformance"])  # some were right
    assert [it.partition(": ")[2] for it in passed["models"][1:]] == [
        "a batch as each alone", "a batch as each alone, unwatched",
    ]  # fmt: skip
    assert "as float32 on the CPU" in passed["models"][0]
    assert all(it["engine"] for it in parts["models"]["figures"])  # as on a GPU
    assert [it for it in passed["capture"] if it.startswith("triton, 4-bit")]
    assert passed["bounds"] == ["linears: right without a sanitizer"]
    assert len([it for it in passed["layers"] if it.startswith("triton, 4-bit")]) == 4


def test_what_is_measured(ran: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    done, found = ran
    parts = found["parts"]
    layers = [it for it in parts["layers"]["figures"] if it["name"] == "layer"]
    assert {it["rows"] for it in layers} == {1, 16}
    assert {it["kernel"] for it in layers} >= {"float16", "triton 4-bit", "triton 4-bit act"}
    assert all(it["seconds"] > 0 and it["share_of_memory"] > 0 for it in layers)
    replies = [it for it in parts["llama"]["figures"] if it["name"] == "replies"]
    assert [it["sequences"] for it in replies] == [1, 16]
    assert all(it["tokens_a_second"] > 0 for it in replies)
    assert re.search(
        r"^16 sequences: [\d.]+ times one's tokens a second, aim 10$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^conformance +done +\d+ +\d+ +0 +0$", done.stdout, re.MULTILINE)


SLOW = """
import sys, time
sys.path.insert(0, {gpu!r})
from pathlib import Path
from record import Record
record = Record(Path({file!r}), 1)
record.check("the first", passed=True)
with record.checking("the second"):
    raise ValueError("wrong")
time.sleep(600)
"""


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    program, file = module(GPU / "run.py"), tmp_path / "slow.json"
    code = SLOW.format(gpu=str(GPU), file=str(file))
    state = program._run_there([sys.executable, "-c", code], 3, tmp_path, "slow")
    assert state == ("out of time", "")
    assert json.loads(file.read_text())["checks"] == [
        {"name": "the first", "passed": True, "detail": ""},
        {"name": "the second", "passed": False, "detail": "ValueError: wrong"},
    ]


def test_a_part_without_time_is_not_reached(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--budget", "10", "--parts", "capture,tune")
    assert {it["state"] for it in found["parts"].values()} == {"not reached"}
    assert (done.returncode, "not reached" in done.stdout) == (0, True)  # nothing was wrong


def test_a_part_that_crashes_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder must be")
    done, found = run(tmp_path, "--parts", "llama,tune")
    assert found["parts"]["llama"]["state"] == "crashed"
    assert "NotADirectoryError" in found["parts"]["llama"]["error"]
    assert found["parts"]["tune"]["state"] == "done"
    assert done.returncode == 1
    assert "CRASHED llama" in done.stdout


BARE = """
import sys
sys.path.insert(0, {gpu!r})
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
import bare
print(bare.make_importable(Path({site!r}), wheels=Path({wheels!r})))
import carried
print(carried.__file__, version("carried"), find_spec("gptq_loader_kernels").origin)
print(len(entry_points(group=bare.OURS.replace("-", "_"))))
"""


def test_a_bare_python_takes_the_tree_and_the_wheels(tmp_path: Path) -> None:
    site, wheels = tmp_path / "site", tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Name: carried\nVersion: 1.0\n")
    code = BARE.format(gpu=str(GPU), site=str(site), wheels=str(wheels))
    environ = {name: it for name, it in os.environ.items() if name != "PYTHONPATH"}
    for _ in range(2):  # the second time it is there already
        done = run_process(
            [sys.executable, "-S", "-c", code], check=True, env=environ, cwd=tmp_path
        )
        taken, where, count = done.stdout.splitlines()
        assert taken == "['gptq-loader-plugin', 'carried 1.0']"
        kernels = site / "gptq_loader_kernels" / "__init__.py"
        assert where == f"{site / 'carried.py'} 1.0 {kernels}"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert int(count) == len(project["entry-points"]["gptq_loader_plugin"])


def test_every_dependency_is_carried_or_brought() -> None:
    bundle = module(ROOT / "tools" / "gpu_bundle.py")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", it)[0] for it in project["dependencies"]}  # type: ignore[index]
    assert needed <= {*bundle.NEEDED, *bundle.BROUGHT}


def test_the_page_has_the_table_that_the_model_computes(tmp_path: Path) -> None:
    copy = tmp_path / "gpu.md"
    shutil.copy(PAGE, copy)
    run_process([sys.executable, ROOT / "bench" / "step_model.py", "--table", copy], check=True)
    assert copy.read_text() == PAGE.read_text(), (
        "python bench/step_model.py --table docs/kernels/gpu.md"
    )


def test_the_model_counts_bytes_and_launches() -> None:
    model = module(ROOT / "bench" / "step_model.py")
    llama = model.LLAMA_2_7B
    assert llama.position_bytes == 2 * 32 * 4096 * 2  # keys and values of 32 layers in 16 bits
    packed = 32 * 4096 * (4 * 4096 + 3 * 11008)
    assert llama.weight_bytes == packed * (4 + 32 / 128) / 8 + 2 * 32000 * 4096
    step = llama.step_seconds(1e12, sequences=16, context=100, launch=1e-6)
    moved = llama.weight_bytes + 16 * 100 * llama.position_bytes
    assert step == pytest.approx(moved / 1e12 + llama.launches * 1e-6)


def test_a_check_that_failed_is_told_and_the_model_is_held_against_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = module(GPU / "report.py")
    replies = {
        "name": "replies", "sequences": 1, "prompt": 512, "reply": 128, "step_seconds": 2e-3,
        "prompt_tokens_a_second": 1e4, "tokens_a_second": 500.0, "share_of_memory": 0.8,
        "share_of_memory_with_kv": 0.85,
    }  # fmt: skip
    loaded = {"name": "loaded", "bandwidth": 4e12, "launch_seconds": 1e-6}
    good = {"name": "one", "passed": True, "detail": ""}
    results: dict[str, Any] = {
        "machine": {"name": "A GPU", "device": "cuda sm90", "python": "3.12.3", "torch": "2.11.0"},
        "tiny": False,
        "parts": {
            "capture": {"state": "done", "seconds": 1.0, "checks": [good], "figures": []},
            "llama": {"state": "out of time", "checks": [], "figures": [loaded, replies]},
        },
    }
    assert not report.print_report(results)
    model = module(ROOT / "bench" / "step_model.py").LLAMA_2_7B
    expected = model.step_seconds(4e12, context=576, launch=1e-6)
    (ratio,) = report.model_ratios(results)
    assert (ratio["model"], ratio["ratio"]) == (expected, 2e-3 / expected)
    assert (
        f"{1e3 * expected:.3f} by the model: ratio {2e-3 / expected:.2f}" in capsys.readouterr().out
    )
    results["parts"]["capture"]["checks"] = [{"name": "two", "passed": False, "detail": "off"}]
    assert report.print_report(results)
    assert "FAILED capture: two: off" in capsys.readouterr().out
