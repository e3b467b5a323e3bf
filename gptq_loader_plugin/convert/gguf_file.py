"""A GGUF file, written a layer at a time by the gguf package."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.to_jinja import as_jinja
from gptq_loader_plugin.convert.gguf_blocks import block_type, blocks, blocks_error
from gptq_loader_plugin.convert.gguf_shapes import (
    check_computed_alike,
    family_of,
    rope_tensors,
    write_shape,
)
from gptq_loader_plugin.convert.gguf_vocabulary import read_vocabulary
from gptq_loader_plugin.convert.layers import has_bias
from gptq_loader_plugin.convert.pieces import ConvertedLayer
from gptq_loader_plugin.errors import OptionInvalid, TemplateError, UnsupportedFormat
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.convert.gguf_blocks import BlockType
    from gptq_loader_plugin.convert.gguf_shapes import Family
    from gptq_loader_plugin.convert.options import ConvertOptions
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["write_gguf"]

# A wrapper's text part has llama.cpp's names once its own prefix is gone.
PREFIXES = re.compile(r"^(model\.)?language_model\.(model\.)?")
SKIPPED = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|^(model\.)?(vision|multi_modal)")


class Tensor(NamedTuple):
    """A tensor to write: its name there, its type, its bytes' shape, and how to make them."""

    name: str
    type_name: str
    byte_shape: tuple[int, ...]
    make: Callable[[], NDArray[np.uint8]]
    layer: str = ""


class Layers:
    """What became of the layers that were written so far."""

    def __init__(self) -> None:
        self.done: list[ConvertedLayer] = []


def write_gguf(
    checkpoint: Checkpoint,
    file: Path,
    *,
    options: ConvertOptions,
    progress: Callable[[Progress], None],
) -> tuple[list[ConvertedLayer], list[str]]:
    """Write a checkpoint as a GGUF file; return what each layer became, and warnings.

    Raises:
        UnsupportedFormat: llama.cpp does not know the model, or its tokenizer.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise OptionInvalid(
            "GGUF files are written by the package gguf, which is not installed",
            hint="install it: pip install gguf",
        ) from error
    from transformers import AutoConfig

    model_type = checkpoint.model_config["model_type"]
    family = family_of(model_type, checkpoint.path)
    fields = {name: it for name, it in checkpoint.model_config.items() if name != "model_type"}
    config = AutoConfig.for_model(model_type, **fields).get_text_config()
    check_computed_alike(config, family, checkpoint.path)
    layers = Layers()
    tensors = _tensors(checkpoint, config, family, layers)
    writer = GGUFWriter(file, family.architecture, use_temp_file=False)
    notes = write_shape(writer, config, family)
    _write_general(writer, checkpoint, tensors)
    notes += _write_vocabulary(writer, checkpoint, tensors, options)
    for tensor in tensors:
        size = int(np.prod(tensor.byte_shape))
        kind = GGMLQuantizationType[tensor.type_name]
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors):
            progress(Progress("convert", done, len(tensors), "tensors", tensor.name))
            writer.write_tensor_data(tensor.make())
        progress(Progress("convert", len(tensors), len(tensors), "tensors"))
        writer.flush()
    finally:
        writer.close()
    return layers.done, notes


def _write_general(writer: GGUFWriter, checkpoint: Checkpoint, tensors: list[Tensor]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_quantized_by("gptq-loader convert, from GPTQ")
    kinds = Counter(tensor.type_name for tensor in tensors if tensor.layer)
    kind = kinds.most_common(1)[0][0]
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _write_vocabulary(
    writer: GGUFWriter, checkpoint: Checkpoint, tensors: list[Tensor], options: ConvertOptions
) -> list[str]:
    from gguf import SpecialVocab

    rows = next(it.byte_shape[0] for it in tensors if it.name == "token_embd.weight")
    vocabulary = read_vocabulary(checkpoint.folder, rows=rows, pretokenizer=options.pretokenizer)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pretokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    special = SpecialVocab(checkpoint.folder, load_merges=vocabulary.model == "gpt2", n_vocab=rows)
    template = find_template(checkpoint.folder, card=checkpoint.card, rows=rows)
    try:
        special.chat_template = as_jinja(template)
    except TemplateError as error:
        special.chat_template = None
        notes = [f"there is no chat template in the file: {error.message}"]
    else:
        notes = []
    special.add_to_gguf(writer, quiet=True)
    return notes


def _tensors(
    checkpoint: Checkpoint,
    config: Any,  # noqa: ANN401 - transformers' config
    family: Family,
    layers: Layers,
) -> list[Tensor]:
    """Plan every tensor, layers and others, in the order of the checkpoint's files."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(it for it, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    biased = has_bias(checkpoint)
    owner = {part: name for name in checkpoint.layers for part in checkpoint.layer_tensors(name)}

    def named(tensor: str) -> str:
        bare = PREFIXES.sub("model.", tensor)
        name: str | None = names.get_name(bare, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedFormat(
                f"llama.cpp's {family.architecture} has no tensor for {tensor}",
                path=checkpoint.path,
                hint="convert to dense, and give that to llama.cpp's convert_hf_to_gguf",
            )
        return name

    tied = bool(getattr(config, "tie_word_embeddings", False))
    planned: dict[str, Tensor] = {}
    for tensor in checkpoint.headers:
        layer = owner.get(tensor)
        if layer is not None:
            is_bias = tensor == f"{layer}.bias"
            if is_bias and biased(layer):
                planned[tensor] = _plain(checkpoint, tensor, named(tensor), config, family)
            elif not is_bias and layer not in planned:
                spec = checkpoint.layers[layer]
                name = named(f"{layer}.weight")
                planned[layer] = _layer(checkpoint, spec, name, config, family, layers)
        elif not SKIPPED.search(tensor) and not (tied and tensor == "lm_head.weight"):
            planned[tensor] = _plain(checkpoint, tensor, named(tensor), config, family)
    for name, values in rope_tensors(config, family).items():
        data = values.view(np.uint8)
        planned[name] = Tensor(name, "F32", data.shape, lambda data=data: data)  # type: ignore[misc]
    return list(planned.values())


def _layer(
    checkpoint: Checkpoint,
    spec: LayerSpec,
    name: str,
    config: Any,  # noqa: ANN401 - transformers' config
    family: Family,
    layers: Layers,
) -> Tensor:
    kind: BlockType = block_type(spec)
    order = _row_order(spec.name, spec.out_features, config, family)

    def make() -> NDArray[np.uint8]:
        packed = checkpoint.packed(spec.name)
        try:
            made = blocks(packed, kind)
        except OverflowError as error:
            raise UnsupportedFormat(
                f"{spec.name}: {error}, which is what GGUF's blocks have",
                path=checkpoint.path,
                hint="convert it to compressed-tensors or dense, with --dtype bfloat16",
            ) from error
        off = blocks_error(packed, made, kind)
        note = (kind.note or "scales rounded to float16") if off else ""
        layers.done.append(ConvertedLayer(spec.name, kind.name, off, note))
        return made if order is None else made[order]

    shape = (spec.out_features, kind.row_bytes)
    return Tensor(name, kind.name, shape, make, layer=spec.name)


def _plain(
    checkpoint: Checkpoint,
    tensor: str,
    name: str,
    config: Any,  # noqa: ANN401 - transformers' config
    family: Family,
) -> Tensor:
    """Plan a tensor that is not quantised: vectors in float32, matrices as they are stored."""
    info = checkpoint.headers[tensor]
    is_vector = len(info.shape) == 1
    type_name = "F32" if is_vector or info.dtype not in ("F16", "BF16") else info.dtype
    order = _row_order(tensor, info.shape[0], config, family)
    adds_one = family.norms_add_one and tensor.endswith("norm.weight")

    def make() -> NDArray[np.uint8]:
        import torch

        values = checkpoint.tensor(tensor)
        if type_name == "F32":
            values = values.float()
        if adds_one:
            values = values + 1
        if order is not None:
            values = values[torch.from_numpy(order)]
        data: NDArray[np.uint8] = values.contiguous().view(torch.uint8).numpy()
        return data

    width = 4 if type_name == "F32" else 2
    return Tensor(name, type_name, (*info.shape[:-1], info.shape[-1] * width), make)


def _row_order(
    tensor: str,
    rows: int,
    config: Any,  # noqa: ANN401 - transformers' config
    family: Family,
) -> NDArray[np.int64] | None:
    """Order the rows of queries and keys as llama.cpp turns them: pairs side by side."""
    role = re.search(r"\.([qk])_proj(\.weight|\.bias)?$", tensor)
    if not family.turned or role is None:
        return None
    heads = config.num_attention_heads
    if role[1] == "k":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
