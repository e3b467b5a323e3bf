"""Give each layer the width that serves the whole model best within a size.

A size is bits a weight ("3.5bpw": all that the quantised layers take in the file, their scales,
zeros and g_idx too, over their weights) or bytes of all weight files ("4GB"). `sensitivity`
forecasts what each width of each layer costs in quality, and `allocation` chooses.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid, QuantizeError
from gptq_loader_plugin.kernel.packing import unfilled_words
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize.allocation import Option, allocate
from gptq_loader_plugin.quantize.sizes import layer_bytes
from gptq_loader_plugin.quantize.widths import Width, Widths, unit_of
from gptq_loader_plugin.system.units import parse_size, write_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.sensitivity import Errors

__all__ = ["Budget", "Layers", "loosest"]

GROUPS = (128, 64, 32)  # what vLLM, SGLang and every kernel here take
BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*", re.IGNORECASE)
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
PER_TENSOR = 70  # bytes of a safetensors header beside a tensor's name, about


@dataclass(frozen=True, slots=True)
class Budget:
    """How large a checkpoint may be.

    Attributes:
        text: as it was written.
        bits: the most bits a quantised weight, or None.
        bytes: the most bytes of all weight files, or None.
    """

    text: str
    bits: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a size: "3.5bpw", "4GB", "900 MiB".

        Raises:
            OptionInvalid: it is none.
        """
        bits = BITS.fullmatch(text)
        if bits is not None:
            return cls(text, bits=float(bits[1]))
        try:
            return cls(text, bytes=parse_size(text))
        except OptionInvalid as error:
            raise OptionInvalid(
                error.message, hint="write 3.5bpw (bits a weight), 900MB or 4GB"
            ) from error


def loosest(widths: Sequence[int]) -> int:
    """Return the width that the most shapes can be packed in, by which layers are found."""
    return max(widths, key=lambda bits: (32 % bits == 0, bits))


class Layers:
    """The layers of a model, as a budget sees them.

    Args:
        modules: the linears that are to be quantised, by their path in the model.
        hub: the name of each in the hub's files, by that path.
        options: `widths` to choose from.
        plain: the bytes of every other tensor in the weight files, by its name there.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        hub: Mapping[str, str],
        options: QuantizeOptions,
        *,
        plain: Mapping[str, int],
    ) -> None:
        self._options = options
        self._shapes = {path: linear_shape(it) or (0, 0) for path, it in modules.items()}
        packed = [f"{hub.get(path, path)}{part}" for path in modules for part in PARTS]
        header = sum(len(name) + PER_TENSOR for name in [*packed, *plain])
        self._rest = sum(plain.values()) + header
        self.weights = sum(rows * columns for rows, columns in self._shapes.values())
        units: defaultdict[str, list[str]] = defaultdict(list)
        for path in modules:
            units[unit_of(hub.get(path, path))].append(path)
        self._units = [(paths, self._widths_of(paths)) for paths in units.values()]

    @property
    def candidates(self) -> dict[str, list[Width]]:
        """The widths to choose from of each layer, by its path."""
        return {path: widths for paths, widths in self._units for path in paths}

    def check(self, budget: Budget) -> None:
        """Refuse a budget that no choice of widths meets, or that every one does.

        Raises:
            QuantizeError: it is less than the least, or more than the most that layers can take.
        """
        allowed, bits = self._allowed(budget), self._options.widths
        extremes = [[self._bytes(paths, it) for it in widths] for paths, widths in self._units]
        least, most = (sum(map(end, extremes)) for end in (min, max))
        if allowed < least:
            raise QuantizeError(
                f"{budget.text} is less than the model takes with all layers at {min(bits)} bits: "
                f"{self._written(least)}",
                hint="allow more, or take a smaller model",
            )
        if allowed > most:
            raise QuantizeError(
                f"{budget.text} is more than the model takes with all layers at {max(bits)} bits: "
                f"{self._written(most)}",
                hint=f"allow less, or give all layers the same: --bits {max(bits)} --group-size "
                f"{min(it.group_size for it in self._units[0][1])}",
            )

    def choose(self, budget: Budget, errors: Errors) -> Widths:
        """Choose the widths with the least error within a budget.

        Args:
            budget: one that `check` lets pass.
            errors: what each width of each layer loses, from `sensitivity`.
        """
        options = [
            [
                Option(self._bytes(paths, it), sum(errors[path][it] for path in paths))
                for it in widths
            ]
            for paths, widths in self._units
        ]
        chosen: dict[str, Width] = {}
        places = allocate(options, self._allowed(budget))
        for (paths, widths), place in zip(self._units, places, strict=True):
            chosen |= dict.fromkeys(paths, widths[place])
        return Widths.chosen(self._options, chosen)

    def packed_bytes(self, widths: Widths) -> int:
        """Count what the quantised layers take."""
        return sum(self._bytes([path], width) for path, width in widths.layers.items())

    def describe(self, widths: Widths) -> str:
        """Say how large the checkpoint will be, and how many layers get which width."""
        packed = self.packed_bytes(widths)
        counts = Counter(widths.layers.values())
        listed = ", ".join(
            f"{count} at {width.bits} bits {_groups(width)}"
            for width, count in sorted(counts.items(), key=lambda it: (it[0].bits, -it[0][1]))
        )
        return f"it will take {self._written(packed)}; of {len(widths.layers)} layers {listed}"

    def forecast(self, widths: Widths) -> int:
        """Count the bytes of all weight files together."""
        return self._rest + self.packed_bytes(widths)

    def _allowed(self, budget: Budget) -> int:
        """Return the most bytes that quantised layers may take."""
        if budget.bits is not None:
            return int(budget.bits * self.weights / 8)
        return (budget.bytes or 0) - self._rest

    def _bytes(self, paths: Sequence[str], width: Width) -> int:
        return sum(layer_bytes(*self._shapes[path], *width) for path in paths)

    def _widths_of(self, paths: Sequence[str]) -> list[Width]:
        """List the widths that all layers of a unit can have."""
        shapes = [self._shapes[path] for path in paths]
        sizes = [size for size in GROUPS if not any(rows % size for rows, _ in shapes)] or [-1]
        return [
            Width(bits, size)
            for bits in sorted(self._options.widths)
            if all(unfilled_words(shape, bits) is None for shape in shapes)
            for size in sizes
        ]

    def _written(self, packed: int) -> str:
        return f"{8 * packed / self.weights:.2f}bpw, {write_size(self._rest + packed)} of files"


def _groups(width: Width) -> str:
    return "without groups" if width.group_size < 0 else f"in groups of {width.group_size}"
