"""Models that read pictures too: built by their own class, of which the part for text is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["NotLoaded", "auto_class", "drop_towers", "reads_pictures"]


class NotLoaded(nn.Module):
    """Stands where a tower or its projector was."""


def reads_pictures(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for pictures with text for it, and none for text alone.

    A class for text alone counts where its config.json would be read again.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind: Any = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    text: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return text.config_class is not None and text.config_class not in MODEL_FOR_CAUSAL_LM_MAPPING


def auto_class(config: PreTrainedConfig) -> Any:  # noqa: ANN401 - one of transformers' auto classes
    """Return the auto class that builds a model which goes on with a text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_pictures(config) else AutoModelForCausalLM


def drop_towers(model: PreTrainedModel) -> None:
    """Take away what a text does not go through: the towers beside the decoder, and projectors."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    kept = [
        paths[id(module)]
        for module in (decoder, head, model.get_input_embeddings())
        if id(module) in paths
    ]
    if not paths.get(id(decoder)):  # the decoder is the model itself
        return
    for path in paths.values():
        parent = path.rpartition(".")[0]
        beside = not parent or any(_is_inside(it, parent) for it in kept)
        used = any(_is_inside(path, it) or _is_inside(it, path) for it in kept)
        if path and beside and not used and _has_weights(model.get_submodule(path)):
            model.set_submodule(path, NotLoaded())


def _is_inside(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
