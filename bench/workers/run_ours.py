"""Measure this package: `LoadedModel.stream`'s own loop."""

from __future__ import annotations

import os

import torch
import transformers  # noqa: F401 - so that its import is no part of the load
from turns import DEPTH, Loaded, serve

import gptq_loader_plugin as gptq
from gptq_loader_plugin.measure.speed import bytes_read_a_token, prompt_seconds, reply_seconds


def load(reference: str) -> Loaded:
    backend, head = os.environ.get("BENCH_BACKEND"), os.environ.get("BENCH_HEAD")
    model = gptq.load(reference, device="cpu", backend=backend, head=head)  # type: ignore[arg-type]
    return Loaded(
        lambda tokens: prompt_seconds(model, tokens),
        lambda tokens: reply_seconds(model, tokens, DEPTH),
        {
            "threads": torch.get_num_threads(),
            "kernels": model.plan.kernels(),
            "notes": list(model.notes),
            "token_bytes": bytes_read_a_token(model),
        },
    )


if __name__ == "__main__":
    serve(load)
