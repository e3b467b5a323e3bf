"""Lay out the Chat tab, and wire it to what happens there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import AT_ONCE, PRIVATE, REPLIES, show_error, stop
from gptq_loader_extensions.gradio.tabs.chat_events import NEW_CONVERSATION, ChatEvents
from gptq_loader_extensions.gradio.tabs.export_box import ExportBox
from gptq_loader_extensions.gradio.versions import known

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.tab import Wiring

__all__ = ["ChatTab"]

WELCOME = "### What would you like to know?\nThe model runs on this machine."
# As models write it; a single dollar is money.
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]


class ChatTab:
    """The tab; made inside the page's layout, then wired.

    Args:
        models: generates the replies.
        header: the page's header, which shows what generates them.
    """

    def __init__(self, models: Models, header: gr.HTML) -> None:
        self._parts: dict[str, Any] = {
            "header": header,
            "conversation": gr.State(()),
            "cancel": gr.State(None),
            "problem": gr.State(""),
            "key": gr.State(""),
        }
        self._lay_out_talk()
        self._lay_out_message()
        self._export = ExportBox(models)
        self._parts["prompt"] = self._export.prompt
        # A carrier between the server and page.js; hidden by the style sheet, because what is not
        # drawn at all does not change in the browser.
        self._parts["kept"] = gr.Textbox(
            "", elem_id=elements.KEPT, elem_classes=elements.CARRIER_CLASS, label="Kept"
        )
        self._events = ChatEvents(models, self._parts)

    def _lay_out_talk(self) -> None:
        parts = self._parts
        with gr.Row(elem_id=elements.TALKS):
            parts["picker"] = gr.Dropdown(
                [NEW_CONVERSATION],
                value="",
                label="Conversation",
                show_label=False,
                container=False,
                elem_id=elements.PICKER,
                scale=1,
                min_width=120,
                interactive=True,
            )
            parts["new"] = _small("New", elements.NEW, interactive=True)
            parts["delete"] = _small("Delete", elements.DELETE)
        options = known(
            gr.Chatbot,
            type="messages",
            editable="all",
            buttons=["copy"],
            show_copy_button=True,
            show_label=False,
            layout="bubble",
            allow_tags=False,
            feedback_options=None,
            latex_delimiters=LATEX,
            autoscroll=False,  # page.js scrolls, and never against the user
            allow_file_downloads=False,
        )
        parts["chat"] = gr.Chatbot(
            elem_id=elements.CHAT, label="Chat", placeholder=WELCOME, **options
        )

    def _lay_out_message(self) -> None:
        parts = self._parts
        with gr.Row(elem_id=elements.ASK):
            parts["message"] = gr.Textbox(
                elem_id=elements.MESSAGE,
                label="Message",
                show_label=False,
                container=False,
                placeholder="Write a message",
                lines=1,
                max_lines=6,
                autofocus=True,
                scale=1,
                min_width=160,
            )
            parts["send"] = gr.Button("Send", elem_id=elements.SEND, variant="primary", scale=0)
            parts["stop"] = gr.Button(
                "Stop",
                elem_id=elements.STOP,
                elem_classes=elements.STOPS_CLASS,
                variant="stop",
                scale=0,
                visible=False,
            )
        with gr.Row(elem_id=elements.BELOW):
            parts["status"] = gr.Markdown("", elem_id=elements.STATUS)
            parts["retry"] = _small("Retry", elements.RETRY)
            parts["undo"] = _small("Undo", elements.UNDO)

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what happens."""
        parts, events = self._parts, self._events
        conversation, key, message = parts["conversation"], parts["key"], parts["message"]
        kept, picker = parts["kept"], parts["picker"]
        outputs = list(parts.values())
        inputs = [conversation, key, *wiring.panel.parts]
        sending = [message.submit, parts["send"].click]
        streams = [
            gr.on(sending, events.send, [message, *inputs], outputs, **REPLIES),
            parts["retry"].click(events.retry, inputs, outputs, **REPLIES),
        ]
        if hasattr(parts["chat"], "edit"):  # since gradio 5
            streams.append(parts["chat"].edit(events.edit, inputs, outputs, **REPLIES))
        for reply in streams:
            reply.then(show_error, [parts["problem"]], None, concurrency_limit=None, **PRIVATE)
        parts["stop"].click(stop, [parts["cancel"]], None, **AT_ONCE)
        parts["undo"].click(events.undo, [conversation, key], outputs, **AT_ONCE)
        parts["new"].click(events.empty, None, outputs, **AT_ONCE)

        # What page.js returns goes to the function in place of the inputs.
        keep, begin = "(text) => gptqPage.keep(text)", "() => gptqPage.open()"
        choose = "(_, key) => [gptqPage.open(key), key]"
        forget = "(_, key) => [gptqPage.forget(key), key]"
        kept.change(events.listed, [kept], [picker], js=keep, **AT_ONCE)
        picker.select(events.opened, [kept, picker], outputs, js=choose, **AT_ONCE)
        parts["delete"].click(events.deleted, [kept, picker], outputs, js=forget, **AT_ONCE)
        wiring.page.load(events.opened, [kept], outputs, js=begin, **AT_ONCE)
        self._export.wire(conversation, wiring.panel.parts[0], message)


def _small(name: str, elem_id: str, *, interactive: bool = False) -> gr.Button:
    return gr.Button(
        name, elem_id=elem_id, size="sm", scale=0, min_width=64, interactive=interactive
    )
