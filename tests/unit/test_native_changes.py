"""What is changed of a loaded model is seen by native code, and no other device gets in its way."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from native_codes import runs
from test_native_step import build, by_steps, install

from gptq_loader_kernels.cpu.library import Activations, Isa, find_library
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.generation.kv_cache import make_cache

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

IDS = torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(1))


def norms(model: Any) -> list[torch.nn.Parameter]:
    return [it for name, it in model.named_parameters() if "norm" in name]


def scale_in_place(model: Any) -> None:
    with torch.no_grad():
        norms(model)[0].mul_(1.5)


def scale_data(model: Any) -> None:
    for norm in norms(model):
        norm.data *= 1.5


def scale_in_inference(model: Any) -> None:
    with torch.inference_mode():
        model.model.layers[1].self_attn.q_norm.weight.mul_(3)


def load_state(model: Any) -> None:
    state = {name: it * 1.5 for name, it in model.named_parameters() if "norm" in name}
    model.load_state_dict(state, strict=False)


def change_epsilon(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5


def change_all_epsilons(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def change_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def change_one_scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def change_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def change_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.5


def change_angles(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.3


class OtherNorm(torch.nn.Module):
    """A norm of somebody's own, with a weight as transformers' has."""

    variance_epsilon = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(128), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.to(x.dtype)


def replace_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = OtherNorm().to(model.dtype)


CHANGES = [
    scale_in_place, scale_data, scale_in_inference, load_state, change_epsilon,
    change_all_epsilons, change_scaling, change_one_scaling, change_activation,
    change_frequencies, change_angles, replace_norm,
]  # fmt: skip


def change_cap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.1


def change_eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5


def change_sliding_frequencies(model: Any) -> None:
    model.model.rotary_emb.sliding_attention_inv_freq *= 0.5


def change_top_k(model: Any) -> None:
    model.model.layers[0].mlp.gate.top_k = 1


def change_router(model: Any) -> None:
    model.model.layers[0].mlp.gate.weight *= -1


def change_experts(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts.experts
    experts[0], experts[1] = experts[1], experts[0]


def exchange_linears(model: Any) -> None:
    one, other = list(model.model.layers[0].mlp.experts.experts)[:2]
    one["gate"], other["gate"] = other["gate"], one["gate"]


def take_out_and_put_back(model: Any) -> None:
    expert = model.model.layers[0].mlp.experts.experts[1]
    gate = expert.pop("gate")
    expert.update({"gate": expert["up"], "up": gate})


def change_expert_activation(model: Any) -> None:
    model.model.layers[0].mlp.experts.fused.act_fn = torch.nn.Tanh()


def change_residual(model: Any) -> None:
    for layer in model.model.layers:
        layer.residual_multiplier = 2.0


def change_embedding(model: Any) -> None:
    model.model.embedding_multiplier = 0.1


def change_rope(model: Any) -> None:
    model.model.layers[0].self_attn.use_rope = False


def change_bias(model: Any) -> None:
    model.model.layers[0].input_layernorm.bias = None


def change_words(model: Any) -> None:
    for expert in model.model.layers[0].mlp.experts.experts:
        expert["down"].words = torch.flip(expert["down"].words, (0,))


def change_code(model: Any) -> None:
    for expert in model.model.layers[1].mlp.experts.experts:
        expert["gate"].forward = expert["up"].forward


def replace_linear(model: Any) -> None:
    for expert in model.model.layers[1].mlp.experts.experts:
        expert["gate"] = expert["up"]


def hook_expert(model: Any) -> None:
    for expert in model.model.layers[1].mlp.experts.experts:
        expert["down"].register_forward_hook(lambda *call: 3 * call[2])


def move_experts(model: Any) -> None:
    for expert in model.model.layers[1].mlp.experts.experts:
        expert["down"]._apply(lambda it: torch.zeros_like(it) if it.dtype == torch.int16 else it)


OF_FAMILIES = [
    *(("qwen3_moe", it) for it in (hook_expert, move_experts)),
    *(("qwen3_moe", it) for it in (change_words, change_code, replace_linear)),
    ("granite", change_residual), ("granite", change_embedding), ("smollm3", change_rope),
    ("stablelm", change_bias),
    *(("qwen3_moe", it) for it in (change_top_k, change_router, change_experts)),
    *(("qwen3_moe", it) for it in (exchange_linears, take_out_and_put_back)),
    ("mixtral", change_expert_activation),
    ("gemma2", change_cap), ("gemma2", change_eps), ("gemma3", change_sliding_frequencies),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=lambda it: it.__name__)
def test_a_change_is_seen(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    check_change("qwen3", change, dtype)


@pytest.mark.parametrize(("family", "change"), OF_FAMILIES)
def test_a_change_of_what_a_family_has_is_seen(family: str, change: Callable[[Any], None]) -> None:
    check_change(family, change, torch.float32)


def check_change(family: str, change: Callable[[Any], None], dtype: torch.dtype) -> None:
    """Compare steps after a change with transformers', and with those before."""
    model = build(family, dtype=dtype)
    step = install(model)
    old = by_steps(model, IDS, 12, (1,) * 4).float()  # all is described now
    change(model)
    exact = copy.deepcopy(model)
    exact.model.forward = type(exact.model).forward.__get__(exact.model)
    with torch.inference_mode():
        right = exact(input_ids=IDS, use_cache=False).logits[:, 12:].float()
    found = by_steps(model, IDS, 12, (1,) * 4).float()
    error, changed = (found - right).norm() / right.norm(), (old - right).norm() / right.norm()
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)
    assert changed > 3 * error, "there was nothing to see"
    assert step.decoder is model.model


@pytest.mark.parametrize("made", ["inference", "plain"])
def test_biases_of_what_is_not_packed_are_read_where_they_lie(made: str) -> None:
    if made == "inference":
        with torch.inference_mode():
            model = build("llama-biased", bits=None, dtype=torch.bfloat16)
    else:
        model = build("llama-biased", bits=None, dtype=torch.bfloat16)
    install(model)
    by_steps(model, IDS, 12, (1,) * 4)
    with torch.inference_mode():
        model.model.layers[0].self_attn.q_proj.bias.add_(3)
        norms(model)[-1].mul_(2)
        right = model(input_ids=IDS.repeat(2, 1), use_cache=False).logits[:1, 12:].float()
    found = by_steps(model, IDS, 12, (1,) * 4).float()
    assert (found - right).norm() < 3e-2 * right.norm()


def test_a_head_merged_through_data_is_not_searched_by_its_old_copy() -> None:
    from gptq_loader_kernels.cpu.head import TopLogitsLinear

    head = TopLogitsLinear.of(torch.nn.Linear(64, 4096, bias=False))
    x = torch.randn(1, 64)
    with torch.inference_mode():
        assert head.top_logits(x, [1]) is not None
        head.weight.data += 0.1
        assert head.top_logits(x, [1]) is None
        head.bias = torch.nn.Parameter(torch.ones(4096))
        torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight, head.bias))


@pytest.mark.parametrize("name", ["rows", "words", "scales", "zeros", "bias", "segment_group"])
def test_any_tensor_of_a_layer_may_be_replaced(name: str) -> None:
    from gptq_loader_kernels.cpu.linear import NativeLinear

    _, packed, weight = make_layer(Case(bias=True, group_size=32, rows=128))
    layer = NativeLinear(packed, in_features=128, out_features=96)
    assert packed.bias is not None
    x = torch.randn(3, 128)
    right = x.double() @ weight.t() + packed.bias.double()
    torch.testing.assert_close(layer(x).double(), right, rtol=1e-4, atol=1e-4)
    old = getattr(layer, name).clone()
    setattr(layer, name, old.clone())
    rest = [torch.full_like(old, 7) for _ in range(64)]  # takes what was freed
    torch.testing.assert_close(layer(x).double(), right, rtol=1e-4, atol=1e-4)
    setattr(layer, name, rest[0][:0])
    if name == "scales":
        with pytest.raises(ValueError, match="scales"):
            layer(x)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_another_default_device_changes_nothing(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from gptq_loader_kernels.cpu.head import TopLogitsLinear

    model, x = build("llama"), torch.randn(1, 64)
    linear = torch.nn.Linear(64, 4096, bias=False)
    _, packed, _ = make_layer(Case(bias=True))
    many = torch.randn(300, 256)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits[:, 12:]
    torch.set_default_device(device)
    try:
        from gptq_loader_kernels.cpu.linear import NativeLinear

        layer = NativeLinear(packed, in_features=256, out_features=96)
        step, head = install(model), TopLogitsLinear.of(linear)
        with torch.inference_mode():
            cache = make_cache(model)
            parts = [
                model(input_ids=part, cache=cache, use_cache=True).logits
                for part in IDS.split((12, 1, 3), dim=1)
            ]
            states = step.step_many([[5], [6, 7]], [make_cache(model), make_cache(model)])
            top = head.top_logits(x, [3])
            some, all_rows = layer(many[:2]), layer(many)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(torch.cat(parts[1:], dim=1), expected, rtol=2e-4, atol=2e-4)
    assert states is not None
    assert states.device.type == top.device.type == "cpu"
    torch.testing.assert_close(some, all_rows[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", [Activations.INT8, Activations.INT16])
@pytest.mark.parametrize("size", [1e-30, 3e-37, 1e-37])
@pytest.mark.parametrize("isa", [Isa.AVX2, Isa.AVX512_VNNI], ids=lambda isa: isa.name)
def test_tiny_activations_do_not_overflow(isa: Isa, size: float, activations: Activations) -> None:
    from gptq_loader_kernels.cpu.linear import NativeLinear

    if not runs(isa):
        pytest.skip(f"this processor does not run {isa.name}")
    _, packed, weight = make_layer(Case(group_size=32, rows=128))
    code: Any = {"isa": isa, "activations": activations}
    layer = NativeLinear(packed, in_features=128, out_features=96, **code)
    x = (torch.randn(3, 128) * size).bfloat16()
    right = x.double() @ weight.t()
    assert (layer(x).double() - right).norm() < 2e-2 * right.norm()


def test_packed_layers_are_counted_and_their_tensors_not_gone_through() -> None:
    """Looking at all of them took a sixth of a small model's step."""
    from gptq_loader_kernels.cpu.linear import NativeLinear

    model = build("llama")
    step = install(model)
    by_steps(model, IDS, 12, (1,) * 4)
    built = step._build(torch.float32)
    assert built is not None
    packed = [it for it in model.base_model.modules() if isinstance(it, NativeLinear)]
    assert len(built.watch.counted) == len(packed) == 14
    buffers = {id(tensor) for layer in packed for tensor in layer.buffers()}
    assert not buffers.intersection(map(id, built.watch.tensors))
