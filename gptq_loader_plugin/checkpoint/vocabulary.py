"""How many tokens a model knows, by the rows of its embedding: a config may be off by some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.model_fields import read_fields

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo

__all__ = ["EMBEDDINGS", "embedding_rows", "fit_vocabulary", "vocabulary_warning"]

# The last part of a module's name: embeddings of tokens, and output heads.
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "embed_in", "wte")
HEADS = ("lm_head", "embed_out")


def embedding_rows(headers: Mapping[str, TensorInfo]) -> int | None:
    """Return the rows of the embedding and of the head, or None where they differ or are unknown.

    Args:
        headers: every tensor's header; a packed embedding has its rows as columns.
    """
    rows: dict[str, int] = {}
    for name, info in headers.items():
        module, _, part = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if kind in (*EMBEDDINGS, *HEADS) and part in ("weight", "qweight") and info.shape:
            rows[kind] = info.shape[0 if part == "weight" else -1]
    if len(set(rows.values())) != 1 or not any(kind in rows for kind in EMBEDDINGS):
        return None
    return next(iter(rows.values()))


def fit_vocabulary(config: PreTrainedConfig, headers: Mapping[str, TensorInfo]) -> None:
    """Correct a config's vocabulary by the tensors', and drop a padding token beyond it.

    A padding token changes no number; torch refuses one that the embedding does not have.
    """
    rows = embedding_rows(headers)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        known: Any = getattr(part, "vocab_size", None)
        if not isinstance(known, int):
            continue
        if rows is not None:
            part.vocab_size = known = rows
        padding = getattr(part, "pad_token_id", None)
        if isinstance(padding, int) and not 0 <= padding < known:
            part.pad_token_id = None


def vocabulary_warning(folder: Path, headers: Mapping[str, TensorInfo]) -> str | None:
    """Return the warning for a config.json whose vocab_size is not the tensors'."""
    file = folder / "config.json"
    stored = read_fields(read_json(file), file) if file.is_file() else {}
    text = stored.get("text_config")
    stated = (text if isinstance(text, dict) else stored).get("vocab_size")
    rows = embedding_rows(headers)
    if rows is None or not isinstance(stated, int) or stated == rows:
        return None
    return f"vocab_size is {stated} in config.json; the tensors say {rows}, and they win"
