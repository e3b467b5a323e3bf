"""The engine for accelerators, run on the CPU: many replies in one pass, as each is alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, plugins
from torch.utils._python_dispatch import TorchDispatchMode

import gptq_loader_plugin as gptq
from gptq_loader_plugin.conformance.models import check_family
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.engine.block_pool import BlockPool, BlockTable
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.batch_sampling import Row, pick_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


@pytest.mark.parametrize("family", PLAIN)
def test_families_are_written_as_one_call_answers(family: str) -> None:
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    report = check_family(family, kernel, ("parts", "kept", "batch"), attention)
    assert report.not_paged is None
    assert report.failed == {}


@pytest.mark.parametrize("family", ONE_AFTER_THE_OTHER)
def test_families_that_keep_something_else_are_left_to_transformers(family: str) -> None:
    loaded = plugins()
    kernel = next(it for it in loaded.kernels() if it.name == "reference")
    attention = loaded.hook.gptq_paged_attention(device=find_device("cpu"))
    report = check_family(family, kernel, ("parts",), attention)
    assert report.not_paged


class Dispatched(TorchDispatchMode):
    """Count the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_decoding_step_waits_for_nothing(model: gptq.LoadedModel) -> None:
    engine = engine_of(model)
    tables = [engine.make(model.model) for _ in range(3)]
    engine.step([[1, 2, 3], [4], [5, 6]], tables, [3, 1, 2])
    engine.step([[1], [2], [3]], tables, [4, 2, 3])
    vocabulary, device = model.model.config.vocab_size, torch.device("cpu")
    sampled = options(0, temperature=0.7, repetition_penalty=1.1)
    rows = [Row.of(sampled, [5], vocabulary, device)] * 3
    with Dispatched() as dispatched:
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
