"""Write the chats that the demo's model is calibrated on, by the model itself.

    python tools/write_demo_chats.py

The model is the unquantised one, of a known digest, and the sampling is seeded, so what it writes
is written once and carried in the package: docs/decisions/own-chats.md. Takes a minute or so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gptq_loader_plugin.quantize.demo import CHAT_TEMPLATE, CHATS, OPTIONS
from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.quantize.own_chats import write_chats
from gptq_loader_plugin.quantize.source import load_source

# What it writes may name addresses and people, of its invention or not: such chats are left out, and
# a quarter more are written.
NAMES = ("http", "www", "@")
EXTRA = 1.25


def main() -> None:
    """Write them over what the package carries."""
    model, tokenizer = load_source(Path(find_demo_model(progress=lambda _: None)))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = int(EXTRA * OPTIONS.samples * OPTIONS.seq_len)
    chats = write_chats(model, tokenizer, tokens=tokens, progress=lambda _: None)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    lines = [line for line in lines if not any(name in line for name in NAMES)]
    CHATS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} chats in {CHATS}", file=sys.stderr)


if __name__ == "__main__":
    main()
