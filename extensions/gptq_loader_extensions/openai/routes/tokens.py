"""/tokenize and /detokenize, as vLLM and llama.cpp have them, and what a tokenizer is like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.chat_prompt import encode_chat
from gptq_loader_extensions.openai.replies.prompt_tokenizer import prompt_tokenizer
from gptq_loader_extensions.openai.routes.chat_request import check_chat
from gptq_loader_extensions.openai.routes.json_route import JsonRoute
from gptq_loader_extensions.openai.schema.openapi import ERRORS
from gptq_loader_extensions.openai.schema.schemas import ChatRequest, Text, TokenId

if TYPE_CHECKING:
    from gptq_loader_extensions.openai.server import Server
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["token_routes"]


class Tokenize(BaseModel):
    """POST /tokenize: a prompt (`content`, as llama.cpp calls it), or a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class Detokenize(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


def token_routes(server: Server) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.post("/v1/tokenize", include_in_schema=False)
    @router.post("/tokenize")
    async def tokenize(body: Tokenize, request: Request) -> dict[str, Any]:
        """Return the tokens of a prompt or a conversation."""
        chat = _chat(body)

        def encode(model: LoadedModel) -> tuple[list[int], list[str], int]:
            ids = _prompt_ids(body, model) if chat is None else encode_chat(chat, model)
            token_text = server.token_text(model)
            return ids, [token_text.text(token) for token in ids], model.context

        ids, texts, context = await server.with_prompts(request, encode, model=body.model)
        tokens: list[Any] = list(ids)
        if body.with_pieces:
            tokens = [{"id": token, "piece": text} for token, text in zip(ids, texts, strict=True)]
        return {
            "count": len(ids),
            "max_model_len": context,
            "tokens": tokens,
            "token_strs": texts if body.return_token_strs else None,
        }

    @router.post("/v1/detokenize", include_in_schema=False)
    @router.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> dict[str, str]:
        """Return the text of tokens."""

        def decode(model: LoadedModel) -> str:
            if body.tokens and max(body.tokens) >= model.vocab_size:
                raise invalid(
                    f"tokens: this model's are 0 to {model.vocab_size - 1}", param="tokens"
                )
            return str(model.tokenizer.decode(body.tokens))

        text = await server.with_prompts(request, decode, model=body.model)
        return {"prompt": text, "content": text}

    @router.get("/tokenizer_info")
    async def info(request: Request) -> dict[str, Any]:
        """Return what a client needs to know of the tokenizer."""
        return await server.with_prompts(request, _describe)

    return router


def _chat(body: Tokenize) -> ChatRequest | None:
    """Return the conversation of a request; None where it has a prompt.

    Raises:
        ApiError: it has neither, or both, or something unknown.
    """
    if (body.messages is None) == (body.prompt is None and body.content is None):
        raise invalid("send a prompt or messages, one of them", param="prompt")
    if body.messages is not None:
        fields = {"model": body.model, "messages": body.messages, **(body.model_extra or {})}
        try:
            chat = ChatRequest.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(map(str, first["loc"]))[:200]
            raise invalid(f"{param}: {first['msg']}", param=param) from error
        check_chat(chat)
        return chat
    if unknown := sorted(body.model_extra or {}):
        raise invalid(
            f"there is no option {unknown[0][:100]!r}; correct its spelling, or leave it out",
            param=unknown[0][:200],
            code="unknown_option",
        )
    return None


def _prompt_ids(body: Tokenize, model: LoadedModel) -> list[int]:
    """Tokenise a prompt: llama.cpp's has no special tokens unless they are asked for."""
    llama = body.prompt is None
    special = body.add_special if llama else body.add_special_tokens
    if special is None:
        special = not llama
    text = (body.content if llama else body.prompt) or ""
    ids: list[int] = prompt_tokenizer(model)(text, verbose=False, add_special_tokens=special)[
        "input_ids"
    ]
    return ids


def _describe(model: LoadedModel) -> dict[str, Any]:
    tokenizer: Any = model.tokenizer
    return {
        "tokenizer_class": type(prompt_tokenizer(model).tokenizer).__name__,
        "chat_template": getattr(model.template, "text", None),
        "model_max_length": model.context,
        "vocab_size": model.vocab_size,
        **{
            name: None if getattr(tokenizer, name) is None else str(getattr(tokenizer, name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        },
    }
