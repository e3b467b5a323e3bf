"""Which width each layer gets, and how a config says it: `dynamic`, rules by regular expression.

GPTQModel, vLLM, SGLang and this package match a rule's pattern from the start of a module's name,
and take the first that matches. vLLM and SGLang join some modules, and ask for the joined one by a
name of its own (`qkv_proj`), so that what they join has one width, and a pattern names both.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["Width", "Widths", "dynamic_rules", "unit_of"]

# What engines join into one module, and what that is called there.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
JOINED_AS = {leaf: name for name, leaves in JOINED.items() for leaf in leaves}
EXPERTS = re.compile(r"(.*\.experts)\.\d+\..*")
NUMBERED = re.compile(r"(?:.*?\.)?(?P<list>[^.]+)\.(?P<number>\d+)\.(?P<rest>.+)")


class Width(NamedTuple):
    """How wide the codes of a layer are.

    Attributes:
        bits: the width of a code.
        group_size: rows that share a scale, or -1 for all of them.
    """

    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class Widths:
    """How each layer is quantised.

    Attributes:
        base: how most of them are, and what a config says of all.
        layers: the width of each layer that was chosen by itself, by its path in the model.
    """

    base: QuantizeOptions
    layers: Mapping[str, Width] = field(default_factory=dict)

    @classmethod
    def chosen(cls, options: QuantizeOptions, layers: Mapping[str, Width]) -> Widths:
        """Make them of the layers' widths; the most frequent one is what the config says."""
        most = Counter(layers.values()).most_common(1)[0][0]
        return cls(options.model_copy(update=most._asdict()), layers)

    def of(self, path: str) -> QuantizeOptions:
        """Return how a layer is to be quantised, by its path in the model."""
        width = self.layers.get(path)
        return self.base if width is None else self.base.model_copy(update=width._asdict())

    def rules(self, hub: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Write the layers that are not as most are as `dynamic` has them.

        Args:
            hub: the name of each layer in the hub's files, by its path in the model.
        """
        base = Width(self.base.bits, self.base.group_size)
        odd = {hub.get(path, path): it for path, it in self.layers.items() if it != base}
        return dynamic_rules(odd)


def unit_of(name: str) -> str:
    """Name what a layer must have one width with: what engines join it with, or itself.

    Args:
        name: the layer's name in the hub's files.

    Returns:
        A name: that of the joined module, or of all experts of a block, or the layer's own.
    """
    experts = EXPERTS.fullmatch(name)
    if experts:
        return experts[1]
    parent, dot, leaf = name.rpartition(".")
    joined = JOINED_AS.get(leaf)
    return f"{parent}{dot}{joined}" if joined else name


def dynamic_rules(widths: Mapping[str, Width]) -> dict[str, dict[str, int]]:
    """Write widths as rules of `dynamic`: one for each width and kind of layer, over its blocks.

    Args:
        widths: the width of each layer that is not as the config says, by its name in the hub's
            files; layers that engines join have the same.

    Returns:
        {"bits": ..., "group_size": ...} by pattern. Patterns take any prefix before the list of
        blocks, because engines have prefixes of their own for models that read pictures too.
    """
    numbers: defaultdict[tuple[Width, str, str], set[int]] = defaultdict(set)
    rules: dict[str, dict[str, int]] = {}
    for name, width in widths.items():
        placed = NUMBERED.fullmatch(name)
        if placed is None:
            rules[f"+:{re.escape(name)}$"] = width._asdict()
            continue
        numbers[width, placed["list"], unit_of(placed["rest"])].add(int(placed["number"]))
    for (width, blocks, unit), of_unit in numbers.items():
        which = _one_of(str(number) for number in sorted(of_unit))
        pattern = rf"+:(?:.*\.)?{re.escape(blocks)}\.{which}\.{_unit_pattern(unit)}$"
        rules[pattern] = width._asdict()
    return rules


def _unit_pattern(unit: str) -> str:
    if unit.endswith("experts"):
        return rf"{re.escape(unit)}(?:\..*)?"
    parent, dot, leaf = unit.rpartition(".")
    names = _one_of([*JOINED.get(leaf, ()), leaf])
    return f"{re.escape(parent + dot)}{names}"


def _one_of(words: Iterable[str]) -> str:
    listed = [re.escape(word) for word in words]
    return listed[0] if len(listed) == 1 else f"(?:{'|'.join(listed)})"
