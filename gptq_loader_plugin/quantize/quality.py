"""How far a quantised model is from the one it was made of, and the files that say so.

The two are compared on a text that neither was calibrated on: the mean over its tokens of the
Kullback-Leibler divergence of the quantised model's probabilities from the other's, in nats, and
how often both hold the same token for the likeliest. The noise floor is the same for the model
before it is quantised, its hidden states off by bfloat16's rounding (`generation.noise_floor`):
what is below that, rounding does too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.generation.noise_floor import bfloat16_noise
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.quantize.widths import Widths

__all__ = ["QUALITY_FILE", "Divergence", "HeldOutText", "write_quality"]

QUALITY_FILE = "quality.json"
WINDOW = 256  # tokens that are read at a time
KEPT_BYTES = 256 << 20  # of the unquantised model's logits, as float16
WORST = 5  # layers that the card names


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's probabilities are from another's.

    Attributes:
        kl: the mean divergence of a token, in nats.
        kl_error: the standard error of that mean.
        top1: the share of tokens for which both have the same likeliest one.
        tokens: how many were compared.
    """

    kl: float
    kl_error: float
    top1: float
    tokens: int


class HeldOutText:
    """What a model answers to a text before it is quantised.

    Args:
        model: the model, not quantised yet.
        tokenizer: its tokenizer.
        text: a text that it is not calibrated on.
        progress: called with the windows read.
        at_once: whether all windows go through the model together, which reads its weights once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        progress: Callable[[Progress], None],
        *,
        at_once: bool = False,
    ) -> None:
        self._at_once = at_once
        self._progress = progress
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        windows = [part for part in ids.split(WINDOW) if len(part) > 1]
        embedding: Any = model.get_input_embeddings()
        row = 2 * WINDOW * embedding.weight.shape[0]
        self._windows = windows[: max(KEPT_BYTES // row, 1)]
        self._expected = [it.half() for it in self._logits(model)]
        with bfloat16_noise(model):
            self.floor = self.compare(model)

    def compare(self, model: PreTrainedModel) -> Divergence:
        """Measure how far a model is from the one that this was made with."""
        kls, same = [], []
        for logits, expected in zip(self._logits(model), self._expected, strict=True):
            right = expected.float().log_softmax(-1)
            kls.append(kl_divergence(right, logits.log_softmax(-1)))
            same.append(logits.argmax(-1) == expected.argmax(-1))
        kl = torch.cat(kls).double()
        return Divergence(
            kl=float(kl.mean()),
            kl_error=float(kl.std() / len(kl) ** 0.5),
            top1=float(torch.cat(same).double().mean()),
            tokens=len(kl),
        )

    @torch.inference_mode()
    def _logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        every: list[torch.Tensor] = []
        while len(every) < len(self._windows):
            first = len(every)
            length = len(self._windows[first])
            alike = [it for it in self._windows[first:] if len(it) == length]
            ids = torch.stack(alike if self._at_once else alike[:1])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            every += list(logits)
            self._progress(Progress("compare", len(every), len(self._windows), "windows"))
        return every


def write_quality(
    out: Path,
    widths: Widths,
    losses: Mapping[str, float],
    compared: Divergence,
    floor: Divergence,
    *,
    name: str,
) -> None:
    """Write what was measured beside a checkpoint: as JSON, and as a model card for people.

    Args:
        out: the checkpoint's folder.
        widths: how each layer was quantised.
        losses: the relative squared error of each layer's outputs, by the layer's path.
        compared: the quantised model beside the other.
        floor: that one beside itself, where rounding alone moves it.
        name: what that one is called.
    """
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    content: dict[str, Any] = {
        "model": name,
        "bytes": size,
        "compared": asdict(compared),
        "noise_floor": asdict(floor),
        "layers": {path: round(loss, 8) for path, loss in losses.items()},
        "options": widths.base.model_dump(),
    }
    if widths.layers:
        content["widths"] = {path: list(it) for path, it in widths.layers.items()}
    write_whole(out / QUALITY_FILE, json.dumps(content, indent=2) + "\n")
    write_whole(out / "README.md", _card(out.name, content, size))


def _card(title: str, content: dict[str, Any], size: int) -> str:
    options, compared, floor = (content[key] for key in ("options", "compared", "noise_floor"))
    mixed = content.get("widths", {}).values() or [(options["bits"], options["group_size"])]
    bits = ", ".join(str(it) for it in sorted({bits for bits, _ in mixed}))
    group = ", ".join("none" if it < 0 else str(it) for it in sorted({group for _, group in mixed}))
    if options["size"] is not None:
        bits = f"{bits}: by layer, for {options['size']}"
    kl = f"{compared['kl']:.4f} ± {compared['kl_error']:.4f}"
    worst = sorted(content["layers"].items(), key=lambda it: -it[1])[:WORST]
    rows = "\n".join(f"| `{path}` | {loss:.2%} |" for path, loss in worst)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gptq
- {options["bits"]}-bit
---

# {title}

{content["model"]}, quantised with GPTQ by gptq-loader-plugin.

| | |
|---|---|
| bits | {bits} |
| group size | {group} |
| order | {options["order"]} |
| zeros | {"symmetric" if options["sym"] else "asymmetric"}, format {options["checkpoint_format"]} |
| weight files | {write_size(size)} |

## Measured

Beside the unquantised model, on {compared["tokens"]:,} tokens that it was not calibrated on. The
noise floor is the unquantised model beside itself, its hidden states off by bfloat16's rounding.

| | this checkpoint | noise floor |
|---|---|---|
| KL divergence, nats a token | {kl} | {floor["kl"]:.1e} |
| same likeliest token | {compared["top1"]:.1%} | {floor["top1"]:.1%} |

The layers that lost most, by the squared error of their outputs; all are in `{QUALITY_FILE}`:

| layer | error |
|---|---|
{rows}
"""
