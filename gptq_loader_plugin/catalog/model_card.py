"""Write a model card: front matter, template, files, parameters, downloads, hosts, Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.engines.engine import OURS
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.card_facts import CardFacts, ProvidedFile

__all__ = ["write_card"]

COLUMNS = (
    "Branch", "Bits", "GS", "Act Order", "Damp %", "GPTQ Dataset", "Seq Len", "Size", "ExLlama",
    "Desc",
)  # fmt: skip
PARAMETERS = """
- Bits: the width of a quantised weight.
- GS: the group size, the input rows that share a scale. Smaller is more exact and larger on disk;
  "None" is one scale for a whole column.
- Act Order: whether rows were quantised in the order of their activations, which is more exact.
  Also called `desc_act`.
- Damp %: the damping of GPTQ's Hessian.
- GPTQ Dataset: what it was calibrated on, which is not what the model was trained on.
- Seq Len: the tokens of a calibration sample; it does not limit the context.
- Size: the weights' bytes, read from the files.
- ExLlama: whether ExLlama's kernels take it, which run 4 bits alone.
"""


def write_card(
    facts: CardFacts,
    *,
    perplexities: Sequence[tuple[str, str, float]] = (),
    base_model: str | None = None,
    license_name: str | None = None,
) -> str:
    """Write a model card from what is known.

    Args:
        facts: what is known.
        perplexities: measured on this machine: checkpoint, text and figure.
        base_model: the repository of the model it was made of, where the old card has none.
        license_name: the licence, likewise.
    """
    base = base_model or facts.card.base_model
    parts = [
        _front_matter(facts, base, license_name or facts.card.license),
        f"# {facts.name}",
        _description(facts, base),
        _prompt(facts),
        _files(facts),
        _measured(perplexities),
        _download(facts),
        _webui(facts),
        _python(facts),
        _compatibility(facts),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _front_matter(facts: CardFacts, base: str | None, license_name: str | None) -> str:
    import yaml

    bits = sorted({f"{it.bits}-bit" for it in facts.files if it.bits})
    card = facts.card
    fields: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "datasets": list(card.datasets),
        "inference": False,
        "language": list(card.languages),
        "license": license_name,
        "model_creator": card.model_creator,
        "model_name": facts.name,
        "model_type": facts.model_type,
        "pipeline_tag": "text-generation",
        "prompt_template": facts.prompt_template,
        "tags": ["gptq", *bits],
    }
    known = {name: it for name, it in fields.items() if it not in (None, [])}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def _description(facts: CardFacts, base: str | None) -> str:
    card = facts.card
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    by = f", by {card.model_creator}" if card.model_creator else ""
    text = f"## Description\n\nGPTQ quantisations{of}{by}."
    if facts.context:
        text += f" The context is {facts.context:,} tokens."
    if card.datasets:
        text += f" The model was trained on {', '.join(card.datasets)}."
    return text


def _prompt(facts: CardFacts) -> str:
    if facts.prompt_template is None:
        return (
            "## Prompt template\n\nNone that is one turn of text: see `chat_template` in the "
            "tokenizer's files."
        )
    text = f"## Prompt template\n\n```\n{facts.prompt_template}\n```"
    if facts.stop:
        text += f"\n\nA reply ends at {', '.join(f'`{it}`' for it in facts.stop)}."
    if facts.card.system:
        text += f"\n\nRecommended system message:\n\n```\n{facts.card.system}\n```"
    return text


def _files(facts: CardFacts) -> str:
    rows = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    rows += ["| " + " | ".join(_row(it, facts)) + " |" for it in facts.files]
    return (
        "## Provided files, and GPTQ parameters\n\n"
        + "\n".join(rows)
        + f"\n\n### What the parameters mean\n{PARAMETERS}"
    )


def _row(file: ProvidedFile, facts: CardFacts) -> tuple[str, ...]:
    branch = file.branch
    if facts.repo:
        branch = f"[{branch}](https://huggingface.co/{facts.repo}/tree/{branch})"
    is_whole = file.group_size is not None and file.group_size < 0
    group = "None" if is_whole else _text(file.group_size)
    return (
        branch,
        _text(file.bits),
        group,
        _yes(file.desc_act),
        _text(file.damp_percent),
        _text(file.dataset),
        _text(file.seq_len),
        _size(file.size_bytes),
        _yes(file.exllama),
        _cell(file.desc or _described(file)),
    )


def _size(size_bytes: int | None) -> str:
    """Write a size as cards have it, in GB of a thousand million bytes."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 10**8 else write_size(size_bytes)


def _described(file: ProvidedFile) -> str:
    group = "no groups" if (file.group_size or 0) < 0 else f"groups of {file.group_size}"
    order = ", act-order" if file.desc_act else ""
    return f"{file.bits}-bit, {group}{order}."


def _measured(perplexities: Sequence[tuple[str, str, float]]) -> str:
    if not perplexities:
        return ""
    rows = [
        f"| {_cell(name)} | {_cell(text)} | {figure:.3f} |" for name, text, figure in perplexities
    ]
    return "\n".join(
        ["## Perplexity", "", "Lower is better; figures on one text can be compared.", "",
         "| Checkpoint | Text | Perplexity |", "| --- | --- | --- |", *rows]
    )  # fmt: skip


def _download(facts: CardFacts) -> str:
    if not facts.repo:
        return ""
    other = next((it.branch for it in facts.files if it.branch != "main"), "main")
    return f"""## How to download

```
pip install gptq-loader-plugin
gptq-loader branches {facts.repo}
gptq-loader download {facts.repo}:{other}
```

With Hugging Face's own tool, and with git:

```
hf download {facts.repo} --revision {other} --local-dir {facts.name}
git clone --single-branch --branch {other} https://huggingface.co/{facts.repo}
```"""


def _webui(facts: CardFacts) -> str:
    what = facts.repo or facts.name
    return f"""## In text-generation-webui

1. In its folder and its own Python: `pip install gptq-loader-plugin`, then `gptq-loader webui run`.
2. On the Model tab, download `{what}`; a branch is named after a colon, `{what}:BRANCH`.
3. Refresh the list and choose the model: the loader `GPTQ` is chosen by itself, and nothing is
   left to set by hand. Press Load.
4. On the Chat tab the checkpoint's own template is used, where there is one."""


def _python(facts: CardFacts) -> str:
    what = facts.repo or f"./{facts.name}"
    return f"""## In Python

```python
import gptq_loader_plugin as gptq

with gptq.load("{what}") as model:
    for piece in model.chat([{{"role": "user", "content": "Tell me about AI"}}]):
        print(piece.text, end="")
```

Or by transformers, which the same package teaches this format:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq_loader_plugin

gptq_loader_plugin.enable_transformers()
model = AutoModelForCausalLM.from_pretrained("{what}")
tokenizer = AutoTokenizer.from_pretrained("{what}")
```"""


def _compatibility(facts: CardFacts) -> str:
    """Say which programs take which branch, by their own rules."""
    engines: dict[str, dict[str, bool | None]] = {}
    for file in facts.files:
        for it in file.answers:
            if it.engine.startswith(f"{OURS}+"):
                continue
            name = f"{it.engine} {it.version}" if it.engine != OURS else it.engine
            engines.setdefault(name, {})[file.branch] = it.takes
    if not engines:
        return ""
    marks = {True: "yes", False: "no", None: "?"}
    branches = [it.branch for it in facts.files]
    rows = [
        "| " + " | ".join([_cell(name), *(marks[takes.get(it)] for it in branches)]) + " |"
        for name, takes in engines.items()
    ]
    head = "| " + " | ".join(["Program", *branches]) + " |"
    rule = "| " + " | ".join("---" for _ in range(len(branches) + 1)) + " |"
    why = "Why not, of each: `gptq-loader where " + (facts.repo or facts.name) + "`."
    return "\n".join(["## Compatibility", "", head, rule, *rows, "", why])


def _text(value: object) -> str:
    return "-" if value is None else _cell(str(value))


def _yes(value: bool | None) -> str:  # noqa: FBT001 - the thing to write
    return "-" if value is None else "Yes" if value else "No"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
