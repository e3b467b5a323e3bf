"""The module over the native library; imports torch, so `CpuKernel.prepare` imports it."""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_kernels.autograd import needs_gradient, with_gradient
from gptq_loader_kernels.cpu.autograd import by_unpacking
from gptq_loader_kernels.cpu.library import (
    COLUMNS,
    Activations,
    Isa,
    Linear,
    choose_code,
    held_bits,
    load_library,
    unit_rows,
    unit_words,
)
from gptq_loader_kernels.cpu.memory import empty, place
from gptq_loader_kernels.cpu.tensors import (
    check_packed,
    check_range,
    check_tensor,
    describe_tensor,
)
from gptq_loader_plugin.model.watch import CountedModule

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["NativeLinear"]

SEGMENT_ROWS = 256  # of a group, summed before they are scaled: bounds what cancels
# Rows of x from which a float32 weight is unpacked for torch's matmul (decisions/native-cpu.md).
UNPACK_FROM = {Isa.PLAIN: 16, Isa.AVX2: 32, Isa.AVX_VNNI: 32, Isa.AVX512: 192}
# Instruction sets of ARM have the numbers of others.
ARM_NAMES = {Isa.PLAIN: "PLAIN", Isa.DOTPROD: "DOTPROD", Isa.I8MM: "I8MM"}
UNPACKED_BYTES = 16 << 20  # of weights unpacked at a time: they stay in a large cache
_kept = threading.local()
TYPES = {torch.float32: 0, torch.bfloat16: 1}


def _unpack_from(isa: Isa) -> int:
    """Give the rows of x from which torch multiplies an unpacked float32 weight.

    With products of matrices of bytes, ARM never does: they multiply twice as many numbers an
    instruction. A Mac's own library has a matrix unit for float32.
    """
    if _is_arm() and isa >= Isa.I8MM and sys.platform != "darwin":
        return sys.maxsize
    return UNPACK_FROM[min(isa, Isa.AVX512)]


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


class NativeLinear(CountedModule):
    """y = x @ W.T + bias by the native library, the weight packed.

    bfloat16 activations use bfloat16 products, exact, summed in float32, where the processor has
    them; float32 and float16 ones are then multiplied in float32. Other processors multiply by
    whole numbers of 16 bits, which are nearer to x than bfloat16 is, or in float32.

    Args:
        packed: the layer, of 2, 3, 4 or 8 bits; 5, 6 and 7 are widened to 8.
        in_features: the length of x.
        out_features: the length of y.
        isa: the code to run, by default the best the processor has.
        activations: what a bfloat16 x is multiplied as, by default the fastest that rounds nothing.
        amx: whether to multiply many rows by the processor's matrix unit, by default where it can.

    Raises:
        ValueError: the layer's tensors do not fit each other, or these sizes.
    """

    def __init__(
        self,
        packed: PackedLinear,
        *,
        in_features: int,
        out_features: int,
        isa: Isa | None = None,
        activations: Activations | None = None,
        amx: bool | None = None,
    ) -> None:
        super().__init__()
        check_packed(packed, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = held_bits(packed.bits)
        self._library = load_library()
        self._isa, self.activations = choose_code(isa, activations)
        self._amx = bool(self._library.gptq_amx()) if amx is None else amx
        self.unpack_from = _unpack_from(self._isa)
        # Rows of a dtype from which panels of the weight are unpacked; 0 where none are.
        self.panels_from = {
            dtype: self._library.gptq_gemm_from(type_, self._isa, self.activations, self._amx)
            for dtype, type_ in TYPES.items()
        }
        self._layer: Linear | None = None
        self._held: tuple[torch.Tensor | None, ...] = ()
        self._addresses: list[int | None] = []
        rows, segment_units, segment_group = _lay_out(packed.g_idx, self.bits)
        # Numbers are kept as raw bits: a model's .to(dtype) must not change them.
        bias = None if packed.bias is None else packed.bias.float().contiguous().view(torch.int32)
        tensors = {
            "rows": place(rows),
            "segment_units": place(segment_units),
            "segment_group": place(segment_group),
            "words": _pack(packed, rows, self.bits, out_features, self._library),
            "scales": place(_tiles(_scales(packed.scales))),
            "zeros": place(_tiles(packed.zeros)),
            "bias": None if bias is None else place(bias),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features].

        Raises:
            RuntimeError: x or the layer is not on the CPU.
            ValueError: x has another number of features, or a tensor of the layer was replaced by
                one that does not fit.
            MemoryError: memory is short.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x is {describe_tensor(x)}; this layer takes {self.in_features}")
        if needs_gradient(x):
            return with_gradient(self, x, by_unpacking)
        if x.dtype not in TYPES:
            y: torch.Tensor = self(x.float())
            return y.to(x.dtype)
        int8 = self.activations is Activations.INT8
        if int8 and x.dtype != torch.bfloat16:
            rounded: torch.Tensor = self(x.bfloat16())
            return rounded.to(x.dtype)
        flat = x.reshape(-1, self.in_features).contiguous()
        if flat.device.type != "cpu":
            raise RuntimeError(f"this layer was prepared for the CPU; its input is on {x.device}")
        rows = flat.shape[0]
        panels = 0 < self.panels_from[x.dtype] <= rows
        if not panels and x.dtype == torch.float32 and rows >= self.unpack_from:
            return self._unpacked(flat).view(*x.shape[:-1], self.out_features)
        out = flat.new_empty(rows, self.out_features)
        layer, read, written = ctypes.addressof(self.filled()), flat.data_ptr(), out.data_ptr()
        threads = torch.get_num_threads()
        if panels:
            layers, outs = ctypes.c_void_p(layer), ctypes.c_void_p(written)
            failed = self._library.gptq_gemm(
                ctypes.addressof(layers), ctypes.addressof(outs), 1, read, rows,
                TYPES[x.dtype], self._isa, self._amx, threads,
            )  # fmt: skip
        else:
            exact = x.dtype == torch.float32 and self._isa >= Isa.AVX512_BF16
            activations = Activations.FLOAT32 if exact else self.activations
            failed = self._library.gptq_gemv(
                layer, read, written, rows, TYPES[x.dtype], self._isa, activations, threads
            )
        if failed:
            raise MemoryError(f"no memory for the activations of {rows} tokens")
        return out.view(*x.shape[:-1], self.out_features)

    def _unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply many rows: unpack some columns at a time, and leave the product to torch."""
        layer = self.filled()
        tiles: int = -(-self.out_features // COLUMNS)
        step = max(UNPACKED_BYTES // (self.in_features * COLUMNS * x.element_size()), 8)
        out = x.new_empty(x.shape[0], self.out_features)
        for first in range(0, tiles, step):
            count = min(step, tiles - first)
            weight = _scratch(self.in_features, count * COLUMNS, x.dtype)
            self._library.gptq_unpack(
                ctypes.addressof(layer),
                first,
                count,
                weight.data_ptr(),
                TYPES[x.dtype],
                self._isa,
                torch.get_num_threads(),
            )
            columns = min(count * COLUMNS, self.out_features - first * COLUMNS)
            part = out[:, first * COLUMNS :][:, :columns]
            torch.mm(x, weight[:, :columns], out=part)
        bias: Any = self.bias
        return out if bias is None else out.add_(bias.view(torch.float32))

    def extra_repr(self) -> str:
        """Say the shape when printed."""
        code = ARM_NAMES[self._isa] if _is_arm() else self._isa.name
        if self.activations is not Activations.FLOAT32:
            code += f", activations {self.activations.name}"
        if self._amx and self.activations is not Activations.INT8:
            code += " with AMX"
        return f"{self.in_features}, {self.out_features}, {self.bits}-bit, {code}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory: a copy points into its own."""
        return {**self.__dict__, "_layer": None, "_held": (), "_addresses": [], "_library": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and find the library again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._library = load_library()

    def filled(self) -> Linear:
        """Give the layer as the library reads it, anew where a tensor was replaced or has moved.

        Those it was read from are held on to: another one at the address of one that is gone may
        be smaller.
        """
        tensors = self._buffers
        held = tuple(tensors.values())
        addresses = [None if it is None else it.data_ptr() for it in held]
        layer = self._layer
        if layer is not None and addresses == self._addresses and all(map(is_, held, self._held)):
            return layer
        rows, words, scales = (self.get_buffer(name) for name in ("rows", "words", "scales"))
        segment_units = self.get_buffer("segment_units")
        if words.device.type != "cpu":
            raise RuntimeError(f"this layer was prepared for the CPU and is on {words.device}")
        unit = unit_rows(self.bits)
        tiles, units = -(-self.out_features // COLUMNS), rows.numel() // unit
        segments, groups = segment_units.numel(), scales.numel() // (tiles * COLUMNS)
        shapes: dict[str, tuple[int, ...]] = {
            "rows": (units * unit,),
            "segment_units": (segments,),
            "segment_group": (segments,),
            "words": (tiles, units, unit_words(self.bits), COLUMNS),
            "scales": (tiles, groups, COLUMNS),
            "zeros": (tiles, groups, COLUMNS),
            "bias": (self.out_features,),
        }
        dtypes = {"scales": (torch.int16, torch.int32), "zeros": (torch.uint8,)}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor is not None:
                check_tensor(name, tensor, shape, *dtypes.get(name, (torch.int32,)))
        check_range("rows", rows, -1, self.in_features)
        check_range("segment_group", self.get_buffer("segment_group"), 0, groups)
        check_range("segment_units", segment_units, 1, SEGMENT_ROWS // unit + 1)
        if int(segment_units.sum()) != units:
            raise ValueError(f"segment_units do not add up to {units} units")
        layer = Linear(
            bits=self.bits,
            in_features=self.in_features,
            out_features=self.out_features,
            units=units,
            segments=segments,
            groups=groups,
            float_scales=scales.dtype == torch.int32,
            **dict(zip(tensors, addresses, strict=True)),
        )
        self._layer, self._held, self._addresses = layer, held, addresses
        return layer


def _scratch(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Give the calling thread's memory for unpacked weights: mapped once, not once a call."""
    size = rows * columns * dtype.itemsize
    kept: torch.Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size:
        kept = _kept.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(rows, columns)


def _lay_out(g_idx: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by group, fill groups up to whole units, and cut them into segments.

    Returns:
        The feature of each row or -1, the units of each segment, and its group: int32.
    """
    size = unit_rows(bits)
    counts: list[int] = torch.bincount(g_idx.long()).tolist()
    order = torch.argsort(g_idx, stable=True).to(torch.int32)
    parts, units, groups, first = [], [], [], 0
    for group, count in enumerate(counts):
        for start in range(0, count, SEGMENT_ROWS):
            length = min(SEGMENT_ROWS, count - start)
            parts.append(order[first + start : first + start + length])
            parts.append(order.new_full((-length % size,), -1))
            units.append(-(-length // size))
            groups.append(group)
        first += count
    return (
        torch.cat(parts),
        torch.tensor(units, dtype=torch.int32, device="cpu"),
        torch.tensor(groups, dtype=torch.int32, device="cpu"),
    )


def _pack(
    packed: PackedLinear, rows: torch.Tensor, bits: int, columns: int, library: ctypes.CDLL
) -> torch.Tensor:
    """Pack the codes as the library reads them: int32 [tiles, units, words of a unit, 64]."""
    units = len(rows) // unit_rows(bits)
    qweight = packed.qweight.contiguous()
    words = empty(-(-columns // COLUMNS), units, unit_words(bits), COLUMNS, dtype=rows.dtype)
    failed = library.gptq_pack(
        packed.bits,
        packed.layout == "planar",
        qweight.data_ptr(),
        rows.data_ptr(),
        len(packed.g_idx),
        units,
        columns,
        words.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory to pack a layer of {len(packed.g_idx)}x{columns}")
    return words


def _scales(scales: torch.Tensor) -> torch.Tensor:
    """Give scales as raw bits, int16 for float16 and else int32 for float32: nothing is rounded."""
    if scales.dtype == torch.float16:
        return scales.contiguous().view(torch.int16)
    return scales.float().contiguous().view(torch.int32)


def _tiles(table: torch.Tensor) -> torch.Tensor:
    """Lay a table [G, N] out by tile: [tiles, G, 64], filled up with zeros."""
    groups, columns = table.shape
    padded = torch.nn.functional.pad(table, (0, -columns % COLUMNS))
    return padded.view(groups, -1, COLUMNS).transpose(0, 1).contiguous()
