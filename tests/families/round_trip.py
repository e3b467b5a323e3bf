"""What becomes of one model type: loading its published checkpoint, decoding, quantising it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from published import dequantised, publish
from tiny_configs import VOCABULARY

from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.generate import generate_pieces
from gptq_loader_plugin.generation.kv_cache import looks_ahead
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.loading import load
from gptq_loader_plugin.quantize.options import QuantizeOptions
from gptq_loader_plugin.quantize.run import quantize
from gptq_loader_plugin.quantize.source import load_source

TOKENS, STEPS = 24, 8
LOGITS_TOLERANCE, DECODE_TOLERANCE = 1e-4, 1e-3
IDS = torch.randint(5, 360, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Row:
    """A line of the table.

    Attributes:
        model_type: as transformers calls it.
        loads: "exact", "wrong", "refused", "fails", or "not built": the tiny model itself.
        decodes: the same of eight greedy tokens, against forwards without a cache.
        quantises: the same of the quantiser and what it wrote.
        path: how a token is decoded on a CPU.
        notes: what was raised, or how far off it is.
    """

    model_type: str
    loads: str = "not built"
    decodes: str = "-"
    quantises: str = "-"
    path: str = "-"
    notes: list[str] = field(default_factory=list)


def round_trip(model_type: str, folder: Path) -> Row:
    """Publish a tiny model of that type, load it, decode with it, quantise it."""
    row = Row(model_type)
    try:
        published = publish(model_type, folder)
        reference = dequantised(published.packed, published, folder / "right")
        expected = logits(reference, IDS)
    except Exception as error:  # noqa: BLE001 - whatever a class raises
        row.notes.append(_short(error))
        return row
    row.loads, row.decodes = _compare(published.packed, reference, expected, row, "load")
    if row.loads == "exact":
        row.path = _path(published.packed)
    try:
        model, tokenizer = load_source(published.original)
        samples = [IDS, *(torch.randint(5, 360, (3, TOKENS)).tolist())]
        options = QuantizeOptions(group_size=32)
        quantize(model, tokenizer, folder / "ours", options=options, samples=samples)
        reference = dequantised(folder / "ours", published, folder / "right")
        expected = logits(reference, IDS)
    except Exception as error:  # noqa: BLE001
        refused = isinstance(error, GPTQLoaderError)
        row.quantises = "refused" if refused else "fails"
        row.notes.append(f"quantise: {_short(error)}")
        return row
    row.quantises, _ = _compare(folder / "ours", reference, expected, row, "quantise")
    return row


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Run a whole sequence without a cache: float32 [tokens, vocabulary]."""
    output: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return output


@torch.inference_mode()
def generate_logits(model: Any, ids: list[int], steps: int) -> torch.Tensor:
    """Return the logits of each step of transformers' greedy `generate`: [steps, vocabulary]."""
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(output.logits).float()


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative root-mean-square error."""
    return float((found - expected).norm() / expected.norm())


def _compare(
    folder: Path, reference: Any, expected: torch.Tensor, row: Row, doing: str
) -> tuple[str, str]:
    """Load a checkpoint and compare its logits, then eight tokens of its own decoding."""
    try:
        loaded = load(folder, backend="reference", device="cpu", dtype="float32")
        found = logits(loaded.model, IDS)
    except Exception as error:  # noqa: BLE001
        row.notes.append(f"{doing}: {_short(error)}")
        return ("refused" if isinstance(error, GPTQLoaderError) else "fails"), "-"
    error = relative_rms(found, expected)
    if not error <= LOGITS_TOLERANCE:
        row.notes.append(f"{doing}: relative RMS {error:.2g}")
        return "wrong", "-"
    try:
        worst = _decode(loaded, reference)
    except Exception as error:  # noqa: BLE001
        row.notes.append(f"decode: {_short(error)}")
        return "exact", "fails"
    if not worst <= DECODE_TOLERANCE:
        row.notes.append(f"decode: relative RMS {worst:.2g}")
        return "exact", "wrong"
    return "exact", "exact"


def _decode(loaded: Any, reference: Any) -> float:
    """Decode greedily; compare each step's logits with a forward without a cache.

    Where a prompt's tokens see those after them, a reply's would too in such a forward, and
    transformers answers otherwise with a cache than without: its `generate` is right there, with
    the cache that it uses where nothing is said.
    """
    ids = list(IDS)
    seen: list[tuple[int, torch.Tensor]] = []
    options = GenerateOptions(max_new_tokens=STEPS, temperature=0.0)
    generation = loaded.begin(ids, options, watch=lambda *it: seen.append(it))
    for _ in generate_pieces(lambda: generation):
        pass
    ahead = looks_ahead(reference)
    generated = generate_logits(reference, IDS, STEPS) if ahead else []
    worst = 0.0
    for i, (token, own) in enumerate(seen):
        expected = generated[i] if ahead else logits(reference, ids)[-1]
        worst = max(worst, relative_rms(own[0, :VOCABULARY].float(), expected[:VOCABULARY]))
        ids.append(token)
    return worst


def _path(folder: Path) -> str:
    try:
        loaded = load(folder, device="cpu", dtype="float32")
    except Exception as error:  # noqa: BLE001
        return f"fails: {_short(error)}"
    by_layer = any("layer by layer" in note for note in loaded.notes)
    return "layer by layer" if by_layer else "native"


def _short(error: Exception) -> str:
    words = " ".join(str(error).split())[:220]
    if isinstance(error, GPTQLoaderError):
        return f"{type(error).__name__}: {words}"
    frames = traceback.extract_tb(error.__traceback__)
    own = next((it for it in reversed(frames) if "gptq_loader" in it.filename), frames[-1])
    return f"{type(error).__name__}: {words} [{Path(own.filename).name}:{own.name}]"
