"""Name presets of sampling, so that nobody has to know six numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["CUSTOM", "OWN", "PRESETS", "SAMPLING", "own_sampling", "preset_of", "preset_values"]

# What a preset sets, in the page's order; the maximum of new tokens and the seed stay as they are.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OWN, CUSTOM = "The checkpoint's own", "Custom"
PRESETS = {
    "Balanced": GenerateOptions(),
    "Deterministic": GenerateOptions(temperature=0.0, top_p=1.0, top_k=0),
    "No repetition": GenerateOptions(repetition_penalty=1.1),
    "Inventive": GenerateOptions(temperature=1.1, top_p=1.0, top_k=0, min_p=0.05),
}


def own_sampling(model: LoadedModel) -> GenerateOptions:
    """Read what the checkpoint's generation_config.json recommends; the rest is the default."""
    config = model.model.generation_config
    values = {} if config is None else config.to_diff_dict()
    if values.get("do_sample") is False:
        return PRESETS["Deterministic"]
    return GenerateOptions.parse(
        {name: values[name] for name in SAMPLING if values.get(name) is not None}
    )


def preset_of(sampling: GenerateOptions) -> str:
    """Return the preset that samples like this, or `CUSTOM`."""
    for name, preset in PRESETS.items():
        if all(getattr(preset, option) == getattr(sampling, option) for option in SAMPLING):
            return name
    return CUSTOM


def preset_values() -> dict[str, dict[str, float]]:
    """Return each preset's numbers by their names, for the script of the page."""
    return {
        name: {option: getattr(preset, option) for option in SAMPLING}
        for name, preset in PRESETS.items()
    }
