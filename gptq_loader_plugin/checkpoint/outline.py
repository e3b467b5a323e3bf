"""Describe a checkpoint by its headers alone, believing its config where only data could tell.

Enough to say what it would take and which kernels would run it: for a list of many, and for one
that is on the hub. `infer` reads g_idx and qzeros too, and then the tensors win.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from gptq_loader_plugin.checkpoint.config import QuantConfig
from gptq_loader_plugin.checkpoint.infer import (
    check_codes,
    layout_of,
    next_power_of_two,
    read_layer,
)
from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint, model_dtype, not_gptq
from gptq_loader_plugin.checkpoint.tensors import TensorFiles
from gptq_loader_plugin.kernel import LayerSpec

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.config import StoredConfig
    from gptq_loader_plugin.checkpoint.layer_data import LayerHeaders
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel.packing import Bits

__all__ = ["outline"]


def outline(
    headers: dict[str, TensorInfo], stored: StoredConfig, *, folder: Path, size_bytes: int
) -> GPTQCheckpoint:
    """Describe a checkpoint whose tensors will not be read.

    Args:
        headers: every tensor's header.
        stored: what its config files say.
        folder: where its `config.json` is.
        size_bytes: its weight files' bytes.

    Raises:
        CheckpointError: the tensors are not GPTQ's, or do not fit each other.
    """
    names = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    if not names:
        raise not_gptq(headers, folder)
    check_codes(headers, folder)
    dtype = model_dtype(headers)
    layers = tuple(
        replace(_layer(read_layer(name, headers, stored, folder), stored), model_dtype=dtype)
        for name in names
    )
    checkpoint = GPTQCheckpoint(
        folder,
        config=_config(layers, stored),
        layers=layers,
        warnings=(),
        tensors=TensorFiles(headers),
    )
    checkpoint.size_bytes = size_bytes
    return checkpoint


def _layer(headers: LayerHeaders, stored: StoredConfig) -> LayerSpec:
    override = stored.override(headers.name) or {}
    size = _group_size(headers, override.get("group_size", stored.group_size))
    last = headers.rows - size * (headers.groups - 1) if size > 0 else headers.rows
    whole = size if size > 0 else headers.rows
    sym = override.get("sym", stored.sym) is not False
    middle, highest = 1 << (headers.bits - 1), (1 << headers.bits) - 1
    return LayerSpec(
        name=headers.name,
        in_features=headers.rows,
        out_features=headers.columns,
        bits=cast("Bits", headers.bits),
        group_size=size,
        desc_act=bool(override.get("desc_act", stored.desc_act)),
        sym=sym,
        groups=headers.groups,
        group_rows=(last, whole),
        group_unit=math.gcd(last, whole),
        zero_range=(middle, middle) if sym else (0, highest),
        layout=layout_of(headers.bits, stored),
        scales_dtype=headers.scales_dtype,
        bias=headers.bias,
    )


def _group_size(headers: LayerHeaders, stored_size: object) -> int:
    if headers.groups == 1:
        return -1
    if isinstance(stored_size, int) and stored_size > 0 and headers.fits(stored_size):
        return stored_size
    if headers.rows % headers.groups == 0:
        return headers.rows // headers.groups
    return next_power_of_two(-(-headers.rows // headers.groups))


def _config(layers: tuple[LayerSpec, ...], stored: StoredConfig) -> QuantConfig:
    """Describe how most layers were quantised; widths and groups are the tensors', as they win."""
    grouped = [layer.group_size for layer in layers if layer.groups > 1]
    bits = Counter(layer.bits for layer in layers).most_common(1)[0][0]
    group_size = Counter(grouped).most_common(1)[0][0] if grouped else -1
    sources = {
        **stored.sources,
        **({"bits": "tensors"} if stored.bits != bits else {}),
        **({"group_size": "tensors"} if stored.group_size != group_size else {}),
    }
    named = stored.checkpoint_format or "gptq"
    own = {"sources", "bits", "group_size", "desc_act", "sym"}
    return QuantConfig(
        **stored.model_dump(exclude={*own, "checkpoint_format"}, exclude_none=True),
        bits=bits,
        group_size=group_size,
        desc_act=bool(stored.desc_act),
        sym=stored.sym is not False,
        checkpoint_format=cast("Any", named),  # read_stored_config has checked it
        zeros="v1" if named == "gptq" else "v2",
        sources=sources,
    )
