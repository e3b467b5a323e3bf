"""Run in Ray's Python: clients that chat for some seconds, and what each request came to, as JSON.

    python ray_clients.py URL '{"key": K, "model": M, "clients": 2, "seconds": 20, "tokens": 64}'

Every second client streams. The client itself retries nothing: what fails is reported, and
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
        results: list[dict[str, Any]] = []

        async def one(number: int) -> None:
            while time.time() < until:
                results.append(await chat(client, job, stream=number % 2 == 0))

        await asyncio.gather(*(one(it) for it in range(job["clients"])))
    sys.stdout.write(json.dumps(results))


async def chat(client: openai.AsyncOpenAI, job: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"stream": stream, "began": time.time(), "error": None, "text": ""}
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model=job["model"],
            messages=[{"role": "user", "content": "Tell me of rivers, at length."}],
            max_tokens=job["tokens"],
            temperature=0,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        result["replica"] = raw.headers.get("x-replica")
        answer = raw.parse()
        if stream:
            async for chunk in answer:
                result["text"] += "".join(it.delta.content or "" for it in chunk.choices)
                result["tokens"] = chunk.usage.completion_tokens if chunk.usage else None
        else:
            result |= {"text": answer.choices[0].message.content}
            result |= {"tokens": answer.usage.completion_tokens}
    except openai.APIError as error:
        result["error"] = getattr(error, "code", None) or type(error).__name__
        result["status"] = getattr(error, "status_code", None)
        result["message"] = str(error)[:300]
    result["ended"] = time.time()
    return result


asyncio.run(main())
