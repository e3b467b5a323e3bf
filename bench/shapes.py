"""Make a checkpoint of random weights in the shape of a known model, without the model.

    python bench/shapes.py NAME FOLDER [--bits 4] [--group-size 128] [--act-order] [--layers N]

NAME is SmolLM2-135M, TinyLlama-1.1B, Llama-2-7B, or SmolLM2-135M-5 and Qwen3-30B-A3B-6, which have
five of the model's 30 blocks and six of 48. For benchmarks: codes are random words, scales keep
every activation near one, so logits are finite and no reply degenerates. The tokenizer has one
token a byte and fills the vocabulary up. The same arguments make the same bytes; a folder with a
config.json is finished and is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS, pack_columns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["BOS", "EOS", "SHAPES", "Shape", "make_checkpoint", "write_tokenizer"]

SHARD_BYTES = 1 << 30
BOS, EOS = 256, 257  # after a token for every byte


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-like model, or of a mixture like Qwen3's, and what its config says.

    A mixture has `experts` of `inner` features each in every block, of which a token takes `top_k`.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tied: bool = False
    rope_theta: float = 10000.0
    eps: float = 1e-5
    experts: int = 0
    top_k: int = 0
    head_dim: int = 0  # where heads are not as wide together as `hidden`

    @property
    def head_size(self) -> int:
        """The features of a head."""
        return self.head_dim or self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int, str]]:
        """Give (in_features, out_features, name of the input) of a block's linear layers."""
        queries, keys = self.head_size * self.heads, self.head_size * self.kv_heads
        found = {
            "self_attn.q_proj": (self.hidden, queries, "attention"),
            "self_attn.k_proj": (self.hidden, keys, "attention"),
            "self_attn.v_proj": (self.hidden, keys, "attention"),
            "self_attn.o_proj": (queries, self.hidden, "output"),
        }
        parts = [f"mlp.experts.{i}." for i in range(self.experts)] or ["mlp."]
        for part in parts:
            found[f"{part}gate_proj"] = self.hidden, self.inner, "mlp"
            found[f"{part}up_proj"] = self.hidden, self.inner, "mlp"
            found[f"{part}down_proj"] = self.inner, self.hidden, "inner"
        return found


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49152, 8192, tied=True, rope_theta=100000.0),
    # Five of its thirty blocks, for contexts that thirty take many minutes to read.
    "SmolLM2-135M-5": Shape(576, 1536, 5, 9, 3, 49152, 65536, tied=True, rope_theta=100000.0),
    "TinyLlama-1.1B": Shape(2048, 5632, 22, 32, 4, 32000, 2048),
    "Llama-2-7B": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    # Qwen3-30B-A3B in all but its blocks, of which it has 48.
    "Qwen3-30B-A3B-6": Shape(
        2048, 768, 6, 32, 4, 151936, 4096,
        rope_theta=1e6, eps=1e-6, experts=128, top_k=8, head_dim=128,
    ),
}  # fmt: skip


def make_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    bits: int = 4,
    group_size: int = 128,
    act_order: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `folder`, shard by shard, unless a finished one is there.

    Args:
        folder: where to; it is made.
        shape: the model's sizes.
        bits: the width of a code, 2 to 8; 5, 6 and 7 are planar.
        group_size: rows that share a scale, or -1.
        act_order: whether the rows' groups are shuffled, alike for layers with one input.
        seed: of everything random.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.SFC64(seed))
    quantization: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.1,
        "desc_act": act_order,
        "sym": True,
        "true_sequential": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if bits in CONTINUOUS_BITS else "gptq_p",
        "model_file_base_name": "model",
    }
    _write_shards(folder, _tensors(shape, bits, group_size, random, act_order=act_order))
    write_tokenizer(folder, shape.vocabulary, shape.context)
    _write_json(folder / "quantize_config.json", quantization)
    _write_json(
        folder / "config.json", {**_model_config(shape), "quantization_config": quantization}
    )
    return folder


def _tensors(
    shape: Shape, bits: int, group_size: int, random: np.random.Generator, *, act_order: bool
) -> Iterator[tuple[str, NDArray[Any]]]:
    table = (shape.vocabulary, shape.hidden)
    embedding = random.standard_normal(table, dtype=np.float32)
    if shape.tied:  # it is the head too
        embedding /= np.float32(math.sqrt(shape.hidden))
    ones = np.ones(shape.hidden, dtype=np.float16)
    yield "model.embed_tokens.weight", embedding.astype(np.float16)
    for block in range(shape.layers):
        orders: dict[str, NDArray[np.int32]] = {}
        for name, (rows, columns, source) in shape.linears().items():
            size = group_size if group_size > 0 else rows
            g_idx = orders.setdefault(
                source, (random.permutation(rows) if act_order else np.arange(rows)) // size
            ).astype(np.int32)
            # a block adds to what came before: more blocks, the less each
            gain = 1 / math.sqrt(2 * shape.layers) if source in ("output", "inner") else 1.0
            layer = _layer(rows, columns, bits, random, gain=gain, groups=-(-rows // size))
            for part, tensor in ({**layer, "g_idx": g_idx}).items():
                yield f"model.layers.{block}.{name}.{part}", tensor
        yield f"model.layers.{block}.input_layernorm.weight", ones
        yield f"model.layers.{block}.post_attention_layernorm.weight", ones
        if shape.experts:
            router = random.standard_normal((shape.experts, shape.hidden), dtype=np.float32)
            router /= np.float32(math.sqrt(shape.hidden))
            yield f"model.layers.{block}.mlp.gate.weight", router.astype(np.float16)
            for name in ("q_norm", "k_norm"):
                weight = np.ones(shape.head_size, dtype=np.float16)
                yield f"model.layers.{block}.self_attn.{name}.weight", weight
    yield "model.norm.weight", ones
    if not shape.tied:
        head = random.standard_normal(table, dtype=np.float32)
        head /= np.float32(math.sqrt(shape.hidden))
        head[[BOS, EOS]] = 0.0  # a greedy reply never ends
        yield "lm_head.weight", head.astype(np.float16)


def _layer(
    rows: int, columns: int, bits: int, random: np.random.Generator, *, gain: float, groups: int
) -> dict[str, NDArray[Any]]:
    words = random.integers(0, 1 << 64, rows * bits // 64 * columns, dtype=np.uint64)
    middle = 1 << (bits - 1)
    stored = middle - 1 if bits in CONTINUOUS_BITS else middle
    zeros = np.full((groups, columns), stored, dtype=np.uint8)
    # codes spread evenly over 2**bits values have this standard deviation
    spread = math.sqrt((4**bits - 1) / 12)
    scales = random.random((groups, columns), dtype=np.float32) * np.float32(0.2) + np.float32(0.9)
    scales *= np.float32(gain / (spread * math.sqrt(rows)))
    layout = "continuous" if bits in CONTINUOUS_BITS else "planar"
    return {
        "qweight": words.view(np.int32).reshape(rows * bits // 32, columns),
        "qzeros": pack_columns(zeros, bits, layout),
        "scales": scales.astype(np.float16),
    }


def _write_shards(folder: Path, tensors: Iterator[tuple[str, NDArray[Any]]]) -> None:
    shards: list[dict[str, None]] = []
    shard: dict[str, NDArray[Any]] = {}
    total = 0

    def write() -> None:
        save_file(shard, folder / f".{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(dict.fromkeys(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(it.nbytes for it in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
        total += tensor.nbytes
    write()
    table = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        (folder / f".{i}.partial").chmod(0o644)
        (folder / f".{i}.partial").replace(folder / file)
        table.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        _write_json(folder / "model.safetensors.index.json", index)


def _model_config(shape: Shape) -> dict[str, Any]:
    mixture = {
        "head_dim": shape.head_size,
        "moe_intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
    }
    kind, name = ("qwen3_moe", "Qwen3Moe") if shape.experts else ("llama", "Llama")
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **(mixture if shape.experts else {}),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float16",
    }


def write_tokenizer(folder: Path, vocabulary: int, context: int) -> None:
    """Write a tokenizer of one token a byte, filled up to a vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {letter: i for i, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    tokens |= {f"Ġ{i}": i for i in range(EOS + 1, vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": context,
        },
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--layers", type=int, help="blocks, fewer than the model has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.name]
    made = make_checkpoint(
        arguments.folder,
        replace(shape, layers=arguments.layers or shape.layers),
        bits=arguments.bits,
        group_size=arguments.group_size,
        act_order=arguments.act_order,
        seed=arguments.seed,
    )
    print(made)


if __name__ == "__main__":
    main()
