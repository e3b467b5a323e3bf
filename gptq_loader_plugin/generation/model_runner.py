"""Run a model over the tokens of one sequence, part by part, as one call over all of it answers.

Families differ in what they keep of what they have read: most fill a cache that is handed to them,
some make one of a class of their own, some keep a state in their modules, and some keep nothing
that can be handed back. Some count the positions of each call from zero, and some rotate by the
length of the sequence.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.generation.kv_cache import looks_ahead, makes_own_cache
from gptq_loader_plugin.generation.rotation import LengthRotation
from gptq_loader_plugin.transformers_compat import CACHE_NAMES, find_cache_argument

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Batcher

__all__ = ["ModelRunner"]

# Types whose class wants the whole sequence in each call, and cuts off what its cache has; whose
# loops write into one cache what each of them keeps; or which answers otherwise with one.
WHOLE_SEQUENCE = ("cpmant", "dory", "prophetnet", "xlm")
# What RecurrentGemma's modules keep of the last sequence that was read.
MODULE_STATES = ("recurrent_states", "conv1d_state")
# Such a module has one state, so that threads take turns.
_turn = threading.RLock()


class ModelRunner:
    """A model, and how it reads one sequence.

    Args:
        model: a causal language model.
        batcher: what steps it where its kernel finished the model: a few tokens are read by it, and
            nothing of transformers' calls stands between.

    Attributes:
        rotation: how it rotates sequences of different lengths.
        rereads: whether it keeps nothing: each call must have the whole sequence.
        takes_parts: whether a prompt may be read in parts. Not where a state is kept, or a cache of
            the class's own: Jamba and MiniMax answer otherwise where several tokens follow others.
            Nor where a prompt's tokens see those after them.
        keeps_prefixes: whether what it read of one prompt holds in another that begins the same.
    """

    def __init__(self, model: PreTrainedModel, batcher: Batcher | None = None) -> None:
        self._model: Any = model
        self._batcher = batcher
        self._cache_name = find_cache_argument(model)
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        if getattr(model.config, "model_type", None) in WHOLE_SEQUENCE:
            self._cache_name = None
        # RoBERTa's kin count positions from the padding token's id, by what the cache holds.
        counts_itself = any(hasattr(it, "create_position_ids_from_input_ids") for it in modules)
        names = signature(type(model).forward).parameters
        self._takes_positions = "position_ids" in names and not counts_itself
        self._takes_use_cache = "use_cache" in names
        self.rotation = LengthRotation(model)
        self._states = [
            (vars(module), name)
            for module in modules
            for name in MODULE_STATES
            if name in vars(module)
        ]
        self._kept: list[Any] = [None] * len(self._states)
        self.rereads = self._cache_name is None
        keeps_state = makes_own_cache(model) or getattr(model, "_is_stateful", False)
        self.keeps_prefixes = not looks_ahead(model)
        self.takes_parts = not self.rereads and not keeps_state and self.keeps_prefixes

    def run(
        self,
        tokens: Sequence[int],
        cache: Any,  # noqa: ANN401 - transformers' caches
        *,
        past: int,
        length: int,
        states: bool = False,
        logits_to_keep: int = 0,
    ) -> tuple[torch.Tensor, Any]:
        """Read tokens of a sequence.

        Args:
            tokens: what is read, of which `past` tokens are before.
            cache: what was kept of those, or None.
            past: how many tokens were read before.
            length: of the sequence, what is read later included.
            states: whether to return the decoder's states in place of logits.
            logits_to_keep: of how many last tokens logits are needed; 0 for all.

        Returns:
            Logits [1, tokens, vocabulary] or states [1, tokens, hidden], and what is kept now.
        """
        if states and self._batcher is not None and cache is not None:
            found = self._batcher.step_many([tokens], [cache])
            if found is not None:
                return found[None], cache
        device = self._model.device
        more: dict[str, Any] = {}
        if self._cache_name is not None:
            more = {self._cache_name: cache, "use_cache": True}
        elif self._takes_use_cache:
            more = {"use_cache": False}
        if self._takes_positions:
            more["position_ids"] = torch.arange(past, past + len(tokens), device=device)[None]
        if not states:
            more["logits_to_keep"] = logits_to_keep
        run = self._model.get_decoder() if states else self._model
        with self.rotation.applied(length), self._own_states():
            output = run(input_ids=torch.tensor([tokens], device=device), **more)
        if cache is None and self._cache_name is not None:
            names = (self._cache_name, *CACHE_NAMES)
            cache = next((getattr(output, name) for name in names if hasattr(output, name)), None)
        return (output.last_hidden_state if states else output.logits), cache

    @contextmanager
    def _own_states(self) -> Iterator[None]:
        """Have the modules go on with what they kept of this sequence, and keep it."""
        if not self._states:
            yield
            return
        with _turn:
            for (own, name), kept in zip(self._states, self._kept, strict=True):
                own[name] = kept
            yield
            self._kept = [own[name] for own, name in self._states]
