"""The server as a person starts it, for other programs to talk to."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

__all__ = ["CITIES", "DATA", "ONE", "OTHER", "copy_thinker", "serving"]

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = "gptq-4bit-32g-act-sym"
OTHER = "gptq-3bit-128g-act-sym"
CONTEXT = 4096  # tokens: what agents say of their tools takes more than the tests' own have
# Opens a thought, as Qwen3's and DeepSeek's do.
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
{# </think> #}"""
CITIES = ("Paris", "Rome")


def copy_thinker(models: Path) -> Path:
    """Copy a tiny checkpoint into a models folder twice: as it is, and as one that thinks."""
    for name in (ONE, "thinker"):
        shutil.copytree(DATA / ONE, models / name)
        config = json.loads((models / name / "config.json").read_text())
        config["max_position_embeddings"] = CONTEXT
        (models / name / "config.json").write_text(json.dumps(config))
    (models / "thinker" / "chat_template.jinja").write_text(THINKING)
    return models


@contextmanager
def serving(*args: str) -> Iterator[ServerProcess]:
    """Serve a tiny checkpoint, with the others of the tests beside it."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", ONE, "--models-dir", str(DATA)]
    options = ["--port", "0", "--device", "cpu", "--json", *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with start_server([*command, *options], sent=signal.SIGTERM, env=environ) as server:
        yield server
        assert server.process.poll() is None, server.log
