"""Look at one layer's tensors as a whole: what is zero, lost, or not where it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["check_siblings", "check_whole", "check_zeros", "damaged"]

# Of a layer's scales: writers give a group of zeros a scale too, so what is zero was not written.
ZERO_SHARE = 0.1
CONSTANT_SHARE = 0.25  # of columns; a few may be dead
# The largest scale beside the median: up to 24 in SmolLM2, whose outliers are strong for its size.
SCALE_RATIO = 2000.0
# Layers with the same inputs are ordered by the same Hessian: all of SmolLM2's and of the tests'
# have the same g_idx, row by row.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
SAME, OTHER = 0.9, 0.6
FEW = 2


def damaged(check: Any, name: str, words: str) -> Finding:  # noqa: ANN401 - a check's name
    """Return the finding that a tensor or layer was damaged."""
    return Finding(
        check,
        wrong=True,
        message=f"{name} {words}",
        where=name,
        fix="download the checkpoint again; if it stays so, it was published damaged",
    )


def check_whole(name: str, packed: PackedLinear) -> Iterator[Finding]:
    """Find what is missing from a layer: codes, scales, rows of them, a bias that is finite."""
    zero = float((packed.scales == 0).float().mean())
    constant = float((packed.qweight == packed.qweight[0]).all(dim=0).float().mean())
    if not bool(packed.qweight.any()):
        yield damaged("layers", name, "has codes that are all zero")
    elif constant > CONSTANT_SHARE:
        yield damaged("layers", name, f"has one code alone in {constant:.0%} of its columns")
    elif rows := int((packed.qweight == 0).all(dim=1).sum()):
        share = f"{rows} of {len(packed.qweight)}"
        yield damaged("layers", name, f"has codes of zero in {share} rows of its qweight")
    if zero > ZERO_SHARE:
        yield damaged("layers", name, f"has scales of which {zero:.0%} are zero")
    elif groups := int((packed.scales == 0).all(dim=1).sum()):
        yield damaged("layers", name, f"has no scales in {groups} of its groups: they are zero")
    else:
        sizes = packed.scales.float().abs()
        ratio = float(sizes.max() / sizes.median().clamp_min(1e-12))
        if ratio > SCALE_RATIO:
            yield damaged("layers", name, f"has a scale {ratio:,.0f} times as large as the median")
    if packed.bias is not None and not bool(packed.bias.isfinite().all()):
        yield damaged("layers", name, "has a bias that is not finite")
    counts = np.bincount(packed.g_idx.numpy(), minlength=len(packed.scales))
    if (counts != counts.max()).sum() > 1:  # the last group may be shorter
        yield damaged(
            "layers",
            name,
            f"has a g_idx that puts {counts.max()} rows into group {counts.argmax()} and "
            f"{counts.min()} into group {counts.argmin()}: groups are of one size",
        )


def check_zeros(zeros: dict[str, tuple[int, int, int]]) -> Iterator[Finding]:
    """Find layers whose zeros are stored otherwise than those of the other layers.

    Args:
        zeros: of each layer its bits, and its lowest and highest true zero. Those of a symmetric
            layer are all 2**(bits-1).
    """
    off = {
        name: low - (1 << (bits - 1)) for name, (bits, low, high) in zeros.items() if low == high
    }
    if 2 * len(off) < len(zeros):  # asymmetric: one value in a whole layer is chance
        return
    for name, steps in off.items():
        if steps == 0:
            continue
        bits, zero, _ = zeros[name]
        words = (
            f"that are off by one step ({steps:+d}): they are stored in the other format (v1 "
            "stores zero - 1, v2 zero)"
            if abs(steps) == 1
            else f"that are all {zero}, and symmetric ones of {bits} bits are {1 << (bits - 1)}"
        )
        yield Finding(
            "zeros",
            wrong=True,
            message=f"{name} has zero points {words}",
            where=name,
            fix="download it again, or ask its publisher: qzeros and checkpoint_format disagree",
        )


def check_siblings(groups: dict[str, Any]) -> Iterator[Finding]:
    """Find layers whose act-order is not that of the layers with the same inputs.

    Args:
        groups: of each act-order layer, the group of every row.
    """
    agreeing: dict[tuple[str, str], float] = {}
    for name, rows in groups.items():
        stem, _, last = name.rpartition(".")
        for first, *others in SIBLINGS:
            if last != first:
                continue
            for other in others:
                its = groups.get(f"{stem}.{other}")
                if its is not None and its.shape == rows.shape:
                    agreeing[name, f"{stem}.{other}"] = float((its == rows).mean())
    shares = sorted(agreeing.values())
    if len(shares) <= FEW or shares[len(shares) // 2] < SAME:
        return
    for (name, other), share in agreeing.items():
        if share < OTHER:
            yield Finding(
                "layers",
                wrong=True,
                message=f"{name} and {other} have the same inputs and another act-order: one of "
                "them belongs to another block, layers were swapped",
                where=name,
                fix="download the checkpoint again; if it was merged or converted, do that again",
            )
