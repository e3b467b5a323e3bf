"""The names of the cache are those that the installed transformers goes by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_architectures import MODELS, tiny_model
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptq_loader_plugin.generation.kv_cache import make_cache
from gptq_loader_plugin.transformers_compat import LAYER_CACHE_NAMES, cache_argument, cache_field


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_cache_is_passed_and_returned_by_its_name(name: str) -> None:
    """And every decoder layer gets it by a name that multi_device.py leaves where it is."""
    model = tiny_model(name)
    received: list[set[str]] = []

    def record(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {key for key, value in kwargs.items() if isinstance(value, Cache)}
        assert named or any(isinstance(value, Cache) for value in args)
        received.append(named)

    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2:
            for layer in module:
                layer.register_forward_pre_hook(record, with_kwargs=True)
            break
    cache = make_cache(model)
    with torch.inference_mode():
        output = model(torch.arange(5)[None], **{cache_argument(model): cache, "use_cache": True})
    assert cache.get_seq_length() == 5
    assert output[cache_field(type(output))] is cache
    assert len(received) == 2
    assert set().union(*received) <= set(LAYER_CACHE_NAMES)


def test_an_output_that_is_made_here_holds_the_cache() -> None:
    cache = make_cache(tiny_model("llama"))
    made: Any = BaseModelOutputWithPast(**{cache_field(BaseModelOutputWithPast): cache})
    assert made.to_tuple() == (cache,)
