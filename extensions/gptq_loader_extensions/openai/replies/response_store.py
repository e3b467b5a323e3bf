"""Keep responses in memory, for requests that go on from one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ResponseStore", "StoredResponse"]

MAX_RESPONSES = 1000
MAX_CHARACTERS = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and what led to it.

    Attributes:
        answer: the response, as it was sent.
        messages: the conversation, the reply included.
        size: how many characters that is, about.
        input_items: what it answers, as items, oldest first.
    """

    answer: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    size: int
    input_items: Sequence[dict[str, Any]] = ()


class ResponseStore:
    """The latest responses, by id; the oldest make room for new ones."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}  # of those responses, by their ids
        self._size = 0

    def add(self, response: StoredResponse) -> None:
        """Keep a response."""
        self._responses[response.answer["id"]] = response
        self._items |= {item["id"]: item for item in response.answer.get("output", ())}
        self._size += response.size
        while len(self._responses) > MAX_RESPONSES or self._size > MAX_CHARACTERS:
            self.remove(next(iter(self._responses)))

    def find(self, response_id: str) -> StoredResponse | None:
        """Find a response; None where it was not kept, or not for so long."""
        return self._responses.get(response_id)

    def find_item(self, item_id: str) -> dict[str, Any] | None:
        """Find an item of a response that is kept; None where there is none."""
        return self._items.get(item_id)

    def remove(self, response_id: str) -> bool:
        """Forget a response; return whether there was one."""
        response = self._responses.pop(response_id, None)
        if response is not None:
            self._size -= response.size
            for item in response.answer.get("output", ()):
                self._items.pop(item["id"], None)
        return response is not None
