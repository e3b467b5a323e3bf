"""Quantise 40 tiny models of ten families, and count those that `verify` or `doctor` accuses.

    python bench/good_checkpoints.py [--only PART...] [--keep FOLDER]

Each family's model is made at random with a seed, of transformers' own class, and quantised to 2,
3, 4 and 8 bits by `gptq-loader quantize`'s own code. Group sizes, orders (act-order among them),
symmetric and asymmetric zeros, and both formats of zeros take turns. Every checkpoint is verified,
and `doctor` looks at it for every symptom but `slow`: none may be accused.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from planted_faults import TESTS, accusations
from transformers import AutoModelForCausalLM, logging

from gptq_loader_plugin.quantize.options import QuantizeOptions
from gptq_loader_plugin.quantize.run import quantize_model

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt_neox", "mistral", "mixtral",
            "qwen2_moe", "gemma2")  # fmt: skip
WIDTHS = (2, 3, 4, 8)
GROUPS = (32, 64, -1)
ORDERS = ("act", "static", "none", "group-aware")
FORMATS = ("gptq", "gptq_v2")
VOCABULARY = 448  # the tokenizer has 384, and what a family's class adds of its own
TOKENIZER = TESTS / "data" / "checkpoints" / "base"


@dataclass(frozen=True)
class Good:
    """A checkpoint to make.

    Attributes:
        family: transformers' model type.
        bits: the width of a code.
        group: input rows that share a scale, or -1.
        order: in which rows are quantised.
        sym: whether zeros are symmetric.
        zeros: the format they are stored in.
    """

    family: str
    bits: Literal[2, 3, 4, 8]
    group: int
    order: Literal["static", "group-aware", "act", "none"]
    sym: bool
    zeros: Literal["gptq", "gptq_v2"]

    @property
    def name(self) -> str:
        """What its folder is called."""
        kind = "sym" if self.sym else "asym"
        return f"{self.family}-{self.bits}bit-{self.group}g-{self.order}-{kind}-{self.zeros}"


def plan() -> Iterator[Good]:
    """Yield the 40, whose settings take turns at different paces."""
    for (f, family), (w, bits) in itertools.product(enumerate(FAMILIES), enumerate(WIDTHS)):
        yield Good(
            family,
            bits,
            GROUPS[(f + w) % len(GROUPS)],
            ORDERS[(f + 2 * w + f // 4) % len(ORDERS)],
            sym=(f + w) % 2 == 0,
            zeros=FORMATS[(f // 2 + w) % len(FORMATS)],
        )


def write_model(family: str, folder: Path) -> None:
    """Write a tiny model with the tests' tokenizer, its weights as large as trained ones."""
    sys.path.insert(0, str(TESTS / "families"))
    from tiny_configs import tiny_config

    torch.manual_seed(0)
    config = tiny_config(family)
    config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases, which a class makes all alike
            parameter.data += torch.randn_like(parameter) * 0.05
        elif "embed" not in name:
            parameter.data *= 2.0
    model.save_pretrained(folder)
    for file in (*TOKENIZER.glob("*token*"), TOKENIZER / "chat_template.jinja",
                 TOKENIZER / "generation_config.json"):  # fmt: skip
        shutil.copy(file, folder)


def make(good: Good, folder: Path) -> Path:
    """Quantise a family's model; return the checkpoint."""
    source = folder / good.family
    if not source.is_dir():
        write_model(good.family, source)
    options = QuantizeOptions(
        bits=good.bits, group_size=good.group, order=good.order, sym=good.sym, effort="fast",
        checkpoint_format=good.zeros, samples=8, seq_len=128,
    )  # fmt: skip
    return quantize_model(source, folder / good.name, options=options)


def main() -> None:
    """Make them, and count those that are accused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of some")
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this folder")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    count = accused = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for good in plan():
            if not any(part in good.name for part in arguments.only):
                continue
            checkpoint = make(good, folder)
            words = accusations(checkpoint)
            count, accused = count + 1, accused + bool(words)
            print("\n".join(f"ACCUSED  {good.name}: {it}" for it in words) or f"right  {good.name}",
                  flush=True)  # fmt: skip
    print(f"accused {accused} of {count} good checkpoints")


if __name__ == "__main__":
    main()
