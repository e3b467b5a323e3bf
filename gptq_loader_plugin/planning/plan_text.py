"""A plan in words, and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.kernel import LayerSpec
    from gptq_loader_plugin.planning.choose import Choice

__all__ = ["describe_layers", "layer_json"]

MAX_SHAPES = 4  # of one paragraph, so that it fits a line: a block of most models has three


def describe_layers(layers: Sequence[LayerSpec], where: str) -> str:
    """Describe what the layers of one paragraph are: widths, groups, order and shapes."""
    bits = dict.fromkeys(f"{width}-bit" for width in sorted({layer.bits for layer in layers}))
    groups = dict.fromkeys(
        "no groups" if size < 0 else f"groups of {size}"
        for size in sorted({layer.group_size for layer in layers})
    )
    sorted_rows = [layer.desc_act for layer in layers]
    order = ", act-order" if all(sorted_rows) else ", some in act-order" if any(sorted_rows) else ""
    shapes = list(dict.fromkeys(f"{layer.in_features}x{layer.out_features}" for layer in layers))
    named, more = ", ".join(shapes[:MAX_SHAPES]), len(shapes) - MAX_SHAPES
    rest = f" and {more} more shape{'s' * (more > 1)}" if more > 0 else ""
    count = f"{len(layers)} layer{'s' * (len(layers) > 1)}{where}"
    return f"{count}, {' and '.join(bits)}, {' or '.join(groups)}{order}: {named}{rest}"


def layer_json(choice: Choice) -> dict[str, Any]:
    """Return one layer's choice as plain data, for `explain --json`."""
    layer = choice.layer
    return {
        "name": layer.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "desc_act": layer.desc_act,
        "kernel": choice.chosen.kernel,
        "note": choice.chosen.note,
        "outranked": [verdict.kernel for verdict in choice.accepted[1:]],
        "declined": [
            {"kernel": verdict.kernel, "reason": verdict.reason} for verdict in choice.declined
        ],
    }
