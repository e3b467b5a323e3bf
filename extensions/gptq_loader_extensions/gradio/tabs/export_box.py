"""Lay out what shows the exact prompt, and exports or imports a conversation."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, PRIVATE
from gptq_loader_extensions.gradio.jobs.conversation import Conversation, prompt_messages
from gptq_loader_extensions.gradio.jobs.reply import chat_prompt
from gptq_loader_extensions.gradio.tabs.export import as_json, as_markdown, file_name
from gptq_loader_extensions.gradio.tabs.panel_values import read_settings
from gptq_loader_extensions.gradio.views.prompt_view import prompt_html
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel

__all__ = ["ExportBox"]

NO_MODEL = "No model is loaded. Choose one in the Model tab."


class ExportBox:
    """The box; made inside the Chat tab, then wired.

    Args:
        models: holds the model whose prompt is shown.

    Attributes:
        prompt: the button that shows the prompt.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        with gr.Accordion("Prompt, export and import", open=False, elem_id=elements.MORE):
            with gr.Row():
                self.prompt = _button("Show the prompt", elements.SHOW_PROMPT)
                self._json = _button("Export as JSON", elements.EXPORT_JSON)
                self._markdown = _button("Export as Markdown", elements.EXPORT_MARKDOWN)
                _button("Import JSON", elements.IMPORT)  # chats.js opens the file
            self._shown = gr.HTML("", elem_id=elements.PROMPT_VIEW)
        self._file = gr.Textbox(
            "", elem_id=elements.FILE, elem_classes=elements.CARRIER_CLASS, label="File"
        )

    def wire(self, conversation: gr.State, message: gr.Textbox, panel: SettingsPanel) -> None:
        """Connect the buttons; page.js saves what is exported."""
        system = panel.parts[0]
        inputs = [conversation, message, *panel.parts]
        self.prompt.click(self._prompt, inputs, [self._shown], **AT_ONCE)
        for button, write in ((self._json, self._as_json), (self._markdown, self._as_markdown)):
            written = button.click(write, [conversation, system], [self._file], **AT_ONCE)
            save = "(text) => gptqPage.download(text)"
            written.then(None, [self._file], None, js=save, **PRIVATE)

    def _prompt(self, messages: Conversation, draft: str, *values: Any) -> str:  # noqa: ANN401
        """Draw the prompt of the message being written, or else of the last reply."""
        loaded = self._models.loaded
        if loaded is None:
            return alert(NO_MODEL)
        try:
            settings = read_settings(values)
            prompt = prompt_messages(messages, settings.system)
            if draft.strip():
                prompt.append({"role": "user", "content": draft})
            elif messages and messages[-1].role == "assistant":
                prompt.pop()
            ids = chat_prompt(prompt, settings)(loaded.model).ids
        except GPTQLoaderError as error:
            return alert(format_error(error))
        return prompt_html(ids, loaded.model.tokenizer, context=loaded.model.context)

    def _as_json(self, messages: Conversation, system: str | None) -> str:
        text = as_json(messages, model=self._name(), system=system or "")
        return _file(messages, ".json", "application/json", text)

    def _as_markdown(self, messages: Conversation, system: str | None) -> str:
        text = as_markdown(messages, model=self._name(), system=system or "")
        return _file(messages, ".md", "text/markdown", text)

    def _name(self) -> str:
        loaded = self._models.loaded
        return loaded.name if loaded else ""


def _file(messages: Conversation, suffix: str, kind: str, text: str) -> str:
    """Return a file for the browser to save; "" for an empty conversation, of which it tells."""
    if not messages:
        return ""
    today = datetime.now().astimezone().date()
    return json.dumps({"name": file_name(messages, suffix, on=today), "type": kind, "text": text})


def _button(name: str, elem_id: str) -> gr.Button:
    return gr.Button(name, elem_id=elem_id, size="sm", scale=0, min_width=160)
