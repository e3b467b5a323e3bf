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
from gptq_loader_plugin.checkpoint.layer_data import LayerHeaders, Survey, survey
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
    "power_of_two",
    "read_layer",
    "row_groups",
]

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
    found = [read_layer(name, headers, stored, path) for name in names]
    seen = [survey(it, layout_of(it.bits, stored), tensors, path) for it in found]
    planar_zeros = stored.checkpoint_format == "gptq_p"
    zeros_format, warning = decide_format(
        [] if planar_zeros else [it.zeros for it in seen if it.zeros.bits in CONTINUOUS_BITS],
        label="gptq_v2" if planar_zeros else stored.checkpoint_format,
    )
    warnings = [warning] if warning else []
    guess = _common_group_size(found, seen, stored)
    layers: list[LayerSpec] = []
    lost: list[str] = []
    for it, found_in in zip(found, seen, strict=True):
        own: ZerosFormat = zeros_format if it.bits in CONTINUOUS_BITS else "v2"
        layer = _spec(it, found_in, found_in.ranges[own], stored, guess)
        layers.append(layer)
        _check_lost(layer, it.qzeros.shape[1], path)
        if own == "v1" and not layer.sym and found_in.overwritten:
            lost.append(it.name)
    if lost:
        warnings.append(
            f"the program that wrote this checkpoint destroyed some zeros of {lost[0]}"
            + (f" and of {len(lost) - 1} more layers" if len(lost) > 1 else "")
            + ", a known fault of GPTQ-for-LLaMa and early AutoGPTQ without --sym; answers may "
            "suffer, in every program"
        )
    config, said = _config(layers, stored, zeros_format)
    return Inferred(config, tuple(layers), (*warnings, *said))


def row_groups(
    g_idx: NDArray[np.int32] | None, *, rows: int, groups: int, group_size: int
) -> NDArray[np.int32]:
    """Give the group of every row: g_idx where there is one, else groups in sequence."""
    if g_idx is not None:
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
    g_idx = need("g_idx", ("I32",), 1) if f"{name}.g_idx" in headers else None
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
    qweight: TensorInfo, qzeros: TensorInfo, g_idx: TensorInfo | None, told: int | None
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
    if told in fitting:
        return told
    return fitting[0] if fitting else None


def layout_of(bits: int, stored: StoredConfig) -> Layout:
    """Say how codes of this width lie in words."""
    planar = bits not in CONTINUOUS_BITS or stored.checkpoint_format == "gptq_p"
    return "planar" if planar else "continuous"


def _common_group_size(
    layers: Sequence[LayerHeaders], seen: Sequence[Survey], stored: StoredConfig
) -> int:
    """Find the group size that fits every layer without an override, and -1 where none groups."""
    plain = [it for it in layers if "group_size" not in (stored.override(it.name) or {})] or layers
    grouped = [it for it in plain if it.groups > 1]
    if not grouped:
        return -1
    told = stored.group_size
    if told is not None and told > 0 and all(it.fits(told) for it in plain):
        return told
    most = {it.name: found_in.most_rows for it, found_in in zip(layers, seen, strict=True)}
    counted = {rows for it in grouped if (rows := most[it.name]) is not None}
    if len(counted) == 1:
        return counted.pop()
    whole = {it.rows // it.groups for it in grouped if it.rows % it.groups == 0}
    if len(whole) == 1 and all(it.fits(min(whole)) for it in plain):
        return whole.pop()
    return power_of_two(max(-(-it.rows // it.groups) for it in grouped))


def _group_size(layer: LayerHeaders, most_rows: int | None, told: object, guess: int) -> int:
    if layer.groups == 1:
        return -1
    if most_rows is not None:
        return most_rows
    for size in (told, guess):
        if isinstance(size, int) and size > 0 and layer.fits(size):
            return size
    if layer.rows % layer.groups == 0:
        return layer.rows // layer.groups
    return power_of_two(-(-layer.rows // layer.groups))


def power_of_two(least: int) -> int:
    """Give the least power of two that is no less."""
    return 1 << (least - 1).bit_length()


def _spec(
    layer: LayerHeaders,
    seen: Survey,
    zeros: tuple[int, int],
    stored: StoredConfig,
    guess: int,
) -> LayerSpec:
    override = stored.override(layer.name) or {}
    told = override.get("group_size", stored.group_size)
    size = _group_size(layer, seen.most_rows, told, guess)
    counts = seen.counts
    if counts is None:
        rows = row_groups(None, rows=layer.rows, groups=layer.groups, group_size=size)
        counts = np.bincount(rows, minlength=layer.groups)
    desc_act = not seen.ordered
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
        layout=seen.layout,
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
    plain = [it for it in layers if not (stored.override(it.name) or {})] or layers
    grouped = [it for it in plain if it.groups > 1]
    # one group changes no number, so a flag that no file gives is the tensors' "no"
    ordered = any(it.desc_act for it in grouped or plain)
    seen: dict[str, Any] = {
        "bits": _most_common([it.bits for it in plain]),
        "group_size": _most_common([it.group_size for it in grouped]) if grouped else -1,
        "desc_act": ordered,
        "sym": all(it.sym for it in layers),
    }
    told = {name: getattr(stored, name) for name in seen}
    if stored.static_groups:  # act-order that leaves groups in sequence
        told["desc_act"] = ordered
    warnings = [
        f"{name} is {told[name]} in {stored.sources[name]}; the tensors say {value}, and they win"
        for name, value in seen.items()
        if told[name] is not None and told[name] != value and not _same_groups(name, told, plain)
    ]
    return _merge(seen, stored, zeros_format), warnings


def _same_groups(name: str, told: dict[str, Any], layers: Sequence[LayerSpec]) -> bool:
    """Whether a group size that is at least every layer's rows means no groups, as it does."""
    size = told["group_size"]
    return name == "group_size" and size >= max(it.in_features for it in layers)


def _merge(seen: dict[str, Any], stored: StoredConfig, zeros_format: ZerosFormat) -> QuantConfig:
    sources = dict(stored.sources)
    fields: dict[str, Any] = stored.model_dump(exclude={"sources", *seen}, exclude_none=True)
    for name, value in seen.items():
        fields[name] = value
        if getattr(stored, name) != value:
            sources[name] = "tensors"
    defaults = {"bits": 4, "group_size": -1, "desc_act": False, "sym": True}
    for name, value in defaults.items():
        if name not in fields:
            fields[name], sources[name] = value, "default"
    if fields.get("checkpoint_format") not in (
        "gptq_p",
        "gptq_v2" if zeros_format == "v2" else "gptq",
    ):
        fields["checkpoint_format"] = "gptq_v2" if zeros_format == "v2" else "gptq"
        sources["checkpoint_format"] = "tensors"
    return QuantConfig(**fields, zeros=zeros_format, sources=sources)


def _most_common(values: Sequence[int]) -> int:
    return max(sorted(set(values)), key=values.count)
