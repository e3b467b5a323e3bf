"""The experts that the native library chooses, and what they count, as by transformers' routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_native_step import build, by_steps, install

from gptq_loader_kernels.cpu.families import Family, find
from gptq_loader_kernels.cpu.fitting import why_not
from gptq_loader_kernels.cpu.library import find_library

LACKED_BY_V2 = {"correction", "negative", "sum"}
pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")


def mixtures(model: Any) -> list[Any]:
    return [it.mlp for it in model.model.layers if hasattr(it.mlp, "experts")]


def change(mixture: Any, family: Family, what: str) -> None:
    """Change one of a router's parts."""
    correction = find(mixture, family.correction)
    router = mixture.gate
    if what == "correction":  # other experts for every token
        correction.copy_(torch.arange(len(router.weight)) % 3)
    elif what == "negative":  # scores below zero, beside which those of no group are not the best
        correction.sub_(2)
    elif what == "far":  # what a sigmoid makes 0 and 1
        router.weight.data *= 400
    elif what == "scaling":
        router.routed_scaling_factor = 0.3
    elif what == "groups":
        router.topk_group += 1
    else:
        router.norm_topk_prob = not router.norm_topk_prob


@pytest.mark.parametrize(
    "family",
    ["glm4_moe", "glm4_moe-plain", "dots1", "minimax_m2", "deepseek_v2-groups", "deepseek_v3"],
)
@pytest.mark.parametrize("what", ["correction", "negative", "far", "scaling", "groups", "sum"])
def test_a_changed_router_is_followed(family: str, what: str) -> None:
    model = build(family)
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(2))
    step = install(model)
    before = by_steps(model, ids, 14, (8, 8, 1, 8, 1))
    with torch.inference_mode():
        for mixture in mixtures(model):
            if what == "groups" and getattr(mixture.gate, "num_group", 1) == 1:
                pytest.skip("all experts are one group")
            lacks = {"minimax_m2": {"scaling", "sum"}, "deepseek_v2-groups": LACKED_BY_V2}
            if what in lacks.get(family, ()):
                pytest.skip("its class has no such setting")
            change(mixture, step.family, what)
        expected = model(input_ids=ids).logits[:, 14:]
    taken = step.steps
    found = by_steps(model, ids, 14, (8, 8, 1, 8, 1))
    assert step.steps == taken + 5
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    if what in {"correction", "scaling", "far"}:
        assert not torch.allclose(before, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 9}, "mixture 0 takes 9 of 8 experts"),
        ({"num_group": 3}, "mixture 0 takes 3 of 8 experts, of 2 of 3 groups"),
        ({"num_group": 8, "topk_group": 4}, "mixture 0 takes 3 of 8 experts, of 4 of 8 groups"),
        ({"topk_group": 5}, "mixture 0 takes 3 of 8 experts, of 5 of 4 groups"),
        ({"topk_group": 1}, "mixture 0 takes 3 of 8 experts, of 1 of 4 groups"),
    ],
)
def test_what_cannot_be_chosen_is_refused(fields: dict[str, int], words: str) -> None:
    decoder = build("glm4_moe", bits=None).model
    assert why_not(decoder) is None
    for name, value in fields.items():
        setattr(decoder.layers[1].mlp.gate, name, value)
    assert why_not(decoder) == words


def test_a_router_of_another_dtype_is_refused() -> None:
    decoder = build("glm4_moe", bits=None).model
    router = decoder.layers[1].mlp.gate
    router.e_score_correction_bias = router.e_score_correction_bias.half()
    words = "mixture 0 corrects its scores in torch.float16; the step takes float32"
    assert why_not(decoder) == words
    router.weight.data = router.weight.half()
    assert why_not(decoder) == "mixture 0 has a router in torch.float16"
