"""What exllamav2's compiled extension does with a 4-bit GPTQ layer, in numpy: a double for its GPU.

Written from its sources (0.3.2: ext_qmatrix.cpp, q_matrix.cu, q_gemm.cu, q_gemm_kernel_gptq.cuh):
which arguments it takes and checks, what it derives and does not check, what it rewrites in place,
where each product takes which path, and how sums round. Where the source leaves an order open, the
worst order happens here. Where it would read memory that is not its own, `Crash` is raised.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ROWS = 128  # of the weight, that one block of threads adds up
STEP_ROWS = 32  # that a block takes before it looks for the next group
MOST_FUSED_ROWS = 32  # of x; more of them take the path of the dequantised weight
SHUFFLED = (0, 2, 4, 6, 1, 3, 5, 7)  # the code that lies in each nibble of a word, lowest first
TENSOR_CORE_STEP = 16  # products that are added exactly before a float16 sum is rounded


class Crash(AssertionError):
    """The extension reads or writes what is not its own here, or answers by chance."""


class CheckFailed(RuntimeError):
    """A TORCH_CHECK of the extension."""


@dataclass
class Matrix:
    """`QMatrix`: the addresses of tensors, which it does not keep alive."""

    q_weight: torch.Tensor
    perm: torch.Tensor | None
    qzeros: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    temp_dq: torch.Tensor
    max_dq_rows: int
    height: int
    width: int
    groups: int
    group_size: int

    def rows(self) -> NDArray[np.int64]:
        """The row of x that each sorted row of the weight multiplies."""
        if self.perm is None:
            return np.arange(self.height)
        return self.perm.numpy().view(np.uint16).astype(np.int64)

    def centred(self) -> NDArray[np.float16]:
        """Codes minus zeros [K, N], which float16 holds exactly; no scales yet."""
        words = self.q_weight.numpy().view(np.uint32)
        codes = np.empty((self.height, self.width), dtype=np.int32)
        for nibble, code in enumerate(SHUFFLED):
            codes[code::8] = (words >> np.uint32(4 * nibble)) & np.uint32(0xF)
        zeros = _nibbles(self.qzeros.numpy().view(np.uint32)).astype(np.int32) + 1  # no wrap
        return (codes - zeros[self.group_of_row()]).astype(np.float16)

    def group_of_row(self) -> NDArray[np.int64]:
        """The row of scales in use at each row: it steps on only where a step of 32 begins."""
        found = np.empty(self.height, dtype=np.int64)
        for block in range(0, self.height, BLOCK_ROWS):
            group, following = block // self.group_size, block + self.group_size
            for k in range(block, min(block + BLOCK_ROWS, self.height), STEP_ROWS):
                if k == following:
                    group, following = group + 1, following + self.group_size
                found[k : k + STEP_ROWS] = group
        if found.max() >= self.groups:
            raise Crash("reads scales past the last group")
        return found


@dataclass
class Double:
    """The extension's functions, and what they were called with."""

    matrices: dict[int, Matrix] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)  # "fused" or "dequantised", of each product
    made: int = 0

    def make_q_matrix(  # noqa: PLR0917 - the extension's own
        self,
        q_weight: torch.Tensor,
        q_perm: torch.Tensor,
        q_invperm: torch.Tensor,
        q_scale: torch.Tensor,
        q_scale_max: torch.Tensor,
        q_groups: torch.Tensor,
        q_group_map: torch.Tensor,
        gptq_qzeros: torch.Tensor,
        gptq_scales: torch.Tensor,
        gptq_g_idx: torch.Tensor,
        bias: torch.Tensor,
        temp_dq: torch.Tensor,
        max_dq_rows: int,
    ) -> int:
        check(q_weight.dtype == torch.int32, "q_weight is not int")
        for tensor, dtype in (
            (q_perm, torch.int16), (q_invperm, torch.int16), (q_scale, torch.int32),
            (q_scale_max, torch.float16), (q_groups, torch.int16), (q_group_map, torch.int16),
            (gptq_qzeros, torch.int32), (gptq_scales, torch.float16), (gptq_g_idx, torch.int32),
            (bias, torch.float16),
        ):  # fmt: skip
            check(tensor.is_meta or tensor.dtype == dtype, f"a tensor is not {dtype}")
            if not (tensor.is_meta or tensor.is_contiguous()):
                raise Crash("takes a tensor that is not contiguous for one that is")
        check(q_scale.is_meta, "EXL2 is not modelled here")
        check(q_perm.shape[0] == q_invperm.shape[0], "q_perm and q_invperm differ in size")
        check(q_weight.shape[1] == gptq_qzeros.shape[1] * 8, "q_weight and gptq_qzeros differ")
        check(q_weight.shape[1] == gptq_scales.shape[1], "q_weight and gptq_scales differ")
        groups, width = gptq_qzeros.shape[0], q_weight.shape[1]
        height = q_weight.shape[0] * 8  # so 4 bits, whatever the layer is
        check(bias.is_meta or bias.shape[0] == width, "q_weight and bias differ")
        wanted = width * min(max_dq_rows, height)
        check(temp_dq.is_meta or temp_dq.shape[0] >= wanted, "Insufficient size of temp_dq buffer")
        if height % STEP_ROWS:
            raise Crash("reads the weight past its last row")
        if height > 0xFFFF:
            raise Crash("permutes rows by 16-bit numbers")
        group_size = 1
        while group_size * groups < height:
            group_size *= 2
        if not gptq_g_idx.is_meta:
            if gptq_g_idx.device.type != "cpu":
                raise Crash("reads g_idx on the CPU")
            if q_perm.is_meta or q_perm.shape[0] < height:
                raise Crash("writes a permutation that nobody made room for")
            order = np.argsort(gptq_g_idx.numpy(), kind="stable").astype(np.uint16)
            q_perm.numpy().view(np.uint16)[:] = order
            q_invperm.numpy().view(np.uint16)[order] = np.arange(height, dtype=np.uint16)
            _sort_rows(q_weight, order)
        _shuffle(q_weight)
        self.made += 1
        self.matrices[self.made] = Matrix(
            q_weight=q_weight,
            perm=None if gptq_g_idx.is_meta else q_perm,
            qzeros=gptq_qzeros,
            scales=gptq_scales,
            bias=None if bias.is_meta else bias,
            temp_dq=temp_dq,
            max_dq_rows=max_dq_rows,
            height=height,
            width=width,
            groups=groups,
            group_size=group_size,
        )
        return self.made

    def free_q_matrix(self, handle: int) -> None:
        if self.matrices.pop(handle, None) is None:
            raise Crash("frees what is free")

    def reconstruct(self, handle: int, output: torch.Tensor) -> None:
        matrix = self._matrix(handle)
        check(output.shape == (matrix.height, matrix.width), "Output tensor doesn't match shape")
        check(output.dtype == torch.float16, "output is not half")
        output.copy_(torch.from_numpy(self._weight(matrix)))

    def gemm_half_q_half(
        self, a: torch.Tensor, handle: int, c: torch.Tensor, force_cuda: bool
    ) -> None:
        matrix = self._matrix(handle)
        check(a.dtype == c.dtype == torch.float16, "a or c is not half")
        check(a.shape[0] == c.shape[0], "a and c have incompatible shapes")
        check(matrix.height == a.shape[1], "a and b have incompatible shapes")
        check(matrix.width == c.shape[1], "b and c have incompatible shapes")
        if not (a.is_contiguous() and c.is_contiguous()):
            raise Crash("takes a tensor that is not contiguous for one that is")
        if not len(a):
            raise Crash("launches a grid of no blocks")
        may = matrix.height <= matrix.max_dq_rows // BLOCK_ROWS * BLOCK_ROWS
        dequantises = len(a) > MOST_FUSED_ROWS and not force_cuda and may
        self.paths.append("dequantised" if dequantises else "fused")
        product = _dequantised if dequantises else _fused
        c.copy_(torch.from_numpy(product(a.numpy(), matrix, self._weight(matrix))))

    def _matrix(self, handle: int) -> Matrix:
        if handle not in self.matrices:
            raise Crash("uses what was freed")
        return self.matrices[handle]

    def _weight(self, matrix: Matrix) -> NDArray[np.float16]:
        """The weight [K, N], rows in x's order, each scaled and rounded once."""
        scaled = matrix.centred() * matrix.scales.numpy()[matrix.group_of_row()]
        weight = np.empty_like(scaled)
        weight[matrix.rows()] = scaled
        return weight


def module(double: Double) -> Any:
    """Make the module that `import exllamav2_ext` would give."""
    made: Any = types.ModuleType("exllamav2_ext")
    made.__spec__ = ModuleSpec("exllamav2_ext", loader=None)
    for name in ("make_q_matrix", "free_q_matrix", "reconstruct", "gemm_half_q_half"):
        setattr(made, name, getattr(double, name))
    return made


def check(holds: bool, words: str) -> None:
    if not holds:
        raise CheckFailed(words)


def _fused(a: NDArray[np.float16], matrix: Matrix, _: NDArray[np.float16]) -> NDArray[np.float16]:
    """Sum in float16 pairs: 8 rows, scaled into a block's sum; blocks then add up atomically."""
    x = a[:, matrix.rows()]
    centred, scales = matrix.centred(), matrix.scales.numpy()[matrix.group_of_row()]
    blocks = []
    for block in range(0, matrix.height, BLOCK_ROWS):
        pair = np.zeros((2, len(x), matrix.width), dtype=np.float16)
        for k in range(block, min(block + BLOCK_ROWS, matrix.height), 8):
            eight = np.zeros_like(pair)
            for i in range(4):
                for lane in (0, 1):
                    row = k + 2 * i + lane
                    eight[lane] = _fma(x[:, row, None], centred[row], eight[lane])
            for lane in (0, 1):
                pair[lane] = _fma(eight[lane], scales[k], pair[lane])
        blocks.append(pair[0] + pair[1])
    if matrix.bias is None:
        # Block 0 clears c, and nothing makes the others wait for it: the worst is that it is last.
        return blocks[0]
    c = np.broadcast_to(matrix.bias.numpy(), blocks[0].shape)
    for part in reversed(blocks):
        c = c + part
    return c


def _dequantised(
    a: NDArray[np.float16], matrix: Matrix, weight: NDArray[np.float16]
) -> NDArray[np.float16]:
    """Dequantise into the scratch, then cublasHgemm, whose sums are float16 too."""
    elements = weight.size
    if matrix.temp_dq.is_meta or matrix.temp_dq.numel() < elements:
        raise Crash("dequantises past the end of the scratch")
    matrix.temp_dq[:elements] = torch.from_numpy(weight).reshape(-1)
    c = np.zeros((len(a), matrix.width), dtype=np.float16)
    if matrix.bias is not None:
        c = c + matrix.bias.numpy()
    for k in range(0, matrix.height, TENSOR_CORE_STEP):
        step = slice(k, k + TENSOR_CORE_STEP)
        c = (c + a[:, step].astype(np.float32) @ weight[step].astype(np.float32)).astype(np.float16)
    return c


def _fma(
    a: NDArray[np.float16], b: NDArray[np.float16], c: NDArray[np.float16]
) -> NDArray[np.float16]:
    return (a.astype(np.float64) * b + c).astype(np.float16)


def _nibbles(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Unpack [G, N / 8] words into [G, N] nibbles, the lowest first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return ((words[:, :, None] >> shifts) & np.uint32(0xF)).reshape(len(words), -1)


def _sort_rows(q_weight: torch.Tensor, order: NDArray[np.uint16]) -> None:
    words = q_weight.numpy().view(np.uint32)
    codes = _nibbles(np.ascontiguousarray(words.T)).T[order]  # [K, N]
    packed = np.zeros_like(words)
    for i in range(8):
        packed |= codes[i::8] << np.uint32(4 * i)
    words[:] = packed


def _shuffle(q_weight: torch.Tensor) -> None:
    words = q_weight.numpy().view(np.uint32)
    shuffled = np.zeros_like(words)
    for nibble, code in enumerate(SHUFFLED):
        shuffled |= ((words >> np.uint32(4 * code)) & np.uint32(0xF)) << np.uint32(4 * nibble)
    words[:] = shuffled
