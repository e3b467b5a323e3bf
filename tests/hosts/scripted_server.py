"""Serve a tiny checkpoint whose replies what is asked chooses: scripted_server.py MODELS NAME.

A question with "call:" and JSON in it is answered with that call, and what the call gave with the
word that it says is secret; anything else with "All done." The prompts, the events and the context
are the server's as ever, and so are the steps: only which tokens they pick is not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from said import Said

import gptq_loader_plugin as gptq

CALL = re.compile(r"call:(\{.*?\}\})", re.DOTALL)
ANSWERED = "<tool_response>"
DONE = "All done."
SECRET = re.compile(r"secret word is (\w+)")


def reply_to(prompt: str) -> str:
    """Return what a prompt is answered with."""
    calls = list(CALL.finditer(prompt))
    answer = prompt.rfind(ANSWERED)
    if not calls:
        return DONE
    if answer > calls[-1].end():
        secret = SECRET.search(prompt, answer)
        return f"The word is {secret[1]}." if secret else DONE
    call = calls[-1][1].replace('\\"', '"')  # of who sends the question in quotes
    return f"<tool_call>\n{call}\n</tool_call>"


def load_scripted(reference: Any) -> gptq.LoadedModel:
    """Load a model whose replies are chosen."""
    model = gptq.load(reference, device="cpu", dtype="float32")
    model.draft = None  # a step is a token
    begin = model.begin

    def scripted(ids: Any, *args: Any, processors: Any = (), **more: Any) -> Any:
        text = reply_to(model.tokenizer.decode(ids))
        chosen = Said(model.tokenizer, text, len(ids))
        return begin(ids, *args, processors=[*processors, chosen], **more)

    model.begin = scripted  # type: ignore[method-assign]
    return model


def main(models: str, name: str) -> None:
    """Serve a model of a models folder, and say where as `serve --json` does."""
    plugins = gptq.Plugins(installed=True)
    options = {"models_dir": Path(models), "port": 0, "as_json": True}
    plugins.host("openai").install(reference=name, load=load_scripted, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
