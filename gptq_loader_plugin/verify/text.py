"""Judge a loaded model by its text: a paragraph that it scores, and three replies."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.generation.noise_floor import find_blocks
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["check_activations", "check_text", "is_trained"]

WINDOW = 256  # tokens of the paragraph
REPLY = 64
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours, and say what each is like.",
    "Write two sentences about the sea.",
)
# SmolLM2-135M scores the paragraph 40 in 4 bits; wrong ones score thousands (docs/verify.md).
GIBBERISH = 1000.0
SUSPICIOUS = 300.0
SAME_TOKEN = 0.5  # of a reply
SCRIPTS = 3
DISTINCT = 0.35  # of a reply's runs of four tokens; a loop has few
FLOAT16_MAX = 65504.0
EMBEDDING_ROWS = 4096
SHARED = 10.0  # times what random rows have, which is 1


def is_trained(model: Any) -> bool:  # noqa: ANN401 - transformers' model
    """Return whether a model was ever trained: its embeddings have a direction in common.

    Of n rows made at random, the mean has 1/n of their squared length. Training turns all of them
    one way.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.dim() != 2:
        return True
    rows = weight.detach()[:EMBEDDING_ROWS].float()
    shared = rows.mean(dim=0).square().sum() / rows.square().sum(dim=1).mean().clamp_min(1e-12)
    return float(shared) * len(rows) > SHARED


def check_activations(model: LoadedModel, ids: Sequence[int]) -> tuple[list[Finding], float]:
    """Run tokens through the model, and watch the hidden states of every block.

    Returns:
        What is wrong, and the largest magnitude.
    """
    import torch

    tokens = torch.tensor([list(ids)], device=model.model.device)
    largest_of: dict[str, float] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - torch's hook type
        def hook(_module: object, _inputs: object, output: Any) -> None:  # noqa: ANN401
            state = output[0] if isinstance(output, tuple) else output
            largest_of[name] = float(state.float().abs().max())  # not a number where one is not

        return hook

    # what a class answers as hidden states has the last block's behind the last norm
    embedding = ("the embedding", model.model.get_input_embeddings())
    watched = [embedding, *find_blocks(model.model)]
    handles = [module.register_forward_hook(keep(name)) for name, module in watched]
    try:
        with torch.inference_mode():
            model.model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    largest = 0.0
    for where, magnitude in largest_of.items():
        if not math.isfinite(magnitude):
            return [
                Finding(
                    "activations",
                    wrong=True,
                    message=f"hidden states are not finite from {where} on",
                    where=where,
                    fix="load it with dtype float32; if they still are not, it is damaged",
                )
            ], float("inf")
        largest = max(largest, magnitude)
    if largest > FLOAT16_MAX:
        return [
            Finding(
                "activations",
                wrong=False,
                message=f"hidden states reach {largest:.0f}, more than float16 holds",
                fix="compute in bfloat16",
            )
        ], largest
    return [], largest


def check_text(model: LoadedModel) -> tuple[list[Finding], dict[str, Any]]:
    """Score the paragraph and judge three greedy replies; one that was not trained is left out.

    Returns:
        What is wrong, and what was measured.
    """
    from gptq_loader_plugin.measure.perplexity import measure_perplexity, sample_text

    window = min(WINDOW, model.context)
    score = measure_perplexity(model, sample_text(), windows=1, window_tokens=window).perplexity
    facts: dict[str, Any] = {"perplexity": round(score, 2), "trained": is_trained(model.model)}
    if not facts["trained"]:
        message = "its embeddings are random: it was never trained, so its text is not judged"
        return [Finding("text", wrong=False, message=message)], facts
    replies = [_reply(model, question) for question in QUESTIONS]
    facts["replies"] = [text for text, _ in replies]
    findings = list(_of_score(score))
    findings += [it for text, ids in replies for it in _of_reply(text, ids, wrong=bool(findings))]
    return findings, facts


def _of_score(score: float) -> list[Finding]:
    if not score < SUSPICIOUS:  # not a number is no good either
        return [
            Finding(
                "text",
                wrong=not score < GIBBERISH,
                message=f"it scores plain English {score:.4g}, and a working model some 5 to 100",
                fix="compare with the model it was made of, or another branch",
            )
        ]
    return []


def _reply(model: LoadedModel, question: str) -> tuple[str, list[int]]:
    from gptq_loader_plugin.generation.options import GenerateOptions

    options = GenerateOptions(temperature=0, max_new_tokens=REPLY)
    text = "".join(
        piece.text for piece in model.chat([{"role": "user", "content": question}], options)
    )
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return text, ids


def _of_reply(text: str, ids: Sequence[int], *, wrong: bool) -> list[Finding]:
    """Name what is wrong with a reply's form; alone it is a note, since small models loop too."""
    if len(ids) < 8:
        return []
    words = None
    share = Counter(ids).most_common(1)[0][1] / len(ids)
    runs = [tuple(ids[at : at + 4]) for at in range(len(ids) - 3)]
    scripts = _scripts(text)
    if share > SAME_TOKEN:
        words, wrong = f"a reply is one token in {share:.0%}", True
    elif len(scripts) >= SCRIPTS:
        words = f"a reply mixes scripts: {', '.join(sorted(scripts))}"
    elif len(set(runs)) < DISTINCT * len(runs):
        words = "a reply repeats itself"
    if words is None:
        return []
    return [Finding("text", wrong=wrong, message=words, where=text[:60])]


def _scripts(text: str) -> set[str]:
    """Name the scripts of a text's letters, as Unicode calls them: LATIN, CJK, CYRILLIC."""
    names = (unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    return {name for name in names if name}
