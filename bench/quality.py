"""How good the quantiser is: perplexity and KL divergence by bits, groups, effort and offset.

    python bench/quality.py --text valid.txt --test test.txt [--bits 4,3,2] [--groups=-1,128,64,32]
        [--tools fast,standard,best] [--offsets 0,512,1024] [--samples 64] [--out DIR]
        [--peer auto-round=PYTHON --peer gptqmodel=PYTHON --peer llama.cpp=PYTHON]

Quantises SmolLM2-135M-Instruct, symmetric, calibrated on samples of 512 tokens of `--text`, and
prints for each checkpoint: the bits that a weight of its blocks takes; perplexity on the first
400,000 characters of `--test` (20 windows of 1,024 tokens, dequantised weights in bfloat16); the KL
divergence from the float model and how often both have the same likeliest token, on text after
those characters; and the seconds that quantising took. A checkpoint that is there already is not
made or measured again, and a program that fails has a row that says so. Bits may be a size, as
`quantize --size` takes it: `--bits 4.5bpw`.

A tool is one of our efforts, an effort and an order (`standard:group-aware`), or another program's
mode: `auto-round:60` (iterations), `gptqmodel:default`, `:mse`, `:act`, `:foem`, `:gptaq`,
`:mse-foem`, or `llama.cpp:Q4_K_M` and its like (which has widths of its own, without an importance
matrix; the embedding stays in 16 bits, as in the others' files). Those run by the Python that
--peer names, on the same samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from machine import describe
from safetensors.torch import load_file
from transformers import AutoTokenizer

import gptq_loader_plugin as gptq
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.measure.perplexity import mean_perplexity
from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model
from gptq_loader_plugin.quantize.calibration import calibration_samples
from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.quantize.quality import HeldOutText
from gptq_loader_plugin.quantize.source import load_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

CHARACTERS = 400_000
WINDOWS, WINDOW_TOKENS = 20, 1024
HELD_OUT = 8_000  # characters behind those: some 2,000 tokens
SECONDS_FILE, FOUND_FILE = "seconds.json", "found.json"
WORKER = Path(__file__).absolute().parent / "workers" / "quantizer.py"


@dataclass(frozen=True, slots=True)
class Cell:
    """One checkpoint of the table.

    Attributes:
        bits: of a code, or a size for all blocks.
        group: rows that share a scale; -1 for all.
        tool: what quantises.
        offset: tokens before the first sample.
        samples: of 512 tokens.
    """

    bits: str
    group: int
    tool: str
    offset: int
    samples: int

    @property
    def name(self) -> str:
        """The folder's."""
        tool = self.tool.replace(":", "-")
        width = self.bits if self.sized else f"{self.bits}bit-{self.group}g"
        return f"{width}-{tool}-{self.samples}-{self.offset}"

    @property
    def sized(self) -> bool:
        """Whether widths are chosen by layer."""
        return not self.bits.isdecimal()

    @property
    def options(self) -> QuantizeOptions:
        """How we quantise; of another program, what the calibration is cut by."""
        effort, _, order = self.tool.partition(":")
        ours = effort in ("fast", "standard", "best")
        widths = {"size": self.bits}
        fields: dict[str, Any] = {
            **(widths if self.sized else {"bits": int(self.bits), "group_size": self.group}),
            "effort": effort if ours else "fast",
            "order": (order if ours else "") or "static",
            "samples": self.samples,
            "seq_len": 512,
            "offset": self.offset,
        }
        return QuantizeOptions.model_validate(fields)


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured of a checkpoint.

    Attributes:
        bits: that a weight of the blocks takes.
        perplexity: of the test text.
        kl: divergence from the float model, in nats a token.
        top1: how often both have the same likeliest token.
        seconds: that quantising took.
    """

    bits: float
    perplexity: float
    kl: float
    top1: float
    seconds: float

    def columns(self) -> str:
        """Lay it out as the table's last columns."""
        measured = f"{self.bits:.2f} | {self.perplexity:.2f} | {self.kl:.4f} | {self.top1:.1%}"
        return f"{measured} | {self.seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--test", type=Path, required=True, help="text to predict")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="-1,128,64,32")
    parser.add_argument("--tools", default="fast,standard,best")
    parser.add_argument("--offsets", default="0", help="tokens before the first sample")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--peer", action="append", default=[], help="PROGRAM=PYTHON")
    arguments = parser.parse_args()
    peers = dict(it.split("=", 1) for it in arguments.peer)
    test = arguments.test.read_text(encoding="utf-8")
    source = write_source(arguments.out / "source")
    ids = AutoTokenizer.from_pretrained(source)(test[:CHARACTERS], verbose=False)["input_ids"]
    windows = torch.tensor(ids)[: WINDOWS * WINDOW_TOKENS].split(WINDOW_TOKENS)
    answers = read_answers(source, test[CHARACTERS : CHARACTERS + HELD_OUT])
    print(describe())
    columns = "bits a weight | perplexity | KL | same token | seconds"
    print(f"\n| bits | group | tool | offset | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    cells = itertools.product(
        arguments.bits.split(","),
        [int(it) for it in arguments.groups.split(",")],
        arguments.tools.split(","),
        [int(it) for it in arguments.offsets.split(",")],
    )
    for bits, group, tool, offset in cells:
        cell = Cell(bits, group, tool, offset, arguments.samples)
        folder = arguments.out / cell.name
        try:
            make(folder, cell, source, arguments.text, peers)
        except GPTQLoaderError as error:
            columns = f"fails: {error} | | | |"
        except subprocess.CalledProcessError:
            columns = f"fails: {folder.with_suffix('.log')} has its words | | | |"
        else:
            columns = judge(folder, windows, answers).columns()
        print(f"| {bits} | {group} | {tool} | {offset} | {columns} |", flush=True)


def judge(folder: Path, windows: Sequence[torch.Tensor], answers: HeldOutText) -> Found:
    """Measure a checkpoint, unless that was done."""
    kept = folder / FOUND_FILE
    if kept.is_file():
        return Found(**json.loads(kept.read_text()))
    with opened(folder) as model:
        perplexity = measure(model, windows)
        compared = answers.compare(model)
    seconds = json.loads((folder / SECONDS_FILE).read_text())
    found = Found(bits_a_weight(folder), perplexity, compared.kl, compared.top1, seconds)
    kept.write_text(json.dumps(asdict(found)))
    return found


@contextmanager
def opened(folder: Path) -> Iterator[PreTrainedModel]:
    """Load a checkpoint in bfloat16, its weights dequantised."""
    if files := list(folder.glob("*.gguf")):
        yield load_source(files[0])[0].to(torch.bfloat16)
        return
    checkpoint = next(folder.rglob("config.json")).parent  # AutoRound's is in a folder of it
    with gptq.load(checkpoint, backend="dense", check=False) as loaded:
        yield loaded.model


@torch.inference_mode()
def measure(model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> float:
    """Measure perplexity as `gptq-loader perplexity` does, of a model that it does not load too."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        losses.append(float(loss))
    return mean_perplexity(losses, window_tokens=WINDOW_TOKENS).perplexity


def bits_a_weight(folder: Path) -> float:
    """Count what a weight of the blocks takes, with its scales, zeros and order."""
    taken, weights = 0, 0
    for file in folder.rglob("*.gguf"):
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                taken, weights = taken + int(tensor.n_bytes), weights + int(tensor.n_elements)
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            path, _, part = name.rpartition(".")
            taken += tensor.nbytes if f"{path}.qweight" in tensors and part != "bias" else 0
            weights += len(tensors[f"{path}.g_idx"]) * tensor.shape[1] if part == "qweight" else 0
    return 8 * taken / weights


def write_source(folder: Path) -> Path:
    """Write the unquantised model as every program reads it, unless it is there."""
    if not (folder / "config.json").is_file():
        model, tokenizer = load_source(find_demo_model(progress=lambda _: None))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)  # its config comes last
    return folder


def read_answers(source: Path, held_out: str) -> HeldOutText:
    """Have the unquantised model read the text that all checkpoints are compared on."""
    return HeldOutText(*load_source(source), held_out, lambda _: None)


def make(folder: Path, cell: Cell, source: Path, text: Path, peers: dict[str, str]) -> None:
    """Quantise, unless it is there, and note the seconds that took."""
    kept = folder / SECONDS_FILE
    if not kept.is_file():
        program, _, mode = cell.tool.partition(":")
        began = time.monotonic()
        if program in peers:
            seconds = run_peer(peers[program], program, mode, cell, source, folder, text)
        else:
            quantize_model(source, folder, options=cell.options, text=text)
            seconds = time.monotonic() - began
        kept.write_text(json.dumps(seconds))


def run_peer(
    python: str, program: str, mode: str, cell: Cell, source: Path, folder: Path, text: Path
) -> float:
    """Have another program quantise; return the seconds that took."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = text.read_text(encoding="utf-8")
    samples = calibration_samples(tokenizer, cell.options, content, context=2048)
    asked = {
        "program": program,
        "mode": mode,
        "source": str(source.absolute()),
        "gguf": str(find_demo_model(progress=lambda _: None)),
        "out": str(folder.absolute()),
        "bits": 0 if cell.sized else int(cell.bits),
        "group_size": cell.group,
        "samples": samples,
    }
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        words = folder.with_suffix(".log")
        with words.open("w", encoding="utf-8") as log:
            command = [python, "-W", "ignore", str(WORKER), str(request)]
            completed = subprocess.run(  # noqa: S603 - ours, and what the user named
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=False,
                cwd=scratch,
                env={"GPTQMODEL_CPU_WORKERS": "4", **os.environ},  # fewer than two make it fail
            )
        with words.open("a", encoding="utf-8") as log:
            log.write(completed.stdout)
    lines = [it for it in completed.stdout.splitlines() if it.startswith("SECONDS ")]
    if not lines:
        raise subprocess.CalledProcessError(completed.returncode, command)
    return float(lines[0].removeprefix("SECONDS "))


if __name__ == "__main__":
    main()
