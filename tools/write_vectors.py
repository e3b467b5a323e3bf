"""Write vectors for the native library: its inputs, and what is right by the reference kernel.

    .venv/bin/python tools/write_vectors.py FILE

tests/native/vectors.cpp reads them on another kind of machine. What the library is called with
points from structures into tensors, so the file holds the memory of both, and where it was: 64-bit
machines of one byte order lay structures out alike.

    "GPTQVEC1", int64 blocks, int64 tests
    each block   int64 address, int64 size, int64 whether it holds pointers; its bytes
    each test    64 bytes of name, int64 count, int64 [count]

    pack   linear, bits, qweight, bytes of its words
    rows   linear, x, y, rows of x
    step   model, x, cos, sin, sequences, y, length of y

Needs the library built for this machine, which packs; what is right comes from transformers and the
reference kernel alone.
"""

import ctypes
import dataclasses
import struct
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from gptq_loader_kernels.cpu.decoder import CACHE
from gptq_loader_kernels.cpu.describe import describe
from gptq_loader_kernels.cpu.library import Activations, Isa, KvCache, Sequence
from gptq_loader_kernels.cpu.linear import NativeLinear
from gptq_loader_plugin.conformance.layers import Case, make_layer

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 128, 192, 4, 2, 2
PAST, CAPACITY = 150, 160  # positions: two blocks of attention
ROWS, COLUMNS = 320, 200  # of a layer: whole groups of 64 and of 160, a last tile that is not full


class Vectors:
    """The memory of structures and tensors, and the tests that use it."""

    def __init__(self):
        self.blocks, self.tests, self.kept = [], [], []

    def add_tensor(self, tensor):
        self.kept.append(tensor)
        place = tensor.data_ptr()
        self.blocks.append((place, ctypes.string_at(place, tensor.nbytes), 0))
        return place

    def add_structure(self, of):
        self.kept.append(of)
        place = ctypes.addressof(of)
        self.blocks.append((place, ctypes.string_at(place, ctypes.sizeof(of)), 1))
        return place

    def add_linear(self, module):
        for tensor in module.buffers():
            self.add_tensor(tensor)
        return self.add_structure(module.filled())

    def write(self, path):
        blocks = {it[0]: it for it in self.blocks if it[1]}  # a tensor may be there twice
        with open(path, "wb") as file:
            file.write(b"GPTQVEC1" + struct.pack("<qq", len(blocks), len(self.tests)))
            for address, content, holds in blocks.values():
                file.write(struct.pack("<Qqq", address, len(content), holds) + content)
            for name, numbers in self.tests:
                head = struct.pack("<64sq", name.encode(), len(numbers))
                file.write(head + struct.pack("<%dQ" % len(numbers), *numbers))
        print("%s: %d tests, %d blocks" % (path, len(self.tests), len(blocks)))


def main():
    torch.manual_seed(0)
    vectors = Vectors()
    for bits in (2, 3, 4, 8):
        for order in (False, True):
            for group in (64, 160, -1):
                add_layer(vectors, bits, order, group)
        for tokens in (1, 3):
            add_step(vectors, bits, tokens)
    vectors.write(sys.argv[1])


def add_layer(vectors, bits, order, group):
    case = Case(
        bits=bits, act_order=order, group_size=group, rows=ROWS, columns=COLUMNS, sym=False,
        bias=True,
    )  # fmt: skip
    _, packed, weight = make_layer(case)
    module = NativeLinear(packed, in_features=ROWS, out_features=COLUMNS)
    linear = vectors.add_linear(module)
    name = "%d bits, groups of %d%s" % (bits, group, ", shuffled" if order else "")
    qweight = vectors.add_tensor(packed.qweight)
    vectors.tests.append(("pack, " + name, [linear, bits, qweight, module.words.nbytes]))
    for rows in (1, 2, 7):
        x = torch.randn(rows, ROWS)
        y = (x.double() @ weight.T + packed.bias.double()).float()
        places = [linear, vectors.add_tensor(x), vectors.add_tensor(y), rows]
        vectors.tests.append(("rows, %d by %s" % (rows, name), places))


@torch.inference_mode()
def add_step(vectors, bits, tokens):
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=64,
    )  # fmt: skip
    right, native = (LlamaForCausalLM(config).float().eval().model for _ in range(2))
    native.load_state_dict(right.state_dict())
    for index, (path, linear) in enumerate(list(right.named_modules())):
        if not isinstance(linear, torch.nn.Linear):
            continue
        case = Case(
            bits=bits, act_order=index % 2 == 0, group_size=32, rows=linear.in_features,
            columns=linear.out_features, sym=False, bias=False,
        )  # fmt: skip
        _, packed, weight = make_layer(case)
        size = 16 / (1 << bits)  # of 4 bits' weights
        packed = dataclasses.replace(packed, scales=packed.scales * size)
        linear.weight.data = (weight * size).float()
        module = NativeLinear(packed, in_features=case.rows, out_features=case.columns)
        native.set_submodule(path, module)
        vectors.add_linear(module)
    for tensor in native.parameters():
        vectors.add_tensor(tensor)
    x = torch.randn(1, PAST + tokens, HIDDEN)
    cache = DynamicCache(config=config)
    right(inputs_embeds=x[:, :PAST], use_cache=True, **{CACHE: cache})
    caches = (KvCache * LAYERS)()
    for place, layer in zip(caches, cache.layers):
        held = [torch.zeros(KV_HEADS, CAPACITY, HIDDEN // HEADS) for _ in range(2)]
        for to, of in zip(held, (layer.keys, layer.values)):
            to[:, :PAST] = of[0]
        place.keys, place.values = map(vectors.add_tensor, held)
        place.capacity = CAPACITY
    sequence = Sequence(past=PAST, tokens=tokens, caches=caches)
    new = x[:, PAST:].contiguous()
    y = right(inputs_embeds=new, use_cache=True, **{CACHE: cache}).last_hidden_state
    positions = torch.arange(PAST, PAST + tokens)[None]
    angles = [it.contiguous() for it in native.rotary_emb(new, positions)]
    described = describe(native, torch.float32, Isa.PLAIN, Activations.FLOAT32)
    vectors.kept.append(described)
    for kept in described.kept:
        if isinstance(kept, (ctypes.Structure, ctypes.Array)):
            vectors.add_structure(kept)
    vectors.add_structure(caches)
    places = [
        vectors.add_structure(described.model), vectors.add_tensor(new),
        *map(vectors.add_tensor, angles), vectors.add_structure(sequence),
        vectors.add_tensor(y.contiguous()), y.numel(),
    ]  # fmt: skip
    vectors.tests.append(("step, %d tokens, %d bits" % (tokens, bits), places))


if __name__ == "__main__":
    main()
