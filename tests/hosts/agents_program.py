"""Talk to a server by the quick start of one client library, and print as JSON what came back.

python agents_program.py NAME URL MODEL THINKER
"""

import json
import os
import sys
from typing import Literal

NAME, URL, MODEL, THINKER = sys.argv[1:]
os.environ |= {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": f"{URL}/v1"}
ASK = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
CITIES = ("Paris", "Rome")


def with_openai():
    from openai import OpenAI

    client = OpenAI()
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    first = client.responses.create(model=MODEL, input="Hello", max_output_tokens=8)
    second = client.responses.create(
        model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=8
    )
    call = client.responses.create(
        model=MODEL,
        input="Weather?",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    kinds = []
    with client.responses.stream(
        model=MODEL, input="Weather?", tools=tools, tool_choice="required"
    ) as stream:
        kinds += [event.type for event in stream]
        final = stream.get_final_response()
    thought = client.chat.completions.create(model=THINKER, messages=ASK, max_tokens=8)
    hints = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ASK, max_tokens=2, reasoning_effort="low", verbosity="low"
    )
    return {
        "text": first.output_text,
        "longer": second.usage.input_tokens > first.usage.input_tokens,
        "city": json.loads(call.output[-1].arguments)["city"],
        "first and last": [kinds[0], kinds[-1]],
        "streamed": json.loads(final.output[0].arguments)["city"],
        "thought": bool(thought.choices[0].message.reasoning_content),
        "ignored": hints.headers["x-ignored-options"],
    }


def with_anthropic():
    from anthropic import Anthropic, BadRequestError, NotFoundError

    client = Anthropic(base_url=URL, api_key="x")
    tools = [{"name": "weather", "description": "It.", "input_schema": SCHEMA}]
    text = client.messages.create(model=MODEL, max_tokens=8, messages=ASK)
    called = client.messages.create(
        model=MODEL,
        max_tokens=600,
        messages=ASK,
        tools=tools,
        tool_choice={"type": "tool", "name": "weather"},
    )
    with client.messages.stream(
        model=MODEL,
        max_tokens=600,
        messages=ASK,
        tools=tools,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:
        streamed = stream.get_final_message()
    count = client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens
    errors = []
    for body in ({"model": "nope"}, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}):
        try:
            client.messages.create(**{"model": MODEL, "max_tokens": 2, "messages": ASK, **body})
        except (BadRequestError, NotFoundError) as error:
            errors.append(type(error).__name__)
    return {
        "text": text.content[0].text,
        "stop": text.stop_reason,
        "city": called.content[-1].input["city"],
        "streamed": streamed.content[-1].input["city"],
        "counted": count == text.usage.input_tokens,
        "errors": errors,
        "models": MODEL in [it.id for it in client.models.list()],
    }


def with_ollama():
    os.environ["OLLAMA_HOST"] = URL
    import ollama

    client = ollama.Client()
    options = {"num_predict": 8, "num_ctx": 512}
    whole = client.chat(model=MODEL, messages=ASK, options=options)
    parts = client.chat(model=MODEL, messages=ASK, options=options, stream=True)
    formed = client.chat(model=MODEL, messages=ASK, format=SCHEMA)
    thought = client.chat(model=THINKER, messages=ASK, think=True, options=options)
    return {
        "text": whole.message.content,
        "streamed": "".join(it.message.content for it in parts),
        "completion": client.generate(model=MODEL, prompt="Hello", options=options).response,
        "city": json.loads(formed.message.content)["city"],
        "thought": bool(thought.message.thinking),
        "models": MODEL in [it.model for it in client.list().models],
        "capabilities": client.show(MODEL).capabilities,
        **_with_ollamas_models(ollama, client),
    }


def _with_ollamas_models(ollama, client):
    client.generate(model=MODEL)
    (running,) = client.ps().models
    unloaded = client.generate(model=MODEL, keep_alive=0)
    try:
        refused = ""
        client.embed(model=MODEL, input="Hello")
    except ollama.ResponseError as error:
        refused = error.error
    return {
        "running": [running.model, len(running.digest), running.expires_at.year],
        "unloaded": [unloaded.done_reason, len(client.ps().models)],
        "pulled": client.pull(MODEL).status,
        "refused": refused,
    }


def with_litellm():
    import litellm

    options = {"api_base": f"{URL}/v1", "api_key": "x", "max_tokens": 600}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    called = litellm.completion(
        f"openai/{MODEL}", ASK, tools=tools, tool_choice="required", **options
    )
    ollama = litellm.completion(f"ollama_chat/{MODEL}", ASK, api_base=URL, max_tokens=8)
    anthropic = litellm.completion(
        f"anthropic/{MODEL}", ASK, api_base=URL, api_key="x", max_tokens=8
    )
    thought = litellm.completion(f"hosted_vllm/{THINKER}", ASK, **{**options, "max_tokens": 8})
    response = litellm.responses(
        model=f"openai/{MODEL}",
        input="Hello",
        api_base=f"{URL}/v1",
        api_key="x",
        max_output_tokens=8,
    )
    return {
        "city": json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"],
        "texts": [it.choices[0].message.content for it in (ollama, anthropic)],
        "thought": bool(thought.choices[0].message.reasoning_content),
        "output": len(response.output),
    }


def with_langchain():
    from langchain_openai import ChatOpenAI

    def weather(city: Literal["Paris", "Rome"]) -> str:
        """Tell the weather."""
        return city

    chat = ChatOpenAI(model=MODEL, max_tokens=600)
    bound = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    formed = chat.with_structured_output(
        {"title": "city", "description": "A city.", **SCHEMA}, method="function_calling"
    )
    responses = ChatOpenAI(model=MODEL, max_tokens=8, use_responses_api=True)
    return {
        "city": bound.invoke("Hello").tool_calls[0]["args"]["city"],
        "formed": formed.invoke("Hello")["city"],
        "text": responses.invoke("Hello").text,
    }


def with_llama_index():
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        city: Literal["Paris", "Rome"]

    def weather(city: Literal["Paris", "Rome"]) -> str:
        """Say the weather."""
        return f"sunny in {city}"

    named = {"model": MODEL, "api_base": f"{URL}/v1", "api_key": "x", "context_window": 4096}
    options = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 600}
    model = OpenAILike(**named, **options)
    formed = OpenAILike(**named, **options, should_use_structured_outputs=True)
    short = OpenAILike(**named, is_chat_model=True, max_tokens=8)
    plain = OpenAILike(**named, is_chat_model=False, max_tokens=8)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(content="Hello")]
    tool = FunctionTool.from_defaults(weather)
    chat = model.chat_with_tools([tool], "Weather?", tool_required=True)
    return {
        "texts": [
            short.chat(messages).message.content,
            "".join(it.delta for it in short.stream_chat(messages)),
            plain.complete("Hello").text,
        ],
        "called": model.get_tool_calls_from_response(chat)[0].tool_kwargs["city"],
        "answer": str(model.predict_and_call([tool], "Weather?", tool_required=True)),
        "formed": model.as_structured_llm(City).complete("Where?").raw.city,
        "by a schema": formed.as_structured_llm(City).complete("Where?").raw.city,
    }


def with_instructor():
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]

    cities = []
    for mode in (instructor.Mode.TOOLS, instructor.Mode.RESPONSES_TOOLS):
        client = instructor.from_openai(OpenAI(), mode=mode)
        made = client.chat.completions.create(model=MODEL, response_model=City, messages=ASK)
        cities.append(made.city)
    return {"city": cities[0], "response": cities[1]}


def with_pydantic_ai():
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]

    settings = {"max_tokens": 600}
    chat = Agent(OpenAIChatModel(MODEL), output_type=City, model_settings=settings)
    responses = Agent(OpenAIResponsesModel(MODEL), model_settings={"max_tokens": 8})
    return {
        "city": chat.run_sync("Hello").output.city,
        "text": responses.run_sync("Hello").output,
    }


def with_openai_agents():
    from agents import Agent, ModelSettings, Runner, set_tracing_disabled
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]

    set_tracing_disabled(True)
    settings = ModelSettings(max_tokens=64)  # a reply that is cut off is an error here
    typed = Agent(name="a", model=MODEL, output_type=City, model_settings=settings)
    return {"city": Runner.run_sync(typed, "Hello").final_output.city}


def with_smolagents():
    from smolagents import OpenAIServerModel

    model = OpenAIServerModel(MODEL, api_base=f"{URL}/v1", api_key="x", max_tokens=600)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    client = model.client.chat.completions
    made = client.create(model=MODEL, messages=ASK, tools=tools, tool_choice="required")
    arguments = made.choices[0].message.tool_calls[0].function.arguments
    return {"city": json.loads(arguments)["city"]}


def with_outlines():
    import openai
    import outlines
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]

    model = outlines.from_vllm(openai.OpenAI(), MODEL)
    return {
        "city": json.loads(model("Hello", City))["city"],
        "choice": model("Hello", Literal["yes", "no"]),
    }


print(json.dumps(globals()[f"with_{NAME}"]()))
