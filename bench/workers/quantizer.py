"""Quantise a model with another program, on the samples that ours is calibrated on.

    PYTHON bench/workers/quantizer.py REQUEST

Run by the Python of an environment that holds the program. REQUEST is JSON: program and mode
(`bench/quality.py` lists them), source and out (folders), gguf (the same model), bits, group_size,
and samples, lists of token ids of one length. Prints a line SECONDS with what quantising and saving
took.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

MODES = {
    "default": {},
    "mse": {"mse": 2.4},
    "act": {"desc_act": True},
    "foem": {"foem": {"alpha": 0, "beta": 0.2}},
    "gptaq": {"gptaq": {"alpha": 0.25}},
    "mse-foem": {"mse": 2.4, "foem": {"alpha": 0, "beta": 0.2}},
}


def gptqmodel(asked: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    fields = {"desc_act": False, **MODES[asked["mode"]]}
    config = QuantizeConfig(
        bits=asked["bits"], group_size=asked["group_size"], sym=True, device="cpu", **fields
    )
    model = GPTQModel.load(asked["source"], config)
    ones = [1] * len(asked["samples"][0])
    calibration = [{"input_ids": ids, "attention_mask": ones} for ids in asked["samples"]]
    model.quantize(calibration, batch_size=8)
    model.save(asked["out"])


def auto_round(asked: dict[str, Any]) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(asked["source"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(asked["source"])
    samples = torch.tensor(asked["samples"])
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=asked["bits"],
        group_size=asked["group_size"],
        sym=True,
        iters=int(asked["mode"]),
        nsamples=len(samples),
        seqlen=samples.shape[1],
        batch_size=4,
        dataset=list(samples.split(4)),
        device_map="cpu",
    )
    quantizer.quantize_and_save(asked["out"], format="auto_gptq")


def llama_cpp(asked: dict[str, Any]) -> None:
    import llama_cpp as library

    out = Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{asked['mode']}")
    options.allow_requantize = True  # what is quantised as 32 or 16 bits would be
    options.token_embedding_type = options.output_tensor_type = library.GGML_TYPE_F16
    files = [str(it).encode() for it in (asked["gguf"], out / "model.gguf")]
    if library.llama_model_quantize(*files, options):
        raise SystemExit("llama.cpp failed")


PROGRAMS = {"gptqmodel": gptqmodel, "auto-round": auto_round, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    began = time.monotonic()
    PROGRAMS[request["program"]](request)
    print(f"SECONDS {time.monotonic() - began}", flush=True)
