"""Chat in a terminal: the real program, in a terminal of the test's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if sys.platform == "win32":
    pytest.skip("terminals are another thing there", allow_module_level=True)

from altered import DATA, ONE, PLUGINS
from parrot import TEMPLATE, parrot
from terminal import CTRL_C, CTRL_D, LEFT, UP, Terminal, open_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREEDY = ("--temperature", "0", "--device", "cpu", "--no-check")
# As R1's: the prompt opens the thought.
THINKING = TEMPLATE.replace("assistant\n", "assistant\n<think>\n").replace(
    "{{ message.content", "{{ message.content.split('</think>')[-1]"
)


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "gptq_loader_plugin", "chat", str(folder), *GREEDY, *options]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "thinker"
    return parrot(
        folder, ["easy, ", "I think", "\n</think>", "\n\nTen", " it is."], template=THINKING
    )


@pytest.fixture(scope="module")
def chat(data: Path, thinker: Path) -> Iterator[Terminal]:
    env = {**PLUGINS, "GPTQ_LOADER_DATA": str(data)}
    with open_terminal(command(thinker), env=env) as terminal:
        terminal.wait_for("a message, or /help")
        yield terminal


def test_a_message_is_edited_and_the_last_one_comes_back(chat: Terminal, data: Path) -> None:
    chat.send("helo" + LEFT + "l\r")
    shown = chat.wait_for("Ten it is.")
    assert "> hello" in shown
    assert "^[" not in shown
    chat.send(UP)
    chat.wait_for("> hello", times=2)
    chat.send("\r")
    chat.wait_for("Ten it is.", times=2)
    kept = data / "chat-history"
    assert "+hello" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_thoughts_are_apart_and_faint(chat: Terminal) -> None:
    chat.send("/new\rThink\r")
    shown = chat.wait_for("Ten it is.", times=3)
    lines = [line for line in shown.splitlines() if line]
    (at, *_) = [i for i, line in enumerate(lines) if line.startswith("easy, I think")]
    assert lines[at + 1].startswith("(thought for 0.")
    assert lines[at + 2] == "Ten it is."
    assert b"\x1b[2measy" in chat.raw
    assert "think>" not in shown
    chat.send("/thoughts fold\rAgain\r")
    shown = chat.wait_for("Ten it is.", times=4)
    assert shown.count("easy, I think") == 3


def test_lines_that_are_pasted_are_one_message(chat: Terminal) -> None:
    replies = chat.text().count("Ten it is.")
    chat.paste("one\ntwo\nthree")
    shown = chat.wait_for(". three")
    assert "> one" in shown
    chat.send("\r")
    shown = chat.wait_for("Ten it is.", times=replies + 1)
    chat.send("four\x1b\rfive")
    chat.wait_for(". five")
    chat.send(CTRL_C)
    shown = chat.wait_for("Ctrl-D or /quit leaves", times=2)
    assert shown.count("Ten it is.") == replies + 1


def test_commands_never_reach_the_model(chat: Terminal) -> None:
    replies = chat.text().count("Ten it is.")
    chat.send("/help\r")
    chat.wait_for("take back the last message")
    chat.send("/hlep\r")
    chat.wait_for("there is no command /hlep")
    chat.wait_for("did you mean /help?")
    chat.send("/set temprature 1\r")
    chat.wait_for("did you mean temperature?")
    chat.send("/set temperature 0.5\r/set\r")
    chat.wait_for("temperature          0.5")
    chat.send("/set temperature 99\r")
    chat.wait_for("less than or equal to 10")
    chat.send("/set temperature 0\r/undo\r/explain\r")
    shown = chat.wait_for("chosen: weights stay packed")
    assert shown.count("Ten it is.") == replies
    chat.send(" /help is a message\r")
    chat.wait_for("Ten it is.", times=replies + 1)
    chat.send("/retry\r")
    chat.wait_for("Ten it is.", times=replies + 2)


def test_control_d_ends_it(chat: Terminal) -> None:
    chat.send(CTRL_D)
    assert chat.wait_for_end() == 0


def test_control_c_ends_the_reply_and_keeps_the_chat(data: Path) -> None:
    env = {**PLUGINS, "GPTQ_LOADER_DATA": str(data)}
    options = ("--max-new-tokens", "480", "--temperature", "9", "--top-k", "0", "--top-p", "1")
    with open_terminal(command(DATA / ONE, *options), rows=60, env=env) as terminal:
        terminal.wait_for("a message, or /help")
        terminal.send("/set temperature 9\rHello\r")
        terminal.wait_for("> Hello\n")
        terminal.send(CTRL_C)
        terminal.wait_for("(stopped)")
        terminal.send("/undo\r/undo\r")
        terminal.wait_for("there is no message yet")
        terminal.send("/quit\r")
        assert terminal.wait_for_end() == 0
