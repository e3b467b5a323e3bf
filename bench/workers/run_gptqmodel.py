"""Measure GPTQModel on the CPU, with the kernel it chooses, by `generate`."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from importlib.metadata import version

import torch
from generating import prompt_seconds, reply_seconds
from turns import Loaded, serve

with contextlib.redirect_stdout(sys.stderr):  # it greets
    from gptqmodel import GPTQModel


def load(folder: str) -> Loaded:
    model = GPTQModel.load(folder, device="cpu", dtype=torch.bfloat16)
    kinds = Counter(type(it).__name__ for it in model.model.modules() if hasattr(it, "qzeros"))
    return Loaded(
        lambda tokens: prompt_seconds(model, tokens),
        lambda tokens: reply_seconds(model, tokens),
        {
            "version": version("gptqmodel"),
            "threads": torch.get_num_threads(),
            "kernels": dict(kinds),
        },
    )


if __name__ == "__main__":
    serve(load)
