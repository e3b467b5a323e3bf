"""GPTQ-for-LLaMa's first files, of March 2023: zeros are floats, and there are no groups.

A linear layer of [N, K] is stored as

    qweight  int32 [K * bits / 32, N], as it is today
    scales   float [N, 1]
    zeros    float [N, 1]: the scale times the zero of each output
    bias     float [N], zeros where the model has none

so that w = scales * codes - zeros (https://github.com/qwopqwop200/GPTQ-for-LLaMa). No config says
how wide a code is; the shapes of the model's other tensors do.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, cast

import numpy as np

from gptq_loader_plugin.checkpoint.config import QuantConfig
from gptq_loader_plugin.checkpoint.protocol import Checkpoint
from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.errors import CorruptCheckpoint, TensorMismatch, UnsupportedFormat
from gptq_loader_plugin.kernel import LayerSpec, PackedLinear
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from gptq_loader_plugin.checkpoint.config import StoredConfig
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.checkpoint.tensors import TensorFiles
    from gptq_loader_plugin.kernel.packing import Bits

__all__ = ["EarlyCheckpoint", "is_early"]

PARTS = ("qweight", "zeros", "scales", "bias")
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
# A zero is a whole number times its scale; float16 rounds the product by 2**-11 of it.
OFF_BY = 0.05


def is_early(headers: Mapping[str, TensorInfo]) -> bool:
    """Return whether a checkpoint's layers have float zeros and no packed ones."""
    layers = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    return bool(layers) and all(
        f"{name}.zeros" in headers and f"{name}.qzeros" not in headers for name in layers
    )


class EarlyCheckpoint(Checkpoint):
    """An open checkpoint of that time.

    Args:
        path: its folder, or its file.
        tensors: its tensors, by name.
        stored: what a config says, where someone has added one.
        model_dtype: the dtype of most plain weights.

    Raises:
        TensorMismatch: a layer's tensors do not fit each other.
        UnsupportedFormat: its zeros are not whole numbers of scales.
    """

    def __init__(
        self, path: Path, tensors: TensorFiles, stored: StoredConfig, *, model_dtype: str
    ) -> None:
        self.path = path
        self.headers = tensors.headers
        self._tensors = tensors
        names = [it.removesuffix(".qweight") for it in self.headers if it.endswith(".qweight")]
        self._bits: Bits = cast("Bits", stored.bits or _find_bits(names, self.headers))
        self._zeros = {name: self._read_zeros(name) for name in names}  # uint8 [1, N], small
        self.layers = {name: self._layer(name, model_dtype) for name in names}
        sources = {"bits": stored.sources.get("bits", "tensors"), "group_size": "tensors"}
        self.config = QuantConfig(
            bits=self._bits,
            group_size=-1,
            desc_act=False,
            sym=all(layer.sym for layer in self.layers.values()),
            checkpoint_format="gptq_v2",  # once they are whole numbers, zeros are as they are
            zeros="v2",
            sources={**sources, "desc_act": "default", "sym": "tensors"},
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype it is stored in."""
        return self._tensors.tensor(name)

    def packed(self, name: str) -> PackedLinear:
        """Read one layer's tensors, with whole zeros.

        Raises:
            CorruptCheckpoint: a scale is not finite.
        """
        import torch

        layer, scales = self.layers[name], self.tensor(f"{name}.scales")
        if not bool(scales.isfinite().all()):
            raise CorruptCheckpoint(
                f"{name}.scales holds values that are not finite",
                path=self.path,
                tensor=f"{name}.scales",
                hint=DAMAGED,
            )
        return PackedLinear(
            qweight=self.tensor(f"{name}.qweight"),
            zeros=torch.from_numpy(self._zeros[name]),
            scales=scales.reshape(1, -1),
            g_idx=torch.zeros(layer.in_features, dtype=torch.int32),
            bits=self._bits,
            bias=self._bias(name),
        )

    def layer_tensors(self, name: str) -> list[str]:
        """Return the names of the tensors that make up one layer, its bias among them."""
        return [f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self.headers]

    def close(self) -> None:
        """Close its files."""
        self._tensors.close()

    def _bias(self, name: str) -> torch.Tensor | None:
        if f"{name}.bias" not in self.headers:
            return None
        bias = self.tensor(f"{name}.bias")
        return bias if bool(bias.any()) else None

    def _layer(self, name: str, model_dtype: str) -> LayerSpec:
        rows, columns = self.headers[f"{name}.qweight"].shape
        zeros = self._zeros[name]
        return LayerSpec.from_groups(
            name,
            np.array([rows * 32 // self._bits]),
            out_features=columns,
            bits=self._bits,
            group_size=-1,
            desc_act=False,
            zero_range=(int(zeros.min()), int(zeros.max())),
            scales_dtype=FLOATS[self.headers[f"{name}.scales"].dtype],
            bias=f"{name}.bias" in self.headers,
            model_dtype=model_dtype,
        )

    def _read_zeros(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Divide a layer's zeros by its scales: uint8 [1, N]."""
        columns = self.headers[f"{name}.qweight"].shape[-1]
        for part in ("zeros", "scales"):
            info = self.headers.get(f"{name}.{part}")
            if info is None or info.dtype not in FLOATS or math.prod(info.shape) != columns:
                shape = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise TensorMismatch(
                    f"{name}.{part} is {shape}; it must be a float for each of {columns} outputs",
                    path=self.path,
                    tensor=f"{name}.{part}",
                    hint=DAMAGED,
                )
        scaled = self.tensor(f"{name}.zeros").double().reshape(1, -1).numpy()
        scales = self.tensor(f"{name}.scales").double().reshape(1, -1).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.where(scales == 0, 0.0, scaled / scales)
        whole = np.rint(zeros)
        if (
            not (np.abs(zeros - whole) <= OFF_BY).all()
            or not ((whole >= 0) & (whole < 1 << self._bits)).all()
        ):
            raise UnsupportedFormat(
                f"{name}.zeros are floats that are not whole numbers of {self._bits}-bit scales",
                path=self.path,
                hint="look for a version of this model in a newer format",
            )
        return whole.astype(np.uint8)


def _find_bits(names: list[str], headers: Mapping[str, TensorInfo]) -> int:
    """Find the width with which layers have as many inputs as other tensors have sizes."""
    sizes = {
        size for name, info in headers.items() for size in info.shape if name[-8:] != ".qweight"
    }
    sizes |= {headers[f"{name}.qweight"].shape[-1] for name in names}
    fitting: Counter[int] = Counter()
    for name in names:
        rows = headers[f"{name}.qweight"].shape[0]
        for bits in CONTINUOUS_BITS:
            if rows * 32 % bits == 0 and rows * 32 // bits in sizes:
                fitting[bits] += 1
    # a tie is a small model's; most files of that time have 4 bits
    return max(sorted(CONTINUOUS_BITS), key=lambda bits: (fitting[bits], bits == 4))
