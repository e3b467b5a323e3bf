"""What tools/check_commits.py lets pass, what it refuses, and which commits it looks at."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from processes import run_process

ROOT = Path(__file__).parents[2]
WHY = "Because it was wrong before."


@pytest.fixture(scope="module")
def checker() -> Any:
    spec = importlib.util.spec_from_file_location(
        "check_commits", ROOT / "tools" / "check_commits.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clone:
    """A git repository of a test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        environ = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        command = ["git", *identity, *arguments]
        env = {**os.environ, **environ}
        return run_process(command, cwd=self.folder, env=env, check=True).stdout

    def commit(self, message: str, file: str = "code.py") -> None:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(message)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    for name in [it for it in os.environ if it.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook's, which name another repository
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Clone(folder)


@pytest.mark.parametrize(
    "subject",
    [
        "Read zeros of both formats",
        "Fix the order of rows in act-order layers",
        "Re-use the scratch of the last product",
        "Pass what is masked to the kernel",
        "Need no compiler to install",
        'Revert "Read zeros of both formats"',
        "Say " + "x" * 68,
    ],
)
def test_a_good_message_passes(checker: Any, subject: str) -> None:
    assert checker.problems(f"{subject}\n\n{WHY}\n", ["code.py"]) == []


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (f"Say {'x' * 69}\n\n{WHY}", "73 characters"),
        (f"read zeros\n\n{WHY}", "its first letter a capital"),
        (f"CI: read zeros\n\n{WHY}", "its first letter a capital"),
        (f"Reads zeros\n\n{WHY}", "imperative: Reads is none"),
        (f"Added a reader\n\n{WHY}", "imperative: Added is none"),
        (f"Adding a reader\n\n{WHY}", "imperative: Adding is none"),
        (f"WIP\n\n{WHY}", "say in the subject what is changed"),
        (f"Fix tests\n\n{WHY}", "say in the subject what is changed"),
        (f"Merge what was met\n\n{WHY}", "say in the subject what is changed"),
        (f"Read zeros.\n\n{WHY}", "full stop"),
        (f"Read zeros; write scales\n\n{WHY}", "two changes"),
        (f"Read zeros\n{WHY}", "second line empty"),
        ("Read zeros", "say why in a body"),
        ("Read zeros\n\nSigned-off-by: A <a@b>", "say why in a body"),
        ("", "begin the subject with a verb"),
    ],
)
def test_a_bad_message_is_refused_in_words(checker: Any, message: str, problem: str) -> None:
    assert any(problem in it for it in checker.problems(message, ["code.py"]))


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        (["docs/hub.md", "mkdocs.yml", "README.md", "tests/unit/test_hub.py"], False),
        (["docs/hub.md", "gptq_loader_plugin/hub/remote.py"], True),
        (["examples/my_host/README.md"], False),
        (["mytests/a.py"], True),
    ],
)
def test_docs_and_tests_alone_need_no_body(checker: Any, files: list[str], needed: bool) -> None:
    assert bool(checker.problems("Say what the hub answers", files)) is needed


def test_the_commits_of_a_branch_are_checked(
    checker: Any, clone: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clone.commit("an old message")
    clone.git("clone", "--quiet", "--bare", ".", str(tmp_path / "upstream"))
    clone.git("remote", "add", "origin", str(tmp_path / "upstream"))
    clone.git("fetch", "--quiet", "origin")
    assert checker.main([]) == 0, "what the upstream has is not asked about"
    clone.git("switch", "--quiet", "--create", "work")
    clone.commit(f"Read zeros\n\n{WHY}")
    clone.commit("Explain zeros", "docs/zeros.md")
    capsys.readouterr()
    assert checker.main([]) == 0
    assert capsys.readouterr().out == "2 commit message(s) checked\n"
    clone.commit(f"Read zeros; write scales\n\n{WHY}")
    clone.commit(f"Write scales\n\n{WHY}")
    assert checker.main([]) == 1
    error = capsys.readouterr().err
    assert "Read zeros; write scales: the subject holds two changes" in error
    assert error.count("\n") == 2, "one problem, and what to do"


def test_without_an_upstream_the_last_tag_begins(checker: Any, clone: Clone) -> None:
    clone.commit("an old message")
    assert checker.main([]) == 1, "without a tag either, the last commit"
    clone.commit(f"Read zeros\n\n{WHY}")
    assert checker.main([]) == 0
    clone.git("tag", "v1", "HEAD~1")
    clone.commit("another bad one")
    assert checker.main([]) == 1
    clone.git("tag", "v2")
    clone.commit(f"Write scales\n\n{WHY}")
    assert checker.main([]) == 0
    assert checker.main(["v1..HEAD"]) == 1, "a range that is given is taken"


def test_merges_are_passed_over(checker: Any, clone: Clone) -> None:
    clone.commit(f"Read zeros\n\n{WHY}")
    clone.git("tag", "v1")
    clone.git("switch", "--quiet", "--create", "work")
    clone.commit(f"Write scales\n\n{WHY}", "other.py")
    clone.git("switch", "--quiet", "main")
    clone.commit(f"Write zeros\n\n{WHY}")
    clone.git("merge", "--quiet", "--no-ff", "--message", "Merge branch 'work'", "work")
    assert checker.main([]) == 0


def test_without_a_history_nothing_fails(
    checker: Any,
    clone: Clone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert checker.main([]) == 0
    assert "nothing is committed yet" in capsys.readouterr().out
    clone.commit("a bad message")
    clone.commit("another one")
    clone.git("clone", "--quiet", "--depth=1", clone.folder.as_uri(), str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    assert checker.main([]) == 0
    assert "this clone is shallow" in capsys.readouterr().out
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.chdir(plain)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert checker.main([]) == 0
    assert "no clone with a history" in capsys.readouterr().out


def test_a_message_is_checked_before_it_is_committed(
    checker: Any, clone: Clone, capsys: pytest.CaptureFixture[str]
) -> None:
    clone.commit(f"Read zeros\n\n{WHY}")
    (clone.folder / "code.py").write_text("more")
    clone.git("add", "--all")
    message = clone.folder / "COMMIT_EDITMSG"
    message.write_text("Write scales\n\n# Please enter the commit message\n")
    assert checker.main(["--message", str(message)]) == 1
    assert "this message: say why in a body" in capsys.readouterr().err
    message.write_text(f"# a comment\nWrite scales\n\n{WHY}\n")
    assert checker.main(["--message", str(message)]) == 0
