"""A program that uses transformers as a model card of 2023 says, and then as its owner would.

    python transformers_program.py card|save|lora REFERENCE REVISION [FOLDER]

Run by the Python of each environment, on one checkpoint; prints one line of JSON. Except for
`enable_transformers()`, nothing here knows of GPTQ.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import gptq_loader_plugin

system_message = "You are a helpful AI assistant."
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 24


def card(model_name_or_path: str, revision: str) -> dict[str, Any]:
    """The card's Python; tokens are fewer, and the input goes where the model is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        model_name_or_path, device_map="auto", trust_remote_code=False, revision=revision
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, use_fast=True)
    prompt = "Tell me about AI"
    prompt_template = f"""<|im_start|>system
{system_message}<|im_end|>
<|im_start|>user
{prompt}<|im_end|>
<|im_start|>assistant
"""
    input_ids = tokenizer(prompt_template, return_tensors="pt").input_ids.to(model.device)
    output = model.generate(
        inputs=input_ids,
        temperature=0.7,
        do_sample=True,
        top_p=0.95,
        top_k=40,
        max_new_tokens=TOKENS,
    )
    pipe = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        top_k=40,
        repetition_penalty=1.1,
    )
    piped = pipe(prompt_template)[0]["generated_text"]
    return {
        "generated": tokenizer.decode(output[0][input_ids.shape[1] :], skip_special_tokens=True),
        "piped": piped.removeprefix(prompt_template),
        "greedy": greedy(model, tokenizer),
        "loaded": loaded(model_name_or_path, revision),
        "kernels": model.hf_quantizer.plan.kernels(),
        "class": type(model).__name__,
    }


def greedy(model: Any, tokenizer: Any) -> str:
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids.to(model.device)
    tokens = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :]
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.rstrip("\ufffd")


def loaded(reference: str, revision: str) -> str:
    """What our own load answers."""
    options = gptq_loader_plugin.GenerateOptions(temperature=0, max_new_tokens=TOKENS)
    with gptq_loader_plugin.load(reference, revision=revision) as model:
        return model.generate(QUESTION, options).text


def save(reference: str, revision: str, folder: str) -> dict[str, Any]:
    """Save, load again, compare."""
    model = AutoModelForCausalLM.from_pretrained(reference, revision=revision)
    model.save_pretrained(folder, max_shard_size="40MB")
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        same = torch.equal(model(ids).logits, again(ids).logits)
    return {"same": same}


def lora(reference: str, revision: str, folder: str) -> dict[str, Any]:
    """Train an adapter, save it, load it again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 24))
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(reference, revision=revision)
    model = get_peft_model(base, options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    model.train()
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    model.save_pretrained(folder)
    fresh = AutoModelForCausalLM.from_pretrained(reference, revision=revision)
    plain = fresh(ids).logits.detach()
    again = PeftModel.from_pretrained(fresh, folder).eval()
    by_name = AutoModelForCausalLM.from_pretrained(folder)  # the adapter names the checkpoint
    with torch.inference_mode():
        right = model(ids).logits
        restored, named = again(ids).logits, by_name(ids).logits
        with again.disable_adapter():
            without = again(ids).logits
        generated = [
            trained.generate(input_ids=ids[:1], do_sample=False, max_new_tokens=8).tolist()
            for trained in (model, again)
        ]
    return {
        "losses": losses,
        "trained": len(weights),
        "layers": sum(fresh.hf_quantizer.plan.kernels().values()),
        "same": torch.equal(restored, right),
        "by_name": float((named.float() - right.float()).norm() / right.float().norm()),
        "changed": not torch.equal(restored, plain),
        "restored": torch.equal(without, plain),
        "generates_the_same": generated[0] == generated[1],
    }


def main() -> None:
    transformers.logging.set_verbosity_error()
    gptq_loader_plugin.enable_transformers()
    task = {"card": card, "save": save, "lora": lora}[sys.argv[1]]
    answer = task(*sys.argv[2:])
    sys.stdout.write(json.dumps({"transformers": transformers.__version__, **answer}) + "\n")


if __name__ == "__main__":
    main()
