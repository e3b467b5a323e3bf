"""Tokenizers of repositories that bring Python code for them, which is not run."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import gptq_loader_plugin as gptq
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.tokenizer import RANKS, read_tokenizer
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
