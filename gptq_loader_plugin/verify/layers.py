"""Check each layer's tensors: all there, finite, not zero, and codes as GPTQ leaves them."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.checkpoint.vocabulary import EMBEDDINGS
from gptq_loader_plugin.errors import CheckpointError
from gptq_loader_plugin.verify.damage import check_siblings, check_whole, check_zeros, damaged
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["check_layers", "check_tensors"]

COLUMNS = 64  # of each layer, spread over it
# Codes of a weight are bell-shaped. Of 210 layers of SmolLM2 and the 7 widths of the tests' 16
# checkpoints, none has more than .97 of the bits that random codes have (3.88 of 4, 1.87 of 2);
# random ones have .995 and more. 8 bits differ less: 7.58 and 7.97 by these many samples. The four
# codes of 2 bits are nearly as frequent wherever the scale is a good one: asymmetric layers with
# small groups have up to .99 (bench/good_checkpoints.py), random ones .9997.
RANDOM_SHARE, RANDOM_SHARE_OF_TWO_BITS = 0.985, 0.998
# The root-mean-square weight of a layer beside the median of its kind: up to 3.7 in SmolLM2.
FAR = 8.0
FEW = 2
# GPTQ's scales make an outermost code of each group's largest weight. Where that is so in every
# block, rows put into other groups stand out: 1.000 of SmolLM2's groups, .93 to .96 shuffled. Few
# groups may miss it by chance: an expert of 128 in the sample had .953 (bench/good_checkpoints.py).
REACHED, NOT_REACHED = 0.99, 0.975
DEVIATIONS = 3.0  # below NOT_REACHED, of what so many groups have by chance
ZERO_SHARE = 0.5  # of a layer's columns, or of a tensor's rows
PADDED_SHARE = 0.1  # of an embedding's rows; those of Phi-2 and Megatron's models are 2 % padding
NORM_SHARE = 0.25  # of a norm's channels
FLOATS = ("F16", "BF16", "F32")
PLAIN = ("model.embed_tokens.weight", "lm_head.weight")  # of which there is one, never zero


@dataclass(frozen=True, slots=True)
class _Measured:
    name: str
    bits: int
    magnitude: float
    entropy: float
    zero_columns: float
    reached: float | None  # the share of groups with an outermost code; None for one group
    groups: int  # in the sample, those of every column

    @property
    def is_random(self) -> bool:
        """Whether its codes are as frequent as random ones."""
        share = RANDOM_SHARE_OF_TWO_BITS if self.bits == 2 else RANDOM_SHARE
        return self.entropy > share * self.bits

    @property
    def is_in_other_groups(self) -> bool:
        """Whether too few groups have an outermost code, beyond what chance makes of so many."""
        spread = math.sqrt(NOT_REACHED * (1 - NOT_REACHED) / self.groups)
        return self.reached is not None and self.reached < NOT_REACHED - DEVIATIONS * spread


def check_layers(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[list[Finding], dict[str, Any]]:
    """Look at a sample of every layer's columns.

    Args:
        checkpoint: the open checkpoint.
        progress: called with the layers done and all of them.

    Returns:
        What is wrong, and what was measured.
    """
    findings: list[Finding] = []
    kinds: dict[str, list[_Measured]] = defaultdict(list)
    entropies: list[float] = []
    groups: dict[str, Any] = {}
    zeros: dict[str, tuple[int, int, int]] = {}
    for count, (name, layer) in enumerate(checkpoint.layers.items(), start=1):
        progress(count, len(checkpoint.layers))
        try:
            packed = checkpoint.packed(name)
        except CheckpointError as error:
            findings.append(Finding("layers", True, error.message, name, error.hint))  # noqa: FBT003
            continue
        if layer.groups > 1 and layer.desc_act:
            groups[name] = packed.g_idx.numpy()
        if layer.layout == "continuous":
            zeros[name] = layer.bits, *layer.zero_range
        wrong = list(check_whole(name, packed))
        findings += wrong
        if wrong:
            continue
        measured = _measure(name, packed, layer.bits)
        kinds[_kind(name)].append(measured)
        entropies.append(measured.entropy / layer.bits)
        findings += _of_sample(measured)
    every = [measured for group in kinds.values() for measured in group]
    for group in kinds.values():
        # of two blocks neither is the usual one
        findings += _beside(group, group if len(group) > FEW else every)
        findings += _of_groups(group)
    findings += _of_codes(every)
    findings += [*check_zeros(zeros), *check_siblings(groups)]
    facts = {
        "layers": len(checkpoint.layers),
        "code_entropy": [round(min(entropies), 3), round(max(entropies), 3)] if entropies else [],
    }
    return findings, facts


def check_tensors(checkpoint: Checkpoint) -> list[Finding]:
    """Look at every tensor that is not quantised: embeddings, norms, heads, biases."""
    parts = {part for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}
    findings, zero, kinds = [], [], Counter[str]()
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for name, info in checkpoint.headers.items():
        if name in parts or info.dtype not in FLOATS:
            continue
        tensor = checkpoint.tensor(name)
        kinds[_kind(name)] += 1
        if not bool(tensor.isfinite().all()):
            findings.append(damaged("tensors", name, "holds values that are not finite"))
        elif not name.endswith("bias") and not bool(tensor.any()):
            zero.append(name)
        elif tensor.dim() == 2 and (share := _zero_rows(tensor)) > _bearable(name):
            findings.append(damaged("tensors", name, f"is zero in {share:.0%} of its rows"))
        elif tensor.dim() == 1 and "norm" in name and not name.endswith("bias"):
            shares[_kind(name)][name] = float((tensor == 0).float().mean())
    for of_kind in shares.values():  # where all have as many, they are the model's own
        few = min(of_kind.values()) if len(of_kind) > 1 else 0.0
        findings += [
            damaged("tensors", name, f"is zero in {share:.0%} of its channels")
            for name, share in of_kind.items()
            if share > NORM_SHARE and few < NORM_SHARE / 2
        ]
    # norms that multiply by one more than they store begin as zeros, in every block
    of_kinds = Counter(_kind(name) for name in zero)
    odd = [name for name in zero if of_kinds[_kind(name)] < kinds[_kind(name)] or name in PLAIN]
    return [*findings, *(damaged("tensors", name, "is all zero") for name in odd)]


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _bearable(name: str) -> float:
    """Return the share of zero rows that may be padding, or a pruned weight's."""
    return PADDED_SHARE if name.removesuffix(".weight").endswith(EMBEDDINGS) else ZERO_SHARE


def _zero_rows(tensor: Any) -> float:  # noqa: ANN401 - torch's tensor
    return float((tensor == 0).all(dim=1).float().mean())


def _measure(name: str, packed: PackedLinear, bits: int) -> _Measured:
    import torch

    columns = packed.scales.shape[1]
    sample = packed.take_columns(torch.linspace(0, columns - 1, min(COLUMNS, columns)).long())
    weight = sample.dequantize().numpy()  # [n, K]
    groups = sample.g_idx.numpy()
    scales = sample.scales.float().numpy()[groups]  # [K, n]
    used = np.where(scales == 0, 1, scales)
    codes = np.rint(weight.T / used + sample.zeros.numpy()[groups]).astype(np.int64)
    counts = np.bincount(codes.ravel().clip(0), minlength=1 << bits) / codes.size
    some = counts[counts > 0]
    return _Measured(
        name=name,
        bits=bits,
        magnitude=float(np.sqrt((weight**2).mean())),
        entropy=float(-(some * np.log2(some)).sum()),
        zero_columns=float((~weight.any(axis=1)).mean()),
        reached=_reached(codes, groups, (1 << bits) - 1),
        groups=(int(groups.max()) + 1) * codes.shape[1],
    )


def _reached(codes: Any, groups: Any, highest: int) -> float | None:  # noqa: ANN401 - arrays
    count = int(groups.max()) + 1
    if count == 1:
        return None
    reached = np.zeros((count, codes.shape[1]), dtype=bool)
    np.logical_or.at(reached, groups, (codes == 0) | (codes == highest))
    return float(reached.mean())


def _of_sample(measured: _Measured) -> Iterator[Finding]:
    if measured.zero_columns > ZERO_SHARE:
        share = f"{measured.zero_columns:.0%}"
        yield damaged("layers", measured.name, f"is zero in {share} of its columns")


def _of_codes(every: list[_Measured]) -> Iterator[Finding]:
    """Find layers whose codes are random; where most are, the weights were made at random."""
    random = [measured for measured in every if measured.is_random]
    if 2 * len(random) > len(every):
        words = f"{len(random)} of {len(every)} layers have random codes: these are no real weights"
        yield Finding("layers", wrong=False, message=words)
        return
    for measured in random:
        yield damaged(
            "layers",
            measured.name,
            f"has codes that are random: {measured.entropy:.2f} bits of information in "
            f"{measured.bits}",
        )


def _beside(group: list[_Measured], others: list[_Measured]) -> Iterator[Finding]:
    """Find layers whose weights are far larger or smaller than those of the others."""
    usual = statistics.median(measured.magnitude for measured in others)
    for measured in group:
        times = measured.magnitude / usual if usual > 0 and len(others) > FEW else 1
        if not 1 / FAR < times < FAR:
            yield damaged(
                "layers",
                measured.name,
                f"has weights {times:.2g} times as large as the same layers of other blocks",
            )


def _of_groups(group: list[_Measured]) -> Iterator[Finding]:
    """Find layers whose rows are in other groups than those that their scales were made for."""
    shares = [measured.reached for measured in group if measured.reached is not None]
    if len(shares) <= FEW or statistics.median(shares) < REACHED:
        return
    for measured in group:
        if measured.is_in_other_groups:
            yield damaged(
                "layers",
                measured.name,
                "has codes that do not fit their groups, as in the other blocks: its g_idx is "
                "wrong",
            )
