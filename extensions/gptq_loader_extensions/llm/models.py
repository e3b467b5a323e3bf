"""The models that llm uses: for each checkpoint one, and its asynchronous twin.

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

from gptq_loader_extensions.llm.listing import PREFIX, list_models, read_added
from gptq_loader_extensions.llm.model_cache import shared_cache
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator

    from gptq_loader_extensions.llm.listing import ListedModel
    from gptq_loader_extensions.llm.model_cache import ModelCache
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["AsyncGPTQModel", "GPTQModel", "ModelFailed", "Options", "make_models"]

logger = logging.getLogger(__name__)


class ModelFailed(llm.ModelError, click.ClickException):  # type: ignore[misc] # llm is not typed
    """One of our errors, with its hint, as `llm chat` shows only click's without a traceback."""

    def __init__(self, error: GPTQLoaderError) -> None:
        super().__init__(f"{error.message}\nhint: {error.hint}")


def parse_stop(value: object) -> object:
    """Parse the texts that end a reply: one text, or several as a JSON list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"this begins like a JSON list but is not one: {error}") from error
    texts = (value,) if isinstance(value, str) else value
    if texts is None:
        return None
    if not isinstance(texts, list | tuple) or not all(
        isinstance(text, str) and text for text in texts
    ):
        raise ValueError('write one text, or several as a JSON list: \'["a", "b"]\'')
    return tuple(texts)


class Options(llm.Options):  # type: ignore[misc] # llm is not typed
    """The options of `-o NAME VALUE`, with GenerateOptions' defaults."""

    temperature: float | None = Field(
        default=None, ge=0, le=10, description="0 is greedy; default 0.7"
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="sample from the top tokens with this probability mass; default 0.95",
    )
    top_k: int | None = Field(
        default=None, ge=0, description="sample from this many top tokens, 0 for all; default 40"
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="drop tokens less probable than this fraction of the best; default 0",
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=10, description="above 1, make repetition less likely; default 1"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="the maximum length of a reply; default 512"
    )
    seed: int | None = Field(default=None, description="make sampling repeatable")
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(parse_stop)] = Field(
        default=None, description="end the reply at this text, or at any of a JSON list of texts"
    )
    backend: str | None = Field(
        default=None, description="use this kernel, or fail; see llm gptq explain NAME"
    )
    template: str | None = Field(
        default=None, description="chatml, checkpoint, card, or a .jinja file"
    )
    context: int | None = Field(
        default=None, ge=2, description="the maximum length of prompt and reply together"
    )

    def generate(self) -> GenerateOptions:
        """Return the options of generation."""
        from gptq_loader_plugin.generation.options import GenerateOptions

        fields = self.model_dump(exclude={"backend", "template", "context"}, exclude_none=True)
        if "max_tokens" in fields:
            fields["max_new_tokens"] = fields.pop("max_tokens")
        return GenerateOptions.parse(fields)


class _Checkpoint:
    """What both kinds of model share: a checkpoint, and the cache of the loaded model."""

    can_stream = True
    Options = Options

    def __init__(self, listed: ListedModel, cache: ModelCache) -> None:
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
        """Yield the reply piece by piece; record usage, and which kernels ran.

        Raises:
            ModelFailed: one of our errors.
        """
        from gptq_loader_extensions.llm.answering import answer, collect_messages

        requested: Options = prompt.options
        try:
            load_options = LoadOptions(
                backend=requested.backend, template=requested.template, context=requested.context
            )
            options = requested.generate()
            messages = collect_messages(prompt, conversation)
            with self._cache.borrow(self._reference, load_options) as model:
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
    """A checkpoint, as one of llm's models."""

    def execute(
        self,
        prompt: Any,  # noqa: ANN401
        stream: bool,  # noqa: FBT001 - llm's signature
        response: Any,  # noqa: ANN401
        conversation: Any = None,  # noqa: ANN401
    ) -> Iterator[str]:
        """Yield the reply; llm joins the pieces where it does not stream."""
        del stream
        yield from self.pieces(prompt, response, conversation)


class AsyncGPTQModel(_Checkpoint, llm.AsyncModel):  # type: ignore[misc] # llm is not typed
    """A checkpoint, as one of llm's async models: each reply has a thread of its own."""

    async def execute(
        self,
        prompt: Any,  # noqa: ANN401
        stream: bool,  # noqa: FBT001 - llm's signature
        response: Any,  # noqa: ANN401
        conversation: Any = None,  # noqa: ANN401
    ) -> AsyncGenerator[str, None]:
        """Yield the reply; leaving early ends it within a token."""
        del stream
        cancel = threading.Event()
        pieces = self.pieces(prompt, response, conversation, cancel)
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1, thread_name_prefix="gptq")
        try:
            while (text := await loop.run_in_executor(executor, next, pieces, None)) is not None:
                yield text
        finally:
            cancel.set()
            executor.submit(pieces.close)
            executor.shutdown(wait=False)


def make_models() -> list[tuple[GPTQModel, AsyncGPTQModel]]:
    """Make a model of each checkpoint; without the added names where their list is damaged."""
    try:
        names = read_added(llm.user_dir())
    except GPTQLoaderError as error:
        logger.warning("%s; %s", error.message, error.hint)
        names = {}
    cache = shared_cache()
    return [
        (GPTQModel(listed, cache), AsyncGPTQModel(listed, cache)) for listed in list_models(names)
    ]
