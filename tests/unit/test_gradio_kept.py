"""What the page keeps: settings in a file, conversations in a browser; and what it gives away."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest
from waiting import join

from gptq_loader_extensions.gradio.storage.settings_file import (
    ModelSettings,
    SettingsFile,
)
from gptq_loader_extensions.gradio.tabs.export import as_json, as_markdown, file_name
from gptq_loader_extensions.gradio.tabs.saved_chats import new_key, read_list, write_kept
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = GenerateOptions(temperature=0, max_new_tokens=6)
TALK = [
    {"role": "user", "content": "What is\n *this*?"},
    {"role": "assistant", "content": "# A reply\n"},
]


# Settings


def test_settings_are_read_back(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path / "new" / "folder")
    settings = ModelSettings(backend="dense", system="Be brief.", sampling=GREEDY)
    assert file.read("a/b:c") == (None, "")
    assert file.save("a/b:c", settings) == ""
    assert file.save("other", ModelSettings()) == ""
    assert SettingsFile(file.path.parent).read("a/b:c") == (settings, "")
    assert [it.name for it in file.path.parent.iterdir()] == [file.path.name], "nothing is left"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"models": 3}', '{"models": {"a": {"sampling": {"top_p": 7}}}}', "\x00\xff"],
)
def test_a_damaged_file_is_put_aside(tmp_path: Path, text: str) -> None:
    file = SettingsFile(tmp_path)
    for number in (1, 2):
        file.path.write_text(text, encoding="latin-1")
        found, note = file.read("a")
        assert found is None
        assert note == (
            "the file of settings was damaged; it was put aside as "
            f"page-settings.damaged-{number}.json"
        )
        assert file.read("a") == (None, "")
    file.path.write_text(text, encoding="latin-1")
    assert "put aside" in file.save("a", ModelSettings(system="x"))
    assert file.read("a") == (ModelSettings(system="x"), "")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SettingsFile(tmp_path)
    file.save("a", ModelSettings(system="old"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(GPTQLoaderError, match="No space left on device") as caught:
        file.save("a", ModelSettings(system="new"))
    assert "GPTQ_LOADER_CONFIG" in caught.value.hint
    assert file.read("a") == (ModelSettings(system="old"), "")
    assert [it.name for it in tmp_path.iterdir()] == [file.path.name]


def test_many_save_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path)
    saving = [
        threading.Thread(target=file.save, args=(str(i), ModelSettings(context=i + 2)))
        for i in range(16)
    ]
    for thread in saving:
        thread.start()
    join(*saving)
    assert [file.read(str(i))[0] for i in range(16)] == [
        ModelSettings(context=i + 2) for i in range(16)
    ]


# Conversations


def test_a_conversation_is_kept_and_read_back() -> None:
    key = new_key()
    kept = write_kept(key, TALK)
    assert json.loads(kept)["title"] == "What is *this*?"
    found = read_list(json.dumps({"current": key, "opened": json.loads(kept)}))
    assert found.opened is not None
    assert found.opened.talk() == tuple(TALK)
    assert len(json.loads(write_kept(key, [{"role": "user", "content": "w " * 99}]))["title"]) < 50


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        '{"opened": {"key": "../x", "messages": []}}',
        '{"opened": {"key": "0123456789abcdef", "messages": [{"role": "system", "content": ""}]}}',
        '{"listed": [{"key": 5}]}',
    ],
)
def test_what_a_browser_kept_is_checked(text: str | None) -> None:
    found = read_list(text)
    assert (found.opened, found.listed) == (None, ())


def test_a_conversation_is_exported() -> None:
    assert json.loads(as_json(TALK, model="m")) == {"model": "m", "messages": TALK}
    assert as_markdown(TALK, model="m") == (
        "# Conversation with m\n\n## You\n\nWhat is\n *this*?\n\n## Reply\n\n# A reply\n"
    )
    assert file_name(TALK, ".md") == "what-is-this.md"
    assert file_name([{"role": "user", "content": "../../etc: ?"}], ".json") == "etc.json"
    assert file_name([], ".md") == "conversation.md"
