"""Talk to a server with the openai package, and print as JSON what came back.

python openai_program.py URL KEY MODEL OTHER
"""

import asyncio
import json
import sys

import openai

URL, KEY, MODEL, OTHER = sys.argv[1:]
ASK = [{"role": "user", "content": "Hello"}]
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2, 3]}},
    "required": ["size"],
    "additionalProperties": False,
}


def ask(**options):
    defaults = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 16}
    return CLIENT.chat.completions.create(**{**defaults, **options})


def streamed():
    text, scored, usage = "", 0, None
    options = {"include_usage": True}
    for chunk in ask(stream=True, stream_options=options, logprobs=True, top_logprobs=2):
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
        for choice in chunk.choices:
            text += choice.delta.content or ""
            scored += len(choice.logprobs.content) if choice.logprobs else 0
    return {"text": text, "scored": scored, "usage": usage}


def helper():
    """The client's own way to stream, which wants a reply that ended by itself."""
    form = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}}
    ended = ask(response_format=form, max_tokens=200, temperature=1, seed=1)
    with CLIENT.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=form, max_tokens=200, temperature=1, seed=1
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    return {
        "final": final.message.content,
        "whole": ended.choices[0].message.content,
        "finish": final.finish_reason,
    }


async def many():
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        replies = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=MODEL, messages=ASK, temperature=0, max_tokens=16
                )
                for _ in range(8)
            )
        )
        text = ""
        async for chunk in await client.completions.create(
            model=MODEL, prompt="Hello", temperature=0, max_tokens=16, stream=True
        ):
            text += chunk.choices[0].text
    return {"chats": [it.choices[0].message.content for it in replies], "completion": text}


def error(**options):
    try:
        ask(**options)
    except openai.APIStatusError as raised:
        body = raised.body or {}
        return [type(raised).__name__, raised.status_code, raised.code, bool(body.get("message"))]
    return None


def wrong_key():
    try:
        openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError as raised:
        return raised.code
    return None


def embeddings():
    try:
        openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY).embeddings.create(model=MODEL, input="x")
    except openai.APIStatusError as raised:
        return raised.status_code
    return None


whole = ask(logprobs=True, top_logprobs=2)
completion = CLIENT.completions.create(
    model=MODEL, prompt=["Hello", "I am"], temperature=0, max_tokens=16, logprobs=1, echo=True
)
print(
    json.dumps(
        {
            "models": [it.id for it in CLIENT.models.list()],
            "model": CLIENT.models.retrieve(MODEL).id,
            "text": whole.choices[0].message.content,
            "finish": whole.choices[0].finish_reason,
            "scored": len(whole.choices[0].logprobs.content),
            "request": whole._request_id,
            "stream": streamed(),
            "helper": helper(),
            "async": asyncio.run(many()),
            "completions": [it.text for it in completion.choices],
            "offsets": completion.choices[0].logprobs.text_offset,
            "tools": ask(tools=[TOOL]).choices[0].message.content,
            "other": ask(model=OTHER).model,
            "errors": {
                "model": error(model="nope"),
                "type": error(temperature=True),
                "option": error(extra_body={"temprature": 1}),
                "long": error(messages=[{"role": "user", "content": "word " * 600}]),
                "forced": error(tools=[TOOL], tool_choice="force"),
            },
            "wrong key": wrong_key(),
            "embeddings": embeddings(),
        }
    )
)
