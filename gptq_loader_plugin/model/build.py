"""Build the model of a plan: skeleton, weights, self-check, and what kernels do for the whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.model_fields import read_fields
from gptq_loader_plugin.checkpoint.read_ahead import ReadAhead
from gptq_loader_plugin.class_errors import class_errors
from gptq_loader_plugin.errors import ConfigInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.kernel import Finished, Finisher
from gptq_loader_plugin.model.multi_device import follow_devices
from gptq_loader_plugin.model.self_check import check_finite, check_layers
from gptq_loader_plugin.model.skeleton import build_skeleton
from gptq_loader_plugin.model.weights import fill, reading_order
from gptq_loader_plugin.planning.dequantized import dequantized_note

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Batcher
    from gptq_loader_plugin.planning.plan import Plan
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["FilledModel", "build_model"]


@dataclass(frozen=True, slots=True)
class FilledModel:
    """A transformers model, and what became of the checkpoint in it.

    Attributes:
        model: the model, every weight in its place.
        checkpoint: what it was loaded from; its files are closed, and opened where it is read.
        plan: which kernel runs which layer, and why.
        modules: the prepared module of every quantised layer, by the layer's name.
        warnings: what a user should know, one sentence each.
        notes: what was built, and what kernels did for the model as a whole.
        batcher: steps several sequences in one call, where a kernel can.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    plan: Plan
    modules: dict[str, torch.nn.Module]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    batcher: Batcher | None = None


def build_model(
    checkpoint: Checkpoint,
    plan: Plan,
    plugins: Plugins,
    offload_folder: str | Path | None,
    *,
    check: bool,
    config: PreTrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> FilledModel:
    """Build the checkpoint's model as planned, and check it.

    Args:
        checkpoint: where the tensors come from.
        plan: which kernel runs which layer, where.
        plugins: called with the progress of the load.
        offload_folder: where the weights go whose place is the disk.
        check: whether to check the kernels and the logits once loaded.
        config: the model's config, where it is not what config.json says.
        model_class: the class to build; None takes transformers' own for the config.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """

    def progress(event: Progress) -> None:
        ahead.used(event.done)
        plugins.progress(event)

    tensors = [info for _, parts in reading_order(checkpoint) for info in parts]
    folder = None if offload_folder is None else Path(offload_folder)
    model_type = checkpoint.model_config["model_type"]
    with ReadAhead(tensors) as ahead, class_errors(model_type, checkpoint.path):
        model = build_skeleton(
            checkpoint, getattr(torch, plan.dtype), config=config, model_class=model_class
        )
        if (checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = _generation_config(checkpoint.folder)
        filled = fill(model, checkpoint, plan, progress=progress, offload_folder=folder)
    plan = plan.dequantizing(filled.dequantized)
    several = follow_devices(model, plan)
    if check:
        plugins.progress(Progress("self-check", 0, 2, "checks"))
        check_layers(filled.modules, checkpoint, plan)
        plugins.progress(Progress("self-check", 1, 2, "checks"))
        with class_errors(model_type, checkpoint.path):
            check_finite(model, checkpoint)
        plugins.progress(Progress("self-check", 2, 2, "checks"))
    warnings = (*checkpoint.warnings, *filled.warnings)
    if several:  # a kernel finishes a model whose every tensor is on its device
        done = [Finished("decodes layer by layer, over several devices")]
    else:
        used = {choice.kernel.name: choice.kernel for choice in plan.choices}
        done = [kernel.finish(model) for kernel in used.values() if isinstance(kernel, Finisher)]
    notes = [finished.note for finished in done]
    if plan.dequantized:
        notes.append(dequantized_note(plan.dequantized))
    batcher = next((finished.batcher for finished in done if finished.batcher is not None), None)
    if checkpoint.translated is not None:
        notes.insert(0, f"built as a {model_type} model, which computes what its own code does")
    return FilledModel(model, checkpoint, plan, filled.modules, warnings, tuple(notes), batcher)


def _generation_config(folder: Path) -> Any:  # noqa: ANN401 - transformers' own
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    stored = read_json(file)
    fields = read_fields(stored, file)
    try:
        if json.dumps(fields) != json.dumps(stored):
            return GenerationConfig.from_dict(fields)
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise ConfigInvalid(
            f"generation_config.json cannot be read ({error})",
            path=folder / "generation_config.json",
            hint="correct it, or delete it",
        ) from error
