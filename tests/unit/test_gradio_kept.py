"""What the page saves: settings in a file, conversations in a browser; and what it exports."""

from __future__ import annotations

import json
import threading
from datetime import date
from typing import TYPE_CHECKING

import pytest
from waiting import join

from gptq_loader_extensions.gradio.jobs.conversation import Message, TextFile
from gptq_loader_extensions.gradio.storage.settings_file import (
    ModelSettings,
    SettingsFile,
)
from gptq_loader_extensions.gradio.tabs.export import (
    as_json,
    as_markdown,
    file_name,
    read_conversation,
)
from gptq_loader_extensions.gradio.tabs.saved_chats import new_key, read_stored, write_saved
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = GenerateOptions(temperature=0, max_new_tokens=6)
TALK = [
    Message(role="user", content="What is\n *this*?"),
    Message(role="assistant", content="# A reply\n", thought="hm"),
]


# Settings


def test_settings_are_read_back(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path / "new" / "folder")
    settings = ModelSettings(backend="dense", system="Be brief.", sampling=GREEDY)
    assert file.read("a/b:c") == (None, "")
    assert file.save("a/b:c", settings) == ""
    assert file.save("other", ModelSettings()) == ""
    assert SettingsFile(file.path.parent).read("a/b:c") == (settings, "")
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name], "nothing is left"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"models": 3}', '{"models": {"a": {"sampling": {"top_p": 7}}}}', "\x00\xff"],
)
def test_a_damaged_file_is_renamed(tmp_path: Path, text: str) -> None:
    file = SettingsFile(tmp_path)
    for number in (1, 2):
        file.path.write_text(text, encoding="latin-1")
        settings, note = file.read("a")
        assert settings is None
        assert note == (
            f"the settings file was damaged; it was renamed to page-settings.damaged-{number}.json"
        )
        assert file.read("a") == (None, "")
    file.path.write_text(text, encoding="latin-1")
    assert "renamed to" in file.save("a", ModelSettings(system="x"))
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
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]


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
    talk = [*TALK, Message(role="user", content="", files=(TextFile(name="a", text="b"),))]
    written = write_saved(key, talk)
    assert json.loads(written)["title"] == "What is this?"
    panel = {"system": "Be brief.", "top_k": None, "thinking": "Off"}
    stored = read_stored(json.dumps({"opened": json.loads(written), "panel": panel}))
    assert stored.opened is not None
    assert stored.opened.messages == tuple(talk)
    assert stored.panel is not None
    assert (stored.panel.system, stored.panel.top_k, stored.panel.thinking) == (
        "Be brief.",
        None,
        "Off",
    )
    title = json.loads(write_saved(key, [Message(role="user", content="w " * 99)]))["title"]
    assert len(title) < 50


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        '{"opened": {"key": "../x", "messages": []}}',
        '{"opened": {"key": "0123456789abcdef", "messages": [{"role": "system", "content": ""}]}}',
        '{"opened": null, "panel": {"thinking": "maybe"}}',
    ],
)
def test_what_a_browser_saved_is_checked(text: str | None) -> None:
    stored = read_stored(text)
    assert (stored.opened, stored.panel) == (None, None)


def test_a_conversation_is_exported_and_imported() -> None:
    written = as_json(TALK, model="m", system="Be brief.")
    assert json.loads(written)["messages"][0] == {"role": "system", "content": "Be brief."}
    assert read_conversation(written) == (tuple(TALK), "Be brief.")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    assert read_conversation(json.dumps(parts)) == ((Message(role="user", content="a\nb"),), "")
    assert as_markdown(TALK, model="m") == (
        "# Conversation with m\n\n## You\n\nWhat is\n *this*?\n\n## Reply\n\n"
        "<details><summary>Thought</summary>\n\nhm\n\n</details>\n\n# A reply\n"
    )
    on = date(2026, 1, 2)
    assert file_name(TALK, ".md", on=on) == "what-is-this-2026-01-02.md"
    outside = [Message(role="user", content="../../etc: ?")]
    assert file_name(outside, ".json", on=on) == "etc-2026-01-02.json"
    assert file_name([], ".md", on=on) == "conversation-2026-01-02.md"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '[{"role": "tool", "content": "x"}]', '[{"role": "user"}]', "[1]"]
)
def test_what_is_no_conversation_is_refused(text: str) -> None:
    with pytest.raises(OptionInvalid, match="this file is no conversation: it"):
        read_conversation(text)
