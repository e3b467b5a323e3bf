"""Decide whether vLLM would run a checkpoint by itself, and why not, without importing vLLM.

The rules are copied by hand from vLLM 0.32.0, so that they can be applied where it is not there.
Compare them with these files of vllm/model_executor whenever WRITTEN_FOR in options.py changes:

    config.json     layers/quantization/auto_gptq.py: AutoGPTQConfig, its TYPE_MAP
    act-order       layers/quantization/utils/gptq_utils.py: normalize_and_validate_gptq_desc_act
    group sizes     layers/quantization/utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES
    oldest GPU      kernels/linear/mixed_precision/marlin.py: get_min_capability
    CPU             kernels/linear/mixed_precision/cpu.py: CPUWNA16LinearKernel.can_implement

Two more are no rules of vLLM's but what it gets wrong: tensors that contradict config.json, and a
short last group, whose rows it drops. tests/scale/test_vllm_serve.py compares all of them with an
installed vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = [
    "METHODS",
    "label_refusal",
    "reason_for_us",
    "refusal",
    "stored_label",
    "taken_unasked",
]

METHODS = ("gptq", "gptq_v2")  # what config.json may call the method, for the plug-in
BITS = (4, 8)  # the keys of TYPE_MAP, which are symmetric
GROUP_SIZES = (-1, 32, 64, 128)
WIDTH_UNIT = 32  # of the CPU kernel's rows and columns
OLDEST_GPU = (7, 5)


def stored_label(folder: Path) -> Mapping[str, Any]:
    """Give what config.json says of the quantisation, which is all that vLLM goes by."""
    file = folder / "config.json"
    label = read_json(file).get("quantization_config") if file.is_file() else None
    return label if isinstance(label, dict) else {}


def refusal(
    checkpoint: GPTQCheckpoint, layers: Iterable[LayerSpec], device: Device | None
) -> str | None:
    """Say why vLLM's own GPTQ would not run a checkpoint rightly; None where it would.

    Args:
        checkpoint: the open checkpoint.
        layers: its layers as vLLM joins them.
        device: where it will run; None says what can be said of all.
    """
    words = label_refusal(stored_label(checkpoint.folder))
    if words:
        return words
    for layer in layers:
        words = _refused(layer) or (None if device is None else _refused_on(layer, device))
        if words:
            return f"{layer.name}: {words}"
    return None


def label_refusal(label: Mapping[str, Any]) -> str | None:
    """Say why vLLM's own GPTQ would not take what config.json says of the quantisation."""
    if str(label.get("quant_method", "")).lower() != "gptq":
        return "config.json does not say that its method is gptq, and vLLM reads no other file"
    if label.get("desc_act") and label.get("group_size") != -1:
        return "config.json says act-order with groups, which vLLM 0.32 has no more"
    if label.get("bits") not in BITS or not label.get("sym"):
        symmetry = "symmetric" if label.get("sym") else "asymmetric"
        return (
            "vLLM takes 4 or 8 bits with symmetric zeros, and config.json says "
            f"{label.get('bits')} bits, {symmetry}"
        )
    return None


def taken_unasked(checkpoint: GPTQCheckpoint) -> bool:
    """Whether the plug-in takes a checkpoint when vLLM loads it and no method was named."""
    method = str(stored_label(checkpoint.folder).get("quant_method", "")).lower()
    wrong = refusal(checkpoint, checkpoint.layers.values(), None)
    return method in METHODS and wrong is not None


def reason_for_us(
    device: Device | None, *, backend: str | None = None, dtype: str | None = None
) -> str | None:
    """Say why the plug-in is better asked by name for what vLLM would run; None where it is not.

    Args:
        device: where it will run; None where that is not known.
        backend: the kernel that the user names.
        dtype: what the user wants the model to compute in.
    """
    if backend is not None:
        return f"the kernel {backend} is one of this package's"
    if dtype == "float32":
        return "vLLM's own GPTQ does not compute in float32"
    if device is not None and device.type == "cpu":
        return (
            "on a CPU vLLM's own kernel may round what it multiplies to 8 bits, and this "
            "package's is exact"
        )
    return None


def _refused(layer: LayerSpec) -> str | None:
    """Say what vLLM's own GPTQ cannot do with a layer, on any device."""
    if layer.groups > 1 and layer.desc_act:
        return "its rows are in act-order, whatever config.json says, and vLLM would not see it"
    if layer.bits not in BITS:
        return f"vLLM takes 4 or 8 bits, and this has {layer.bits}"
    if not layer.sym:
        return "vLLM takes symmetric zeros, and these are not"
    if layer.group_size not in GROUP_SIZES:
        return f"vLLM has no kernel for groups of {layer.group_size}"
    if layer.group_size > 0 and layer.in_features % layer.group_size:
        return (
            f"groups of {layer.group_size} do not fill {layer.in_features} rows evenly, and vLLM "
            "forgets the rest"
        )
    return None


def _refused_on(layer: LayerSpec, device: Device) -> str | None:
    """Say what vLLM's own GPTQ cannot do with a layer on a device."""
    if device.type == "cpu":
        if layer.bits != 4:
            return f"on a CPU vLLM takes 4 bits, and this has {layer.bits}"
        if layer.in_features % WIDTH_UNIT or layer.out_features % WIDTH_UNIT:
            return (
                f"on a CPU vLLM takes widths that are multiples of {WIDTH_UNIT}, and this is "
                f"{layer.in_features}x{layer.out_features}"
            )
    if device.capability is not None and device.capability < OLDEST_GPU:
        return f"vLLM's own GPTQ needs sm75 or newer; this is {device}"
    return None
