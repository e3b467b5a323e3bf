"""The server as a person starts it, for other programs to talk to.

GPTQ_HOST_MODEL=demo, or any other reference, has the clients' tests talk to that model in place of
a tiny one; docs/hosts/server.md has the command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from processes import start_server

import gptq_loader_plugin as gptq
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

__all__ = ["CITIES", "DATA", "MODEL", "ONE", "OTHER", "THINKER", "serving", "serving_clients"]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = "gptq-4bit-32g-act-sym"
OTHER = "gptq-3bit-128g-act-sym"
THINKER = "thinker"
MODEL = os.environ.get("GPTQ_HOST_MODEL") or ONE  # that clients ask
CONTEXT = 4096  # tokens: what agents say of their tools takes more than the tests' own have
# Opens a thought, as Qwen3's and DeepSeek's do.
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
{# </think> #}"""
CITIES = ("Paris", "Rome")


@contextmanager
def serving(*args: str, model: str = ONE) -> Iterator[ServerProcess]:
    """Serve a tiny checkpoint, with the others of the tests beside it; or another model."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", model]
    options = ["--models-dir", str(DATA), "--port", "0", "--device", "cpu", "--json", *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with start_server([*command, *options], sent=signal.SIGTERM, env=environ) as server:
        yield server
        assert server.process.poll() is None, server.log


@contextmanager
def serving_clients(models: Path) -> Iterator[ServerProcess]:
    """Serve MODEL, and beside it THINKER: the same weights with a template that opens a thought.

    Args:
        models: an empty folder, for the models.
    """
    folder = DATA / ONE if MODEL == ONE else resolve(MODEL, plugins=gptq.Plugins(installed=True))
    for name in {ONE, THINKER} if MODEL == ONE else {THINKER}:
        shutil.copytree(folder, models / name)
        if MODEL == ONE:
            config = json.loads((models / name / "config.json").read_text())
            config["max_position_embeddings"] = CONTEXT
            (models / name / "config.json").write_text(json.dumps(config))
    (models / THINKER / "chat_template.jinja").write_text(THINKING)
    with serving("--models-dir", str(models), model=MODEL) as server:
        yield server
