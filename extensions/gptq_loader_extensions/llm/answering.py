"""Turn llm's prompts and conversations into messages, and answer them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["answer", "collect_messages"]

Messages = list[dict[str, str]]
EXCLUDED = ("reasoning",)  # another model's reasoning is not part of its reply

logger = logging.getLogger(__name__)


def collect_messages(prompt: Any, conversation: Any) -> Messages:  # noqa: ANN401 - llm's own
    """Collect the messages of a conversation, up to this prompt.

    From llm 0.32 on they are all in `prompt.messages`; before, in the conversation's responses.

    Raises:
        TemplateError: a turn has something other than text.
    """
    if hasattr(prompt, "messages"):
        turns = [(message.role, _text(message.parts)) for message in prompt.messages]
        return [{"role": role, "content": text} for role, text in turns if text]
    messages: Messages = []
    system = None
    for turn in [*([] if conversation is None else conversation.responses), None]:
        turn_prompt = prompt if turn is None else turn.prompt
        if turn_prompt.system and turn_prompt.system != system:
            system = turn_prompt.system
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": turn_prompt.prompt})
        if turn is not None:
            messages.append({"role": "assistant", "content": turn.text_or_raise()})
    return messages


def answer(
    model: LoadedModel,
    messages: Messages,
    options: GenerateOptions,
    *,
    cancel: threading.Event | None = None,
) -> tuple[int, Iterator[Piece]]:
    """Answer messages, or complete a lone prompt where there is no template.

    Returns:
        The number of the prompt's tokens, and the pieces of the reply.

    Raises:
        TemplateError: there is no template, and this is more than one prompt.
        PromptTooLong: the last message alone does not fit the context.
    """
    if model.template.name != "none":
        ids, _ = model.encode_chat(messages, when_too_long="drop-oldest")  # which logs a warning
        stop = model.template.stop
        return len(ids), model.stream_ids(ids, options, stop=stop, cancel=cancel)
    if [message["role"] for message in messages] != ["user"]:
        raise TemplateError(
            "this checkpoint has no chat template; it can complete a prompt, but not chat",
            hint="leave out -c and -s, or choose a template: -o template chatml",
        )
    logger.warning("this checkpoint has no chat template; it continues the prompt")
    ids = model.encode(messages[0]["content"])
    return len(ids), model.stream_ids(ids, options, cancel=cancel)


def _text(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        kind = part.to_dict()["type"]
        if kind in EXCLUDED:
            continue
        if kind != "text":
            raise TemplateError(
                f"a message of this conversation has a part that is not text ({kind})",
                hint="start a new conversation: leave out -c",
            )
        texts.append(part.text)
    return "".join(texts)
