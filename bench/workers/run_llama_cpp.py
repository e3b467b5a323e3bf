"""Measure llama.cpp through llama-cpp-python's plain C interface, without its Python objects."""

from __future__ import annotations

import os
import time

import llama_cpp
import numpy as np
from turns import CONTEXT, DEPTH, Loaded, serve, token_ids

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


class Llama:
    """A model and a context of it."""

    def __init__(self, file: str) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_ubatch = min(CONTEXT, 1024)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_threads = params.n_threads_batch = THREADS
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def read(self, tokens: list[int]) -> int:
        """Read tokens after what was read before; give the likeliest one to follow."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def forget(self) -> None:
        """Forget what was read."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)  # noqa: FBT003 - C

    def prompt(self, count: int) -> float:
        """Time reading a prompt."""
        self.forget()
        tokens = token_ids(count)
        began = time.perf_counter()
        self.read(tokens)
        return time.perf_counter() - began

    def reply(self, count: int) -> float:
        """Time a reply after a prompt of DEPTH tokens, its first token left out."""
        self.forget()
        token = self.read(token_ids(DEPTH))
        began = time.perf_counter()
        for _ in range(count):
            token = self.read([token])
        return time.perf_counter() - began


def load(file: str) -> Loaded:
    llama = Llama(file)
    return Loaded(
        llama.prompt,
        llama.reply,
        {
            "version": llama_cpp.__version__,
            "threads": THREADS,
            "system": llama_cpp.llama_print_system_info().decode(),
        },
    )


if __name__ == "__main__":
    serve(load)
