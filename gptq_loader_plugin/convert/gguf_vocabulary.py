"""A tokenizer as GGUF has it: tokens, scores or merges, and how text is split before them.

SentencePiece's BPE, with bytes for what it lacks, is llama.cpp's "llama"; BPE over bytes is its
"gpt2", with one of the ways to split text it knows by name. That name is found by the patterns of
tokenizer.json; another way of splitting would give other tokens, so an unknown one is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import UnsupportedFormat

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Vocabulary", "pretokenizer_of", "read_vocabulary"]

SPACE = "\u2581"  # as SentencePiece writes one
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
START, SHORT = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    WORDS + r"\p{N}" + REST: "qwen2",
    f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|" + r"\p{N}" + SLASHED: "tekken",
    f"{START}{UPPER}*{LOWER}+{SHORT}|{START}{UPPER}+{LOWER}*{SHORT}|" + r"\p{N}{1,3}" + SLASHED: (
        "gpt-4o"
    ),
}


@dataclass(slots=True)
class Vocabulary:
    """A tokenizer, as a GGUF file keeps it.

    Attributes:
        model: "llama" or "gpt2".
        pretokenizer: how text is split, by llama.cpp's name.
        tokens: each token's text.
        types: each token's type.
        scores: each token's score, empty for "gpt2".
        adds_space: whether a space is put before a text, None where the model has none to put.
    """

    model: str
    pretokenizer: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    adds_space: bool | None = None


def read_vocabulary(folder: Path, *, rows: int, pretokenizer: str | None) -> Vocabulary:
    """Read a folder's tokenizer.

    Args:
        folder: the checkpoint's.
        rows: the embedding's rows, which llama.cpp wants a token for each of.
        pretokenizer: how text is split, where the user says so.

    Raises:
        UnsupportedFormat: there is no tokenizer, or it is of a kind llama.cpp does not know.
    """
    file = folder / "tokenizer.json"
    content = read_json(file) if file.is_file() else {}
    if (folder / "tokenizer.model").is_file():
        vocabulary = _of_sentencepiece(folder, rows)
    elif not content:
        raise UnsupportedFormat(
            "there is no tokenizer.json and no tokenizer.model",
            path=folder,
            hint="copy the tokenizer's files from the model this was made of",
        )
    else:
        vocabulary = _of_json(content, rows, folder, pretokenizer)
    for number, text, special in _added_tokens(folder, content):
        if number < rows:
            _put(vocabulary, number, text, CONTROL if special else USER_DEFINED)
    return vocabulary


def pretokenizer_of(content: dict[str, Any]) -> str | None:
    """Find llama.cpp's name of how a tokenizer.json splits text, None where it has none."""
    pre = content.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    patterns = [
        str(part["pattern"].get("Regex") or part["pattern"].get("String"))
        for part in parts
        if part.get("type") == "Split"
    ]
    kinds = {part.get("type"): part for part in parts}
    if not kinds.keys() <= {"Split", "ByteLevel", "Digits"}:
        return None
    own = kinds.get("ByteLevel", {}).get("use_regex", True)
    if len(patterns) == 1 and not own and "Digits" not in kinds:
        return PATTERNS.get(patterns[0])
    if patterns or not own:
        return None
    if "Digits" not in kinds:
        return "gpt-2"
    return "smollm" if kinds["Digits"].get("individual_digits") else None


def _of_sentencepiece(folder: Path, rows: int) -> Vocabulary:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedFormat(
            "tokenizer.model is SentencePiece's, and the package that reads it is not installed",
            path=folder,
            hint="install it: pip install 'gptq-loader-plugin[sentencepiece]'",
        ) from error
    content = (folder / "tokenizer.model").read_bytes()
    model = SentencePieceProcessor(model_proto=content)
    vocabulary = _empty("llama", "default", rows)
    vocabulary.adds_space = model.encode("a", out_type=str)[0].startswith(SPACE)
    for number in range(min(model.vocab_size(), rows)):
        kind = NORMAL
        for is_kind, other in (
            (model.IsUnknown, UNKNOWN),
            (model.IsControl, CONTROL),
            (model.IsUnused, UNUSED),
            (model.IsByte, BYTE),
        ):
            if is_kind(number):
                kind = other
        _put(vocabulary, number, model.IdToPiece(number), kind, model.GetScore(number))
    return vocabulary


def _of_json(
    content: dict[str, Any], rows: int, folder: Path, pretokenizer: str | None
) -> Vocabulary:
    model = content["model"]
    unknown = UnsupportedFormat(
        f"llama.cpp has no tokenizer of kind {model.get('type')} that splits text as this one does",
        path=folder / "tokenizer.json",
        hint="name the nearest of llama.cpp's ways, if you know it: --pretokenizer llama-bpe; its "
        "convert_hf_to_gguf lists them",
    )
    if model.get("type") != "BPE":
        raise unknown
    if model.get("byte_fallback"):
        return _of_byte_fallback(content, rows)
    name = pretokenizer or pretokenizer_of(content)
    if name is None:
        raise unknown
    vocabulary = _empty("gpt2", name, rows)
    for text, number in model["vocab"].items():
        if number < rows:
            _put(vocabulary, number, text, NORMAL)
    return vocabulary


def _of_byte_fallback(content: dict[str, Any], rows: int) -> Vocabulary:
    """Read SentencePiece's BPE from its merges: an earlier merge has a higher score."""
    model = content["model"]
    vocabulary = _empty("llama", "default", rows)
    written = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    vocabulary.adds_space = '"Prepend"' in written or '"prepend_scheme": "first"' in written
    vocabulary.adds_space |= '"prepend_scheme": "always"' in written
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", ())):
        joined = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
        ranks.setdefault(joined, rank)
    for text, number in model["vocab"].items():
        if number >= rows:
            continue
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = BYTE if is_byte else UNKNOWN if text == model.get("unk_token") else NORMAL
        score = -float(ranks[text] if text in ranks else len(ranks) + number)
        _put(vocabulary, number, text, kind, 0.0 if kind != NORMAL else score)
    return vocabulary


def _empty(model: str, pretokenizer: str, rows: int) -> Vocabulary:
    tokens = [f"[PAD{number}]".encode() for number in range(rows)]
    scores = [-10000.0] * rows if model == "llama" else []
    return Vocabulary(model, pretokenizer, tokens, [UNUSED] * rows, scores)


def _put(vocabulary: Vocabulary, number: int, text: str, kind: int, score: float = -1000.0) -> None:
    vocabulary.tokens[number] = text.encode(errors="surrogatepass")
    vocabulary.types[number] = kind
    if vocabulary.scores:
        vocabulary.scores[number] = score


def _added_tokens(folder: Path, content: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """List the tokens that were added to the model's: number, text, whether it is special."""
    added: dict[int, tuple[int, str, bool]] = {}
    plain = folder / "added_tokens.json"
    if plain.is_file():
        for text, number in read_json(plain).items():
            looks_special = text.startswith("<") and text.endswith(">")
            added[int(number)] = (int(number), text, looks_special)
    config = folder / "tokenizer_config.json"
    decoder = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    for number, token in decoder.items():
        added[int(number)] = (int(number), token["content"], bool(token.get("special")))
    for token in content.get("added_tokens", ()):
        added[int(token["id"])] = (int(token["id"]), token["content"], bool(token.get("special")))
    return list(added.values())
