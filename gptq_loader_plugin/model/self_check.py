"""Check a loaded model against itself, once, in under a second or two.

One layer of each kind is multiplied by its kernel and by its dequantised weight, and a short
forward pass must be finite. A kernel that was built for another machine, or a checkpoint whose
values overflow, is found here and not in gibberish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import CorruptCheckpoint, PluginError, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.planning.choose import Choice
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["check_finite", "check_layer", "check_layers"]

ROWS = 3  # more than one, so that kernels with a path for a single row are not the only ones seen
PROBE_TOKENS = 4
SIDE_COLUMNS = 64  # checked at either side of a layer: a whole one, in float32, is large
# Relative root-mean-square error of one layer's product. bfloat16 has 8 bits of mantissa and
# rounds x, the weight and y: 3e-3 measured; ten times that is a fault, not rounding.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


def check_layers(
    modules: Mapping[str, torch.nn.Module], checkpoint: Checkpoint, plan: Plan
) -> None:
    """Compare one layer of each kind with its dequantised weight.

    Args:
        modules: every layer's prepared module, by the layer's name.
        checkpoint: where the layers' tensors are.
        plan: which kernel prepared which layer.

    Raises:
        PluginError: a kernel's answer differs by more than its dtype rounds.
    """
    kinds: dict[tuple[object, ...], Choice] = {}
    for choice in plan.choices:
        layer = choice.layer
        if layer.name not in modules:  # it was cut into several
            continue
        kind = (choice.kernel.name, layer.bits, layer.group_size, layer.desc_act, layer.layout)
        kinds.setdefault(kind, choice)
    for choice in kinds.values():
        check_layer(modules[choice.layer.name], choice, checkpoint, plan)


def check_finite(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Run a few tokens through the model; every logit must be finite.

    Raises:
        CorruptCheckpoint: one is not; the message names the first module that gave such a value.
        UnsupportedFormat: the class does what a quantised layer cannot answer.
    """
    ids = (
        torch.arange(PROBE_TOKENS, device=model.device)[None]
        % model.config.get_text_config().vocab_size
    )
    first: list[str] = []

    def watch(name: str) -> Any:  # noqa: ANN401 - torch's hook type
        def hook(_module: object, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
                first.append(name)

        return hook

    with torch.inference_mode():
        try:
            finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
        except (AttributeError, RuntimeError, TypeError) as error:  # the class touches a weight
            raise UnsupportedFormat(
                f"a {model.config.model_type} model cannot run with these kernels and this dtype "
                f"({str(error).splitlines()[0][:200]})",
                path=checkpoint.path,
                hint='load it with backend="dense" and dtype="float32"',
            ) from error
        if finite:
            return
        handles = [
            module.register_forward_hook(watch(name)) for name, module in model.named_modules()
        ]
        model(input_ids=ids)
        for handle in handles:
            handle.remove()
    raise CorruptCheckpoint(
        f"the model's answers are not finite, from {first[0] if first else 'its logits'} on",
        path=checkpoint.path,
        hint='load it with dtype="float32"; if that fails too, the checkpoint is damaged',
    )


def check_layer(
    module: torch.nn.Module, choice: Choice, checkpoint: Checkpoint, plan: Plan
) -> None:
    """Compare a few rows by a layer's kernel with its dequantised weight.

    Args:
        module: what the kernel prepared.
        choice: the layer, and which kernel that is.
        checkpoint: where its tensors are.
        plan: where it runs.

    Raises:
        PluginError: the kernel's answer differs by more than its dtype rounds.
    """
    layer = choice.layer
    columns = torch.arange(layer.out_features)
    if len(columns) > 2 * SIDE_COLUMNS:
        columns = torch.cat((columns[:SIDE_COLUMNS], columns[-SIDE_COLUMNS:]))
    packed = checkpoint.packed(layer.name).take_columns(columns)
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, layer.in_features, generator=seeded, dtype=torch.float32)
    expected = x @ packed.dequantize().t()
    if packed.bias is not None:
        expected = expected + packed.bias.float()
    with torch.inference_mode():
        y = module(x.to(plan.place(layer.name).device.torch_name)).float().cpu()[:, columns]
    error = float((y - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= TOLERANCE.get(choice.chosen.dtype, TOLERANCE["bfloat16"]):
        raise PluginError(
            f"the kernel {choice.kernel.name} multiplies {layer.name} wrongly: its answer is off "
            f"by {error:.1%}",
            hint='choose another kernel: backend="dense"; and report this to the kernel\'s author',
        )
