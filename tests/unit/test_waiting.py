"""No test waits without a deadline."""

from __future__ import annotations

import ast
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import read_line, run_process, start_process, start_server
from waiting import eventually, join

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parents[1]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
UNTIL_KILLED = "# until it is killed"
# pytest's own deadline has to do for the commands that these run.
EXCEPT = ("test_kernel_cpu.py", "test_kernel_triton.py")
# What waits for ever where it is called without arguments, and what does without `timeout`.
METHODS = ("acquire", "communicate", "get", "join", "wait")
FUNCTIONS = ("call", "check_call", "check_output", "run", "urlopen")


def test_what_comes_is_returned() -> None:
    answers = iter(["", "", "it"])
    assert eventually(lambda: next(answers), awaited="a text") == "it"


def test_what_does_not_come_is_named() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"waited 0\.05 s in vain for a sign\nthe log"):
        eventually(lambda: False, 0.05, awaited="a sign", log=lambda: "the log")


def test_an_error_ends_the_wait() -> None:
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0, awaited="a number")


def test_a_thread_that_does_not_end_is_named() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(60,), name="the slow one")
    thread.start()
    with pytest.raises(pytest.fail.Exception, match="the end of the slow one"):
        join(thread, seconds=0.05)
    end.set()
    join(thread)


def test_a_process_that_says_nothing_is_killed() -> None:
    with start_process(SLEEP) as process:
        assert read_line(process, 0.2) == ""
        assert process.wait(timeout=60)


def test_a_process_does_not_outlive_its_block() -> None:
    with pytest.raises(ZeroDivisionError), start_process(SLEEP) as process:
        _ = 1 / 0
    assert process.poll() is not None


def test_a_server_that_does_not_start_is_told_with_its_own_words() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no port is free')"]
    with pytest.raises(AssertionError, match="no port is free"), start_server(command):
        pass


HANGS = """
import threading

def test_hangs():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def test_is_run_after_it():
    pass
"""


def test_a_test_that_hangs_fails_with_its_stack_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    options = ["-c", TESTS.parent / "pyproject.toml", "-p", "no:cacheprovider"]
    pytest_ = [sys.executable, "-m", "pytest", *options, "-o", "timeout=5", tmp_path]
    stdout = run_process(pytest_, cwd=tmp_path).stdout
    assert "1 failed, 1 passed" in stdout, stdout
    assert "Timeout (>5.0s) from pytest-timeout" in stdout, stdout
    assert ">       lock.acquire()" in stdout, stdout


def unbounded(tree: ast.Module) -> Iterator[ast.AST]:
    """Find the calls and loops that may wait for ever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.While) and all(map(is_idle, node.body)):
            yield node
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        bare = isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        of_subprocess = isinstance(owner, ast.Name) and owner.id == "subprocess"
        without = "timeout" not in options and None not in options
        if (
            (name in METHODS and bare)
            or ((of_subprocess or name == "urlopen") and name in FUNCTIONS and without)
            or (isinstance(given := options.get("timeout"), ast.Constant) and given.value is None)
        ):
            yield node


def is_idle(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but check and wait."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return getattr(statement.value.func, "attr", "") == "sleep"
    return isinstance(statement, ast.Pass | ast.Assert)


@pytest.mark.parametrize(
    "code",
    [
        "while not ready(): pass",
        "while not ready():\n    assert alive()\n    time.sleep(0.1)",
        "thread.join()",
        "process.wait()",
        "process.communicate()",
        "queue.get()",
        "lock.acquire()",
        "subprocess.run(['ls'], check=True)",
        "urlopen('http://localhost')",
        "httpx.get(url, timeout=None)",
    ],
)
def test_what_waits_for_ever_is_found(code: str) -> None:
    assert list(unbounded(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "while begin < end:\n    begin += send()\n    time.sleep(0.1)",
        "thread.join(60)",
        "process.wait(timeout=60)",
        "', '.join(names)",
        "names.get('a')",
        "lock.acquire(blocking=False)",
        "subprocess.run(['ls'], timeout=60)",
        "httpx.get(url)",
    ],
)
def test_what_has_a_deadline_is_left_alone(code: str) -> None:
    assert not list(unbounded(ast.parse(code)))


def test_no_test_waits_without_a_deadline() -> None:
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        if path.name in EXCEPT:
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        found += [
            f"{path.relative_to(TESTS)}:{node.lineno}: {lines[node.lineno - 1].strip()}"
            for node in unbounded(ast.parse(text))
            if not lines[node.lineno - 1].endswith(UNTIL_KILLED)
        ]
    assert not found, "\n".join(["give these a deadline (tests/waiting.py):", *found])
