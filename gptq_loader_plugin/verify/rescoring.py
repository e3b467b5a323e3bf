"""Find what is wrong with a trained model by scoring a text again, with one thing changed.

Every tensor may be sound, and a config or the order of the layers wrong. The text is scored with
other rotary settings, and without one attention or MLP at a time: what is right is missed, and
what is wrong is not.
"""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.measure.perplexity import sample_text
from gptq_loader_plugin.verify.report import Diagnosis
from gptq_loader_plugin.verify.text import GIBBERISH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["Gain", "diagnose_scores", "diagnose_tokens", "try_rotations", "try_without"]

WINDOWS, WINDOW = 4, 64  # tokens, spread over the sample text
LONG, LONG_WINDOW = 2, 256  # positions matter more in longer windows
# SmolLM2 with a base of 10,000 for 100,000 loses .08 to .14 a token, and with half or twice the
# right one .00 to .02.
BETTER_ROTATION = 0.05
BASES = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
# With two layers exchanged, SmolLM2 scores a text .08 (o_proj) to 3 (down_proj) better without the
# worse of them. By so few tokens one of 60 parts seems of no use by chance: without a right one the
# demo scored them .048 better, and all of the text .005 worse. So the likeliest have to be better
# left out of all of it.
BETTER_WITHOUT = 0.045
# What leaves a text worse than gibberish does not explain it. Wrong rotary settings leave SmolLM2's
# perplexity at 43 to 58; two up_proj exchanged make it 156,000, and with another base, or without
# any part, it is still 70,000.
LIKELIEST = 3
TEXT_WINDOW = 128
# Of SmolLM2's 9,283 pairs such as "the" and "The" the embeddings have a cosine of .75, of the same
# tokens in other pairs .34; by a tokenizer of another model both are .41.
NEARER = 0.05
PAIRS = 500
BATCH = 4  # windows at a time: logits of a large vocabulary take 600 kB a token
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "block_sparse_moe", "feed_forward", "ffn")


@dataclass(frozen=True, slots=True)
class Gain:
    """A change by which a text is scored better.

    Attributes:
        nats: by how much, for a token.
        diagnosis: what that says.
    """

    nats: float
    diagnosis: Diagnosis


def diagnose_scores(
    model: LoadedModel, progress: Callable[[Progress], None]
) -> Iterator[Diagnosis]:
    """Find what is wrong by the change that a text is scored best with.

    Where a layer is wrong, other rotary settings may help a little too, and the other way about.
    """
    tokens = list(diagnose_tokens(model))
    if tokens:
        yield from tokens
        return
    gains = [it for it in (try_rotations(model), try_without(model, progress)) if it is not None]
    if gains:
        yield max(gains, key=lambda gain: gain.nats).diagnosis


def diagnose_tokens(model: LoadedModel) -> Iterator[Diagnosis]:
    """Compare the embeddings of words that differ in a space or a capital alone.

    Training makes such words alike. Where they are no more alike than any two, the tokenizer's ids
    are not the rows that they were trained as.
    """
    import torch

    vocabulary: dict[str, int] = model.tokenizer.get_vocab()
    weight: torch.Tensor = _embedding(model)
    pairs = [
        (index, vocabulary[other])
        for token, index in vocabulary.items()
        for other in _variants(token)
        if max(index, vocabulary.get(other, len(weight))) < len(weight)
    ]
    if len(pairs) < PAIRS:
        return
    left, right = torch.tensor(pairs).t()
    shuffled = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(0))]
    like = torch.nn.functional.cosine_similarity
    near = float(like(weight[left].float(), weight[right].float()).mean())
    any_two = float(like(weight[left].float(), weight[shuffled].float()).mean())
    if near - any_two < NEARER:
        yield Diagnosis(
            "the tokenizer is of another model: its ids are not the rows that the embedding was "
            "trained with",
            f"{len(pairs)} pairs of words like 'the' and 'The' have embeddings no more alike "
            f"({near:.2f}) than any two words ({any_two:.2f})",
            "copy the tokenizer's files of the model that this was made of",
        )


def try_rotations(model: LoadedModel) -> Gain | None:
    """Score a text with other bases of the rotary embedding, and without its scaling."""
    rotary = [part for part in model.model.modules() if _is_rotary(part)]
    if len(rotary) != 1:
        return None
    windows = _windows(model, LONG, LONG_WINDOW)
    if windows is None:
        return None
    stated = dict(getattr(rotary[0].config, "rope_parameters", None) or {})
    base = float(stated.get("rope_theta") or BASES[0])
    own = _score(model, windows)
    best, settings = own, stated
    for other in _settings(base, stated):
        with _rotated(rotary[0], other):
            score = _score(model, windows)
        if score < best:
            best, settings = score, other
    if own - best <= BETTER_ROTATION or best > math.log(GIBBERISH):
        return None
    diagnosis = Diagnosis(
        f"the rotary settings in config.json are wrong ({_words(stated)}): text is scored better "
        f"with {_words(settings)}",
        f"perplexity {math.exp(own):.4g} as it is, {math.exp(best):.4g} with that",
        "copy rope_theta, rope_scaling and rope_parameters from the model that this was made of; a "
        "model is trained with one setting of them",
    )
    return Gain(own - best, diagnosis)


def try_without(model: LoadedModel, progress: Callable[[Progress], None]) -> Gain | None:
    """Score a text without each attention and each MLP: a right one is missed."""
    parts = _parts(model.model)
    windows = _windows(model, WINDOWS, WINDOW)
    if not parts or windows is None:
        return None
    few, scores = _score(model, windows), {}
    for count, (name, part) in enumerate(parts.items(), start=1):
        progress(Progress("without", count, len(parts), "parts", name))
        with _left_out(part):
            scores[name] = _score(model, windows)
    likeliest = sorted(scores, key=scores.__getitem__)[:LIKELIEST]
    likeliest = [name for name in likeliest if few - scores[name] > BETTER_WITHOUT]
    if not likeliest:
        return None
    text = _whole_text(model)
    whole = _score(model, text)
    for name in likeliest:
        with _left_out(parts[name]):
            scores[name] = _score(model, text)
    worst = min(likeliest, key=scores.__getitem__)
    if whole - scores[worst] <= BETTER_WITHOUT:
        return None
    which = f"the layers of {worst}" if scores[worst] < math.log(GIBBERISH) else "some layers"
    diagnosis = Diagnosis(
        f"{which} are not the ones that belong there: they were swapped with another block's or "
        "with each other, or are damaged",
        f"text is scored better without them: perplexity {math.exp(scores[worst]):.4g}, and "
        f"{math.exp(whole):.4g} with them",
        "download the checkpoint again; if it was merged or converted, do that again",
    )
    return Gain(whole - scores[worst], diagnosis)


def _embedding(model: LoadedModel) -> torch.Tensor:
    embedding: Any = model.model.get_input_embeddings()
    weight: torch.Tensor = embedding.weight.detach()
    return weight


def _variants(token: str) -> Iterator[str]:
    """Name the words that differ from a token in what training makes alike."""
    for mark in ("Ġ", "▁"):
        if token.startswith(mark) and len(token) > 3 and token[1:].isalpha():
            yield token[1:]
    if len(token) > 2 and token.isalpha() and token.islower():
        yield token.capitalize()


def _windows(model: LoadedModel, count: int, length: int) -> torch.Tensor | None:
    """Cut windows from the sample text, spread over it: [count, length]."""
    import torch

    ids = torch.tensor(model.tokenizer(sample_text(), verbose=False)["input_ids"])
    length = min(length, model.context)
    if len(ids) < count * length:
        return None
    rows = len(_embedding(model))
    step = (len(ids) - length) // max(count - 1, 1)
    windows = torch.stack([ids[step * i : step * i + length] for i in range(count)])
    return windows.to(model.model.device) if int(windows.max()) < rows else None


def _whole_text(model: LoadedModel) -> torch.Tensor:
    """Cut the sample text into windows, one after the other: [count, length]."""
    import torch

    ids = torch.tensor(model.tokenizer(sample_text(), verbose=False)["input_ids"])
    length = min(TEXT_WINDOW, model.context)
    return ids[: len(ids) // length * length].view(-1, length).to(model.model.device)


def _score(model: LoadedModel, windows: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of a token."""
    import torch

    total, cross_entropy = 0.0, torch.nn.functional.cross_entropy
    for some in windows.split(BATCH):
        with torch.inference_mode():
            logits = model.model(input_ids=some, use_cache=False).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten())) * len(some)
    score = total / len(windows)
    return score if math.isfinite(score) else math.inf


def _is_rotary(part: Any) -> bool:  # noqa: ANN401 - a module
    return hasattr(part, "inv_freq") and hasattr(part, "config")


def _settings(base: float, stated: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for other in (base, *BASES):
        plain = {"rope_type": "default", "rope_theta": other}
        if {**stated, **plain} != stated or set(stated) - set(plain):
            yield plain


def _words(settings: dict[str, Any]) -> str:
    kind = settings.get("rope_type", "default")
    words = f"rope_theta {settings.get('rope_theta', BASES[0]):g}"
    factor = settings.get("factor")
    return words if kind == "default" else f"{words}, {kind} scaling by {factor}"


@contextmanager
def _rotated(rotary: Any, settings: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Give a rotary embedding other settings for a while."""
    config = copy.deepcopy(rotary.config)
    config.rope_parameters = {
        **{
            name: value
            for name, value in (config.rope_parameters or {}).items()
            if name == "partial_rotary_factor"
        },
        **settings,
    }
    kept, scaling = rotary.inv_freq, getattr(rotary, "attention_scaling", 1.0)
    other = type(rotary)(config)
    rotary.inv_freq, rotary.attention_scaling = other.inv_freq.to(kept), other.attention_scaling
    try:
        yield
    finally:
        rotary.inv_freq, rotary.attention_scaling = kept, scaling


def _parts(model: Any) -> dict[str, Any]:  # noqa: ANN401 - transformers' model
    """Find the attention and the MLP of each block, by their names."""
    parts = {}
    for name, module in model.named_modules():
        stem, _, last = name.rpartition(".")
        if last in (*ATTENTIONS, *MLPS) and stem.rpartition(".")[2].isdigit():
            parts[name] = module
    return parts


@contextmanager
def _left_out(part: Any) -> Iterator[None]:  # noqa: ANN401 - a module
    """Have a module add nothing for a while."""
    import torch

    def zero(_module: object, _inputs: object, output: Any) -> Any:  # noqa: ANN401
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = part.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
