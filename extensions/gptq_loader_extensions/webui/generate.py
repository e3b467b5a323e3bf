"""What stands in for a model's `generate` in the host: counts tokens, stops, and can be waited for.

It keeps what it has read of a conversation for the next turn, as `LoadedModel` does. The host
samples through transformers' own `generate`, with some forty settings of its own; they pass
through. Imports torch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.kv_cache import PrefixCache
from gptq_loader_plugin.transformers_compat import CACHE_NAMES, cache_argument

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["Generating", "generating_of"]

ATTRIBUTE = "gptq_generating"


class Generating:
    """A model's `generate`, as the host calls it.

    Args:
        loaded: the model; its `generate` becomes this.

    Attributes:
        loaded: the model.
        answer: the tokens of the last reply, the end token among them.
        cancel: ends the reply once it is set; the host's, for the request it is answering.
        chat: whether that request is a conversation, which the template's tokens end too.
        keep: whether what is read may serve the next reply: not where the host changes the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.answer = torch.empty(0, dtype=torch.long)
        self.cancel: threading.Event | None = None
        self.chat = False
        self.keep = True
        self._kept = PrefixCache()
        self._generate: Any = loaded.model.generate
        self._running = threading.RLock()
        self._closed = False
        model: Any = loaded.model
        model.generate = self
        setattr(model, ATTRIBUTE, self)  # found through an adapter's wrapper too
        model.last_prompt_token_count = 0  # the host's usage.prompt_tokens

    def __call__(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:  # noqa: ANN401 - transformers' generate
        """Generate; what the host asks for, and ends at every end token the checkpoint has."""
        with self._running:
            if self._closed:
                raise GPTQLoaderError("this model is unloaded", hint="load it again")
            model: Any = self.loaded.model
            prompt = options.pop("input_ids", None) if inputs is None else inputs
            length = 0
            if prompt is not None:
                options["inputs"] = prompt = prompt.to(model.device)
                length = model.last_prompt_token_count = int(prompt.shape[-1])
            self.answer = self.answer[:0]
            options.update(self._ends(options.get("eos_token_id"), options.get("suppress_tokens")))
            criteria = options.get("stopping_criteria") or []
            watch = _Watch(self, length)
            options["stopping_criteria"] = StoppingCriteriaList([watch, *criteria])
            if not self.keep or prompt is None or prompt.shape[0] != 1 or _has_own_cache(options):
                self._kept.clear()
                return self._generate(**options)
            ids: list[int] = prompt[0].tolist()
            cache, _ = self._kept.reuse(model, ids)
            try:
                return self._generate(**options, **{cache_argument(model): cache})
            finally:
                self._kept.store([*ids, *self.answer.tolist()], cache)

    def stop(self) -> None:
        """Wait for the reply that is being written to end, and allow no other."""
        self._closed = True
        with self._running:
            pass

    def close(self) -> None:
        """Give the model's memory back."""
        self.stop()
        model: Any = self.loaded.model
        self.cancel = self._generate = None
        self._kept.clear()
        del model.generate
        delattr(model, ATTRIBUTE)
        self.loaded.close()

    def _ends(
        self, given: list[int] | int | None, banned: list[int] | None
    ) -> dict[str, list[int]]:
        """Add every end token the checkpoint has, unless the host bans the tokenizer's."""
        ends = {it for it in (given if isinstance(given, list) else [given]) if it is not None}
        if self.loaded.tokenizer.eos_token_id not in (banned or ()):
            ends |= self.loaded.end_ids(self.loaded.template.stop if self.chat else ())
        found = {"eos_token_id": sorted(ends)} if ends else {}
        if banned:
            config: Any = self.loaded.model.generation_config
            found["suppress_tokens"] = [*banned, *(config.suppress_tokens or ())]
        return found

    @property
    def stopping(self) -> bool:
        """Whether the reply that is being written is to end."""
        return self._closed or (self.cancel is not None and self.cancel.is_set())


class _Watch(StoppingCriteria):
    """Count the tokens of a reply, and end it where it is to end.

    The first of the criteria: the host's raise where the reply's reader has gone.
    """

    def __init__(self, generating: Generating, prompt_tokens: int) -> None:
        self._generating = generating
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a bool, though transformers calls it a tensor
        """Say whether to end here."""
        del scores, kwargs
        self._generating.answer = input_ids[0, self._prompt_tokens :]
        return self._generating.stopping


def _has_own_cache(options: dict[str, Any]) -> bool:
    """Say whether a call of `generate` brings a cache, or wants one of a kind that is not kept."""
    names = ("cache_implementation", "prompt_lookup_num_tokens", *CACHE_NAMES)
    return options.get("use_cache") is False or any(options.get(it) for it in names)


def generating_of(model: object) -> Generating | None:
    """Find what stands in for a model's `generate`, where the model is one of ours."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Generating) else None
