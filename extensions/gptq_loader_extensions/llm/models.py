"""The models that llm sees: one for each checkpoint, and the same to await.

Imported by llm's hooks alone; it needs llm.
"""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import click
import llm
from pydantic import BeforeValidator, Field

from gptq_loader_extensions.llm.listing import PREFIX, added, list_models
from gptq_loader_extensions.llm.model_cache import shared_cache
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator

    from gptq_loader_extensions.llm.listing import Listed
    from gptq_loader_extensions.llm.model_cache import ModelCache
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["AsyncGPTQModel", "GPTQModel", "ModelFailed", "Options", "make_models"]

logger = logging.getLogger(__name__)


class ModelFailed(llm.ModelError, click.ClickException):  # type: ignore[misc] # llm is not typed
    """One of our errors, with its hint; `llm chat` shows click's exceptions only, in words."""

    def __init__(self, error: GPTQLoaderError) -> None:
        super().__init__(f"{error.message}\nhint: {error.hint}")


def read_stop(value: object) -> object:
    """Read the texts that end a reply: one text, or several as a JSON list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"this begins like a JSON list, and is none: {error}") from error
    texts = (value,) if isinstance(value, str) else value
    if texts is None:
        return None
    if not isinstance(texts, list | tuple) or not all(isinstance(it, str) and it for it in texts):
        raise ValueError('write one text, or several as a JSON list: \'["a", "b"]\'')
    return tuple(texts)


class Options(llm.Options):  # type: ignore[misc] # llm is not typed
    """What `-o NAME VALUE` takes. What is left out is as in GenerateOptions."""

    temperature: float | None = Field(
        default=None, ge=0, le=10, description="0 takes the likeliest token every time; else 0.7"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the likeliest tokens of this probability; 0.95"
    )
    top_k: int | None = Field(
        default=None, ge=0, description="keep this many of the likeliest tokens, 0 all; 40"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="drop tokens less likely than this share of the best"
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=10, description="above 1, make what was there less likely; 1"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="the most tokens of a reply; 512"
    )
    seed: int | None = Field(default=None, description="make sampling repeatable")
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(read_stop)] = Field(
        default=None, description="end the reply at this text, or at one of a JSON list of texts"
    )
    backend: str | None = Field(
        default=None, description="use this kernel or fail; see llm gptq explain NAME"
    )
    template: str | None = Field(
        default=None, description="chatml, checkpoint, card, or a .jinja file"
    )
    context: int | None = Field(
        default=None, ge=2, description="the longest sequence, prompt and reply together"
    )

    def generate(self) -> GenerateOptions:
        """Give those that are about sampling."""
        from gptq_loader_plugin.generation.options import GenerateOptions

        fields = self.model_dump(exclude={"backend", "template", "context"}, exclude_none=True)
        if "max_tokens" in fields:
            fields["max_new_tokens"] = fields.pop("max_tokens")
        return GenerateOptions.parse(fields)


class _Checkpoint:
    """What both kinds of model share: a checkpoint, and the cache of what is loaded."""

    can_stream = True
    Options = Options

    def __init__(self, listed: Listed, cache: ModelCache) -> None:
        self.model_id = PREFIX + listed.name
        self._reference = listed.reference
        self._cache = cache

    def __str__(self) -> str:
        return f"GPTQ: {self.model_id}"

    def pieces(
        self,
        prompt: Any,  # noqa: ANN401 - llm's own
        response: Any,  # noqa: ANN401
        conversation: Any,  # noqa: ANN401
        cancel: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """Answer piece by piece; record usage, and what ran.

        Raises:
            ModelFailed: one of our errors.
        """
        from gptq_loader_extensions.llm.answering import answer, messages_of

        requested: Options = prompt.options
        try:
            load = LoadOptions(
                backend=requested.backend, template=requested.template, context=requested.context
            )
            options = requested.generate()
            messages = messages_of(prompt, conversation)
            with self._cache.borrow(self._reference, load) as model:
                prompt_tokens, pieces = answer(model, messages, options, cancel=cancel)
                last = None
                for last in pieces:
                    if last.text:
                        yield last.text
                response.set_usage(input=prompt_tokens, output=last.tokens if last else 0)
                response.response_json = {
                    "finish": last.finish if last else None,
                    "kernels": model.plan.kernels(),
                    "template": model.template.name,
                }
        except GPTQLoaderError as error:
            raise ModelFailed(error) from error


class GPTQModel(_Checkpoint, llm.Model):  # type: ignore[misc] # llm is not typed
    """A checkpoint, as llm asks it."""

    def execute(
        self,
        prompt: Any,  # noqa: ANN401
        stream: bool,  # noqa: FBT001 - llm's signature
        response: Any,  # noqa: ANN401
        conversation: Any = None,  # noqa: ANN401
    ) -> Iterator[str]:
        """Answer; llm joins the pieces where it does not stream."""
        del stream
        yield from self.pieces(prompt, response, conversation)


class AsyncGPTQModel(_Checkpoint, llm.AsyncModel):  # type: ignore[misc] # llm is not typed
    """A checkpoint, for those who await it: one thread of its own for each reply."""

    async def execute(
        self,
        prompt: Any,  # noqa: ANN401
        stream: bool,  # noqa: FBT001 - llm's signature
        response: Any,  # noqa: ANN401
        conversation: Any = None,  # noqa: ANN401
    ) -> AsyncGenerator[str, None]:
        """Answer; leaving early ends the reply within a token."""
        del stream
        cancel = threading.Event()
        pieces = self.pieces(prompt, response, conversation, cancel)
        loop = asyncio.get_running_loop()
        with_one = ThreadPoolExecutor(1, thread_name_prefix="gptq")
        try:
            while (text := await loop.run_in_executor(with_one, next, pieces, None)) is not None:
                yield text
        finally:
            cancel.set()
            with_one.submit(pieces.close)
            with_one.shutdown(wait=False)


def make_models() -> list[tuple[GPTQModel, AsyncGPTQModel]]:
    """Make a model of each checkpoint of this machine; a damaged list of ours costs its names."""
    try:
        names = added(llm.user_dir())
    except GPTQLoaderError as error:
        logger.warning("%s; %s", error.message, error.hint)
        names = {}
    cache = shared_cache()
    return [
        (GPTQModel(listed, cache), AsyncGPTQModel(listed, cache)) for listed in list_models(names)
    ]
