"""Tokenizers of repositories that bring Python code for them, which is not run."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import gptq_loader_plugin as gptq
from gptq_loader_extensions.vllm.server.server_files import write_tokenizer
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.tokenizer import RANKS, is_mended, read_tokenizer
from gptq_loader_plugin.checkpoint.reader import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = DATA / "gptq-4bit-128g-act-sym"
TEXTS = (
    "The old house on the hill isn't empty; it's 1,234 years old.",
    "Größe, naïve, 你好世界 — e\u0301 and é\n\n  indented\ttext   ",
    "aaaaaaaa bbb aaa'll WE'LL \r\n\r\n x",
    "",
)
CODE = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in ONE.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tmp_path)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": CODE, "model_max_length": 8192}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit\n")
    return tmp_path


def learn_ranks() -> dict[bytes, int]:
    """Learn a vocabulary of bytes as GPT-2's is: every byte first, then what is merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    tokenizer.train_from_iterator([*TEXTS, readme], trainer)
    octets = {letter: octet for octet, letter in bytes_to_unicode().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda it: it[1])
    return {bytes(octets[letter] for letter in token): rank for token, rank in vocabulary}


def merge(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Join the two neighbours whose bytes have the lowest rank, until none have one."""
    parts = [piece[it : it + 1] for it in range(len(piece))]
    while True:
        joined = [parts[it] + parts[it + 1] for it in range(len(parts) - 1)]
        known = [(ranks[it], place) for place, it in enumerate(joined) if it in ranks]
        if not known:
            return [ranks[it] for it in parts]
        place = min(known)[1]
        parts[place : place + 2] = [joined[place]]


def test_qwens_ranks_are_merged_as_tiktoken_merges_them(folder: Path) -> None:
    ranks = learn_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / RANKS).write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").unlink()
    tokenizer: Any = read_tokenizer(open_checkpoint(folder))
    cut = Qwen2Tokenizer().backend_tokenizer
    octets = {letter: octet for octet, letter in bytes_to_unicode().items()}
    for text in TEXTS:
        normal = cut.normalizer.normalize_str(text)
        pieces = [piece for piece, _ in cut.pre_tokenizer.pre_tokenize_str(normal)]
        expected = [it for piece in pieces for it in merge(bytes(map(octets.get, piece)), ranks)]
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected) == normal
    assert max(map(len, ranks)) > 3  # there was something to merge


def test_qwens_special_tokens_follow_its_ranks(folder: Path) -> None:
    ranks = learn_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / RANKS).write_text("\n".join(lines))
    (folder / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(folder)
    tokenizer: Any = read_tokenizer(checkpoint)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>")
    first = len(ranks)
    assert [tokenizer.convert_tokens_to_ids(it) for it in names] == [
        first, first + 1, first + 2, first + 3, first + 207,
    ]  # fmt: skip
    assert tokenizer("<|im_end|>")["input_ids"] == [first + 2]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|endoftext|>", 8192)
    assert find_template(folder, card=checkpoint.card).name == "chatml"


def test_a_whole_tokenizer_needs_no_code(folder: Path) -> None:
    found: Any = read_tokenizer(open_checkpoint(folder))
    expected: Any = read_tokenizer(open_checkpoint(ONE))
    assert found(TEXTS[0])["input_ids"] == expected(TEXTS[0])["input_ids"]


def test_a_tokenizer_that_is_code_alone_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(gptq.CheckpointError, match=r"OwnTokenizer.*is not run") as refused:
        gptq.load(folder, device="cpu")
    assert "tokenizer.json" in refused.value.hint


EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def learn_pieces(folder: Path) -> Path:
    """Put a tokenizer.model, learnt by SentencePiece, in the place of a checkpoint's tokenizer."""
    import sentencepiece

    for file in ONE.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(file, folder)
    lines = [f"the quick fox {i} sat and looked at the sky while it ran" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.mark.parametrize("spelling", ["config", "table", "map", "some", "pad", "more"])
def test_special_tokens_that_are_empty_are_those_of_the_vocabulary(
    spelling: str, tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    folder = learn_pieces(tmp_path)
    table = {key: {"content": "", "lstrip": False, "normalized": True} for key in EMPTY}
    stated: dict[str, Any] = {
        "config": EMPTY,
        "table": table,
        "map": {},
        "some": {**NAMED, "eos_token": ""},
        "pad": {**EMPTY, "pad_token": ""},
        "more": {**EMPTY, "additional_special_tokens": [""]},
    }[spelling]
    if spelling == "map":
        (folder / "special_tokens_map.json").write_text(json.dumps(table))
    config = {"tokenizer_class": "LLaMATokenizer", "model_max_length": 2048, **stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(open_checkpoint(folder))
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert "" not in tokenizer.all_special_tokens
    assert tokenizer("the fox")["input_ids"][0] == 1
    assert tokenizer("the fox")["input_ids"].count(1) == 1


@pytest.mark.parametrize(
    ("stated", "first"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": None}, True),
        ({}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
    ],
)
def test_a_llamas_texts_begin_as_transformers_4_began_them(
    stated: dict[str, Any], first: bool, tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    folder = learn_pieces(tmp_path)
    if stated:
        (folder / "tokenizer_config.json").write_text(json.dumps({**NAMED, **stated}))
    tokenizer = read_tokenizer(open_checkpoint(folder))
    ids: Any = tokenizer("the fox")["input_ids"]
    assert (ids[0] == 1) is first
    assert is_mended(folder) is ("add_bos_token" not in stated or stated["add_bos_token"] is None)


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "chatml"])
def test_a_chat_begins_once(template: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    folder = learn_pieces(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", **EMPTY}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with gptq.load(folder, device="cpu", template=template) as model:
        ids, _ = model.encode_chat([{"role": "user", "content": "the fox"}])
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert model.encode("the fox")[0] == 1
        assert 2 in model.end_ids()


def test_empty_special_tokens_of_a_tokenizer_json(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(ONE, folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **EMPTY, "pad_token": ""}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(open_checkpoint(folder))
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.pad_token is None
    assert "" not in tokenizer.all_special_tokens
    assert tokenizer("the fox")["input_ids"]


def test_vllm_is_given_the_tokenizer_as_it_is_read(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    learn_pieces(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**EMPTY}))
    tokenizer = read_tokenizer(open_checkpoint(folder))
    written = write_tokenizer(tokenizer, folder, tmp_path)
    assert written is not None
    assert AutoTokenizer.from_pretrained(written)("the fox") == tokenizer("the fox")
    assert write_tokenizer(tokenizer, ONE, tmp_path) is None
