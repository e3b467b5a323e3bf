"""Replies in channels, as gpt-oss writes them: analysis, commentary, final.

A reply is one message after another: `<|channel|>analysis<|message|>TEXT<|end|>`, then
`<|start|>assistant<|channel|>final<|message|>TEXT<|return|>`; a call of a function is a message
`to=functions.NAME` whose text is its arguments, and ends with `<|call|>`
(https://cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import json
import re

from gptq_loader_plugin.chat.marks import overlap

__all__ = ["ANALYSIS", "CALL", "CHANNEL_TOKENS", "FINAL", "ChannelParser", "uses_channels"]

CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
CALL, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
CHANNEL_TOKENS = (CHANNEL, MESSAGE, START, END, CALL, RETURN, CONSTRAIN)
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
FINAL = f"{CHANNEL}final{MESSAGE}"
ENDS = re.compile("|".join(re.escape(it) for it in (END, CALL, RETURN, START, CHANNEL)))
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
HEADER_CHARACTERS = 300  # at most, of who speaks to whom; what is longer is none


def uses_channels(template: str) -> bool:
    """Return whether a template is one of channels."""
    return CHANNEL in template and MESSAGE in template and "analysis" in template


class ChannelParser:
    """Separate a reply's channel of thoughts from what is for the user, and from calls.

    A call is written as Hermes would, in `<tool_call>` and `</tool_call>`.

    Args:
        opened: whether the prompt has begun a message of thoughts.
        closed: whether it has begun one that is for the user.
        calls: whether functions may be called; else what is sent to one is for the user.
    """

    def __init__(self, *, opened: bool = False, closed: bool = False, calls: bool = False) -> None:
        self._calls = calls
        self._held = ""
        self._state = "thought" if opened else "text" if closed else "header"
        self._begun = ""  # of a call, until its arguments begin
        self._messages = {"thought": 0, "text": 0}

    @property
    def thinking(self) -> bool:
        """Whether the thought has not ended."""
        return self._state == "thought"

    def feed(self, text: str) -> tuple[str, str]:
        """Feed a chunk; return what is surely thought, and what is surely answer or call."""
        self._held += text
        thought = answer = ""
        while self._held:
            if self._state == "header":
                if not self._read_header():
                    break
                continue
            end = ENDS.search(self._held)
            cut = end.start() if end else len(self._held) - _held_back(self._held)
            content, self._held = self._held[:cut], self._held[cut:]
            more = self._content(content)
            if end is not None:
                more += self._end()
                drop = 0 if end[0] in (START, CHANNEL) else len(end[0])
                self._held = self._held[drop:]
            if self._state == "thought":
                thought += more
            else:
                answer += more
            if end is None:
                break
            self._state = "header"
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """Return what was held back, at the reply's end."""
        held, self._held = self._held, ""
        if self._state == "header":
            return "", "" if _may_be_header(held.strip()) else held
        more = self._content(held) + self._end()
        return (more, "") if self._state == "thought" else ("", more)

    def _read_header(self) -> bool:
        """Read who speaks in which channel; return whether that is known."""
        header, message, rest = self._held.partition(MESSAGE)
        begun = self._held.lstrip()
        if not message:
            waits = len(begun) <= HEADER_CHARACTERS and _may_be_header(begun)
            return not waits and self._begin("text", self._held)
        recipient = RECIPIENT.search(header)
        if recipient is not None and self._calls:
            self._begun = f'<tool_call>\n{{"name": {json.dumps(recipient[1])}, "arguments": '
            return self._begin("call", rest)
        is_thought = f"{CHANNEL}analysis" in header
        return self._begin("thought" if is_thought else "text", rest)

    def _begin(self, state: str, rest: str) -> bool:
        self._state, self._held = state, rest
        return True

    def _content(self, text: str) -> str:
        """Write more of the message that is being read."""
        if not text:
            return ""
        if self._state == "call":
            begun, self._begun = self._begun, ""
            return begun + text
        separator = ""
        if self._messages[self._state] < 0:  # one has ended
            self._messages[self._state] = 1
            separator = "\n\n"
        self._messages[self._state] = self._messages[self._state] or 1
        return separator + text

    def _end(self) -> str:
        """End the message that is being read."""
        if self._state == "call":
            begun, self._begun = self._begun, ""
            return f"{begun}{'{}' if begun else ''}}}\n</tool_call>"
        if self._messages[self._state]:
            self._messages[self._state] = -1
        return ""


def _may_be_header(text: str) -> bool:
    """Return whether a text begins a header, or may."""
    return any(text.startswith(it) or it.startswith(text) for it in (START, CHANNEL, "to="))


def _held_back(text: str) -> int:
    """Count the last characters that may begin a mark."""
    return max(overlap(text, mark) for mark in (END, CALL, RETURN, START, CHANNEL))
