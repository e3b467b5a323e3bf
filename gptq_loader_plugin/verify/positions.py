"""Look at numbers of a config that tensors do not tell: rotary settings, context, epsilon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.planning.model_shape import shape_of
from gptq_loader_plugin.verify.report import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["diagnose_context", "diagnose_epsilon", "diagnose_rotary"]

# Bases that were published lie between these: 10,000 of the first, 283,461,213 of the longest.
BASES = (1e3, 1e9)
# What a base is trained for at the most: (up to this base, tokens). Mistral 7B v0.1 goes beyond,
# by a sliding window.
REACH = ((1e4, 16_384), (2e5, 32_768), (1e6, 262_144))
# What models of a vocabulary have in common: (model type, vocab_size) -> bases.
USUAL: dict[tuple[str, int], tuple[float, ...]] = {
    ("llama", 128_256): (500_000.0,),
    ("qwen2", 151_936): (1_000_000.0, 10_000.0, 10_000_000.0),
    ("qwen3", 151_936): (1_000_000.0, 5_000_000.0, 10_000_000.0),
    ("gemma", 256_000): (10_000.0,),
    ("gemma2", 256_000): (10_000.0,),
    ("phi3", 32_064): (10_000.0,),
    ("llama", 32_000): (10_000.0, 1_000_000.0),
    ("llama", 32_016): (1_000_000.0,),
    ("mistral", 32_000): (10_000.0, 1_000_000.0),
    ("mistral", 32_768): (1_000_000.0,),
}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
EPSILON_RANGE = (1e-12, 1e-2)
BELIEVED = 1_000_000  # a tokenizer's model_max_length from here on means that nobody set it
OWN = "copy rope_theta, rope_scaling and rope_parameters from the model that this was made of"


def diagnose_rotary(checkpoint: Checkpoint) -> Iterator[Diagnosis]:
    """Find rotary settings that contradict each other, or that no such model has."""
    table = _text_config(checkpoint)
    parameters = _parameters(table)
    stated = {
        name: float(part["rope_theta"])
        for name, part in (("rope_theta", table), ("rope_parameters", parameters))
        if _is_number(part.get("rope_theta"))
    }
    evidence = ", ".join(f"{name} {value:g}" for name, value in stated.items())
    if len(set(stated.values())) > 1:
        yield Diagnosis(
            "config.json has two bases of the rotary embedding: programs differ in which they take",
            evidence,
            OWN,
        )
    usual = USUAL.get((str(table.get("model_type")), int(table.get("vocab_size") or 0)))
    for value in sorted(set(stated.values())):
        if not BASES[0] <= value <= BASES[1]:
            yield Diagnosis(
                f"the base of the rotary embedding (rope_theta) is {value:g}, which no model has",
                evidence,
                OWN,
            )
        elif usual and value not in usual and _kind(parameters) == "default":
            yield Diagnosis(
                f"the base of the rotary embedding (rope_theta) is {value:g}, and models with "
                f"this vocabulary have {' or '.join(f'{it:g}' for it in usual)}",
                evidence,
                OWN,
            )
    yield from _scaling(table, parameters)


def diagnose_context(checkpoint: Checkpoint, options: LoadOptions) -> Iterator[Diagnosis]:
    """Find a context that is longer than the model was trained for."""
    table = _text_config(checkpoint)
    claimed = table.get("max_position_embeddings")
    known = _model_context(checkpoint)
    if options.context is not None and known is not None and options.context > known:
        yield Diagnosis(
            f"the context is too long for this model: {options.context:,} tokens are wanted of it, "
            f"and it takes {known:,}",
            f"max_position_embeddings is {claimed} in config.json",
            f"use --context {known}, or a model that was trained for more",
            about="options",
        )
    if not isinstance(claimed, int):
        return
    parameters = _parameters(table)
    scaled = _kind(parameters) != "default"
    base: Any = parameters.get("rope_theta", table.get("rope_theta"))
    reach = next((tokens for limit, tokens in REACH if _is_number(base) and base <= limit), None)
    if reach is not None and claimed > reach and not scaled and not table.get("sliding_window"):
        yield Diagnosis(
            f"the context is too long: config.json claims {claimed:,} tokens, and models with "
            f"rope_theta {base:g} are trained for {reach:,} at the most",
            f"max_position_embeddings is {claimed}, without rope_scaling",
            "set max_position_embeddings to what the model that this was made of has, or load it "
            f"with --context {min(reach, 4096)}",
        )
    file = checkpoint.folder / "tokenizer_config.json"
    longest = read_json(file).get("model_max_length") if file.is_file() else None
    if isinstance(longest, int) and longest < min(claimed, BELIEVED) and not scaled:
        yield Diagnosis(
            f"the context is too long: config.json claims {claimed:,} tokens, and the tokenizer "
            f"was made for {longest:,}",
            f"model_max_length is {longest} in tokenizer_config.json",
            f"load it with --context {longest}, if replies turn to nonsense beyond that",
        )


def diagnose_epsilon(checkpoint: Checkpoint) -> Iterator[Diagnosis]:
    """Find an epsilon of the norms that no model has."""
    table = _text_config(checkpoint)
    for name in EPSILONS:
        value: Any = table.get(name)
        if _is_number(value) and not EPSILON_RANGE[0] <= value <= EPSILON_RANGE[1]:
            yield Diagnosis(
                f"{name} is {value:g}, which no model has: the norms are wrong",
                f"config.json; models have {EPSILON_RANGE[0]:g} to {EPSILON_RANGE[1]:g}",
                f"copy {name} from the config.json of the model that this was made of",
            )


def _scaling(table: dict[str, Any], parameters: dict[str, Any]) -> Iterator[Diagnosis]:
    """Compare a scaling's factor with the two lengths it stands between."""
    kind = _kind(parameters)
    factor: Any = parameters.get("factor")
    original = parameters.get("original_max_position_embeddings")
    longest = table.get("max_position_embeddings")
    if kind == "default":
        return
    if _is_number(factor) and not 1 <= factor <= 64:
        yield Diagnosis(
            f"the rotary embedding is scaled by {factor:g} ({kind}), which no model is",
            f"rope_scaling in config.json: {parameters}",
            OWN,
        )
    if isinstance(original, int) and isinstance(longest, int) and original > longest:
        yield Diagnosis(
            "the rotary embedding is scaled from a longer context to a shorter one",
            f"original_max_position_embeddings {original}, max_position_embeddings {longest}",
            OWN,
        )


def _model_context(checkpoint: Checkpoint) -> int | None:
    try:
        shape = shape_of(checkpoint)
    except GPTQLoaderError:
        return None
    return max(shape.context or 0, shape.longest_context or 0) or None


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.folder / "config.json"
    table = read_json(file) if file.is_file() else {}
    text = table.get("text_config")
    return text if isinstance(text, dict) else table


def _parameters(table: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers 5 calls rope_parameters, and 4 rope_scaling."""
    for name in ("rope_parameters", "rope_scaling"):
        value = table.get(name)
        if isinstance(value, dict):
            return value
    return {}


def _kind(parameters: dict[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
