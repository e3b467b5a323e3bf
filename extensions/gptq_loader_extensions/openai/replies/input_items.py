"""List what a response answers, as the items that clients page through."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["as_items", "list_page"]


def as_items(content: str | Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return a request's input as items, each with an id and a type; a text is a message."""
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    return [_as_item(item) for item in content or ()]


def list_page(
    items: Sequence[dict[str, Any]], *, limit: int, after: str | None = None
) -> dict[str, Any]:
    """Return a page of a list of items, as OpenAI writes it.

    Args:
        items: all of them, in the order of the list.
        limit: how many there are on the page.
        after: the id of the last item of the page before; None begins the list.

    Raises:
        ApiError: none of them has that id.
    """
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(404, f"there is no item {after!r} in this list", param="after")
    first = 0 if after is None else ids.index(after) + 1
    page = list(items[first : first + limit])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": first + limit < len(items),
    }


def _as_item(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    whole = {"id": f"{'msg' if kind == 'message' else 'item'}_{uuid.uuid4().hex}", "type": kind}
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        item = {**item, "content": [{"type": part, "text": content}]}
    return {**whole, **{name: value for name, value in item.items() if value is not None}}
