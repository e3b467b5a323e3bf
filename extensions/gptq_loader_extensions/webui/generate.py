"""Wrap a model's `generate` for the host: count tokens, stop at once, and be waited for.

The keys and values of a conversation are kept for its next turn, as `LoadedModel` does. The host
samples through transformers' own `generate`, with some forty settings of its own, which pass
through. Imports torch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.kv_cache import PrefixCache, looks_ahead
from gptq_loader_plugin.generation.rotation import LengthRotation
from gptq_loader_plugin.transformers_compat import CACHE_NAMES, cache_argument

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["HostGenerate", "find_generate"]

ATTRIBUTE = "gptq_generate"


class HostGenerate:
    """A model's `generate`, as the host calls it.

    Args:
        loaded: the model; its `generate` is replaced by this.

    Attributes:
        loaded: the model.
        reply_tokens: the tokens of the last reply, the end token among them.
        cancel: ends the reply once it is set; the host's event for its current request.
        chat: whether that request is a chat, which the template's end tokens end too.
        reuse: whether the next reply may reuse the keys and values of this one; not where the
            host has changed the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.reply_tokens = torch.empty(0, dtype=torch.long)
        self.cancel: threading.Event | None = None
        self.chat = False
        self.reuse = True
        self._prefix_cache = PrefixCache()
        self._generate: Any = loaded.model.generate
        self._running = threading.RLock()
        self._closed = False
        model: Any = loaded.model
        model.generate = self
        setattr(model, ATTRIBUTE, self)  # found through an adapter's wrapper too
        model.last_prompt_token_count = 0  # the host's usage.prompt_tokens

    def __call__(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:  # noqa: ANN401 - transformers' generate
        """Generate with the host's options, and end at every end token of the checkpoint."""
        with self._running:
            if self._closed:
                raise GPTQLoaderError("this model is unloaded", hint="load it again")
            model: Any = self.loaded.model
            prompt = options.pop("input_ids", None) if inputs is None else inputs
            length = 0
            if prompt is not None:
                options["inputs"] = prompt = prompt.to(model.device)
                length = model.last_prompt_token_count = int(prompt.shape[-1])
            self.reply_tokens = self.reply_tokens[:0]
            end_ids, banned_ids = options.get("eos_token_id"), options.get("suppress_tokens")
            options.update(self._token_options(end_ids, banned_ids))
            criteria = options.get("stopping_criteria") or []
            count = _CountAndStop(self, length)
            options["stopping_criteria"] = StoppingCriteriaList([count, *criteria])
            if not self.reuse or prompt is None or prompt.shape[0] != 1 or _has_own_cache(options):
                self._prefix_cache.clear()
                return self._generate(**options)
            ids: list[int] = prompt[0].tolist()
            cache, _ = self._prefix_cache.reuse(model, ids)
            varies = LengthRotation(model).varies or looks_ahead(model)
            if cache is None or varies:  # transformers' own begins anew
                return self._generate(**options)
            try:
                return self._generate(**options, **{cache_argument(model): cache})
            finally:
                self._prefix_cache.store([*ids, *self.reply_tokens.tolist()], cache)

    def stop(self) -> None:
        """End the reply in progress, wait for its end, and allow no other."""
        self._closed = True
        with self._running:
            pass

    def close(self) -> None:
        """Release the model's memory."""
        self.stop()
        model: Any = self.loaded.model
        self.cancel = self._generate = None
        self._prefix_cache.clear()
        del model.generate
        delattr(model, ATTRIBUTE)
        self.loaded.close()

    def _token_options(
        self, end_ids: list[int] | int | None, banned_ids: list[int] | None
    ) -> dict[str, list[int]]:
        """Return the options with every end token, unless it is banned, and every banned one."""
        listed = end_ids if isinstance(end_ids, list) else [end_ids]
        ends = {token for token in listed if token is not None}
        if self.loaded.tokenizer.eos_token_id not in (banned_ids or ()):
            ends |= self.loaded.end_ids(self.loaded.template.stop if self.chat else ())
        options = {"eos_token_id": sorted(ends)} if ends else {}
        if banned_ids:
            config: Any = self.loaded.model.generation_config
            options["suppress_tokens"] = [*banned_ids, *(config.suppress_tokens or ())]
        return options

    @property
    def stopping(self) -> bool:
        """Whether the reply in progress must end."""
        return self._closed or (self.cancel is not None and self.cancel.is_set())


class _CountAndStop(StoppingCriteria):
    """Record the tokens of a reply, and end it when it must end.

    The first of the criteria: the host's raise where the client has gone.
    """

    def __init__(self, generate: HostGenerate, prompt_tokens: int) -> None:
        self._generate = generate
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a bool, though transformers calls it a tensor
        """Return whether to end here."""
        del scores, kwargs
        self._generate.reply_tokens = input_ids[0, self._prompt_tokens :]
        return self._generate.stopping


def _has_own_cache(options: dict[str, Any]) -> bool:
    """Return whether a call of `generate` brings a cache, or asks for a kind that is not reused."""
    names = ("cache_implementation", "prompt_lookup_num_tokens", *CACHE_NAMES)
    return options.get("use_cache") is False or any(options.get(name) for name in names)


def find_generate(model: object) -> HostGenerate | None:
    """Return the replacement of a model's `generate`; None for a model that is not ours."""
    generate = getattr(model, ATTRIBUTE, None)
    return generate if isinstance(generate, HostGenerate) else None
