"""Write a GGUF file of random weights in the shape of a known model, as llama.cpp quantises one.

    python bench/gguf_shapes.py NAME FILE [--type Q4_0|Q4_K_M]

For benchmarks against llama.cpp: every tensor has the type its own program gives it, the head six
or eight bits among them, and values near one. There is no vocabulary in the file.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from shapes import Shape

__all__ = ["MIXES", "token_bytes", "write_gguf"]

Type = GGMLQuantizationType
MIXES = ("Q4_0", "Q4_K_M")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Rows that are no multiple of 256 cannot be K-quants: llama.cpp takes these in their place.
NARROW = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
K_SCALE = 8  # of the 32 or 16 values that share a small scale, the same everywhere
# Each type's spread of values about zero, its scale being one.
SPREAD = {
    Type.Q4_0: math.sqrt((16**2 - 1) / 12),
    Type.Q5_0: math.sqrt((32**2 - 1) / 12),
    Type.Q8_0: math.sqrt((256**2 - 1) / 12),
    Type.Q4_K: K_SCALE * math.sqrt((16**2 - 1) / 12),
    Type.Q6_K: K_SCALE * math.sqrt((64**2 - 1) / 12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=MIXES, default="Q4_0")
    arguments = parser.parse_args()
    print(write_gguf(arguments.file, SHAPES[arguments.name], mix=arguments.type))


def write_gguf(file: Path, shape: Shape, *, mix: str, seed: int = 0) -> Path:
    """Write `file`, unless it is there; the same arguments make the same bytes."""
    if file.is_file():
        return file
    random = np.random.Generator(np.random.SFC64(seed))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    writer = GGUFWriter(partial, "qwen3moe" if shape.experts else "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.top_k)
        writer.add_expert_feed_forward_length(shape.inner)
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    tensors = list(_tensors(shape, mix))
    for name, rows, columns, kind in tensors:
        block, size = GGML_QUANT_SIZES[kind]
        count = rows * columns // block * size
        if kind == Type.F32:
            sizes = [columns] if rows == 1 else [rows, columns]
            writer.add_tensor_info(name, sizes, np.dtype(np.float32), count)
        else:
            stored = [rows, columns // block * size]
            if "_exps" in name:
                stored = [shape.experts, rows // shape.experts, columns // block * size]
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, rows, columns, kind in tensors:
        residual = "attn_output" in name or "ffn_down" in name
        gain = 1 / math.sqrt(2 * shape.layers) if residual else 1.0
        gain *= math.sqrt(columns) if name == "token_embd.weight" else 1.0
        writer.write_tensor_data(_values(kind, rows, columns, gain / math.sqrt(columns), random))
    writer.close()
    partial.replace(file)
    return file


def token_bytes(file: Path) -> int:
    """Count the bytes read for a token of a reply: all but an embedding with a head beside it."""
    sizes = {it.name: int(it.n_bytes) for it in GGUFReader(file).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _tensors(shape: Shape, mix: str) -> Iterator[tuple[str, int, int, Type]]:
    """List (name, rows, columns, type), as llama.cpp's own quantiser chooses them."""
    usual, better = (Type.Q4_0, Type.Q4_0) if mix == "Q4_0" else (Type.Q4_K, Type.Q6_K)
    head = Type.Q6_K
    embedding = head if shape.tied else usual
    yield "token_embd.weight", shape.vocabulary, shape.hidden, _fit(embedding, shape.hidden)
    for i in range(shape.layers):
        more = better if _more_bits(i, shape.layers) else usual
        for name, (inputs, outputs, _) in shape.linears().items():
            if ".experts." in name and ".experts.0." not in name:
                continue  # they are one tensor
            part = name.replace("experts.0.", "")
            kind = more if part in ("self_attn.v_proj", "mlp.down_proj") else usual
            many = shape.experts if part != name else 1
            stored = f"blk.{i}.{NAMES[part]}{'_exps' if part != name else ''}.weight"
            yield stored, many * outputs, inputs, _fit(kind, inputs)
        if shape.experts:
            yield f"blk.{i}.ffn_gate_inp.weight", shape.experts, shape.hidden, Type.F32
            yield f"blk.{i}.attn_q_norm.weight", 1, shape.head_size, Type.F32
            yield f"blk.{i}.attn_k_norm.weight", 1, shape.head_size, Type.F32
        yield f"blk.{i}.attn_norm.weight", 1, shape.hidden, Type.F32
        yield f"blk.{i}.ffn_norm.weight", 1, shape.hidden, Type.F32
    yield "output_norm.weight", 1, shape.hidden, Type.F32
    if not shape.tied:
        yield "output.weight", shape.vocabulary, shape.hidden, _fit(head, shape.hidden)


def _more_bits(layer: int, layers: int) -> bool:
    """Say whether Q4_K_M gives a layer's values and its last projection six bits."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _fit(kind: Type, columns: int) -> Type:
    return NARROW.get(kind, kind) if columns % 256 else kind


def _values(
    kind: Type, rows: int, columns: int, gain: float, random: np.random.Generator
) -> NDArray[Any]:
    """Make random blocks whose values have this standard deviation."""
    if kind == Type.F32 and rows > 1:  # a router
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain)
    if kind == Type.F32:
        return np.ones(columns, dtype=np.float32)
    block, size = GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    data = random.integers(0, 256, (count, size), dtype=np.uint8)
    scale = np.array([gain / SPREAD[kind]], dtype=np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        data[:, 192:208] = K_SCALE
        data[:, 208:210] = scale
        return data.reshape(rows, -1)
    data[:, :2] = scale
    if kind == Type.Q4_K:  # the offset puts the middle of the codes at zero
        data[:, 2:4] = np.array([7.5 * gain / SPREAD[kind]], dtype=np.float16).view(np.uint8)
        data[:, 4:12] = K_SCALE
        data[:, 12:16] = K_SCALE << 4 | K_SCALE
    return data.reshape(rows, -1)


if __name__ == "__main__":
    main()
