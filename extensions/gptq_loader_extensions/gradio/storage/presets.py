"""Name ways to sample, so that nobody has to know six numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["OWN", "PRESETS", "SAMPLING", "own_sampling", "preset_of"]

# What a preset sets, in the page's order; the most new tokens and the seed stay as they are.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OWN = "The checkpoint's own"
PRESETS = {
    "Balanced": GenerateOptions(),
    "Deterministic": GenerateOptions(temperature=0.0, top_p=1.0, top_k=0),
    "No repetition": GenerateOptions(repetition_penalty=1.1),
    "Inventive": GenerateOptions(temperature=1.1, top_p=1.0, top_k=0, min_p=0.05),
}


def own_sampling(model: LoadedModel) -> GenerateOptions:
    """Read what the checkpoint's generation_config.json recommends; the rest is the default."""
    config = model.model.generation_config
    told = {} if config is None else config.to_diff_dict()
    if told.get("do_sample") is False:
        return PRESETS["Deterministic"]
    return GenerateOptions.parse({it: told[it] for it in SAMPLING if told.get(it) is not None})


def preset_of(sampling: GenerateOptions) -> str | None:
    """Find the preset that samples like this; None where none does."""
    wanted = [getattr(sampling, it) for it in SAMPLING]
    for name, preset in PRESETS.items():
        if [getattr(preset, it) for it in SAMPLING] == wanted:
            return name
    return None
