"""The engine for accelerators, run on the CPU: many replies in one pass, as each is alone."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.conformance.models import check_family, make_subject
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.engine.block_pool import BlockPool, BlockTable
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.batch_sampling import Row, pick_tokens
from gptq_loader_plugin.measure.speed import reply_seconds

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from step_operators import VIEWS, Operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_plugin.generation.generate import Generation

SHARED = "You are a careful assistant who answers in one word. "
PROMPTS = [
    "The", "Once upon a time there was a", "A " * 60, "x", "What is the capital of France?" * 3,
    "1 2 3 4 5 6 7 8 9", "She said", "import torch\n", SHARED + "Where?", SHARED + "When?",
    SHARED, "In the beginning", "a", "b" * 50, SHARED + "Who?", "last",
]  # fmt: skip
# What asks a device for a value, and waits for it.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item")
PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "gpt_neox", "mixtral",
)  # fmt: skip
# Of these the layers are fused; GPT-NeoX's norms are of another kind.
FUSED = (*PLAIN[:-2], "mixtral", "gemma2", "qwen2_moe")
ONE_AFTER_THE_OTHER = ("bloom", "deepseek_v3", "lfm2", "mamba", "rwkv")


@pytest.fixture(scope="module")
def alone() -> Iterator[gptq.LoadedModel]:
    with gptq.load(DATA / ONE, backend="reference", dtype="float32", plugins=plugins()) as loaded:
        assert loaded.engine is None
        yield loaded


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[gptq.LoadedModel]:
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "1")
    with gptq.load(DATA / ONE, backend="reference", dtype="float32") as loaded:
        assert "several replies are written in one pass" in loaded.explain()
        yield loaded


def engine_of(model: gptq.LoadedModel) -> PagedEngine:
    assert isinstance(model.engine, PagedEngine)
    return model.engine


def options(number: int, **more: Any) -> gptq.GenerateOptions:
    return gptq.GenerateOptions(**{"temperature": 0, "max_new_tokens": 8 + 3 * number, **more})


def write(model: gptq.LoadedModel, coming: Sequence[Generation]) -> tuple[list[str], int]:
    """Write replies side by side, another joining at each step; count the steps."""
    batch, texts, steps = Batch(model), ["" for _ in coming], 0
    numbers = {generation: i for i, generation in enumerate(coming)}
    waiting = list(coming)
    while waiting or len(batch):
        if waiting:
            batch.add(waiting.pop(0))
        for generation, what in batch.step():
            if isinstance(what, Exception):
                raise what
            texts[numbers[generation]] += what.text
        steps += 1
    return texts, steps


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.9}])
def test_sixteen_replies_are_what_they_are_alone(
    model: gptq.LoadedModel, alone: gptq.LoadedModel, more: dict[str, Any]
) -> None:
    model.keep(len(PROMPTS))
    # Draws are the engine's own; the likeliest token is everyone's.
    by = model if more else alone
    expected = [by.generate(it, options(i, **more)).text for i, it in enumerate(PROMPTS)]
    coming = [model.begin(model.encode(it), options(i, **more)) for i, it in enumerate(PROMPTS)]
    texts, steps = write(model, coming)
    assert texts == expected
    longest = options(len(PROMPTS)).max_new_tokens
    assert steps < longest + len(PROMPTS)  # side by side, and not one after the other
    pool = engine_of(model).pool
    assert pool.free_blocks() == pool.num_blocks


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.9}])
def test_a_step_that_begins_before_its_tokens_are_seen_changes_no_reply(
    model: gptq.LoadedModel, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host is a token behind: with stops, joins, a ceiling, a penalty."""
    model.keep(len(PROMPTS))
    chosen = [options(i, **more) for i in range(len(PROMPTS))]
    expected = [model.generate(it, chosen[i]).text for i, it in enumerate(PROMPTS)]
    stop = next(text[3:6] for text in expected if len(text) > 12)
    chosen = [options(i, stop=(stop,) if i % 2 else (), **more) for i in range(len(PROMPTS))]
    chosen[5] = options(5, repetition_penalty=1.2, **more)  # which the host must see first
    expected = [model.generate(it, chosen[i]).text for i, it in enumerate(PROMPTS)]
    model.forget()

    engine = engine_of(model)
    ahead: list[Any] = []
    monkeypatch.setattr(PagedEngine, "runs_ahead", True)
    monkeypatch.setattr(engine, "step_ahead", noting(ahead, engine.step_ahead))
    for which in (range(len(PROMPTS)), [0, 1, 2], [4]):
        ahead.clear()
        coming = [model.begin(model.encode(PROMPTS[i]), chosen[i]) for i in which]
        texts, steps = write(model, coming)
        assert texts == [expected[i] for i in which]
        assert len(ahead) > steps // 3  # among all is one with a penalty, for whose end they wait
    assert engine.pool.free_blocks() == engine.pool.num_blocks
    assert [model.generate(PROMPTS[i], chosen[i]).text for i in (0, 3)] == [
        expected[0],
        expected[3],
    ]


def noting(read: list[Any], step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Note the tokens that a step reads."""

    def noted(tokens: Any, *args: Any, **options: Any) -> torch.Tensor:
        read.append(tokens)
        return step(tokens, *args, **options)

    return noted


@pytest.mark.parametrize("ahead", [False, True])
def test_speed_is_that_of_the_engine(
    model: gptq.LoadedModel, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagedEngine, "runs_ahead", ahead)
    engine = engine_of(model)
    read: list[Any] = []
    for name in ("step", "step_ahead"):
        monkeypatch.setattr(engine, name, noting(read, getattr(engine, name)))
    for _ in range(2):  # the second time, every token of the prompt again
        read.clear()
        assert reply_seconds(model, 5) > 0
        assert (
            sum(len(part) for tokens in read if isinstance(tokens, list) for part in tokens) >= 16
        )
        assert sum(isinstance(tokens, torch.Tensor) for tokens in read) == (4 if ahead else 0)


def test_a_reply_that_is_cancelled_with_a_step_under_way_leaves_no_trace(
    model: gptq.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagedEngine, "runs_ahead", True)
    model.keep(2)
    right = model.generate("She said", options(5)).text
    cancel = threading.Event()
    coming = [
        model.begin(model.encode("Once upon a time"), options(9), cancel=cancel),
        model.begin(model.encode("She said"), options(5)),
    ]
    batch, texts, finish = Batch(model), {id(it): "" for it in coming}, {}
    for generation in coming:
        batch.add(generation)
    while len(batch):
        for generation, what in batch.step():
            assert not isinstance(what, Exception)
            texts[id(generation)] += what.text
            finish[id(generation)] = what.finish
            if len(texts[id(coming[0])]) > 3:
                cancel.set()
    assert finish[id(coming[0])] == "cancelled"
    assert texts[id(coming[1])] == right
    pool = engine_of(model).pool
    assert pool.free_blocks() == pool.num_blocks


def test_a_prompt_that_begins_as_another_is_not_read_again(model: gptq.LoadedModel) -> None:
    first = model.encode(SHARED * 3 + "one")
    model.generate(SHARED * 3 + "one", options(0))
    generation = model.begin(model.encode(SHARED * 3 + "two"), options(0))
    size = engine_of(model).pool.block_size
    assert generation.position >= (len(first) - 4) // size * size > 0
    generation.close()
    model.forget()
    generation = model.begin(model.encode(SHARED * 3 + "two"), options(0))
    assert generation.position == 0
    generation.close()


@pytest.mark.parametrize("family", sorted({*PLAIN, *FUSED}))
def test_families_are_written_as_one_call_answers(family: str) -> None:
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    report = check_family(family, kernel, ("parts", "kept", "batch"), attention)
    assert report.not_paged is None
    assert report.fused == (family in FUSED)
    assert report.failed == {}


@pytest.mark.parametrize("family", ONE_AFTER_THE_OTHER)
def test_families_that_keep_something_else_are_left_to_transformers(family: str) -> None:
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    report = check_family(family, kernel, ("parts",), attention)
    assert report.not_paged


def kernels_of_a_step(engine: PagedEngine, model: gptq.LoadedModel) -> list[str]:
    """Name the operators of a decode step that are no views: each launches a kernel."""
    tables = [engine.make(model.model) for _ in range(3)]
    engine.step([[1, 2, 3], [4], [5, 6]], tables, [3, 1, 2])
    with Operators() as dispatched:
        engine.step([[1], [2], [3]], tables, [4, 2, 3])
    for table in tables:
        table.release()
    return [it for it in dispatched.names if it not in VIEWS]


def test_a_layer_takes_nine_kernels(model: gptq.LoadedModel) -> None:
    """A sum and a norm twice, four products, rotation, attention, activation."""
    engine = engine_of(model)
    names = Counter(kernels_of_a_step(engine, model))
    layers = model.model.config.num_hidden_layers
    fused = ("add_rms_norm", "linear", "rotary_and_cache", "paged_attention", "activation_and_mul")
    counts = {name: names[name] for name in fused}
    assert counts == {
        "add_rms_norm": 2 * layers,
        "linear": 4 * layers + 1,  # and the head
        "rotary_and_cache": layers,
        "paged_attention": layers,
        "activation_and_mul": layers,
    }
    assert names["rms_norm"] == 1
    # Nothing else is of a layer: the embedding, the rotary table and the step's inputs are once.
    assert not {"silu", "mean", "rsqrt", "write_cache", "add", "index_select"} & set(names)


@pytest.mark.parametrize("what", ["hook", "norm", "layer"])
def test_a_changed_model_goes_on_by_its_own_layers(model: gptq.LoadedModel, what: str) -> None:
    engine = engine_of(model)
    assert "add_rms_norm" in kernels_of_a_step(engine, model)
    layer = model.model.model.layers[1]
    if what == "hook":
        layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)
    elif what == "norm":
        layer.input_layernorm.variance_epsilon = 0.1
    else:
        layer.self_attn.k_proj = torch.nn.Linear(
            model.model.config.hidden_size, layer.self_attn.k_proj.out_features, bias=False
        )
    assert "add_rms_norm" not in kernels_of_a_step(engine, model)
    ids = [5, 6, 7, 8]
    with torch.inference_mode():
        right = model.model(torch.tensor([ids])).logits[0, -1]
    table = engine.make(model.model)
    engine.step([ids[:3]], [table], [3])
    assert torch.allclose(engine.step([ids[3:]], [table], [4])[0], right, atol=1e-4)


# The reference kernel looks experts up by value; test_stacked_experts.py has the one for GPUs.
@pytest.mark.parametrize("family", sorted({*PLAIN, *FUSED} - {"mixtral", "qwen2_moe", "qwen3_moe"}))
def test_a_step_is_traced_whole_by_a_compiler(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    subject = make_subject(family, kernel, attention)
    engine = subject.engine
    assert isinstance(engine, PagedEngine)
    if engine._fused is not None:  # asked once a step, before it
        monkeypatch.setattr(engine._fused, "unchanged", lambda: True)
    tables = [engine.make(subject.model) for _ in range(2)]
    engine.step([[5, 6, 7], [8]], tables, [3, 1])
    slots = [table.reserve(1)[0] for table in tables]
    blocks = [table.blocks for table in tables]
    inputs = (
        torch.tensor([9, 10]), torch.tensor([3, 1]), torch.tensor(slots),
        torch.tensor(blocks, dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32),
    )  # fmt: skip
    step = torch.compile(engine._run, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(step(*inputs), engine._run(*inputs))


def test_a_decoding_step_waits_for_nothing(model: gptq.LoadedModel) -> None:
    engine = engine_of(model)
    tables = [engine.make(model.model) for _ in range(3)]
    engine.step([[1, 2, 3], [4], [5, 6]], tables, [3, 1, 2])
    engine.step([[1], [2], [3]], tables, [4, 2, 3])
    vocabulary, device = model.model.config.vocab_size, torch.device("cpu")
    sampled = options(0, temperature=0.7, repetition_penalty=1.1)
    rows = [Row.of(sampled, [5], vocabulary, device)] * 3
    with Operators() as dispatched:
        logits = engine.step([[1], [2], [3]], tables, [5, 3, 4])
        pick_tokens(rows, [torch.tensor([[1, 2]])] * 3, logits)
    assert dispatched.names
    assert not {name for name in dispatched.names if name in SYNCHRONISING}


def test_other_uses_of_the_model_go_on_as_before(
    model: gptq.LoadedModel, alone: gptq.LoadedModel
) -> None:
    model.generate("one", options(1))
    ids = torch.tensor([model.encode("Once upon a time")])
    settings = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.model.generate(ids, **settings), alone.model.generate(ids, **settings))
    assert model.model.config._attn_implementation == alone.model.config._attn_implementation


def test_a_full_cache_ends_one_reply_in_words(model: gptq.LoadedModel) -> None:
    engine = engine_of(model)
    engine.reserve(1)
    engine.resize(2)
    engine._room = 2 * engine.num_blocks_per_sequence  # as where memory holds no more
    with pytest.raises(GPTQLoaderError, match="32 positions of the key-value cache are in use"):
        model.generate("a b c d e f g h", options(20, max_new_tokens=80))
    assert engine.pool.free_blocks() == 2
    assert model.generate("a", options(0)).tokens


def test_random_tables_never_share_what_differs() -> None:
    draw = random.Random(7)
    pool = BlockPool(40, 4)
    held: list[BlockTable] = []
    written: dict[int, list[int]] = {}  # what a real cache would hold: by slot, all tokens up to it
    for _ in range(3000):
        if held and draw.random() < 0.4:
            held.pop(draw.randrange(len(held))).release()
            continue
        ids = [draw.randrange(2) for _ in range(draw.randrange(1, 30))]
        table = BlockTable(pool)
        reused = table.reuse(ids)
        assert reused < len(ids)
        assert table.tokens == ids[:reused]
        try:
            slots = table.reserve(len(ids) - reused)
        except GPTQLoaderError:
            table.release()
            continue
        for position, slot in enumerate(slots, reused):
            written[slot] = ids[: position + 1]
        table.append(ids[reused:])
        held.append(table)
        for it in held:
            for position in range(len(it)):
                block, offset = divmod(position, 4)
                assert written[it.blocks[block] * 4 + offset] == it.tokens[: position + 1]
    for it in held:
        it.release()
    assert pool.free_blocks() == 40


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_keys_and_values_of_8_bits_take_half_and_are_nearly_the_same(family: str) -> None:
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    subject = make_subject(family, kernel, attention)
    whole = subject.engine
    assert isinstance(whole, PagedEngine)
    eight = PagedEngine(subject.model, attention, 96, int8=True)
    eight.probe()
    assert "fused" in eight.fuse() or family == "gpt_neox"
    eight.max_sequences = 2
    assert eight.block_bytes < 0.35 * whole.block_bytes  # those are float32
    ids = [5 + i % 200 for i in range(60)]
    with torch.inference_mode():
        right = subject.model(torch.tensor([ids])).logits[0, -1]
    for parts in ([59, 1], [30, 29, 1], [60]):
        table = eight.make(subject.model)
        first = 0
        for part in parts:
            logits = eight.step([ids[first : first + part]], [table], [60])[0]
            first += part
        table.release()
        assert 0 < float((logits - right).norm() / right.norm()) < 0.02


def test_a_load_with_8_bits_uses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "1")
    with gptq.load(DATA / ONE, backend="reference", dtype="float32", kv_cache="int8") as model:
        assert "keys and values in blocks of 8 bits" in model.explain()
        assert model.generate("She said", options(2)).tokens
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "0")
    with gptq.load(DATA / ONE, backend="reference", kv_cache="int8") as model:
        assert model.generate("She said", options(2)).tokens
