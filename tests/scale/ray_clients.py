"""Run in Ray's Python: clients that chat for some seconds, and what each request came to, as JSON.

    python ray_clients.py URL '{"key": K, "model": M, "clients": 2, "seconds": 20, "tokens": 64}'

Every second client streams. Nothing is asked again by the client itself: what fails, is told, and
the next request is asked at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import openai


async def main() -> None:
    job = json.loads(sys.argv[2])
    async with openai.AsyncOpenAI(
        base_url=f"{sys.argv[1]}/v1", api_key=job["key"], max_retries=0, timeout=300
    ) as client:
        until = time.time() + job["seconds"]
        seen: list[dict[str, Any]] = []

        async def one(number: int) -> None:
            while time.time() < until:
                seen.append(await chat(client, job, stream=number % 2 == 0))

        await asyncio.gather(*(one(it) for it in range(job["clients"])))
    sys.stdout.write(json.dumps(seen))


async def chat(client: openai.AsyncOpenAI, job: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"stream": stream, "began": time.time(), "error": None, "text": ""}
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model=job["model"],
            messages=[{"role": "user", "content": "Tell me of rivers, at length."}],
            max_tokens=job["tokens"],
            temperature=0,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        told["replica"] = raw.headers.get("x-replica")
        answer = raw.parse()
        if stream:
            async for chunk in answer:
                told["text"] += "".join(it.delta.content or "" for it in chunk.choices)
                told["tokens"] = chunk.usage.completion_tokens if chunk.usage else None
        else:
            told |= {"text": answer.choices[0].message.content}
            told |= {"tokens": answer.usage.completion_tokens}
    except openai.APIError as error:
        told["error"] = getattr(error, "code", None) or type(error).__name__
        told["status"] = getattr(error, "status_code", None)
        told["words"] = str(error)[:300]
    told["ended"] = time.time()
    return told


asyncio.run(main())
