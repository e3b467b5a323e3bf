"""Decide whether vLLM would run a checkpoint by itself, and why not, without importing vLLM.

The rules are copied by hand from vLLM 0.32.0, so that they can be applied where it is not there;
those of 0.33.0 are the same. Compare them with these files of vllm/model_executor whenever NEWEST
in options.py changes:

    config.json     layers/quantization/auto_gptq.py: AutoGPTQConfig, its TYPE_MAP
    act-order       layers/quantization/utils/gptq_utils.py: normalize_and_validate_gptq_desc_act
    group sizes     layers/quantization/utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES
    oldest GPU      kernels/linear/mixed_precision/marlin.py: get_min_capability
    CPU             kernels/linear/mixed_precision/cpu.py: CPUWNA16LinearKernel.can_implement

Three more are no rules of vLLM's but what it gets wrong: tensors that contradict config.json; a
short last group, whose rows it drops; and rows without groups that its CPU kernel cannot cut into
blocks of 128, on which it dies. tests/scale/test_vllm_serve.py compares all of them with an
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
    "config_refusal",
    "is_taken_by_default",
    "reason_to_request",
    "refusal",
    "stored_quantization",
]

METHODS = ("gptq", "gptq_v2")  # names of the method in config.json that the plug-in accepts
BITS = (4, 8)  # the keys of TYPE_MAP, which are symmetric
GROUP_SIZES = (-1, 32, 64, 128)
WIDTH_UNIT = 32  # of the CPU kernel's rows and columns
BLOCK_ROWS = 128  # of the CPU kernel, where a group has more
OLDEST_GPU = (7, 5)


def stored_quantization(folder: Path) -> Mapping[str, Any]:
    """Return the quantization_config of config.json, which is all that vLLM reads."""
    file = folder / "config.json"
    stored = read_json(file).get("quantization_config") if file.is_file() else None
    return stored if isinstance(stored, dict) else {}


def refusal(
    checkpoint: GPTQCheckpoint, layers: Iterable[LayerSpec], device: Device | None
) -> str | None:
    """Return why vLLM's own GPTQ would not run a checkpoint correctly; None where it would.

    Args:
        checkpoint: the open checkpoint.
        layers: its layers as vLLM fuses them.
        device: the device it will run on; None checks what holds on every device.
    """
    reason = config_refusal(stored_quantization(checkpoint.folder))
    if reason:
        return reason
    for layer in layers:
        reason = _layer_refusal(layer)
        if reason is None and device is not None:
            reason = _layer_refusal_on(layer, device)
        if reason:
            return f"{layer.name}: {reason}"
    return None


def config_refusal(stored: Mapping[str, Any]) -> str | None:
    """Return why vLLM's own GPTQ would not take a quantization_config; None where it would."""
    if str(stored.get("quant_method", "")).lower() != "gptq":
        return "config.json does not say that its method is gptq, and vLLM reads no other file"
    if stored.get("desc_act") and stored.get("group_size") != -1:
        return "config.json says act-order with groups, which vLLM no longer supports"
    if stored.get("bits") not in BITS or not stored.get("sym"):
        symmetry = "symmetric" if stored.get("sym") else "asymmetric"
        return (
            "vLLM supports 4 or 8 bits with symmetric zeros, and config.json says "
            f"{stored.get('bits')} bits, {symmetry}"
        )
    return None


def is_taken_by_default(checkpoint: GPTQCheckpoint, device: Device | None = None) -> bool:
    """Return whether the plug-in takes a checkpoint when vLLM is given no quantization method.

    Args:
        checkpoint: the open checkpoint.
        device: the device it will run on; vLLM's build for a CPU is known when it decides.
    """
    method = str(stored_quantization(checkpoint.folder).get("quant_method", "")).lower()
    known = device if device is not None and device.type == "cpu" else None
    reason = refusal(checkpoint, checkpoint.layers.values(), known)
    return method in METHODS and reason is not None


def reason_to_request(
    device: Device | None, *, backend: str | None = None, dtype: str | None = None
) -> str | None:
    """Return why to request the plug-in for what vLLM itself would run; None to leave it to vLLM.

    Args:
        device: the device it will run on; None where that is not known.
        backend: the kernel that the user names.
        dtype: the dtype to compute in that the user names.
    """
    if backend is not None:
        return f"the kernel {backend} is one of this package's"
    if dtype == "float32":
        return "vLLM's own GPTQ does not compute in float32"
    if device is not None and device.type == "cpu":
        return (
            "on a CPU vLLM's own kernel may round activations to 8 bits, and this package's is "
            "exact"
        )
    return None


def _layer_refusal(layer: LayerSpec) -> str | None:
    """Return what vLLM's own GPTQ does not support in a layer, on any device."""
    if layer.groups > 1 and layer.desc_act:
        return "its rows are in act-order, whatever config.json says, and vLLM would ignore it"
    if layer.bits not in BITS:
        return f"vLLM supports 4 or 8 bits, and this has {layer.bits}"
    if not layer.sym:
        return "vLLM supports symmetric zeros only, and these are not"
    if layer.group_size not in GROUP_SIZES:
        return f"vLLM has no kernel for groups of {layer.group_size}"
    if layer.group_size > 0 and layer.in_features % layer.group_size:
        return (
            f"groups of {layer.group_size} do not divide {layer.in_features} rows evenly, and vLLM "
            "drops the rest"
        )
    return None


def _layer_refusal_on(layer: LayerSpec, device: Device) -> str | None:
    """Return what vLLM's own GPTQ does not support in a layer on a device."""
    if device.type == "cpu":
        if layer.bits != 4:
            return f"on a CPU vLLM supports 4 bits only, and this has {layer.bits}"
        if layer.in_features % WIDTH_UNIT or layer.out_features % WIDTH_UNIT:
            return (
                f"on a CPU vLLM supports widths that are multiples of {WIDTH_UNIT}, and this is "
                f"{layer.in_features}x{layer.out_features}"
            )
        rows = layer.in_features
        if layer.groups == 1 and rows > BLOCK_ROWS and rows % BLOCK_ROWS:
            return (
                f"on a CPU vLLM cuts rows without groups into blocks of {BLOCK_ROWS}, and fails "
                f"where they do not divide {rows}"
            )
    if device.capability is not None and device.capability < OLDEST_GPU:
        return f"vLLM's own GPTQ needs sm75 or newer; this is {device}"
    return None
