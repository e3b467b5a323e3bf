"""Read a checkpoint's tokenizer, running none of its code.

Some repositories bring Python code for theirs. Where a `tokenizer.json` lies beside it, that is
the whole tokenizer; Qwen of the first generation has tiktoken's file of ranks instead.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["RANKS", "auto_tokenizer", "emptied_tokens", "is_mended", "read_tokenizer"]

COPY_TOKENIZER = (
    "copy tokenizer.json (or tokenizer.model) and tokenizer_config.json from the model this was "
    "made of"
)
RANKS = "qwen.tiktoken"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# Classes, and models whose class is one of them, that began every text with their first token.
BEGINNING = ("llama", "codellama", "code_llama", "gemma", "mistral", "mixtral")
EXTRAS = 205  # <|extra_0|> and so on, which follow Qwen's three special tokens


def read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a checkpoint's folder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is code of its own.
        UnsupportedFormat: transformers does not know the model.
    """
    from transformers import PreTrainedConfig

    from gptq_loader_plugin.checkpoint.transformers_config import read_config

    folder = checkpoint.folder
    own = _own_class(folder)
    if own and not (folder / "tokenizer.json").is_file() and not (folder / RANKS).is_file():
        raise CheckpointError(
            f"its tokenizer ({own}) is Python code of its own, which is not run",
            path=folder,
            hint="find a version of this model that has a tokenizer.json, and copy that file here",
        )
    # A model type that only we know is nothing for a user to be told of.
    config = PreTrainedConfig() if checkpoint.translated is not None else read_config(checkpoint)
    try:
        tokenizer: PreTrainedTokenizerBase = _read(folder, config, own=own)
        usable = len(tokenizer) > 0 and bool(tokenizer("a")["input_ids"])
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the tokenizer cannot be read ({first[:200]})",
            path=folder,
            hint=f"{COPY_TOKENIZER}; tokenizer.model needs pip install sentencepiece protobuf",
        ) from error
    if not usable:
        raise CheckpointError("there is no tokenizer", path=folder, hint=COPY_TOKENIZER)
    return tokenizer


def auto_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> Any:  # noqa: ANN401
    """Read a tokenizer as `AutoTokenizer` does, and those of 2023 as transformers 4 did.

    Their special tokens may be empty texts, which are those of the vocabulary; and a Llama's
    tokenizer.model begins a text with <s> where no file says otherwise.
    """
    from transformers import AutoTokenizer

    named = emptied_tokens(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, config=config, trust_remote_code=False, **named
    )
    if _begins_texts(folder):
        tokenizer.add_bos_token = True
    return tokenizer


def is_mended(folder: Path) -> bool:
    """Return whether `auto_tokenizer` reads a tokenizer in another way than `AutoTokenizer`."""
    return bool(emptied_tokens(folder)) or _begins_texts(folder)


def emptied_tokens(folder: Path) -> dict[str, Any]:
    """Return what stands for the special tokens that are empty texts: a token, or None."""
    stated: dict[str, set[str]] = {}
    more: list[Any] = []
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _table(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key in (*SPECIAL, "pad_token") and isinstance(content, str):
                stated.setdefault(key, set()).add(content)
            elif key == "additional_special_tokens" and isinstance(value, list):
                more = value
    empty = [key for key, contents in stated.items() if "" in contents]
    pieces = _pieces(folder) if empty else {}
    tokens: dict[str, Any] = {key: max(stated[key]) or pieces.get(key) for key in empty}
    if "" in more:
        tokens["additional_special_tokens"] = [token for token in more if token]
    return tokens


def _pieces(folder: Path) -> Mapping[str, str]:
    """Return the special tokens of a vocabulary, by their names in transformers."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        content = _table(folder / "tokenizer.json")
        added = content.get("added_tokens") or []
        known = {str(token.get("content")) for token in added if isinstance(token, dict)}
        return {key: token for key, token in SPECIAL.items() if token in known}
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:  # reading the tokenizer says so
        return SPECIAL
    vocabulary = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {
        "unk_token": vocabulary.unk_id(),
        "bos_token": vocabulary.bos_id(),
        "eos_token": vocabulary.eos_id(),
        "pad_token": vocabulary.pad_id(),
    }
    return {key: vocabulary.id_to_piece(index) for key, index in ids.items() if index >= 0}


def _begins_texts(folder: Path) -> bool:
    """Return whether transformers 4 began texts with <s>, and 5 does not unless it is said."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    stated = _table(folder / "tokenizer_config.json")
    if isinstance(stated.get("add_bos_token"), bool):
        return False
    kind = stated.get("tokenizer_class") or _table(folder / "config.json").get("model_type")
    return str(kind).lower().startswith(BEGINNING)


def _table(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _read(folder: Path, config: PreTrainedConfig, *, own: str) -> Any:  # noqa: ANN401
    from transformers import PreTrainedTokenizerFast

    if not own:
        return auto_tokenizer(folder, config=config)
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return _read_ranks(folder / RANKS)


def _own_class(folder: Path) -> str:
    """Name the class of a tokenizer that is code of its own, and that transformers has not."""
    file = folder / "tokenizer_config.json"
    config = _table(file)
    if not config.get("auto_map"):
        return ""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = str(config.get("tokenizer_class") or "without a name")
    return "" if tokenizer_class_from_name(name) is not None else name


def _read_ranks(file: Path) -> Any:  # noqa: ANN401 - a tokenizer
    """Make a tokenizer of tiktoken's file: tokens' bytes, and the order in which they are merged.

    Text is cut as it is for the Qwen that followed, which transformers has.
    """
    from transformers import AddedToken, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {
        "".join(map(letters.__getitem__, base64.b64decode(token))): int(rank)
        for token, rank in lines
    }
    # tiktoken joins any two tokens whose bytes are a token, the one of the lowest rank first
    merges: Any = [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    tokenizer = Qwen2Tokenizer(vocab=ranks, merges=merges)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    special = ["<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(EXTRAS))]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = file.with_name("tokenizer_config.json")
    tokenizer.model_max_length = json.loads(config.read_text("utf-8")).get("model_max_length")
    return tokenizer
