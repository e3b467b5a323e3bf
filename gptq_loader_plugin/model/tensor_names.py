"""Where each tensor of a checkpoint belongs in a transformers model of today.

Names in a checkpoint are those of the transformers of its year; transformers 5 renames some and
fuses a mixture's experts into one parameter, and its own conversion table says how, so nothing
here knows an architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat
from gptq_loader_plugin.model.experts import experts_layout
from gptq_loader_plugin.model.pictures import NotLoaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = [
    "ExpertPlace",
    "JoinedPlace",
    "LayerPlace",
    "ModulePlace",
    "Names",
    "Place",
    "SplitPlace",
]

EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")
# An expert's tensor where transformers has no conversion for it: as GPTQModel names it.
EXPERT = re.compile(
    r"(?P<parent>.+)\.(?:(?P<expert>\d+)\.(?P<role>gate|up|gate_up|down)_proj"
    r"|(?P<role_before>gate_up|down)(?:_projs)?\.(?P<expert_after>\d+))\.(?:weight|bias)"
)


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """A tensor or layer belongs to one module or parameter, by its path in the model."""

    path: str


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """A layer is one projection of one expert, in a module that fuses experts.

    Attributes:
        parent: the fused module's path, `model.layers.0.mlp.experts`.
        expert: which expert.
        role: "gate", "up", "gate_up" or "down".
    """

    parent: str
    expert: int
    role: str


@dataclass(frozen=True, slots=True)
class SplitPlace:
    """A layer is several modules of the model, side by side.

    Attributes:
        columns: which columns are each module's, int64 [n], by its path.
    """

    columns: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class JoinedPlace:
    """A layer is some of one module's columns, beside other layers' (MiniMax-M3's gate and up).

    Attributes:
        path: the module's path in the model.
        index: which of its layers this is.
        count: how many it has.
    """

    path: str
    index: int
    count: int


Place = ModulePlace | ExpertPlace
LayerPlace = Place | SplitPlace | JoinedPlace
NEXT_MODULE = r"^(model\.)?mtp\b"
NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
ROLES = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


class Names:
    """Where the tensors of a checkpoint belong in a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [
            transform for transform in transforms if not isinstance(transform, WeightConverter)
        ]
        self._converters = [
            transform for transform in transforms if isinstance(transform, WeightConverter)
        ]
        self._prefix = model.base_model_prefix
        self._tensors = {**model.state_dict(), **dict(model.named_buffers())}
        self._known = set(self._tensors)
        self._modules = {name for name, _ in model.named_modules()}
        self._model = model
        self._towers = [
            name for name, module in model.named_modules() if isinstance(module, NotLoaded)
        ]
        layouts = {name: experts_layout(module) for name, module in model.named_modules()}
        self._experts = {
            name: layout.count for name, layout in layouts.items() if layout is not None
        }

    def target(self, tensor: str) -> tuple[str, Any, str | None]:
        """Rename one tensor of a checkpoint.

        Returns:
            Its name in the model (whether or not it exists there); and, where transformers fuses
            it with others, the converter that does and the converter's pattern for it.
        """
        name = tensor
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None and self._exists(renamed):
                return self._with_prefix(renamed), converter, pattern
        # A model saved without a renaming that the table has (or with it already made) keeps its
        # own name where that is the one that exists.
        for candidate in (name, tensor):
            if self._exists(candidate):
                return self._with_prefix(candidate), None, None
        return name, None, None

    def place(self, tensor: str) -> Place | None:
        """Find where one tensor belongs: a parameter's path, an expert's projection, or nowhere."""
        target, converter, pattern = self.target(tensor)
        if converter is None:
            return ModulePlace(target) if self.exists(target) else self._separate(target)
        parent, _, fused = target.rpartition(".")
        expert = EXPERT_INDEX.search(tensor)
        roles = ROLES.get(fused)
        sources = list(converter.source_patterns)
        if expert is None or roles is None or len(sources) != len(roles):
            return None
        return ExpertPlace(parent, int(expert[1]), roles[sources.index(str(pattern))])

    def _separate(self, name: str) -> ExpertPlace | None:
        """Find the expert of a tensor whose class has all experts in one, also in its files."""
        match = EXPERT.fullmatch(name)
        if match is None:
            return None
        parents = (match["parent"], f"{self._prefix}.{match['parent']}")
        parent = next((parent for parent in parents if parent in self._experts), None)
        if parent is None:
            return None
        expert = match["expert"] or match["expert_after"]
        return ExpertPlace(parent, int(expert), match["role"] or match["role_before"])

    def layer(self, name: str, checkpoint: Checkpoint) -> LayerPlace:
        """Find the module, part of one, the modules or the expert that a quantised layer replaces.

        Raises:
            TensorMismatch: the model has no such module.
            UnsupportedFormat: transformers fuses it in a way that is not known here.
        """
        match self.place(self._weight(name)):
            case ExpertPlace() as place:
                return place
            case ModulePlace(path=path):
                return ModulePlace(path.removesuffix(".weight"))
            case None:
                pass
        target, converter, pattern = self.target(f"{name}.weight")
        joined = self._joined(target, converter, pattern)
        if joined is not None:
            return joined
        if converter is not None:
            columns = self._columns(target, converter, checkpoint.layers[name].out_features)
            if columns is not None:
                return SplitPlace(columns)
            raise UnsupportedFormat(
                f"{name} is quantised, and this transformers fuses it into {target}",
                path=checkpoint.path,
                hint="ask for this model to be supported, and name it with your transformers",
            )
        raise TensorMismatch(
            f"{name} is quantised, and a {checkpoint.model_config['model_type']} model has "
            "no such layer",
            path=checkpoint.path,
            tensor=checkpoint.layer_tensors(name)[0],
            hint="check that config.json is of this checkpoint; update transformers if the "
            "model is newer than it",
        )

    def _weight(self, layer: str) -> str:
        """Name a layer's weight: the layer's own name where its files have no `.weight`."""
        name = f"{layer}.weight"
        bare = self.place(name) is None and isinstance(self.place(layer), ModulePlace)
        return layer if bare else name

    def _joined(self, target: str, converter: Any, pattern: str | None) -> JoinedPlace | None:  # noqa: ANN401
        """Find the module whose columns are several layers', one after the other."""
        from transformers.core_model_loading import Concatenate

        path = target.removesuffix(".weight")
        if converter is None or path not in self._modules:
            return None
        sources = list(converter.source_patterns)
        in_turn = all(isinstance(it, Concatenate) and it.dim == 0 for it in converter.operations)
        if not in_turn or len(sources) == 1:
            return None
        return JoinedPlace(path, sources.index(str(pattern)), len(sources))

    def _columns(self, target: str, converter: Any, count: int) -> dict[str, torch.Tensor] | None:  # noqa: ANN401 - transformers' own
        """Learn which columns of a layer go where, by converting their numbers."""
        end = target.index(converter.target_patterns[0])
        suffix = target[end + len(converter.target_patterns[0]) :]
        numbers: Any = {converter.source_patterns[0]: [torch.arange(count)[:, None]]}
        try:
            for operation in converter.operations:
                numbers = operation.convert(
                    numbers,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=target,
                    model=self._model,
                    config=self._model.config,
                    missing_keys=None,
                )
            columns = {
                f"{target[:end]}{pattern}{suffix}".removesuffix(".weight"): (
                    value[0] if isinstance(value, list) else value
                ).flatten()
                for pattern, value in numbers.items()
            }
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        every = torch.cat(list(columns.values())).sort().values
        whole = len(converter.source_patterns) == 1 and torch.equal(every, torch.arange(count))
        return columns if whole and columns.keys() <= self._modules else None

    def exists(self, target: str) -> bool:
        """Whether the model has a parameter or buffer of this name."""
        return target in self._known

    def parameter(self, target: str) -> torch.Tensor | None:
        """Return the model's own parameter or buffer of this name, as it was built."""
        return self._tensors.get(target)

    def has_expert(self, parent: str, expert: int) -> bool:
        """Whether a module has that expert: those that pass states on as they are have none."""
        return expert < self._experts.get(parent, 0)

    def is_module(self, path: str) -> bool:
        """Whether the model has a module of this path."""
        return path in self._modules or f"{self._prefix}.{path}" in self._modules

    def is_left_out(self, name: str) -> bool:
        """Whether what a layer is of is left out: a tower, or a block that predicts more tokens.

        Such blocks are counted on after the last one (`num_nextn_predict_layers`), or lie apart.
        """
        target = self.target(self._weight(name))[0]
        if any(target.startswith(f"{tower}.") for tower in self._towers):
            return True
        if self.place(self._weight(name)) is not None or self.inside_a_block(name):
            return False
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if any(re.search(pattern, name) for pattern in (*ignored, NEXT_MODULE)):
            return True
        config = self._model.config.get_text_config()
        block = re.search(r"\.layers\.(\d+)\.", name)
        more = next((getattr(config, key, None) for key in NEXT_TOKENS if hasattr(config, key)), 0)
        return block is not None and 0 <= int(block[1]) - config.num_hidden_layers < (more or 0)

    def inside_a_block(self, target: str) -> bool:
        """Whether a tensor without a place names a block that the model has: `layers.0.…`."""
        parts = target.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if parts[end - 1].isdigit():
                path = ".".join(parts[:end])
                return path in self._modules or f"{self._prefix}.{path}" in self._modules
        return False

    def _exists(self, name: str) -> bool:
        return self._with_prefix(name) in self._known

    def _with_prefix(self, name: str) -> str:
        """Add or drop the base model's prefix, whichever makes a name that exists."""
        if name in self._known or not self._prefix:
            return name
        longer = f"{self._prefix}.{name}"
        shorter = name.removeprefix(f"{self._prefix}.")
        return next(
            (candidate for candidate in (longer, shorter) if candidate in self._known), name
        )
