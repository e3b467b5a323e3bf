"""Plant faults in checkpoints, and count the causes that `doctor` names first.

    python bench/planted_faults.py [REF...] [--trained REF...] [--good REF...] [--seed 0]

Copies each checkpoint (a folder with one model.safetensors), plants a fault of each kind in a place
that the seed chooses, has `doctor` look for the cause of the symptom that a user would see, and
prints what it named. Kinds that show in text alone are planted in trained ones. Then every REF and
those of `--good` are verified, and looked at by `doctor` for every symptom but `slow`, as they are:
none may be accused. Without REF it takes the tests' checkpoints, and the demo as the trained one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.verify.run import verify
from gptq_loader_plugin.verify.symptoms import diagnose

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.verify.report import Diagnosis, Report, Symptom

Tensors = dict[str, torch.Tensor]
Edit: TypeAlias = "Callable[[Tensors, str, random.Random], None]"
Plant: TypeAlias = "Callable[[Path, random.Random], None]"
FILE = "model.safetensors"
TESTS = Path(__file__).parents[1] / "tests"
DATA = TESTS / "data" / "checkpoints"
# Of every width, with act-order and without, in both formats of zeros.
SOURCES = ("gptq-4bit-32g-act-sym", "gptq_v2-4bit-64g-noact-asym", "gptq-3bit-128g-act-sym",
           "gptq-2bit-32g-act-asym", "gptq_v2-8bit-32g-act-asym")  # fmt: skip
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "qwen2_moe", "falcon", "gpt_neox",
            "opt")  # fmt: skip
SYMPTOMS: tuple[Symptom, ...] = ("gibberish", "never-stops", "nan", "crash")


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        plant: plants it in a folder.
        symptom: what a user sees of it.
        cause: what the cause that is named first must say.
        trained: whether it shows in text alone.
        where: which checkpoints can have it, by a part of their names.
    """

    plant: Plant
    symptom: Symptom
    cause: str
    trained: bool = False
    where: str = ""


def of_tensors(
    edit: Callable[[Tensors, str, random.Random], None],
) -> Callable[[Path, random.Random], None]:
    """Make a fault of an edit of one layer's tensors."""

    def plant(folder: Path, chosen: random.Random) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
        layers = sorted(name for name in tensors if name.endswith(".qweight"))
        edit(tensors, chosen.choice(layers).removesuffix(".qweight"), chosen)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return plant


def zero_codes(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.qweight"].zero_()


def zero_tail(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    """Leave the end of a tensor empty, as a download does that was cut and filled up."""
    codes = tensors[f"{layer}.qweight"]
    codes[int(len(codes) * chosen.uniform(0.3, 0.9)) :] = 0


def zero_scales(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.scales"].zero_()


def not_finite(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    scales = tensors[f"{layer}.scales"].view(-1)
    scales[chosen.randrange(len(scales))] = chosen.choice((float("nan"), float("inf")))


def large_scales(tensors: Tensors, layer: str, _: random.Random) -> None:
    tensors[f"{layer}.scales"] *= 64


def random_codes(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    generator = torch.Generator().manual_seed(chosen.randrange(1 << 30))
    tensors[f"{layer}.qweight"].random_(-(1 << 31), (1 << 31) - 1, generator=generator)


def missing(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    del tensors[f"{layer}.{chosen.choice(('qzeros', 'scales', 'qweight'))}"]


def broken_norm(tensors: Tensors, _: str, chosen: random.Random) -> None:
    norms = sorted(name for name in tensors if "norm" in name)
    tensors[chosen.choice(norms)][0] = float("inf")


def zero_embedding(tensors: Tensors, _: str, __: random.Random) -> None:
    tensors["model.embed_tokens.weight"].zero_()


def without_g_idx(tensors: Tensors, _: str, __: random.Random) -> None:
    for name in [it for it in tensors if it.endswith(".g_idx")]:
        del tensors[name]


def overflowing(tensors: Tensors, _: str, chosen: random.Random) -> None:
    """Make an MLP's inputs so large that its answers are beyond float16."""
    norms = sorted(name for name in tensors if name.endswith("post_attention_layernorm.weight"))
    tensors[chosen.choice(norms)] *= 2e3


def swapped(tensors: Tensors, layer: str, chosen: random.Random) -> None:
    """Exchange a layer with the same one of another block."""
    kind = re.sub(r"\.\d+\.", ".#.", layer)
    layers = {it.removesuffix(".qweight") for it in tensors if it.endswith(".qweight")}
    others = sorted(it for it in layers if re.sub(r"\.\d+\.", ".#.", it) == kind and it != layer)
    other = chosen.choice(others)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        first, second = f"{layer}.{part}", f"{other}.{part}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


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


def wrong_group(folder: Path, _: random.Random) -> None:
    edit_configs(folder, lambda it: it.update(group_size=32 if it["group_size"] == 64 else 64))


def wrong_order(folder: Path, _: random.Random) -> None:
    edit_configs(folder, lambda it: it.update(desc_act=not it["desc_act"]))


def wrong_end(folder: Path, chosen: random.Random) -> None:
    index = chosen.randrange(20, 200)
    for name in ("generation_config.json", "config.json"):
        edit_json(folder / name, lambda it: it.update(eos_token_id=index))


def no_end(folder: Path, _: random.Random) -> None:
    for name in ("generation_config.json", "config.json"):
        edit_json(folder / name, lambda it: it.pop("eos_token_id", None))
    edit_json(folder / "tokenizer_config.json", lambda it: it.pop("eos_token", None))


def no_template(folder: Path, _: random.Random) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", lambda it: it.pop("chat_template", None))


def silent_template(folder: Path, chosen: random.Random) -> None:
    """Leave out what users say: by a name that messages do not have, or by looking for parts."""
    content = chosen.choice(("m['text']", "m['content'][0]['value']", "''"))
    user = f"{{% if m['role'] == 'user' %}}{{{{ {content} }}}}{{% else %}}{{{{ m['content'] }}}}"
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        f"{user}{{% endif %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def other_template(folder: Path, _: random.Random) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )


def stale_index(folder: Path, _: random.Random) -> None:
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors"
             for i, name in enumerate(load_file(folder / FILE))}  # fmt: skip
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": names}))


def cut_short(folder: Path, chosen: random.Random) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(len(content) * chosen.uniform(0.2, 0.95))])


def broken_header(folder: Path, chosen: random.Random) -> None:
    content = bytearray((folder / FILE).read_bytes())
    at = chosen.choice((3, 9, 40))
    content[at : at + 4] = b"\xff\xfe\xff\xfe"
    (folder / FILE).write_bytes(content)


def other_tokenizer(folder: Path, chosen: random.Random) -> None:
    """Number the tokens otherwise, as another tokenizer of the same size does."""
    table = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in table["added_tokens"]}
    vocabulary = table["model"]["vocab"]
    ids = [index for index in vocabulary.values() if index not in special]
    numbers = dict(zip(ids, chosen.sample(ids, len(ids)), strict=True))
    table["model"]["vocab"] = {
        token: numbers.get(index, index) for token, index in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(table))


def larger_tokenizer(folder: Path, _: random.Random) -> None:
    """Have a tokenizer of far more tokens than the embedding has rows."""
    table = json.loads((folder / "tokenizer.json").read_text())
    last = max([*table["model"]["vocab"].values(), *(it["id"] for it in table["added_tokens"])])
    vocabulary = table["model"]["vocab"]
    vocabulary.update({f"of another {i}": last + 1 + i for i in range(1000)})
    (folder / "tokenizer.json").write_text(json.dumps(table))


def wrong_rotation(folder: Path, chosen: random.Random) -> None:
    def edit(table: dict[str, Any]) -> None:
        base = table["rope_parameters"]["rope_theta"]
        other = chosen.choice((
            {"rope_type": "default", "rope_theta": base / 10},
            {"rope_type": "linear", "rope_theta": base, "factor": 8.0},
            {"rope_type": "default", "rope_theta": base / 50},
        ))  # fmt: skip
        table["rope_parameters"] = other

    edit_json(folder / "config.json", edit)


def long_context(folder: Path, chosen: random.Random) -> None:
    tokens = chosen.choice((131_072, 262_144))
    edit_json(folder / "config.json", lambda it: it.update(max_position_embeddings=tokens))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def edit_configs(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the quantization config wherever it stands."""
    for file in (folder / "quantize_config.json", folder / "config.json"):
        table = json.loads(file.read_text())
        part = table.get("quantization_config") if file.name == "config.json" else table
        if part:
            part.pop("format", None)
            edit(part)
            file.write_text(json.dumps(table))


FAULTS: dict[str, Fault] = {
    "codes of zero": Fault(of_tensors(zero_codes), "gibberish", "codes that are all zero"),
    "a tensor whose end is zero": Fault(
        of_tensors(zero_tail), "gibberish", "codes of zero in|one code alone"
    ),
    "scales of zero": Fault(of_tensors(zero_scales), "gibberish", "scales of which 100% are zero"),
    "a scale that is not finite": Fault(of_tensors(not_finite), "nan", "scales .* not finite"),
    "scales 64 times as large": Fault(
        of_tensors(large_scales), "gibberish", "weights .* times as large"
    ),
    "random codes": Fault(of_tensors(random_codes), "gibberish", "codes that are random"),
    "a tensor that is missing": Fault(of_tensors(missing), "crash", "is missing"),
    "a norm that is not finite": Fault(of_tensors(broken_norm), "nan", "norm.* not finite"),
    "an embedding of zeros": Fault(of_tensors(zero_embedding), "gibberish", "embed.* all zero"),
    "zeros labelled otherwise": Fault(wrong_label, "gibberish", "off by one step"),
    "a wrong width in the config": Fault(wrong_bits, "crash", "^bits is"),
    "a wrong group size in the config": Fault(wrong_group, "crash", "^group_size is"),
    "a wrong act-order in the config": Fault(wrong_order, "gibberish", "^desc_act is"),
    "no g_idx": Fault(of_tensors(without_g_idx), "gibberish", "g_idx is missing", where="-act-"),
    "a wrong end token": Fault(wrong_end, "never-stops", "end token's id"),
    "no end token": Fault(no_end, "never-stops", "end token"),
    "no chat template": Fault(no_template, "gibberish", "brings no chat template"),
    "a template without the user's words": Fault(
        silent_template, "gibberish", "leaves out the user's words|template cannot be rendered"
    ),
    "a template of another model": Fault(
        other_template, "never-stops", "is no token|template is of another model"
    ),
    "an index of another model": Fault(stale_index, "crash", "index.json"),
    "a file that is cut short": Fault(cut_short, "crash", "cut short"),
    "a broken header": Fault(broken_header, "crash", "header"),
    "a larger tokenizer": Fault(larger_tokenizer, "crash", "tokenizer is of another model"),
    "hidden states beyond float16": Fault(of_tensors(overflowing), "nan", "too large for float16"),
    "a context that is too long": Fault(long_context, "gibberish", "context is too long"),
    "another tokenizer": Fault(
        other_tokenizer, "gibberish", "tokenizer is of another model", trained=True
    ),
    "wrong rotary settings": Fault(wrong_rotation, "gibberish", "rotary", trained=True),
    "swapped layers": Fault(of_tensors(swapped), "gibberish", "swapped", trained=True),
}


def plant(source: Path, folder: Path, kind: str, seed: int) -> Fault:
    """Copy a checkpoint with a fault; return what it is."""
    shutil.copytree(source, folder)
    fault = FAULTS[kind]
    fault.plant(folder, random.Random(f"{seed} {kind} {source.name}"))  # noqa: S311 - no secret
    return fault


def looked_at(folder: Path, symptom: Symptom) -> list[Diagnosis]:
    options, plugins = LoadOptions(device="cpu"), gptq.Plugins(installed=True)
    seen = diagnose(str(folder), symptom, options=options, plugins=plugins)
    return [diagnosis for diagnosis in seen if diagnosis.about == "checkpoint"]


def verified(folder: Path) -> Report:
    options = LoadOptions(device="cpu")
    return verify(str(folder), options=options, plugins=gptq.Plugins(installed=True))


def accusations(folder: Path) -> list[str]:
    """Return what is said against a checkpoint that is right."""
    report = verified(folder)
    words = [] if report.right else [report.line]
    for symptom in SYMPTOMS:
        words += [f"{symptom}: {it.cause}" for it in looked_at(folder, symptom)]
    return words


def good_families(folder: Path) -> list[Path]:
    """Write a tiny checkpoint of each of several families."""
    sys.path.insert(0, str(TESTS / "families"))
    from published import publish

    made = []
    for family in FAMILIES:
        (folder / family).mkdir()
        made.append(publish(family, folder / family).packed)
    return made


def count_named(sources: list[Path], trained: list[Path], only: str, seed: int) -> None:
    """Plant each kind in each checkpoint that can have it, and count."""
    named = count = 0
    kinds = [kind for kind in FAULTS if only in kind]
    for kind in kinds:
        for source in trained if FAULTS[kind].trained else sources:
            if FAULTS[kind].where not in source.name and not FAULTS[kind].trained:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                fault = plant(source, Path(temporary) / "planted", kind, seed)
                seen = looked_at(Path(temporary) / "planted", fault.symptom)
            first = seen[0].cause if seen else "nothing"
            right = re.search(fault.cause, first) is not None
            named, count = named + right, count + 1
            print(f"{'named' if right else 'MISSED'}  {kind}  {source.name}: {first}", flush=True)
    print(f"named {named} of {count} faults of {len(kinds)} kinds", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--trained", nargs="*", type=Path)
    parser.add_argument("--good", nargs="*", type=Path, default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names have this in them")
    parser.add_argument("--no-good", action="store_true", help="plant only")
    arguments = parser.parse_args()
    trained = arguments.trained
    if trained is None:
        from gptq_loader_plugin.quantize.demo import prepare_demo

        trained = [prepare_demo(progress=lambda _: None)]
    sources = arguments.checkpoints or [DATA / name for name in SOURCES]
    count_named(sources, trained, arguments.only, arguments.seed)
    if arguments.no_good:
        return
    with tempfile.TemporaryDirectory() as temporary:
        good = [*sources, *trained, *arguments.good]
        if not arguments.checkpoints:
            others = (it for it in sorted(DATA.glob("gptq*")) if it not in sources)
            good += [*others, *good_families(Path(temporary))]
        accused = 0
        for folder in good:
            words = accusations(folder)
            accused += bool(words)
            print("\n".join(f"ACCUSED  {folder}: {it}" for it in words) or f"right  {folder}",
                  flush=True)  # fmt: skip
        print(f"accused {accused} of {len(good)} good checkpoints")


if __name__ == "__main__":
    main()
