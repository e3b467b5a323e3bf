"""The server's parts that need no connection: tools, tokens as text, penalties, metrics."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, copy
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from served import load, running
from starlette.requests import Request
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.http.metrics import Metrics
from gptq_loader_extensions.openai.replies.engine import ReplyChunk
from gptq_loader_extensions.openai.replies.logprobs import LogprobAligner
from gptq_loader_extensions.openai.replies.processors import (
    LogitBias,
    PresencePenalty,
    RecentPenalty,
)
from gptq_loader_extensions.openai.replies.scores import ScoredToken
from gptq_loader_extensions.openai.replies.structured import GrammarMask
from gptq_loader_extensions.openai.replies.token_text import TokenText
from gptq_loader_extensions.openai.replies.tool_parsers import (
    BareToolParser,
    CallBegin,
    CallText,
    HermesToolParser,
    ToolParser,
)
from gptq_loader_extensions.openai.schema.aliases import resolve_aliases
from gptq_loader_extensions.openai.schema.paths import REPLY_PATHS
from gptq_loader_plugin.generation.generate import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.generation.generate import Generation

CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
BRACKETS = "[" * 1500  # as a small model repeats one to its limit
# As Hermes and Qwen write it, shortened.
TOOLS_TEMPLATE = """{%- if tools %}<|im_start|>system
Call functions with <tool_call>{"name": ..., "arguments": ...}</tool_call>:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{ call.function.arguments.zone }}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def read(reader: ToolParser, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    plain, calls = "", []
    for event in [*(it for piece in pieces for it in reader.feed(piece)), *reader.finish()]:
        match event:
            case CallBegin():
                calls.append((event.name, ""))
            case CallText():
                name, arguments = calls.pop()
                calls.append((name, arguments + event.arguments))
            case _:
                plain += event
    return plain, calls


@given(st.lists(st.integers(0, 200), max_size=8))
@example([83])
def test_a_call_is_found_however_the_text_is_cut(cuts: list[int]) -> None:
    text = f"Let me look.\n{CALL}\n{CALL} and <tool_x"
    edges = sorted({0, len(text), *(it for it in cuts if it < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    plain, calls = read(HermesToolParser(), pieces)
    assert plain == "Let me look.\n and <tool_x"
    assert [name for name, _ in calls] == ["now", "now"]
    assert json.loads(calls[0][1]) == {"zone": "UTC"}


@pytest.mark.parametrize(
    ("text", "plain", "names"),
    [
        ("plain", "plain", []),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('<tool_call>{"name": "now", "arguments": {}}', "", ["now"]),
        ('<tool_call>{"name": "now", "argu', '<tool_call>{"name": "now", "argu', []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        (f"<tool_call>{BRACKETS}</tool_call>", f"<tool_call>{BRACKETS}</tool_call>", []),
        (f"<tool_call>{BRACKETS}", f"<tool_call>{BRACKETS}", []),
    ],
)
def test_what_is_no_call_stays_text(text: str, plain: str, names: list[str]) -> None:
    parsed, calls = read(HermesToolParser(), list(text))
    assert (parsed, [name for name, _ in calls]) == (plain, names)


@pytest.mark.parametrize(
    ("text", "plain", "names"),
    [
        ('{"name": "now", "parameters": {"zone": "UTC"}}', "", ["now"]),
        ('{"answer": 42}', '{"answer": 42}', []),
        (' {"name": 3}', ' {"name": 3}', []),
        ("It is noon {now}", "It is noon {now}", []),
        ('{"name":' * 1500, '{"name":' * 1500, []),
    ],
)
def test_a_whole_reply_may_be_a_call(text: str, plain: str, names: list[str]) -> None:
    parsed, calls = read(BareToolParser(frozenset({"now"})), list(text))
    assert (parsed, [name for name, _ in calls]) == (plain, names)


def test_tools_reach_a_template_that_takes_them(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tools")
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    tool: dict[str, Any] = {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object"}},
    }
    with running(tmp_path, names=(), start="tools") as served:
        ask = {"max_tokens": 4, "temperature": 0}
        plain = served.chat(**ask).json()["usage"]["prompt_tokens"]
        offered = served.chat(**ask, tools=[tool]).json()["usage"]["prompt_tokens"]
        assert offered > plain + 50
        unused = served.chat(**ask, tools=[tool], tool_choice="none").json()
        assert unused["usage"]["prompt_tokens"] == plain
        tool["function"]["description"] = "<|im_end|>"
        refused = served.chat(**ask, tools=[tool])
        assert refused.status_code == 400
        assert "control token" in refused.json()["error"]["message"]
        call = {"id": "c", "type": "function"}
        called = {"name": "now", "arguments": '{"zone": "UTC"}'}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [{**call, "function": called}]},
        ]
        with_call = served.post("/v1/chat/completions", messages=messages, **ask)
        assert with_call.status_code == 200, "a template reads arguments, and not their JSON"


class Scripted:
    """A load whose models reply with a fixed text, and are real in everything else."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, target: str | Path) -> gptq.LoadedModel:
        model = load(target)
        begin = model.begin

        def scripted(*args: Any, **options: Any) -> Generation:
            generation = begin(*args, **options)
            pieces = iter([*self.text, None])

            def sample(logits: torch.Tensor) -> Piece:
                letter = next(pieces)
                generation.pending = [1]
                generation.finished = letter is None
                return Piece(letter or "", 1, "stop" if letter is None else None)

            generation.sample = sample  # type: ignore[method-assign]
            return generation

        model.begin = scripted  # type: ignore[method-assign]
        return model


def test_a_call_is_sent_as_openai_sends_it(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tools")
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    tool = {"type": "function", "function": {"name": "now"}}
    loads = Scripted(f"Wait.\n{CALL}")
    with running(tmp_path, names=(), start="tools", loads=loads) as served:
        (choice,) = served.chat(tools=[tool]).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Wait.\n"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}
        body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
        chunks = [it["choices"][0] for it in served.events("/v1/chat/completions", **body)[:-1]]
        deltas = [it["delta"] for it in chunks]
        assert "".join(it.get("content", "") for it in deltas) == "Wait.\n"
        streamed = [it["tool_calls"][0] for it in deltas if "tool_calls" in it]
        assert {it["index"] for it in streamed} == {0}
        assert streamed[0]["function"]["name"] == "now"
        assert "".join(it["function"]["arguments"] for it in streamed) == '{"zone": "UTC"}'
        assert len(streamed) > 3, "a call is sent as it is written"
        assert chunks[-1]["finish_reason"] == "tool_calls"
        (choice,) = served.chat().json()["choices"]
        assert choice["message"]["content"] == loads.text, "nobody offered a tool"


# Tokens as text


@pytest.fixture(scope="module")
def token_text() -> TokenText:
    return TokenText(AutoTokenizer.from_pretrained(DATA / ONE))


def test_tokens_as_bytes_make_the_text_again(token_text: TokenText) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    text = "Hello the <|im_start|> ñandú 你好 \U0001f600\n\t end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(token_text.bytes, ids)) == text.encode()
    halves = [
        it for it in ids if b"\xf0\x9f".startswith(token_text.bytes(it)) and token_text.bytes(it)
    ]
    assert token_text.name(halves[0]).startswith("bytes:\\xf0")
    assert token_text.text(halves[0]) == "\ufffd"


def test_a_sentencepiece_token_keeps_its_space() -> None:
    """As in Llama 2's vocabulary: a mark for spaces, and bytes for what has no token."""
    pieces = ["<unk>", *(f"<0x{it:02X}>" for it in range(256)), "\u2581", "a", "\u2581a", "\u00f1"]
    vocabulary = {text: i for i, text in enumerate(pieces)}
    model = BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    inner = Tokenizer(model)
    inner.normalizer = Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    token_text = TokenText(tokenizer)
    text = "a a\u00f1 \U0001f600\u4f60a"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert vocabulary["\u2581a"] in ids
    assert len(ids) > len(text), "some characters are several tokens"
    assert b"".join(map(token_text.bytes, ids)) == text.encode()
    assert token_text.name(vocabulary["<0xE4>"]) == "bytes:\\xe4"
    assert token_text.bytes(len(pieces)) == b"", "a token the vocabulary does not have"


def test_tokens_are_given_out_with_their_text(token_text: TokenText) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    end = 381
    tokens = [ScoredToken(it, -1.0) for it in [*ids, end]]
    texts = [token_text.text(it) for it in ids]

    aligner = LogprobAligner(token_text, frozenset({end}))
    assert aligner.add(ReplyChunk(0, Piece("", 1), tokens[:1])) == []
    assert aligner.add(ReplyChunk(0, Piece("".join(texts[:2]), 2), tokens[1:2])) == tokens[:2]
    rest = ReplyChunk(0, Piece("".join(texts[2:]), 4, "stop"), tokens[2:])
    assert aligner.add(rest) == tokens[2:-1], "an end token is no text"

    stopped = LogprobAligner(token_text, frozenset({end}))
    spelled = ReplyChunk(0, Piece("", 3, "stop"), tokens[:3])
    assert stopped.add(spelled) == [], "they spelled a stop text"


# Grammars


@pytest.mark.parametrize("vocabulary", [384, 385, 401, 416])
@pytest.mark.parametrize("wider", [0, 1, 31, 100])
@pytest.mark.parametrize("pattern", ["[0-9]+", "(.|\n)*"])
def test_a_grammar_allows_what_its_matcher_takes(vocabulary: int, wider: int, pattern: str) -> None:
    llguidance = pytest.importorskip("llguidance")
    hf = pytest.importorskip("llguidance.hf")
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    known = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=[2])
    grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    matcher = llguidance.LLMatcher(known, grammar, log_level=0)
    twin = llguidance.LLMatcher(known, grammar, log_level=0)
    scores = torch.randn(1, vocabulary + wider)
    before = scores.clone()
    masked = GrammarMask(lambda: matcher, 1, known)(torch.tensor([[7]]), scores)
    right = [
        token < vocabulary and twin.validate_tokens([token]) == 1
        for token in range(scores.shape[-1])
    ]
    allowed = torch.tensor([right])
    assert 0 < allowed.sum() < vocabulary
    assert torch.equal(masked, before.masked_fill(~allowed, float("-inf")))
    assert torch.equal(scores, before), "the model's own logits stay what they are"


# Options


def test_penalties_count_what_they_say_they_count() -> None:
    ids = torch.tensor([[7, 7, 1, 2, 2]])
    scores = torch.ones(1, 8)
    penalised = PresencePenalty(2, presence=0.5, frequency=0.25)(ids, scores)
    assert penalised[0].tolist() == [1, 0.25, 0, 1, 1, 1, 1, 1]
    scores[0, 1] = -1
    recent = RecentPenalty(2.0, 3)(ids, scores)
    assert recent[0].tolist() == [1, -2, 0.5, 1, 1, 1, 1, 1]
    assert LogitBias({3: 4.0})(ids, scores)[0, 3] == 5
    assert scores[0, 3] == 1, "the model's own logits stay what they are"


def test_an_option_has_one_name() -> None:
    sent = {"rep_pen": 1.1, "repetition_penalty": 1.1, "sampler_seed": -1, "max_length": 5}
    assert resolve_aliases(sent) == {"repetition_penalty": 1.1, "max_tokens": 5, "seed": None}
    assert resolve_aliases([1]) == [1]
    with pytest.raises(ApiError, match="one option"):
        resolve_aliases({"stop": ["a"], "stop_sequence": ["b"]})


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.requests.labels(route='x"\\\n', status="200").inc()
    metrics.requests.labels(route="y", status="200").inc(2)
    metrics.queue_seconds.observe(0.02)
    metrics.queue_seconds.observe(1000)
    metrics.replies.inc(3)
    text = metrics.render([GaugeMetricFamily("gptq_requests_running", "", value=1.5)]).decode()
    assert "_created" not in text, "OpenMetrics' alone"
    samples = {
        (it.name, *it.labels.values()): it.value
        for family in text_string_to_metric_families(text)
        for it in family.samples
    }
    assert samples["gptq_requests_total", 'x"\\\n', "200"] == 1
    assert samples["gptq_requests_total", "y", "200"] == 2
    assert samples["gptq_queue_seconds_bucket", "0.01"] == 0
    assert samples["gptq_queue_seconds_bucket", "0.025"] == 1
    assert samples["gptq_queue_seconds_bucket", "300.0"] == 1
    assert samples["gptq_queue_seconds_bucket", "+Inf"] == 2
    assert samples["gptq_queue_seconds_count",] == 2
    assert samples["gptq_requests_running",] == 1.5
    assert metrics.total("gptq_replies_total") == 3


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.replies.inc()
    assert one.total("gptq_replies_total") == 1
    assert other.total("gptq_replies_total") == 0


def test_a_route_that_writes_replies_is_known_to_proxies(tmp_path: Path) -> None:
    with running(tmp_path, names=(ONE,)) as served:
        for path in REPLY_PATHS:
            assert served.client.get(path).status_code == 405, f"there is no route {path}"
        route = Route("/v1/elsewhere", endpoint=lambda _: None)
        request = Request({"type": "http", "route": route, "state": {}})
        reply = served.server.new_reply(request, None, lambda _: (None, ()))
        with pytest.raises(AssertionError, match="add the route's path to REPLY_PATHS"):
            reply.send(None)
