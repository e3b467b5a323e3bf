"""Serve the page with tiny checkpoints, slowed, and keep a record: page_server.py RECORD [REF].

A question that ends with "say:" and a text is answered with that text: its tokens are the likeliest
ones, and the model, its steps and its sampling are as ever.

The record gets one byte for each step of the model, so its size tells whether a reply still runs.
Every attempt to reach another machine is written to stderr.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from said import Said

# As fast as a small model on a laptop: slow enough to see a reply grow.
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.02"))
LOOPBACK = ("127.0.0.1", "::1", "localhost", None)


def report_outside(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and args[0] not in LOOPBACK:
        sys.stderr.write(f"OUTSIDE {args[0]}\n")
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOOPBACK:
        sys.stderr.write(f"OUTSIDE {args[1]}\n")


SAID = re.compile(r".*say:(.*?)<\|im_end\|>", re.DOTALL)


def say(model: Any) -> None:
    """Let a model answer with what a question tells it to say."""
    stream = model.stream_ids

    def stream_said(ids: Any, *args: Any, processors: Any = (), **options: Any) -> Any:
        asked = SAID.match(model.tokenizer.decode(ids))
        if asked:
            processors = [*processors, Said(model.tokenizer, asked[1], len(ids))]
        return stream(ids, *args, processors=processors, **options)

    model.stream_ids = stream_said


def main(record: str, reference: str | None = None) -> None:
    sys.addaudithook(report_outside)
    # A shell's background job ignores Ctrl-C, and so would what the tests start from one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import gptq_loader_plugin as gptq

    file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    load = gptq.load

    def slowed(*_: object) -> None:
        os.write(file, b".")
        time.sleep(STEP_SECONDS)

    def load_slowed(reference: Any, **options: Any) -> gptq.LoadedModel:
        model = load(reference, **options)
        model.model.register_forward_pre_hook(slowed)
        model.draft = None  # a step is a token
        say(model)
        return model

    gptq.load = load_slowed
    plugins = gptq.Plugins(installed=True)
    # In bfloat16 a prompt that is read again from the cache may round to another token.
    options = {"device": "cpu", "dtype": "float32", "plugins": plugins}
    model = gptq.load(reference, **options) if reference else None
    plugins.host("gradio").install(model=model, port=0, open_browser=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
