"""Count the operators that one token takes: by transformers' forward, and by the engine.

    python bench/step_operators.py REF [--backend dense]

On a GPU each operator that computes is a kernel or more to launch; views cost the host's time
alone. It runs on the CPU, where the engine takes the same steps.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptq_loader_plugin as gptq
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.generation.kv_cache import make_cache
from gptq_loader_plugin.transformers_compat import find_cache_argument

VIEWS = frozenset((
    "alias", "contiguous", "detach", "expand", "flatten", "reshape", "resolve_conj", "resolve_neg",
    "select", "slice", "split_with_sizes", "t", "to", "transpose", "unsqueeze", "view",
))  # fmt: skip


class Operators(TorchDispatchMode):
    """Note the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        del types
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def __str__(self) -> str:
        """Count them."""
        computing = sum(name not in VIEWS for name in self.names)
        return f"{len(self.names):,} calls, {computing:,} of which compute"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("--backend", default="dense")
    arguments = parser.parse_args()
    os.environ["GPTQ_LOADER_ENGINE"] = "1"
    with gptq.load(arguments.reference, backend=arguments.backend, device="cpu") as model:
        print(f"{model.model.config.get_text_config().num_hidden_layers} layers; {model.notes[-1]}")
        cache = {find_cache_argument(model.model): make_cache(model.model), "use_cache": True}
        with torch.inference_mode():
            model.model(torch.tensor([[1, 2, 3]]), **cache)
            with Operators() as operators:
                model.model(torch.tensor([[4]]), **cache)
        print(f"transformers' forward: {operators}")
        engine = model.engine
        if isinstance(engine, PagedEngine):
            table = engine.make(model.model)
            engine.step([[1, 2, 3]], [table], [3])
            with Operators() as operators:
                engine.step([[4]], [table], [4])
            print(f"the engine's step: {operators}")


if __name__ == "__main__":
    main()
