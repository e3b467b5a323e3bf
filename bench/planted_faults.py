"""Plant faults in checkpoints, and count what `verify` names.

    python bench/planted_faults.py REF... [--seed 0] [--good REF...]

Copies each checkpoint (a folder with one model.safetensors), plants each of ten kinds of fault in
a layer that the seed chooses, verifies it, and prints which check named which. Then verifies every
REF and those of `--good` as they are: none may be accused.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.verify.run import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.verify.report import Report

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"


def of_tensors(edit: Callable[[Tensors, str, random.Random], None]) -> Callable[..., None]:
    """Make a fault of an edit of one layer's tensors."""

    def plant(folder: Path, chosen: random.Random) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
        layers = sorted(name for name in tensors if name.endswith(".qweight"))
        edit(tensors, chosen.choice(layers).removesuffix(".qweight"), chosen)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return plant


def zero_codes(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.qweight"].zero_()


def zero_scales(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.scales"].zero_()


def not_finite(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    scales = tensors[f"{layer}.scales"].view(-1)
    scales[chosen.randrange(len(scales))] = float("nan")


def large_scales(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.scales"] *= 64


def random_codes(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    generator = torch.Generator().manual_seed(chosen.randrange(1 << 30))
    tensors[f"{layer}.qweight"].random_(-(1 << 31), (1 << 31) - 1, generator=generator)


def missing(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    del tensors[f"{layer}.{chosen.choice(('qzeros', 'scales'))}"]


def broken_norm(tensors: Tensors, _: str, chosen: random.Random) -> None:
    norms = sorted(name for name in tensors if "norm" in name)
    tensors[chosen.choice(norms)][0] = float("inf")


def zero_embedding(tensors: Tensors, _: str, __: random.Random) -> None:
    tensors["model.embed_tokens.weight"].zero_()


def wrong_label(folder: Path, _: random.Random) -> None:
    """Call v1 zeros v2, or v2 ones v1, in every config."""
    edit_configs(
        folder,
        lambda it: it.update(
            checkpoint_format="gptq" if it.get("checkpoint_format") == "gptq_v2" else "gptq_v2"
        ),
    )


def wrong_bits(folder: Path, _: random.Random) -> None:
    edit_configs(folder, lambda it: it.update(bits=8 if it["bits"] == 4 else 4))


def edit_configs(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the quantization config wherever it stands."""
    for file in (folder / "quantize_config.json", folder / "config.json"):
        table = json.loads(file.read_text())
        part = table.get("quantization_config") if file.name == "config.json" else table
        if part:
            part.pop("format", None)
            edit(part)
            file.write_text(json.dumps(table))


# Each kind with the checks that may name it.
FAULTS: dict[str, tuple[Callable[[Path, random.Random], None], set[str]]] = {
    "codes of zero": (of_tensors(zero_codes), {"layers"}),
    "scales of zero": (of_tensors(zero_scales), {"layers"}),
    "a scale that is not finite": (of_tensors(not_finite), {"layers"}),
    "scales 64 times as large": (of_tensors(large_scales), {"layers"}),
    "random codes": (of_tensors(random_codes), {"layers"}),
    "a tensor that is missing": (of_tensors(missing), {"files"}),
    "a norm that is not finite": (of_tensors(broken_norm), {"tensors"}),
    "an embedding of zeros": (of_tensors(zero_embedding), {"tensors"}),
    "zeros labelled otherwise": (wrong_label, {"zeros"}),
    "a wrong width in the config": (wrong_bits, {"config"}),
}


def plant(source: Path, folder: Path, kind: str, seed: int) -> set[str]:
    """Copy a checkpoint with a fault; return the checks that may name it."""
    shutil.copytree(source, folder)
    fault, checks = FAULTS[kind]
    fault(folder, random.Random(f"{seed} {kind} {source.name}"))  # noqa: S311 - a seed, no secret
    return checks


def verified(folder: Path) -> Report:
    options = LoadOptions(device="cpu")
    return verify(str(folder), options=options, plugins=gptq.Plugins(installed=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--good", nargs="*", type=Path, default=[])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    named = count = 0
    for source in arguments.checkpoints:
        for kind in FAULTS:
            with tempfile.TemporaryDirectory() as temporary:
                checks = plant(source, Path(temporary) / "planted", kind, arguments.seed)
                report = verified(Path(temporary) / "planted")
            wrong = [finding for finding in report.findings if finding.wrong]
            right = bool(wrong) and wrong[0].check in checks
            named, count = named + right, count + 1
            said = f"{wrong[0].check}: {wrong[0].message}" if wrong else "nothing"
            print(f"{'named' if right else 'MISSED'}  {source.name}  {kind}: {said}", flush=True)
    good = [*arguments.checkpoints, *arguments.good]
    accused = [report.line for folder in good if not (report := verified(folder)).right]
    print("\n".join(accused))
    print(f"named {named} of {count}; accused {len(accused)} of {len(good)} good ones")


if __name__ == "__main__":
    main()
