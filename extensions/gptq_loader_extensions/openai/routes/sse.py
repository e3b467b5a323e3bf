"""Send a reply as server-sent events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from gptq_loader_extensions.openai.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from gptq_loader_extensions.openai.replies.record import RequestRecord
    from gptq_loader_extensions.openai.replies.reply_events import PendingReply

__all__ = ["DONE", "EventStream", "event", "ignored_options", "stream"]

DONE = "data: [DONE]\n\n"
# Proxies must forward each event as it comes.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Any, *, name: str | None = None) -> str:  # noqa: ANN401 - anything JSON can write
    """Return one event, as it is sent."""
    first = "" if name is None else f"event: {name}\n"
    return f"{first}data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A stream of events; however it ends, its reply ends with it."""

    def __init__(
        self,
        events: AsyncIterator[str],
        reply: PendingReply,
        headers: Mapping[str, str],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(events, media_type=media_type, headers=headers)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.cancel()


def stream(
    events: AsyncIterator[str],
    reply: PendingReply,
    record: RequestRecord,
    *,
    done: str = DONE,
    failed: Callable[[ApiError], str] | None = None,
    media_type: str = "text/event-stream",
) -> EventStream:
    """Return a response of events; an error on the way is sent as one of them.

    Args:
        events: as they are sent.
        reply: what they are of.
        record: of the request.
        done: what is sent last.
        failed: writes an error as the API's clients read it; None writes OpenAI's.
        media_type: of the response.
    """

    async def guarded() -> AsyncIterator[str]:
        try:
            async for text in events:
                yield text
        except ApiError as error:
            record.finish = "error"
            yield event(error.body()) if failed is None else failed(error)
        if done:
            yield done

    return EventStream(guarded(), reply, HEADERS | ignored_options(record), media_type)


def ignored_options(record: RequestRecord) -> dict[str, str]:
    """Return the header that names the options which had no effect."""
    return {"x-ignored-options": ", ".join(record.ignored)} if record.ignored else {}
