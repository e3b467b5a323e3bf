"""Chats as other servers' clients write them, in the form that OpenAI's API has for them."""

from __future__ import annotations

from typing import Any

__all__ = ["resolve_dialects"]

# Mistral's and Anthropic's names for choices of tools.
CHOICES = {"any": "required", "auto": "auto", "none": "none", "required": "required"}
TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def resolve_dialects(fields: Any) -> Any:  # noqa: ANN401 - a body that was not checked yet
    """Return a chat's body in OpenAI's form; what is of no known form stays as it is.

    Tools and choices as `/v1/responses` or Anthropic have them, calls without ids, answers without
    a text, and parts of text by their other names.
    """
    if not isinstance(fields, dict):
        return fields
    resolved = dict(fields)
    if "tool_choice" in fields:
        resolved["tool_choice"] = _choice(fields["tool_choice"])
    if isinstance(fields.get("tools"), list):
        resolved["tools"] = [_tool(tool) for tool in fields["tools"]]
    if isinstance(fields.get("messages"), list):
        resolved["messages"] = _messages(fields["messages"])
    return resolved


def _choice(choice: Any) -> Any:  # noqa: ANN401
    if isinstance(choice, str):
        return CHOICES.get(choice, choice)
    if not isinstance(choice, dict):
        return choice
    kind, function = choice.get("type"), choice.get("function")
    if set(choice) == {"type"} and isinstance(kind, str) and kind in CHOICES:
        return CHOICES[kind]
    if set(choice) == {"function"} and isinstance(function, dict):
        return {"type": "function", "function": function}
    if set(choice) == {"type", "name"} and kind in ("function", "tool"):
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _tool(tool: Any) -> Any:  # noqa: ANN401
    """Return a tool with its function in it, and the type that says so."""
    if not isinstance(tool, dict):
        return tool
    if "function" in tool:
        return {"type": "function", **tool}
    if tool.get("type") == "function" and "name" in tool:
        function = {name: value for name, value in tool.items() if name != "type"}
        return {"type": "function", "function": function}
    return tool


def _messages(messages: list[Any]) -> list[Any]:
    """Return messages whose calls have ids, and whose answers name them, in order."""
    calls = _Calls()
    return [
        calls.named(_message(message)) if isinstance(message, dict) else message
        for message in messages
    ]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its parts as texts, and a begun one under the name it has here."""
    written = dict(message)
    if isinstance(message.get("content"), list):
        written["content"] = [_part(part) for part in message["content"]]
    if message.get("role") == "tool" and message.get("content") is None:
        written["content"] = ""  # of a function that returned nothing
    if message.get("partial") is True:  # Moonshot's name
        written["prefix"] = written.pop("partial")
    return written


class _Calls:
    """The calls of a conversation, so far."""

    def __init__(self) -> None:
        self._count = 0
        self._unanswered: list[Any] = []

    def named(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with ids for its calls, or with the id of the one that it answers."""
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            return {**message, "tool_calls": [self._name(call) for call in calls]}
        if message.get("role") != "tool":
            return message
        answered = message.get("tool_call_id")
        if answered is None and self._unanswered:
            answered = self._unanswered[0]
        if answered in self._unanswered:
            self._unanswered.remove(answered)
        return message if answered is None else {**message, "tool_call_id": answered}

    def _name(self, call: Any) -> Any:  # noqa: ANN401
        if not isinstance(call, dict):
            return call
        self._count += 1
        named = {**call, "id": f"call_{self._count}"} if call.get("id") is None else call
        self._unanswered.append(named["id"])
        return named


def _part(part: Any) -> Any:  # noqa: ANN401
    if not isinstance(part, dict):
        return part
    field = TEXT_PARTS.get(str(part.get("type")))
    if field is None or not isinstance(part.get(field), str):
        return part
    return {"type": "text", "text": part[field]}
