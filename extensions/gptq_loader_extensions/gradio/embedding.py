"""Build a chat with one model as a part of another gradio application."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.error_messages import format_error
from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
from gptq_loader_extensions.gradio.jobs.models import Loaded
from gptq_loader_extensions.gradio.jobs.reply import ReplySettings, chat_prompt, write_reply
from gptq_loader_extensions.gradio.tabs.header import entry_name
from gptq_loader_extensions.gradio.versions import known
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["chat_interface"]

DEFAULTS = GenerateOptions()


def chat_interface(model: LoadedModel, *, system: str = "") -> gr.Blocks:
    """Build the chat; programs call it as `/chat`, with a message and optional settings."""
    models = LocalModels(Loaded(entry_name(model), model))

    def chat(
        message: Any,  # noqa: ANN401 - text, or gradio's parts of it
        history: list[Any],
        system: str,
        max_new_tokens: int,
        temperature: float,
    ) -> Iterator[str]:
        cancel = threading.Event()
        messages = [*_messages(history), {"role": "user", "content": _text(message)}]
        try:
            options = GenerateOptions.parse(
                {"max_new_tokens": max_new_tokens, "temperature": temperature}
            )
            first = [{"role": "system", "content": system}] if system.strip() else []
            prepare = chat_prompt([*first, *messages], ReplySettings(options=options))
            for state in write_reply(models, prepare, options, cancel=cancel):
                if state.reply or not state.running:
                    yield state.reply
        except GPTQLoaderError as error:
            raise gr.Error(format_error(error), **known(gr.Error, print_exception=False)) from error
        finally:
            cancel.set()

    inputs: list[Any] = [
        gr.Textbox(system, label="System message"),
        gr.Number(DEFAULTS.max_new_tokens, label="Max new tokens", precision=0),
        gr.Slider(0, 2, DEFAULTS.temperature, step=0.05, label="Temperature"),
    ]
    options = known(
        gr.ChatInterface, type="messages", analytics_enabled=False, api_name="chat", title=None
    )
    return gr.ChatInterface(chat, additional_inputs=inputs, **options)


def _messages(history: list[Any]) -> list[dict[str, str]]:
    """Read a history from any version of gradio: messages, or pairs before 4.44."""
    messages: list[dict[str, str]] = []
    for turn in history:
        if isinstance(turn, dict):
            messages.append({"role": turn["role"], "content": _text(turn["content"])})
            continue
        question, reply = turn
        messages.append({"role": "user", "content": _text(question)})
        messages.append({"role": "assistant", "content": _text(reply)})
    return messages


def _text(content: Any) -> str:  # noqa: ANN401 - as gradio gives it
    """Read a content: a text, or a list of parts, of which the texts are joined."""
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if isinstance(content, dict):
        return str(content.get("text") or "")
    return content or ""
