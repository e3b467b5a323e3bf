"""Turn what llm asks into messages, and answer them."""

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

__all__ = ["answer", "messages_of"]

Messages = list[dict[str, str]]
LEFT_OUT = ("reasoning",)  # what another model thought is not part of what it said

logger = logging.getLogger(__name__)


def messages_of(prompt: Any, conversation: Any) -> Messages:  # noqa: ANN401 - llm's own
    """Collect the turns before this one, and this one.

    From llm 0.32 on they are all in `prompt.messages`; before, in the conversation's responses.

    Raises:
        TemplateError: a turn has something other than text.
    """
    if hasattr(prompt, "messages"):
        turns = [(it.role, _text(it.parts)) for it in prompt.messages]
        return [{"role": role, "content": text} for role, text in turns if text]
    messages: Messages = []
    system = None
    for turn in [*([] if conversation is None else conversation.responses), None]:
        asked = prompt if turn is None else turn.prompt
        if asked.system and asked.system != system:
            system = asked.system
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": asked.prompt})
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
        How many tokens the prompt has, and the pieces of the reply.

    Raises:
        TemplateError: there is no template, and this is more than one prompt.
        PromptTooLong: the last message alone does not fit the context.
    """
    if model.template.name != "none":
        ids, _ = model.encode_chat(messages, when_too_long="drop-oldest")  # which logs a warning
        stop = model.template.stop
        return len(ids), model.stream_ids(ids, options, stop=stop, cancel=cancel)
    if [it["role"] for it in messages] != ["user"]:
        raise TemplateError(
            "this checkpoint has no chat template, so it can complete one prompt and not chat",
            hint="leave out -c and -s, or name a template: -o template chatml",
        )
    logger.warning("this checkpoint has no chat template: it goes on where the prompt ends")
    ids = model.encode(messages[0]["content"])
    return len(ids), model.stream_ids(ids, options, cancel=cancel)


def _text(parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        kind = part.to_dict()["type"]
        if kind in LEFT_OUT:
            continue
        if kind != "text":
            raise TemplateError(
                f"a message of this conversation has a part that is no text ({kind})",
                hint="begin a new conversation: leave out -c",
            )
        texts.append(part.text)
    return "".join(texts)
