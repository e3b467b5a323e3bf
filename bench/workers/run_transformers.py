"""Measure transformers with bfloat16 weights, by `generate`."""

from __future__ import annotations

import torch
import transformers
from generating import prompt_seconds, reply_seconds
from turns import Loaded, serve


def load(folder: str) -> Loaded:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return Loaded(
        lambda tokens: prompt_seconds(model, tokens),
        lambda tokens: reply_seconds(model, tokens),
        {"version": transformers.__version__, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    serve(load)
