"""Read the rows of a data set: JSON lines, Parquet or text, and the chats and texts in them."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.paths import read_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin.quantize.mix import DataSet

__all__ = ["Sample", "read_rows", "samples_of"]

Sample: TypeAlias = "str | list[dict[str, str]]"  # a text, or a chat

# What other writers call the roles of templates.
ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant",
    "user": "user", "assistant": "assistant", "system": "system",
}  # fmt: skip
SHAPES = "messages, conversations, text, or one of Open-Assistant's trees"


def read_rows(data_set: DataSet) -> list[Any]:
    """Read all rows of a data set that are of its languages.

    Raises:
        OptionInvalid: the file is not what its name says, or Parquet cannot be read here.
    """
    file = data_set.input_file_path
    kind = file.with_suffix("") if file.suffix == ".gz" else file
    if kind.suffix == ".parquet":
        rows = _parquet_rows(file)
    elif kind.suffix in (".jsonl", ".json", ".ndjson"):
        rows = list(_json_rows(file))
    else:
        rows = [part for part in re.split(r"\n\s*\n", read_words(file)) if part.strip()]
    if data_set.lang is None:
        return rows
    wanted = {code.strip() for code in data_set.lang.split(",")}
    return [row for row in rows if _language(row) in wanted]


def samples_of(row: Any, data_set: DataSet) -> list[Sample]:  # noqa: ANN401 - whatever a file holds
    """List the samples of a row: one, or of a tree of messages each of its threads.

    Raises:
        OptionInvalid: it holds none.
    """
    match row:
        case str():
            return [row]
        case list() | {"messages": list()}:
            messages = row["messages"] if isinstance(row, dict) else row
            return [[_message(it, data_set) for it in messages]]
        case {"conversations": list(messages)}:
            return [[_message(it, data_set) for it in messages]]
        case {"prompt": {"text": str(), "replies": _} as prompt}:
            return [list(thread) for thread in _threads(prompt, (), data_set)]
        case {"text": str(text)}:
            return [text]
        case _:
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise _wrong(data_set, f"a row has neither {SHAPES}: {keys[:100]}")


def _message(message: Any, data_set: DataSet) -> dict[str, str]:  # noqa: ANN401
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value", message.get("text")))
        if isinstance(role, str) and isinstance(text, str):
            return {"role": ROLES.get(role, role), "content": text}
    raise _wrong(data_set, f"no message with a role and a text: {str(message)[:80]!r}")


def _threads(
    node: dict[str, Any], before: tuple[dict[str, str], ...], data_set: DataSet
) -> Iterator[tuple[dict[str, str], ...]]:
    """Walk a tree of Open-Assistant's export: each way to a last reply of the assistant."""
    if node.get("deleted") or node.get("synthetic"):
        return
    thread = (*before, _message(node, data_set))
    replies = [it for it in node.get("replies") or () if _kept(it, node, data_set.top_k)]
    longer = [way for reply in replies for way in _threads(reply, thread, data_set)]
    if longer:
        yield from longer
    elif thread[-1]["role"] == "assistant":
        yield thread


def _kept(reply: dict[str, Any], parent: dict[str, Any], top_k: int | None) -> bool:
    """Whether a reply is among the best: people ranked those that have others beside them."""
    if top_k is None or reply.get("role") != "assistant":
        return True
    rank = reply.get("rank")
    return len(parent["replies"]) == 1 if rank is None else rank < top_k


def _language(row: Any) -> object:  # noqa: ANN401
    if not isinstance(row, dict):
        return None
    prompt = row.get("prompt")
    return prompt.get("lang") if isinstance(prompt, dict) else row.get("lang")


def _json_rows(file: Path) -> Iterator[Any]:
    read = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
                read += 1
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile) as error:
        raise OptionInvalid(
            f"line {read + 1} of {file.name} is no JSON ({str(error)[:100]})",
            hint="write one JSON value on each line",
        ) from error


def _parquet_rows(file: Path) -> list[Any]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise OptionInvalid(
            f"{file.name} is Parquet, and the package pyarrow, which reads it, is not installed",
            hint="install it: pip install pyarrow; or save the data as .jsonl",
        ) from error
    try:
        rows: list[Any] = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:150]
        raise OptionInvalid(
            f"{file.name} cannot be read as Parquet ({words})", hint="save it again, or as .jsonl"
        ) from error
    return rows


def _wrong(data_set: DataSet, message: str) -> OptionInvalid:
    return OptionInvalid(
        f"{data_set.name}, {data_set.input_file_path.name}: {message}",
        hint=f"give each row {SHAPES}",
    )
