"""A whole plugin: a reader of compressed-tensors' `pack-quantized` checkpoints.

    pip install ./examples/my_format
    gptq-loader explain FOLDER

A linear layer of [N, K] is stored as

    weight_packed      int32 [N, K * bits / 32]: codes along K, one little-endian stream of bits
    weight_scale       float [N, G]
    weight_zero_point  int32 [N * bits / 32, G], packed along N; absent where it is symmetric
    weight_g_idx       int32 [K], the group of each row; absent where groups follow one another,
                       and always in files of compressed-tensors 0.20 and newer

and both codes and zero points are stored plus 2^(bits - 1)
(https://github.com/vllm-project/compressed-tensors). So its transpose is GPTQ's qweight.
Importing this module imports no torch: `gptq-loader inspect` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin import LayerSpec, PackedLinear, QuantConfig, UnsupportedFormat, hookimpl
from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.reader import Checkpoint, Reader
from gptq_loader_plugin.checkpoint.tensors import TensorFiles
from gptq_loader_plugin.checkpoint.weight_files import find_weight_files
from gptq_loader_plugin.kernel.packing import unpack_columns

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


class PackQuantized(Checkpoint):
    """An open checkpoint."""

    def __init__(self, path: Path, tensors: TensorFiles, weights: dict[str, Any]) -> None:
        self.path = path
        self.headers = tensors.headers
        self._tensors = tensors
        self._bits, self._symmetric = int(weights["num_bits"]), bool(weights["symmetric"])
        self._group_size = int(weights.get("group_size") or -1)
        names = [
            name.removesuffix(".weight_packed") for name in self.headers if name.endswith("_packed")
        ]
        self.layers = {name: self._layer(name) for name in names}
        self.config = QuantConfig(
            bits=self._bits,
            group_size=self._group_size,
            desc_act=any(layer.desc_act for layer in self.layers.values()),
            sym=self._symmetric,
            checkpoint_format="gptq_v2",  # zeros are as they are
            zeros="v2",
            sources={"bits": "config.json", "group_size": "tensors", "desc_act": "tensors"},
        )

    def _layer(self, name: str) -> LayerSpec:
        scales = self.headers[f"{name}.weight_scale"]
        columns, groups = scales.shape
        g_idx = self._g_idx(name, groups)
        zero = 1 << (self._bits - 1)
        return LayerSpec.from_groups(
            name,
            np.bincount(g_idx, minlength=groups),
            out_features=columns,
            bits=self._bits,  # type: ignore[arg-type] # `open` has checked it
            group_size=-1 if groups == 1 else self._group_size,
            desc_act=bool((g_idx[1:] < g_idx[:-1]).any()),
            zero_range=(zero, zero) if self._symmetric else (0, 2 * zero - 1),
            scales_dtype=FLOATS[scales.dtype],
            bias=f"{name}.bias" in self.headers,
        )

    def _g_idx(self, name: str, groups: int) -> NDArray[np.int32]:
        """Return the group of each row: int32 [K]."""
        if f"{name}.weight_g_idx" in self.headers:
            return self._tensors.integers(f"{name}.weight_g_idx")
        rows = self.headers[f"{name}.weight_packed"].shape[1] * 32 // self._bits
        return (np.arange(rows) // (rows if groups == 1 else self._group_size)).astype(np.int32)

    def layer_tensors(self, name: str) -> list[str]:
        candidates = [*(f"{name}.{part}" for part in PARTS), f"{name}.bias"]
        return [tensor for tensor in candidates if tensor in self.headers]

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors.tensor(name)

    def packed(self, name: str) -> PackedLinear:
        import torch

        scales = self.tensor(f"{name}.weight_scale").t().contiguous()  # [G, N]
        groups, columns = scales.shape
        zeros = np.full((groups, columns), 1 << (self._bits - 1), np.uint8)
        if not self._symmetric:
            stored = self._tensors.integers(f"{name}.weight_zero_point")
            zeros = unpack_columns(stored.T, self._bits, "continuous", columns)
        bias = f"{name}.bias"
        return PackedLinear(
            qweight=self.tensor(f"{name}.weight_packed").t().contiguous(),  # [K * bits / 32, N]
            zeros=torch.from_numpy(zeros),
            scales=scales,
            g_idx=torch.from_numpy(self._g_idx(name, groups).copy()),
            bits=self._bits,  # type: ignore[arg-type] # `open` has checked it
            bias=self.tensor(bias) if bias in self.headers else None,
        )

    def close(self) -> None:
        self._tensors.close()


@dataclass(frozen=True)
class PackQuantizedReader:
    """Open what llm-compressor writes as `pack-quantized`."""

    name: str = "pack-quantized"

    def open(self, path: Path) -> PackQuantized | None:
        folder = path if path.is_dir() else path.parent
        config = folder / "config.json"
        quantization = read_json(config).get("quantization_config") if config.is_file() else None
        if not quantization or quantization.get("quant_method") != "compressed-tensors":
            return None
        groups = list((quantization.get("config_groups") or {}).values())
        weights = groups[0].get("weights") if len(groups) == 1 else None
        if not weights or weights.get("num_bits") not in (2, 3, 4, 8):
            raise UnsupportedFormat(
                "only one scheme of 2, 3, 4 or 8 bits can be read",
                path=path,
                hint="load it with transformers and compressed-tensors",
            )
        return PackQuantized(
            path, TensorFiles(read_headers(find_weight_files(folder).files)), weights
        )


@hookimpl
def gptq_readers() -> list[Reader]:
    """Offer the reader; it is shown every folder before the built-in one."""
    return [PackQuantizedReader()]
