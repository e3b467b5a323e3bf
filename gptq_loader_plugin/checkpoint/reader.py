"""Open a checkpoint: its config, its layers, and its tensors one at a time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.checkpoint.early import EarlyCheckpoint, is_early
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.infer import FLOAT_DTYPES, infer, row_groups
from gptq_loader_plugin.checkpoint.protocol import Checkpoint, Reader, missing_members
from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.checkpoint.tensors import TensorFiles, is_finite
from gptq_loader_plugin.checkpoint.vocabulary import vocabulary_warning
from gptq_loader_plugin.checkpoint.weight_files import WeightFiles, find_weight_files
from gptq_loader_plugin.checkpoint.zeros import true_zeros
from gptq_loader_plugin.errors import (
    CorruptCheckpoint,
    GPTQLoaderError,
    PluginError,
    UnsupportedFormat,
)
from gptq_loader_plugin.kernel import LayerSpec, PackedLinear
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo

__all__ = [
    "Checkpoint",
    "GPTQCheckpoint",
    "GPTQReader",
    "Reader",
    "model_dtype",
    "not_gptq",
    "open_checkpoint",
]

PACKED_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
OTHER_FORMATS = (  # how other methods name their tensors
    (".q_weight", "EXL2", "load it with exllamav2"),
    (".trellis", "EXL3", "load it with exllamav3"),
    (".weight_packed", "compressed-tensors", "load it with transformers and compressed-tensors"),
    (".weight.absmax", "bitsandbytes", "load it with transformers and bitsandbytes"),
    (".weight.quant_map", "bitsandbytes", "load it with transformers and bitsandbytes"),
    (".SCB", "bitsandbytes", "load it with transformers and bitsandbytes"),
    (".W_q", "HQQ", "load it with transformers and hqq"),
    (".weight_scale", "FP8", "load it with transformers or vLLM"),
    (".weight_scale_inv", "FP8", "load it with transformers or vLLM"),
)


class GPTQCheckpoint(Checkpoint):
    """An open GPTQ checkpoint.

    Attributes:
        tensors: its tensors, by name.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: QuantConfig,
        layers: tuple[LayerSpec, ...],
        warnings: tuple[str, ...],
        tensors: TensorFiles,
        translated: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.layers = {layer.name: layer for layer in layers}
        self.headers = tensors.headers
        self.warnings = warnings
        self.tensors = tensors
        self.translated = translated

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype it is stored in."""
        return self.tensors.tensor(name)

    def packed(self, name: str) -> PackedLinear:
        """Read one layer's tensors, checked, with true zeros.

        Args:
            name: the layer's name in the checkpoint.

        Raises:
            CorruptCheckpoint: a scale is not finite.
        """
        parts = [
            part for part in PACKED_PARTS if part != "bias" and f"{name}.{part}" in self.headers
        ]
        return self.assemble(name, {part: self.tensor(f"{name}.{part}") for part in parts})

    def assemble(self, name: str, parts: Mapping[str, torch.Tensor]) -> PackedLinear:
        """Make a layer of its tensors, which something else may have read, checked likewise.

        Args:
            name: the layer's name in the checkpoint.
            parts: its `qweight`, `qzeros`, `scales` and, where the checkpoint has one, `g_idx`.

        Raises:
            CorruptCheckpoint: a scale is not finite.
        """
        import torch

        layer = self.layers[name]
        if not is_finite(parts["scales"]):
            raise CorruptCheckpoint(
                f"{name}.scales holds values that are not finite",
                path=self.path,
                tensor=f"{name}.scales",
                hint=DAMAGED,
            )
        groups = row_groups(
            parts["g_idx"].numpy() if "g_idx" in parts else None,
            rows=layer.in_features,
            groups=layer.groups,
            group_size=layer.group_size,
        )
        zeros = true_zeros(
            parts["qzeros"].numpy(),
            bits=layer.bits,
            layout=layer.layout,
            columns=layer.out_features,
            zeros_format=self.config.zeros if layer.bits in CONTINUOUS_BITS else "v2",
        )
        return PackedLinear(
            qweight=parts["qweight"],
            zeros=torch.from_numpy(zeros),
            scales=parts["scales"],
            g_idx=torch.from_numpy(np.array(groups, dtype=np.int32)),
            bits=layer.bits,
            layout=layer.layout,
            bias=self._bias(name),
        )

    def layer_tensors(self, name: str) -> list[str]:
        """Return the names of the tensors that make up one layer, its bias among them."""
        return [f"{name}.{part}" for part in PACKED_PARTS if f"{name}.{part}" in self.headers]

    def close(self) -> None:
        """Close its files."""
        self.tensors.close()

    def _bias(self, name: str) -> torch.Tensor | None:
        """Read a layer's bias; AutoGPTQ of 2023 wrote zero biases everywhere, which are none."""
        if f"{name}.bias" not in self.headers:
            return None
        bias = self.tensor(f"{name}.bias")
        return bias if bool(bias.any()) else None


@dataclass(frozen=True, slots=True)
class GPTQReader:
    """Open GPTQ checkpoints, of every writer and every year."""

    name: str = "gptq"

    def open(self, path: Path) -> Checkpoint:
        """Open the checkpoint at `path`, reading headers, g_idx and qzeros.

        Raises:
            BadReference: there are no weight files, or several checkpoints' (see `headers`).
            CheckpointError: the files are there and are wrong.
        """
        folder = path if path.is_dir() else path.parent
        stored, warnings = read_stored_config(folder)
        weights = (
            WeightFiles([path])
            if path.is_file()
            else find_weight_files(folder, base_name=stored.model_file_base_name)
        )
        tensors = TensorFiles(read_headers(weights.files))
        if not any(name.endswith(".qweight") for name in tensors.headers):
            raise not_gptq(tensors.headers, path)
        dtype = model_dtype(tensors.headers)
        if is_early(tensors.headers):
            return EarlyCheckpoint(path, tensors, stored, model_dtype=dtype)
        inferred = infer(tensors, stored, path=path)
        vocabulary = vocabulary_warning(folder, tensors.headers)
        return GPTQCheckpoint(
            path,
            config=inferred.config,
            layers=tuple(replace(layer, model_dtype=dtype) for layer in inferred.layers),
            warnings=(
                *weights.warnings,
                *warnings,
                *inferred.warnings,
                *([vocabulary] if vocabulary else []),
            ),
            tensors=tensors,
        )


def open_checkpoint(path: Path, readers: tuple[Reader, ...] = ()) -> Checkpoint:
    """Open a checkpoint with the first reader that knows its format, ours last."""
    ours = GPTQReader()
    for reader in readers:
        opened = _opened(reader, path) if reader.name != ours.name else None
        if opened is not None:
            return opened
    return ours.open(path)


def _opened(reader: Reader, path: Path) -> Checkpoint | None:
    try:
        opened: object = reader.open(path)
    except (GPTQLoaderError, OSError):  # of the files, which it was given
        raise
    except Exception as error:
        raise PluginError(
            f"the reader {reader.name} failed at {path}: {error}",
            hint="update the package that brings it, or leave it out with GPTQ_LOADER_PLUGINS",
        ) from error
    if opened is None:
        return None
    if missing := missing_members(opened):
        raise PluginError(
            f"the reader {reader.name} answered {opened!r}, which has no {missing[0]}",
            hint="answer a Checkpoint, or None where the files are another format's",
        )
    return cast("Checkpoint", opened)


def model_dtype(headers: dict[str, TensorInfo]) -> str:
    """Find the dtype of most plain weights: embeddings, norms, what was not quantised."""
    elements: Counter[str] = Counter({"F16": 0})
    for name, info in headers.items():
        if info.dtype in FLOAT_DTYPES and not name.endswith(".scales"):
            elements[info.dtype] += math.prod(info.shape)
    return FLOAT_DTYPES[elements.most_common(1)[0][0]]


def not_gptq(headers: dict[str, TensorInfo], path: Path) -> UnsupportedFormat:
    """Return the error that names which other kind of checkpoint this is."""
    for suffix, method, hint in OTHER_FORMATS:
        if any(name.endswith(suffix) for name in headers):
            return UnsupportedFormat(
                f"this is a checkpoint of {method}, not of GPTQ", path=path, hint=hint
            )
    mlx = [name.removesuffix(".biases") for name in headers if name.endswith(".biases")]
    if mlx and headers.get(f"{mlx[0]}.weight", headers[f"{mlx[0]}.biases"]).dtype == "U32":
        return UnsupportedFormat(
            "this is a checkpoint of MLX, not of GPTQ",
            path=path,
            hint="load it with mlx-lm, on a Mac; or look for a GPTQ version of this model",
        )
    if not headers:
        return UnsupportedFormat(
            "it holds no tensors",
            path=path,
            hint="download it again, or name the folder that holds the weights",
        )
    return UnsupportedFormat(
        f"none of its {len(headers)} tensors is a GPTQ qweight: the model is not quantised",
        path=path,
        hint="load it with transformers, or quantise it: gptq-loader quantize MODEL OUT",
    )
