"""Make a reply the items of a response, and the events that send them as they grow."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.schema.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_extensions.openai.replies.chat_reply import CallDelta, ChatReply, ReplyDelta

__all__ = ["ResponseItems"]


class ResponseItems:
    """The items of one response: thoughts, messages and calls, in the order they come.

    Args:
        reply: what they are of.
        custom: the tools whose calls have a text in place of arguments.

    Attributes:
        items: those there are, the last one perhaps unfinished.
    """

    def __init__(self, reply: ChatReply, custom: frozenset[str]) -> None:
        self._reply, self._custom = reply, custom
        self._call = -1  # the index of the call that is the open item
        self._open = ""  # the type of the item that grows
        self.items: list[dict[str, Any]] = []

    def add(self, new: ReplyDelta) -> Iterator[dict[str, Any]]:
        """Add what is new of the reply; yield the events that say so."""
        if new.thought:
            yield from self._begin("reasoning")
            self._part()["text"] += new.thought
            yield self._part_event("reasoning_text.delta", delta=new.thought)
        if new.text:
            yield from self._begin("message")
            self._part()["text"] += new.text
            yield self._part_event("output_text.delta", delta=new.text, logprobs=[])
        for call in new.calls:
            yield from self._add_call(call)

    def finish(self) -> Iterator[dict[str, Any]]:
        """End the last item; a reply without any is an empty message."""
        if not self.items:
            yield from self._begin("message")
        yield from self._end()

    def _add_call(self, call: CallDelta) -> Iterator[dict[str, Any]]:
        if call.begun is not None:
            yield from self._end()
            custom = call.begun.name in self._custom
            self._open = "custom_tool_call" if custom else "function_call"
            self._call = call.index
            self.items.append(
                {
                    "id": _new_id("ctc" if custom else "fc"),
                    "type": self._open,
                    "status": "in_progress",
                    "call_id": call.begun.call_id,
                    "name": call.begun.name,
                    "input" if custom else "arguments": "",
                }
            )
            yield self._item_event("output_item.added")
        if call.arguments and self._open == "function_call":
            self.items[-1]["arguments"] += call.arguments
            yield self._event("function_call_arguments.delta", delta=call.arguments)

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        """Begin an item with a part, unless it is the one that grows."""
        if self._open == kind:
            return
        yield from self._end()
        self._open = kind
        if kind == "reasoning":
            item = {"id": _new_id("rs"), "type": kind, "status": "in_progress", "summary": []}
        else:
            item = {"id": _new_id("msg"), "type": kind, "status": "in_progress"}
            item["role"] = "assistant"
        self.items.append({**item, "content": []})
        yield self._item_event("output_item.added")
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        yield self._part_event("content_part.added", part=dict(part))

    def _end(self) -> Iterator[dict[str, Any]]:
        """End the item that grows."""
        if not self._open:
            return
        item = self.items[-1]
        cut = self._reply.finish == "length"
        item["status"] = "incomplete" if cut else "completed"
        if self._open == "reasoning":
            part = self._part()
            yield self._part_event("reasoning_text.done", text=part["text"])
            yield self._part_event("content_part.done", part=dict(part))
        elif self._open == "message":
            part = self._part()
            part["logprobs"] = self._reply.logprobs
            yield self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("content_part.done", part=dict(part))
        elif self._open == "function_call":
            yield self._event(
                "function_call_arguments.done", arguments=item["arguments"], name=item["name"]
            )
        else:
            item["input"] = _input(self._reply.calls[self._call].arguments)
            yield self._event("custom_tool_call_input.delta", delta=item["input"])
            yield self._event("custom_tool_call_input.done", input=item["input"])
        yield self._item_event("output_item.done")
        self._open = ""

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        position = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **position, **fields}

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
        return self._event(kind, content_index=0, **fields)

    def _item_event(self, kind: str) -> dict[str, Any]:
        item = json.loads(json.dumps(self.items[-1]))
        return {
            "type": f"response.{kind}",
            "output_index": len(self.items) - 1,
            "item": item,
        }


def _input(arguments: str) -> str:
    """Return the text that a call of a tool without arguments has."""
    try:
        content = parse_json(arguments)
    except ValueError:
        return arguments
    text = content.get("input") if isinstance(content, dict) else None
    return text if isinstance(text, str) else arguments


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
