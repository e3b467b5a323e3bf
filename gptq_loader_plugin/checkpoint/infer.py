"""Work out how each layer was quantised from its tensors; they win over any config.

Only headers are read, and of the data g_idx and qzeros. With K = in_features, N = out_features:

* bits = columns of qzeros * 32 / N; K = rows of qweight * 32 / bits;
* group_size: the config's where ceil(K / group_size) is the number of groups in every layer, else
  the most rows of any group of g_idx, else K / groups where whole, else the least power of two
  that fits every layer; one group is -1;
* desc_act: g_idx out of order means yes; in order with several groups means no; with one group the
  flag stands, because it changes no number. No g_idx means groups in sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gptq_loader_plugin.checkpoint.config import QuantConfig
from gptq_loader_plugin.checkpoint.layer_data import (
    LayerData,
    LayerHeaders,
    is_set,
    read_layer_data,
)
from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.checkpoint.zeros import decide_format, lost_columns
from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat
from gptq_loader_plugin.kernel import LayerSpec
from gptq_loader_plugin.kernel.packing import BITS, CONTINUOUS_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.config import StoredConfig
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.checkpoint.tensors import TensorFiles
    from gptq_loader_plugin.checkpoint.zeros import ZerosFormat
    from gptq_loader_plugin.kernel.packing import Bits, Layout

__all__ = [
    "FLOAT_DTYPES",
    "Inferred",
    "check_codes",
    "infer",
    "layout_of",
    "next_power_of_two",
    "read_layer",
    "row_groups",
]

ZEROS_BYTES = 1 << 28  # twenty times the largest that were published
FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Inferred:
    """What the tensors say.

    Attributes:
        config: the config, corrected.
        layers: every quantised layer, in the order of the files.
        warnings: where tensors contradict the config, one sentence each.
    """

    config: QuantConfig
    layers: tuple[LayerSpec, ...]
    warnings: tuple[str, ...]


def infer(tensors: TensorFiles, stored: StoredConfig, *, path: Path) -> Inferred:
    """Work out every layer and the config from the tensors' headers, g_idx and qzeros.

    Raises:
        TensorMismatch: a layer's tensors are missing, or do not fit each other.
        CorruptCheckpoint: a g_idx names a group that does not exist.
        UnsupportedFormat: the codes lie as AWQ packs them.
    """
    headers = tensors.headers
    names = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    check_codes(headers, path)
    read = [read_layer(name, headers, stored, path) for name in names]
    data = [
        read_layer_data(layer_headers, layout_of(layer_headers.bits, stored), tensors, path)
        for layer_headers in read
    ]
    planar_zeros = stored.checkpoint_format == "gptq_p"
    zeros_format, warning = decide_format(
        []
        if planar_zeros
        else [layer_data.zeros for layer_data in data if layer_data.zeros.bits in CONTINUOUS_BITS],
        label="gptq_v2" if planar_zeros else stored.checkpoint_format,
    )
    warnings = [warning] if warning else []
    guess = _common_group_size(read, data, stored)
    layers: list[LayerSpec] = []
    lost: list[str] = []
    unset = [layer.name for layer, its in zip(read, data, strict=True) if its.unset]
    if unset:
        warnings.append(
            f"{len(unset)} layers have a g_idx that was never filled in ({unset[0]}): their groups "
            "are taken in sequence"
        )
    for layer_headers, layer_data in zip(read, data, strict=True):
        own: ZerosFormat = zeros_format if layer_headers.bits in CONTINUOUS_BITS else "v2"
        layer = _spec(layer_headers, layer_data, layer_data.ranges[own], stored, guess)
        layers.append(layer)
        _check_lost(layer, layer_headers.qzeros.shape[1], path)
        if own == "v1" and not layer.sym and layer_data.overwritten:
            lost.append(layer_headers.name)
    if lost:
        warnings.append(
            f"the program that wrote this checkpoint destroyed some zeros of {lost[0]}"
            + (f" and of {len(lost) - 1} more layers" if len(lost) > 1 else "")
            + ", a known fault of GPTQ-for-LLaMa and early AutoGPTQ without --sym; answers may "
            "suffer, in every program"
        )
    config, contradictions = _config(layers, stored, zeros_format)
    return Inferred(config, tuple(layers), (*warnings, *contradictions))


def row_groups(
    g_idx: NDArray[np.int32] | None, *, rows: int, groups: int, group_size: int
) -> NDArray[np.int32]:
    """Return the group of every row: g_idx where it is set, else groups in sequence.

    A g_idx that names one of several groups alone was never filled in: its writer left zeros.
    """
    if g_idx is not None and is_set(g_idx, groups):
        return g_idx
    size = group_size if group_size > 0 else rows
    sequential: NDArray[np.int32] = np.arange(rows, dtype=np.int32) // np.int32(size)
    return sequential.clip(max=groups - 1)


def check_codes(headers: dict[str, TensorInfo], path: Path) -> None:
    """Refuse scales without the codes that they scale."""
    for name in headers:
        codes = f"{name.removesuffix('.scales')}.qweight"
        if name.endswith(".scales") and codes not in headers:
            raise TensorMismatch(f"{codes} is missing", path=path, tensor=codes, hint=DAMAGED)


def read_layer(
    name: str, headers: dict[str, TensorInfo], stored: StoredConfig, path: Path
) -> LayerHeaders:
    """Read what a layer's headers say by themselves.

    Raises:
        TensorMismatch: one of its tensors is missing, or they do not fit each other.
        UnsupportedFormat: its codes lie as AWQ packs them.
    """

    def need(part: str, dtypes: Sequence[str], dimensions: int) -> TensorInfo:
        tensor = f"{name}.{part}"
        if tensor not in headers:
            raise TensorMismatch(f"{tensor} is missing", path=path, tensor=tensor, hint=DAMAGED)
        info = headers[tensor]
        if info.dtype not in dtypes or len(info.shape) != dimensions or 0 in info.shape:
            raise TensorMismatch(
                f"{tensor} is {info.dtype} {list(info.shape)}; it must be "
                f"{' or '.join(dtypes)} with {dimensions} dimensions",
                path=path,
                tensor=tensor,
                hint=DAMAGED,
            )
        return info

    qweight = need("qweight", ("I32",), 2)
    qzeros = need("qzeros", ("I32",), 2)
    scales = need("scales", tuple(FLOAT_DTYPES), 2)
    g_idx = None
    if f"{name}.g_idx" in headers and headers[f"{name}.g_idx"].shape != (0,):
        g_idx = need("g_idx", ("I32", "I64"), 1)
    columns, groups = qweight.shape[1], scales.shape[0]
    if columns * 8 == scales.shape[1] == qzeros.shape[1] * 8:
        raise UnsupportedFormat(
            "this is an AWQ checkpoint, not a GPTQ one: its codes lie along the columns",
            path=path,
            hint="use a program that loads awq, or look for a GPTQ version of this model",
        )
    if scales.shape[1] != columns or qzeros.shape[0] != groups:
        raise TensorMismatch(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales "
            f"{list(scales.shape)} do not fit each other",
            path=path,
            tensor=f"{name}.qzeros",
            hint=DAMAGED,
        )
    if qzeros.nbytes > ZEROS_BYTES:
        raise TensorMismatch(
            f"{name}.qzeros is {list(qzeros.shape)}, larger than any layer's",
            path=path,
            tensor=f"{name}.qzeros",
            hint=DAMAGED,
        )
    bits = _bits(qweight, qzeros, g_idx, _stored_bits(name, stored))
    if bits is None:
        raise TensorMismatch(
            f"{name}: no number of bits from {BITS[0]} to {BITS[-1]} fits qweight "
            f"{list(qweight.shape)}, qzeros {list(qzeros.shape)}"
            + (f" and g_idx {list(g_idx.shape)}" if g_idx else ""),
            path=path,
            tensor=f"{name}.qweight",
            hint=DAMAGED,
        )
    return LayerHeaders(
        name=name,
        bits=bits,
        rows=qweight.shape[0] * 32 // bits,
        columns=columns,
        groups=groups,
        qzeros=qzeros,
        g_idx=g_idx,
        scales_dtype=FLOAT_DTYPES[scales.dtype],
        bias=f"{name}.bias" in headers,
    )


def _stored_bits(name: str, stored: StoredConfig) -> int | None:
    own = (stored.override(name) or {}).get("bits", stored.bits)
    return own if isinstance(own, int) else None


def _bits(
    qweight: TensorInfo, qzeros: TensorInfo, g_idx: TensorInfo | None, stored_bits: int | None
) -> int | None:
    """Find the width that fits all the shapes; the writers round N * bits / 32 down."""
    columns = qweight.shape[1]
    fitting = [
        bits
        for bits in BITS
        if columns * bits // 32 == qzeros.shape[1]
        and qweight.shape[0] * 32 % bits == 0
        and (g_idx is None or qweight.shape[0] * 32 // bits == g_idx.shape[0])
    ]
    if stored_bits in fitting:
        return stored_bits
    return fitting[0] if fitting else None


def layout_of(bits: int, stored: StoredConfig) -> Layout:
    """Return how codes of this width lie in words."""
    planar = bits not in CONTINUOUS_BITS or stored.checkpoint_format == "gptq_p"
    return "planar" if planar else "continuous"


def _common_group_size(
    layers: Sequence[LayerHeaders], data: Sequence[LayerData], stored: StoredConfig
) -> int:
    """Find the group size that fits every layer without an override, and -1 where none groups."""
    plain = [
        layer for layer in layers if "group_size" not in (stored.override(layer.name) or {})
    ] or layers
    grouped = [layer for layer in plain if layer.groups > 1]
    if not grouped:
        return -1
    stored_size = stored.group_size
    if (
        stored_size is not None
        and stored_size > 0
        and all(layer.fits(stored_size) for layer in plain)
    ):
        return stored_size
    largest = {
        layer.name: layer_data.largest_group for layer, layer_data in zip(layers, data, strict=True)
    }
    counted = {rows for layer in grouped if (rows := largest[layer.name]) is not None}
    if len(counted) == 1:
        return counted.pop()
    whole = {layer.rows // layer.groups for layer in grouped if layer.rows % layer.groups == 0}
    if len(whole) == 1 and all(layer.fits(min(whole)) for layer in plain):
        return whole.pop()
    return next_power_of_two(max(-(-layer.rows // layer.groups) for layer in grouped))


def _group_size(
    layer: LayerHeaders, largest_group: int | None, stored_size: object, guess: int
) -> int:
    if layer.groups == 1:
        return -1
    if largest_group is not None:
        return largest_group
    for size in (stored_size, guess):
        if isinstance(size, int) and size > 0 and layer.fits(size):
            return size
    if layer.rows % layer.groups == 0:
        return layer.rows // layer.groups
    return next_power_of_two(-(-layer.rows // layer.groups))


def next_power_of_two(minimum: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (minimum - 1).bit_length()


def _spec(
    layer: LayerHeaders,
    data: LayerData,
    zeros: tuple[int, int],
    stored: StoredConfig,
    guess: int,
) -> LayerSpec:
    override = stored.override(layer.name) or {}
    stored_size = override.get("group_size", stored.group_size)
    size = _group_size(layer, data.largest_group, stored_size, guess)
    counts = data.counts
    if counts is None:
        rows = row_groups(None, rows=layer.rows, groups=layer.groups, group_size=size)
        counts = np.bincount(rows, minlength=layer.groups)
    desc_act = not data.ordered
    if layer.groups == 1:
        desc_act = bool(override.get("desc_act", stored.desc_act))
    return LayerSpec.from_groups(
        layer.name,
        counts,
        out_features=layer.columns,
        bits=cast("Bits", layer.bits),
        group_size=size,
        desc_act=desc_act,
        zero_range=zeros,
        layout=data.layout,
        scales_dtype=layer.scales_dtype,
        bias=layer.bias,
    )


def _check_lost(layer: LayerSpec, words: int, path: Path) -> None:
    lost = lost_columns(words, bits=layer.bits, columns=layer.out_features)
    if lost and not (layer.sym and layer.zero_range[0] == 1 << (layer.bits - 1)):
        raise TensorMismatch(
            f"{layer.name}: the zeros of its last {lost} columns were never written",
            path=path,
            tensor=f"{layer.name}.qzeros",
            hint="ask for a version of this model whose layers are padded to multiples of 32, or "
            "quantised symmetrically",
        )


def _config(
    layers: Sequence[LayerSpec], stored: StoredConfig, zeros_format: ZerosFormat
) -> tuple[QuantConfig, list[str]]:
    """Merge the stored config and the layers; where they disagree the layers win."""
    if not layers:
        return _merge({}, stored, zeros_format), []
    plain = [layer for layer in layers if not (stored.override(layer.name) or {})] or layers
    grouped = [layer for layer in plain if layer.groups > 1]
    # one group changes no number, so a flag that no file gives is the tensors' "no"
    ordered = any(layer.desc_act for layer in grouped or plain)
    inferred: dict[str, Any] = {
        "bits": _mode([layer.bits for layer in plain]),
        "group_size": _mode([layer.group_size for layer in grouped]) if grouped else -1,
        "desc_act": ordered,
        "sym": all(layer.sym for layer in layers),
    }
    labels = {name: getattr(stored, name) for name in inferred}
    if stored.static_groups:  # act-order that leaves groups in sequence
        labels["desc_act"] = ordered
    warnings = [
        f"{name} is {labels[name]} in {stored.sources[name]}; the tensors say {value}, and they win"
        for name, value in inferred.items()
        if labels[name] is not None
        and labels[name] != value
        and not _same_groups(name, labels, plain)
    ]
    return _merge(inferred, stored, zeros_format), warnings


def _same_groups(name: str, labels: dict[str, Any], layers: Sequence[LayerSpec]) -> bool:
    """Whether a group size that is at least every layer's rows means no groups, as it does."""
    size = labels["group_size"]
    return name == "group_size" and size >= max(layer.in_features for layer in layers)


def _merge(
    inferred: dict[str, Any], stored: StoredConfig, zeros_format: ZerosFormat
) -> QuantConfig:
    sources = dict(stored.sources)
    fields: dict[str, Any] = stored.model_dump(exclude={"sources", *inferred}, exclude_none=True)
    for name, value in inferred.items():
        fields[name] = value
        if getattr(stored, name) != value:
            sources[name] = "tensors"
    defaults = {"bits": 4, "group_size": -1, "desc_act": False, "sym": True}
    for name, value in defaults.items():
        if name not in fields:
            fields[name], sources[name] = value, "default"
    of_zeros = "gptq_v2" if zeros_format == "v2" else "gptq"
    if fields.get("checkpoint_format") not in ("gptq_p", of_zeros):
        fields["checkpoint_format"] = of_zeros
        sources["checkpoint_format"] = "tensors"
    return QuantConfig(**fields, zeros=zeros_format, sources=sources)


def _mode(values: Sequence[int]) -> int:
    return max(sorted(set(values)), key=values.count)
