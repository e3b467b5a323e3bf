"""A chat's reply as it grows: its thoughts, its text, its calls, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_extensions.openai.replies.logprobs import LogprobAligner, chat_logprobs
from gptq_loader_extensions.openai.replies.tool_parsers import (
    CallBegin,
    CallText,
    NoToolParser,
    new_call_id,
)
from gptq_loader_plugin.chat.thinking import make_thought_parser

if TYPE_CHECKING:
    from gptq_loader_extensions.openai.replies.chat_prompt import ChatPrompt
    from gptq_loader_extensions.openai.replies.engine import ReplyChunk
    from gptq_loader_extensions.openai.replies.token_text import TokenText
    from gptq_loader_extensions.openai.replies.tool_parsers import ToolEvent

__all__ = ["FINISH", "CallDelta", "ChatReply", "FunctionCall", "PreparedChat", "ReplyDelta"]

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """What reads the replies to a request, once its model is known.

    Attributes:
        prompt: the prompt.
        end_ids: the tokens that end a reply.
        token_text: writes single tokens; None where no log-probabilities are requested.
        show_thoughts: whether thoughts are sent.
    """

    prompt: ChatPrompt
    end_ids: frozenset[int]
    token_text: TokenText | None = None
    show_thoughts: bool = True


@dataclass(slots=True)
class FunctionCall:
    """A call of a function that a model requests.

    Attributes:
        name: the function's.
        arguments: as JSON; where the reply was cut off, a part of it.
        call_id: what the answer to it refers to.
    """

    name: str
    arguments: str = ""
    call_id: str = field(default_factory=new_call_id)

    def to_json(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of a call.

    Attributes:
        index: which of the reply's calls.
        arguments: more of its arguments.
        begun: the call, where it is new.
    """

    index: int
    arguments: str = ""
    begun: FunctionCall | None = None


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """What is new of a reply.

    Attributes:
        thought: more of its thoughts.
        text: more of its text.
        calls: what is new of its calls.
    """

    thought: str = ""
    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class ChatReply:
    """One reply as it grows.

    Args:
        prepared: how to read it.

    Attributes:
        text: of the answer.
        thought: of what came before it.
        calls: of functions.
        logprobs: of its tokens, where they are requested.
        tokens: how many there are.
        thought_tokens: how many of them are thoughts.
        finish: why it ended.
        stop_text: which stop text of the request's ended it, where one did.
    """

    def __init__(self, prepared: PreparedChat) -> None:
        self._tools = prepared.prompt.make_parser()
        calls = not isinstance(self._tools, NoToolParser)
        self._thoughts = make_thought_parser(prepared.prompt.marks, calls=calls)
        self._show_thoughts = prepared.show_thoughts
        self._token_text = prepared.token_text
        self._aligner: LogprobAligner | None = None
        if self._token_text is not None:
            self._aligner = LogprobAligner(self._token_text, prepared.end_ids)
        self.text = self.thought = ""
        self.calls: list[FunctionCall] = []
        self.logprobs: list[dict[str, Any]] = []
        self.tokens = self.thought_tokens = 0
        self.finish: FinishReason | None = None
        self.stop_text = ""

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are requested."""
        return self._aligner is not None

    def add(self, chunk: ReplyChunk) -> ReplyDelta:
        """Add a chunk; return what is new."""
        finish = chunk.piece.finish
        thinking = self._thoughts.thinking
        thought, text = self._thoughts.feed(chunk.piece.text)
        if finish is not None:
            rest = self._thoughts.finish()
            thought, text = thought + rest[0], text + rest[1]
        if thinking or self._thoughts.thinking:
            self.thought_tokens = chunk.piece.tokens
        events = self._tools.feed(text) if text else []
        if finish is not None:
            events += self._tools.finish()
        delta = self._note(thought if self._show_thoughts else "", events)
        self.tokens = chunk.piece.tokens
        if finish is not None:
            self.stop_text = chunk.piece.stop_text
            if self.calls and finish != "length":
                self.finish = "tool_calls"
            else:
                self.finish = "length" if finish == "length" else "stop"
        return delta

    def add_logprobs(self, chunk: ReplyChunk) -> dict[str, Any] | None:
        """Add a chunk's log-probabilities and return them, where they are requested."""
        if self._aligner is None or self._token_text is None:
            return None
        logprobs = chat_logprobs(self._token_text, self._aligner.add(chunk))
        self.logprobs += logprobs["content"]
        return logprobs

    def _note(self, thought: str, events: list[ToolEvent]) -> ReplyDelta:
        text = "".join(event for event in events if isinstance(event, str))
        self.thought += thought
        self.text += text
        deltas: list[CallDelta] = []
        for event in events:
            match event:
                case CallBegin():
                    call = FunctionCall(event.name)
                    self.calls.append(call)
                    deltas.append(CallDelta(len(self.calls) - 1, begun=call))
                case CallText():
                    self.calls[-1].arguments += event.arguments
                    deltas.append(CallDelta(len(self.calls) - 1, event.arguments))
        return ReplyDelta(thought, text, tuple(_joined(deltas)))


def _joined(deltas: list[CallDelta]) -> list[CallDelta]:
    """Join what is new of one call: a call that came at once is sent at once."""
    joined: list[CallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index and delta.begun is None:
            last = joined.pop()
            delta = CallDelta(delta.index, last.arguments + delta.arguments, last.begun)  # noqa: PLW2901
        joined.append(delta)
    return joined
