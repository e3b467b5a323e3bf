"""Whatever does not fit is refused in words before an address of it goes to the native library."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_native_step import build, install

from gptq_loader_kernels.cpu.library import Activations, Isa, find_library
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.generation.kv_cache import make_cache

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import PackedLinear

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

Change = "Callable[[torch.Tensor], torch.Tensor]"
ROWS, COLUMNS, GROUPS = 256, 96, 2


def altered(packed: PackedLinear, **fields: Any) -> PackedLinear:
    """A layer with other tensors, whatever it makes of them itself."""
    other = copy.copy(packed)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def make(packed: PackedLinear, rows: int = ROWS, columns: int = COLUMNS) -> Any:
    from gptq_loader_kernels.cpu.linear import NativeLinear

    return NativeLinear(packed, in_features=rows, out_features=columns)


PACKED: list[tuple[str, Change, str]] = [
    ("qweight", lambda it: it.long(), r"qweight is int64 \[32, 96\], and must be int32 \[32, 96\]"),
    ("qweight", lambda it: it[1:], r"qweight is int32 \[31, 96\]"),
    ("qweight", lambda it: it[:, 1:], r"qweight is int32 \[32, 95\]"),
    ("qweight", lambda it: it.to("meta"), "qweight is on meta, and must be on the CPU"),
    ("scales", lambda it: it.int(), r"scales is int32 \[2, 96\], and must be float16 or bfloat16"),
    ("scales", lambda it: it[:, 1:], r"scales is float16 \[2, 95\]"),
    ("zeros", lambda it: it.int(), r"zeros is int32 \[2, 96\], and must be uint8 \[2, 96\]"),
    ("zeros", lambda it: it[1:], r"zeros is uint8 \[1, 96\]"),
    ("g_idx", lambda it: it.long(), r"g_idx is int64 \[256\]"),
    ("g_idx", lambda it: it[1:], r"g_idx is int32 \[255\]"),
    ("g_idx", lambda it: it + 1, "g_idx goes from 1 to 2, and must from 0 to 1"),
    ("g_idx", lambda it: it - 1, "g_idx goes from -1 to 0, and must from 0 to 1"),
    ("bias", lambda it: it[1:], r"bias is float16 \[95\]"),
    ("bias", lambda it: it.int(), r"bias is int32 \[96\]"),
]


@pytest.mark.parametrize(("field", "change", "words"), PACKED)
def test_a_packed_layer_that_does_not_fit(field: str, change: Any, words: str) -> None:
    _, packed, _ = make_layer(Case(bias=True))
    with pytest.raises(ValueError, match=words):
        make(altered(packed, **{field: change(getattr(packed, field))}))


def test_a_packed_layer_of_another_size() -> None:
    _, packed, _ = make_layer(Case())
    for rows, columns in ((ROWS * 2, COLUMNS), (ROWS, COLUMNS + 1)):
        with pytest.raises(ValueError, match="qweight is"):
            make(packed, rows, columns)
    with pytest.raises(ValueError, match="257x96 does not fill words of 4-bit codes"):
        make(packed, ROWS + 1)
    with pytest.raises(ValueError, match="5-bit codes have no continuous layout"):
        make(altered(packed, bits=5))


def test_tensors_with_gaps_are_read_right() -> None:
    _, packed, weight = make_layer(Case(bias=True))
    assert packed.bias is not None
    strided = {
        name: torch.stack((tensor, tensor * 0), dim=-1)[..., 0]
        for name, tensor in (
            ("qweight", packed.qweight), ("zeros", packed.zeros), ("scales", packed.scales),
            ("g_idx", packed.g_idx), ("bias", packed.bias.float()),
        )
    }  # fmt: skip
    x = torch.randn(3, ROWS)
    answer = make(altered(packed, **strided))(x)
    assert torch.allclose(answer.double(), x.double() @ weight.t() + packed.bias, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 2 * ROWS), (2, ROWS // 2), (ROWS + 1,), ()])
def test_an_input_of_other_features(shape: tuple[int, ...]) -> None:
    _, packed, _ = make_layer(Case())
    with pytest.raises(ValueError, match="this layer takes 256"):
        make(packed)(torch.randn(shape))


BUFFERS: list[tuple[str, Change, str]] = [
    (
        "words",
        lambda it: it[:1].clone(),
        r"words is int32 \[1, 32, 1, 64\], and must be int32 \[2, 32",
    ),
    ("words", lambda it: it.long(), "words is int64"),
    ("words", lambda it: it.transpose(0, 1).contiguous().transpose(0, 1), "words has strides"),
    ("rows", lambda it: it[8:], r"words is int32 \[2, 32, 1, 64\], and must be int32 \[2, 31"),
    ("rows", lambda it: it + 1, "rows goes from 1 to 256, and must from -1 to 255"),
    ("segment_units", lambda it: it[1:], r"segment_group is int32 \[2\]"),
    ("segment_units", lambda it: it * 3, "segment_units goes from 48 to 48, and must from 1 to 32"),
    ("segment_units", lambda it: it - 1, "segment_units do not add up to 32 units"),
    ("segment_group", lambda it: it + 1, "segment_group goes from 1 to 2, and must from 0 to 1"),
    ("scales", lambda it: it[:, 1:].contiguous(), r"zeros is uint8 \[2, 2, 64\]"),
    ("scales", lambda it: it.view(torch.float16).clone(), "scales is float16"),
    ("zeros", lambda it: it.int(), "zeros is int32"),
    ("bias", lambda it: it[1:], r"bias is int32 \[95\]"),
]


@pytest.mark.parametrize(("name", "change", "words"), BUFFERS)
def test_a_buffer_that_was_replaced_by_one_that_does_not_fit(
    name: str, change: Any, words: str
) -> None:
    _, packed, _ = make_layer(Case(bias=True, act_order=False))
    layer = make(packed)
    x = torch.randn(2, ROWS)
    layer(x)
    setattr(layer, name, change(getattr(layer, name)))
    with pytest.raises(ValueError, match=words):
        layer(x)


def test_a_buffer_that_was_replaced_by_one_that_fits_is_read() -> None:
    _, packed, _ = make_layer(Case(bias=True))
    layer, x = make(packed), torch.randn(2, ROWS)
    layer(x)
    layer.bias = torch.zeros(COLUMNS).view(torch.int32)
    doubled = altered(packed, scales=packed.scales * 2, bias=None)
    layer.scales = make(doubled).scales
    assert torch.equal(layer(x), make(doubled)(x))


def test_a_cache_of_another_model_is_not_written() -> None:
    """Its heads are others: transformers says so, or takes it."""
    from gptq_loader_kernels.cpu.decoder import CACHE

    model, other = build("llama"), build("qwen3")
    step = install(model)
    ids = torch.arange(3, 6)[None]
    cache = make_cache(other)
    with torch.inference_mode():
        other(input_ids=ids, **{CACHE: cache})
        taken = step.steps
        assert step.step_many([[5]], [cache]) is None
        with pytest.raises(RuntimeError):
            model(input_ids=ids[:, :1], **{CACHE: cache})
        assert step.steps == taken
        layers = make_cache(model)
        model(input_ids=ids, **{CACHE: layers})
        layers.layers[1].length -= 1
        assert step.step_many([[5]], [layers]) is None, "one layer holds less than the others"


def test_sequences_and_caches_that_do_not_belong_together() -> None:
    model = build("llama")
    step, cache = install(model), make_cache(model)
    with torch.inference_mode():
        for tokens, caches in (([[5]], []), ([[5], [6]], [cache]), ([[5], [6]], [cache] * 2)):
            with pytest.raises(ValueError, match="need as many caches, each its own"):
                step.step_many(tokens, caches)


def test_states_of_another_size_go_to_transformers() -> None:
    from gptq_loader_kernels.cpu.decoder import CACHE

    model = build("llama")
    step = install(model)
    taken = step.steps
    with torch.inference_mode(), pytest.raises(RuntimeError):
        model.model(inputs_embeds=torch.randn(1, 1, 64), **{CACHE: make_cache(model)})
    with torch.inference_mode(), pytest.raises(ValueError, match="input_ids"):
        model.model(**{CACHE: make_cache(model)})
    assert step.steps == taken


class Half(torch.nn.Module):
    """Angles for half of a head."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del x
        angles = torch.zeros(1, positions.shape[1], 16)
        return angles, angles


def test_angles_of_another_size() -> None:
    model = build("llama")
    step = install(model)
    model.model.rotary_emb = Half()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"cos is float32 \[1, 1, 16\]"):
        step.step_many([[5]], [make_cache(model)])


def resize(module: torch.nn.Module, path: str, *shape: int, device: str = "cpu") -> None:
    """Replace a weight by one of another shape."""
    owner = module.get_submodule(path)
    weight = torch.nn.Parameter(torch.zeros(*shape, device=device), requires_grad=False)
    owner.weight = weight


@pytest.mark.parametrize(
    ("path", "shape", "words"),
    [
        ("norm", (64,), "norm is 64, and not 128"),
        ("layers.1.input_layernorm", (64,), "input_layernorm is 64"),
        ("layers.0.self_attn.q_norm", (64,), "self_attn.q_norm is 64, and not 32"),
        ("layers.1.self_attn.k_proj", (64, 128), "self_attn.k_proj is 64 x 128, and not 32 x 128"),
        ("layers.1.mlp.down_proj", (128, 128), "mlp.down_proj is 128 x 128, and not 128 x 224"),
    ],
)
def test_a_part_of_another_size(path: str, shape: tuple[int, ...], words: str) -> None:
    from gptq_loader_kernels.cpu.describe import describe
    from gptq_loader_kernels.cpu.fitting import why_not

    decoder = build("qwen3", bits=None).model
    assert why_not(decoder) is None
    resize(decoder, path, *shape)
    assert words in str(why_not(decoder))
    assert describe(decoder, torch.float32, Isa.PLAIN, Activations.FLOAT32) is None


def test_a_part_that_is_elsewhere_or_packed_for_another_size() -> None:
    from gptq_loader_kernels.cpu.fitting import why_not

    decoder = build("qwen3", bits=4).model
    decoder.layers[1].mlp.up_proj = decoder.layers[0].self_attn.o_proj
    assert "mlp.up_proj is 128 x 128, and not 224 x 128" in str(why_not(decoder))
    decoder = build("qwen3", bits=None).model
    resize(decoder, "layers.0.mlp.up_proj", 224, 128, device="meta")
    assert "mlp.up_proj is on meta" in str(why_not(decoder))


def head(cls: str, dtype: torch.dtype = torch.float32) -> Any:
    from gptq_loader_kernels.cpu import head

    linear = torch.nn.Linear(64, 4096, bias=False, dtype=dtype).requires_grad_(requires_grad=False)
    return getattr(head, cls).of(linear)


@torch.inference_mode()
def test_a_head_is_given_what_does_not_fit() -> None:
    """Three rows of 32 are not one and a half rows of 64."""
    rows = head("RowsLinear")
    for shape in ((3, 32), (2, 128), (32,)):
        with pytest.raises(RuntimeError, match=r"shapes|size"):
            rows(torch.randn(shape))
    rows.weight = torch.nn.Parameter(torch.randn(4000, 64))
    assert rows(torch.randn(2, 64)).shape == (2, 4000)  # torch's, which goes by the weight


@torch.inference_mode()
def test_top_logits_are_refused_for_what_does_not_fit() -> None:
    short = head("TopLogitsLinear")
    x = torch.randn(2, 64)
    for needed in ([], [1], [1, 1, 1], [0, 1], [1, -1]):
        with pytest.raises(ValueError, match="how many logits of 2 rows"):
            short.top_logits(x, needed)
    marks = torch.zeros(2, 4096, dtype=torch.bool)
    for excluded, message in (
        (marks[:1], r"excluded is bool \[1, 4096\]"),
        (marks[:, 1:], r"excluded is bool \[2, 4095\]"),
        (marks.int(), r"excluded is int32"), (marks.t().contiguous().t(), "excluded has strides"),
        (marks.to("meta"), "excluded is on meta"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            short.top_logits(x, [1, 1], excluded)
    assert short.top_logits(x, [1, 1], marks) is not None
    assert short.top_logits(x[:, :32], [1]) is None, "one row of 64 numbers, in the wrong shape"
    with pytest.raises(ValueError, match="weight is float16"):
        head("TopLogitsLinear", torch.float16)
