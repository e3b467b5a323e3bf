"""Lay out the Chat tab, and wire it to what happens there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import AT_ONCE, PRIVATE, REPLIES, show_error, stop
from gptq_loader_extensions.gradio.tabs.chat_events import ChatEvents
from gptq_loader_extensions.gradio.tabs.export_box import ExportBox
from gptq_loader_extensions.gradio.tabs.message_view import LATEX
from gptq_loader_extensions.gradio.versions import known

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.tab import Wiring

__all__ = ["ChatTab"]

WELCOME = "### What would you like to know?\nThe model runs on this machine."


class ChatTab:
    """The tab; made inside the page's layout, then wired.

    Args:
        models: generates the replies.
        header: the page's header, which shows what generates them.
    """

    def __init__(self, models: Models, header: gr.HTML) -> None:
        self._models = models
        self._parts: dict[str, Any] = {
            "header": header,
            "conversation": gr.State(()),
            "cancel": gr.State(None),
            "problem": gr.State(""),
            "key": gr.State(""),
            "files": gr.State(()),
        }
        with gr.Row(elem_id=elements.TALK):
            with gr.Column(elem_id=elements.SIDE, scale=0, min_width=210):
                self._parts["new"] = gr.Button("New chat", elem_id=elements.NEW, size="sm")
                gr.HTML("<div></div>", elem_id=elements.CHATS)  # chats.js draws the list
            with gr.Column(scale=1, min_width=300):
                self._lay_out_talk()
                self._lay_out_message()
                self._export = ExportBox(models)
        self._parts["prompt"] = self._export.prompt
        self._lay_out_carriers()

    def _lay_out_carriers(self) -> None:
        """Lay out what goes between the server and the scripts; the style sheet hides it.

        What is not drawn at all does not change in the browser.
        """
        for name, elem_id in (("kept", elements.KEPT), ("command", elements.COMMAND)):
            self._parts[name] = gr.Textbox(
                "", elem_id=elem_id, elem_classes=elements.CARRIER_CLASS, label=name
            )
        self._change, self._generate = (
            gr.Button(elem_id, elem_id=elem_id, elem_classes=elements.CARRIER_CLASS)
            for elem_id in (elements.CHANGE, elements.GENERATE)
        )

    def _lay_out_talk(self) -> None:
        parts = self._parts
        options = known(
            gr.Chatbot,
            type="messages",
            buttons=[],  # messages.js draws them, over what was written
            show_copy_button=False,
            show_label=False,
            layout="bubble",
            group_consecutive_messages=False,
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
        parts["attached"] = gr.HTML("", elem_id=elements.ATTACHED)
        with gr.Row(elem_id=elements.ASK):
            gr.Button("Attach", elem_id=elements.ATTACH, scale=0, min_width=46)
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
            parts["continue"] = _small("Continue", elements.CONTINUE)
            parts["retry"] = _small("Retry", elements.RETRY)
            parts["undo"] = _small("Undo", elements.UNDO)

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what happens."""
        parts, panel = self._parts, wiring.panel
        events = ChatEvents(self._models, parts, panel)
        conversation, key, message = parts["conversation"], parts["key"], parts["message"]
        kept, command, files = parts["kept"], parts["command"], parts["files"]
        outputs = list(parts.values())
        inputs = [conversation, key, *panel.parts]
        sending = [message.submit, parts["send"].click]
        sent = [message, conversation, key, files, *panel.parts]
        # What a script returns goes to the function in place of the inputs.
        read = "(_, ...others) => [gptqPage.command(), ...others]"
        replies = [
            gr.on(sending, events.send, sent, outputs, **REPLIES),
            parts["retry"].click(events.retry, inputs, outputs, **REPLIES),
            parts["continue"].click(events.go_on, inputs, outputs, **REPLIES),
            self._generate.click(events.generate, [command, *inputs], outputs, js=read, **REPLIES),
        ]
        changed = [command, conversation, key, files]
        shown = [*outputs, *panel.parts]
        change = self._change.click(events.change, changed, shown, js=read, **AT_ONCE)
        for event in (*replies, change):
            event.then(show_error, [parts["problem"]], None, concurrency_limit=None, **PRIVATE)
        parts["stop"].click(stop, [parts["cancel"]], None, **AT_ONCE)
        parts["undo"].click(events.undo, [conversation, key], outputs, **AT_ONCE)
        parts["new"].click(events.empty, None, outputs, **AT_ONCE)

        kept.change(None, [kept], None, js="(text) => gptqPage.keep(text)", **AT_ONCE)
        begin = "() => gptqPage.open()"
        wiring.page.load(events.opened, [kept], shown, js=begin, **AT_ONCE)
        self._export.wire(conversation, message, panel)


def _small(name: str, elem_id: str, *, interactive: bool = False) -> gr.Button:
    return gr.Button(
        name, elem_id=elem_id, size="sm", scale=0, min_width=64, interactive=interactive
    )
