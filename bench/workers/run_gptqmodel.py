"""Measure GPTQModel on the CPU, with the kernel it chooses, by `generate`."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

import torch
from generating import prompt_seconds, reply_seconds
from gptqmodel import GPTQModel
from turns import Loaded, serve


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
