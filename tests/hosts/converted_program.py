"""Load checkpoints in another reader's Python, and keep the logits that it computes.

    python converted_program.py READER '{"folders": [...], "ids": [...], "out": FILE}'

READER is transformers, gptqmodel or auto-round. The logits of each folder go into one safetensors
file under the folder's place in the list, in float32; a line of JSON says which classes the layers
are of.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from safetensors.torch import save_file


def by_transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def by_gptqmodel(folder: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def by_auto_round(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=AutoRoundConfig()
    )


READERS = {
    "transformers": by_transformers, "gptqmodel": by_gptqmodel, "auto-round": by_auto_round,
}  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[2])
    ids, logits, found = torch.tensor([job["ids"]]), {}, {}
    for at, folder in enumerate(job["folders"]):
        try:
            model = READERS[sys.argv[1]](folder).eval()
            with torch.inference_mode():
                logits[str(at)] = model(ids).logits.float().contiguous()
        except Exception as error:  # noqa: BLE001 - whatever the reader raises is its answer
            found[folder] = {"error": f"{type(error).__name__}: {error}"}
            continue
        layers = (it for name, it in model.named_modules() if name.endswith("_proj"))
        found[folder] = Counter(type(it).__name__ for it in layers)
    save_file(logits, job["out"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
