"""How far a model's next-token probabilities are from a reference's: Kullback-Leibler, top 1.

One model is in memory at a time. The reference leaves its log-probabilities in a file, whole and in
float32, and each model is read against that.

What is not worth a difference is measured too: the reference once more, its hidden states off by
bfloat16's rounding, differs from itself by the noise floor (`generation.noise_floor`). A divergence
of that size says nothing.
"""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.generation.noise_floor import bfloat16_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

__all__ = ["Divergence", "KeptReference", "Scored", "compute_logits"]

SPARE = 1 << 30  # bytes of a disk that are left free


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model is from the reference.

    Attributes:
        mean: of the Kullback-Leibler divergence of each token's probabilities, in nats.
        median: the same.
        p90: of every ten tokens, nine are nearer.
        top1: the share of tokens of which both have the same as likeliest.
    """

    mean: float
    median: float
    p90: float
    top1: float


@dataclass(slots=True)
class Scored:
    """What was read so far of one model.

    Attributes:
        losses: the negative log-likelihood of each token.
        divergences: the Kullback-Leibler divergence of each token.
        agreed: whether both have the same token as likeliest.
    """

    losses: list[NDArray[np.float32]] = field(default_factory=list)
    divergences: list[NDArray[np.float32]] = field(default_factory=list)
    agreed: list[NDArray[np.bool_]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(float(np.concatenate(self.losses).mean(dtype=np.float64)))

    @property
    def divergence(self) -> Divergence | None:
        """How far it is from the reference; None where it was not compared."""
        if not self.divergences:
            return None
        every = np.concatenate(self.divergences)
        return Divergence(
            mean=float(every.mean(dtype=np.float64)),
            median=float(np.median(every)),
            p90=float(np.quantile(every, 0.9)),
            top1=float(np.concatenate(self.agreed).mean()),
        )


class KeptReference:
    """A reference's log-probabilities, in a file.

    Args:
        folder: where to keep it.
        windows: the tokens that are read, each int64 [n].
        vocabulary: the tokens whose probabilities are kept.

    Raises:
        OptionInvalid: the disk has no room for them.
    """

    def __init__(self, folder: Path, windows: Sequence[torch.Tensor], vocabulary: int) -> None:
        self.windows = windows
        self.vocabulary = vocabulary
        rows = sum(len(window) - 1 for window in windows)
        size, free = rows * vocabulary * 4, shutil.disk_usage(folder).free
        if size + SPARE > free:
            raise OptionInvalid(
                f"the reference's probabilities take {size / 1e9:.1f} GB of the disk, and "
                f"{free / 1e9:.1f} GB are free",
                hint="read fewer windows: --windows; or name another disk by TMPDIR",
            )
        file = folder / "reference"
        self._kept = np.memmap(file, np.float32, "w+", shape=(rows, vocabulary))
        # Nameless, so that gigabytes do not outlive a process that is killed; not so on Windows.
        with suppress(PermissionError):
            file.unlink()

    def read(
        self, logits: Callable[[torch.Tensor], torch.Tensor], *, keep: bool = False
    ) -> Iterator[Scored]:
        """Read a model window by window; after each, the same `Scored` so far.

        Args:
            logits: computes a window's logits, float [n, vocabulary or more].
            keep: whether this is the reference itself, whose probabilities are to be kept.

        Raises:
            OptionInvalid: the model has fewer tokens than the reference.
        """
        import torch

        scored, at = Scored(), 0
        for window in self.windows:
            count = len(window) - 1
            own = logits(window)[:-1, : self.vocabulary].float().cpu()
            if own.shape[-1] != self.vocabulary:
                raise OptionInvalid(
                    f"one of the models has {own.shape[-1]:,} tokens, and the reference "
                    f"{self.vocabulary:,}",
                    hint="compare checkpoints of one model; name the smaller one first",
                )
            log_probs = torch.log_softmax(own, dim=-1)
            scored.losses.append(-log_probs.gather(1, window[1:, None]).squeeze(1).numpy())
            if keep:
                self._kept[at : at + count] = log_probs.numpy()
            else:
                reference = torch.from_numpy(self._kept[at : at + count])
                scored.divergences.append(kl_divergence(reference, log_probs).numpy())
                scored.agreed.append((reference.argmax(-1) == log_probs.argmax(-1)).numpy())
            at += count
            yield scored


def compute_logits(
    model: Any,  # noqa: ANN401 - transformers' model
    window: torch.Tensor,
    *,
    is_noisy: bool = False,
) -> torch.Tensor:
    """Compute a window's logits by transformers' model.

    Args:
        model: the model.
        window: its tokens, int64 [n].
        is_noisy: whether hidden states are off by bfloat16's rounding, for the noise floor.
    """
    import torch

    from gptq_loader_plugin.generation.rotation import LengthRotation

    ids = window[None].to(model.get_input_embeddings().weight.device)
    noise = bfloat16_noise(model) if is_noisy else nullcontext()
    with torch.inference_mode(), LengthRotation(model).applied(len(window)), noise:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits
