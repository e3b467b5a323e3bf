"""Read a checkpoint in the words of a transformers class that computes the same.

Its config, its layers and its tensors get the names that class has for them, and a layer that
holds queries, keys and values is cut into three: a column of a packed layer has its own codes,
zeros and scales, so that is exact. Nothing is read from the files for it, and nothing is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.checkpoint.architectures.families import FAMILIES
from gptq_loader_plugin.checkpoint.architectures.unsupported import REFUSED, SAME_CODE
from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
from gptq_loader_plugin.checkpoint.tensors import TensorFiles, View
from gptq_loader_plugin.errors import ConfigInvalid, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.architectures.families import Family
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["refuse", "translate", "translate_config"]

PARTS = ("q_proj", "k_proj", "v_proj")
BY_ROWS = ("weight", "bias")  # every other tensor of a layer has its outputs along its last axis
# Of config.json, what says nothing of the mathematics to a class of another name.
DROPPED = (
    "architectures", "attn_implementation", "auto_map", "model_type", "quantization_config",
)  # fmt: skip
ELSEWHERE = (
    "look for its GGUF version, which llama.cpp runs, or a version that transformers has a class "
    "for"
)


def translate(checkpoint: Checkpoint, *, families: Sequence[Family] = FAMILIES) -> Checkpoint:
    """Return a checkpoint in the words of the transformers class that computes the same.

    Most have them already, and are given back as they are.

    Args:
        checkpoint: as its files have it.
        families: what is known; a plugin's reader may know others.

    Raises:
        UnsupportedFormat: no class of transformers computes what this kind of model does.
        ConfigInvalid: config.json lacks what it takes to build the model.
    """
    path = checkpoint.folder / "config.json"
    if not isinstance(checkpoint, GPTQCheckpoint):
        return checkpoint  # whose reader knows its format
    if not path.is_file():
        return checkpoint  # a plan can be made without it; building says what is missing
    config = checkpoint.model_config
    family = _find(config, families, path)
    if family is not None:
        return _Translation(checkpoint, family, _write(config, family, path)).run()
    refuse(config, path)
    model_type = config["model_type"]
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if code is None or model_type in SAME_CODE:
        return checkpoint
    warning = (
        f"config.json names Python code of its own ({code}), which is not run: the model is built "
        f"as transformers' own {model_type}"
    )
    return _replace(checkpoint, warnings=(*checkpoint.warnings, warning))


def refuse(config: dict[str, Any], path: Path) -> None:
    """Refuse a config.json of a kind that no class of transformers computes.

    Raises:
        UnsupportedFormat: it is of such a kind.
    """
    model_type = config["model_type"]
    for refused in REFUSED:
        if refused.model_type == model_type and refused.when(config):
            raise UnsupportedFormat(
                f"a {model_type} model {refused.reason}", path=path, hint=ELSEWHERE
            )


def translate_config(config: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Write a config.json in transformers' words; None where it is, or where nobody can.

    Raises:
        UnsupportedFormat: no class of transformers computes what this kind of model does.
        ConfigInvalid: it lacks what it takes to build the model.
    """
    family = _find(config, FAMILIES, path)
    return None if family is None else _write(config, family, path)


def _find(config: dict[str, Any], families: Sequence[Family], path: Path) -> Family | None:
    of_its_name = (family for family in families if family.model_type == config.get("model_type"))
    try:
        return next((family for family in of_its_name if family.when(config)), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise _incomplete(config["model_type"], path, error) from error


def _write(config: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    for key, needed in family.needs.items():
        if config.get(key, needed) != needed:
            raise UnsupportedFormat(
                f"a {family.model_type} model whose {key} is {str(config[key]).lower()} is not "
                "what any class of transformers computes",
                path=path,
                hint=ELSEWHERE,
            )
    written = {
        family.keys.get(key, key): value
        for key, value in config.items()
        if key not in DROPPED and value is not None
    }
    try:
        written |= {**family.sets, **family.computed(config), "model_type": family.becomes}
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise _incomplete(family.model_type, path, error) from error
    return {key: value for key, value in written.items() if value is not None}


def _incomplete(model_type: str, path: Path, error: Exception) -> ConfigInvalid:
    return ConfigInvalid(
        f"what it takes to build a {model_type} model is missing or wrong: {error}",
        path=path,
        hint="copy config.json from the model this was made of",
    )


def _replace(checkpoint: GPTQCheckpoint, **parts: Any) -> GPTQCheckpoint:  # noqa: ANN401
    """Make a checkpoint like another one, with some parts of its own."""
    same = {
        "config": checkpoint.config,
        "layers": tuple(checkpoint.layers.values()),
        "warnings": checkpoint.warnings,
        "tensors": checkpoint.tensors,
        "translated": checkpoint.translated,
    }
    return GPTQCheckpoint(checkpoint.path, **{**same, **parts})


@dataclass(frozen=True, slots=True)
class _Translation:
    """One checkpoint, the family it is read by, and its config in transformers' words."""

    checkpoint: GPTQCheckpoint
    family: Family
    config: dict[str, Any]

    def run(self) -> Checkpoint:
        fused = self.family.fused
        normalised = self.family.normalised(self.checkpoint.model_config)
        cuts = self._cuts() if fused else {}
        last = str(self.config.get("num_hidden_layers", 0) + 1)
        names = [(pattern.replace("LAST", last), become) for pattern, become in self.family.names]
        headers: dict[str, TensorInfo] = {}
        views: dict[str, View] = {}
        for old, info in self.checkpoint.headers.items():
            new = _rename(old, names)
            layer, _, leaf = new.rpartition(".")
            parent, _, name = layer.rpartition(".")
            if fused is not None and name == fused.name:
                for part, (header, view) in self._cut(info, leaf, cuts, self._bits(old)).items():
                    headers[f"{parent}.{part}.{leaf}"] = header
                    if view is not None:
                        views[f"{parent}.{part}.{leaf}"] = view
                continue
            headers[new] = info
            if new == normalised:
                views[new] = View(info, _normalise)
        if normalised and normalised not in headers:
            raise UnsupportedFormat(
                f"{normalised} is missing or quantised, and its rows must be made to have length "
                "one",
                path=self.checkpoint.path,
                hint="use a version of this model whose output head is not quantised",
            )
        return _replace(
            self.checkpoint,
            layers=tuple(self._layers(names, cuts)),
            tensors=TensorFiles(headers, views),
            translated=self.config,
        )

    def _cuts(self) -> dict[str, NDArray[np.int64]]:
        """Return which columns of the fused layer are each part's."""
        config = self.config
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        size = config.get("head_dim") or config["hidden_size"] // heads
        columns = np.arange((heads + 2 * groups) * size)
        if self.family.fused is not None and self.family.fused.grouped:
            grouped = columns.reshape(groups, -1, size)
            return {
                "q_proj": grouped[:, :-2].reshape(-1),
                "k_proj": grouped[:, -2].reshape(-1),
                "v_proj": grouped[:, -1].reshape(-1),
            }
        ends = [heads * size, (heads + groups) * size]
        return dict(zip(PARTS, np.split(columns, ends), strict=True))

    def _bits(self, tensor: str) -> int:
        layer = self.checkpoint.layers.get(tensor.rpartition(".")[0])
        return 0 if layer is None else layer.bits

    def _cut(
        self, info: TensorInfo, leaf: str, cuts: Mapping[str, NDArray[np.int64]], bits: int
    ) -> dict[str, tuple[TensorInfo, View | None]]:
        """Cut one tensor of the fused layer into those of its parts: each header, and how."""
        if leaf == "g_idx":
            return dict.fromkeys(cuts, (info, None))
        axis = 0 if leaf in BY_ROWS else len(info.shape) - 1
        taken = {
            part: self._words(columns, bits) if leaf == "qzeros" else columns
            for part, columns in cuts.items()
        }
        if sum(map(len, taken.values())) != info.shape[axis]:
            raise ConfigInvalid(
                f"{info.name} is {list(info.shape)}: not the heads that config.json names",
                path=self.checkpoint.folder / "config.json",
                hint="copy config.json from the model this was made of",
            )
        parts: dict[str, tuple[TensorInfo, View | None]] = {}
        start = info.start
        for part, index in taken.items():
            shape = tuple(
                len(index) if dimension == axis else n for dimension, n in enumerate(info.shape)
            )
            cut = replace(info, shape=shape, start=start)
            # Where it lies matters to reading ahead alone, which is to read the whole once.
            start += cut.nbytes if start >= 0 else 0
            parts[part] = cut, View(info, _taker(index, axis))
        return parts

    def _words(self, columns: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
        """Return which words of qzeros hold those columns, all of whose fields must be theirs."""
        unit = 32 // gcd(32, bits)
        runs = columns.reshape(-1, unit) if len(columns) % unit == 0 else None
        if runs is None or (runs[:, 0] % unit).any() or (np.diff(runs) != 1).any():
            raise UnsupportedFormat(
                f"its {bits}-bit zeros of queries, keys and values share words",
                path=self.checkpoint.path,
                hint="use a version of this model with another number of bits",
            )
        words = unit * bits // 32
        return (runs[:, :1] // unit * words + np.arange(words)).reshape(-1)

    def _layers(
        self, names: list[tuple[str, Any]], cuts: Mapping[str, NDArray[np.int64]]
    ) -> list[LayerSpec]:
        layers: list[LayerSpec] = []
        for layer in self.checkpoint.layers.values():
            name = _rename(f"{layer.name}.", names).removesuffix(".")
            parent, _, leaf = name.rpartition(".")
            if self.family.fused is not None and leaf == self.family.fused.name:
                layers += [
                    replace(layer, name=f"{parent}.{part}", out_features=len(columns))
                    for part, columns in cuts.items()
                ]
            else:
                layers.append(replace(layer, name=name))
        return layers


def _rename(name: str, names: list[tuple[str, Any]]) -> str:
    for pattern, become in names:
        name = re.sub(pattern, become, name)
    return name


def _taker(index: NDArray[np.int64], axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def select(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return tensor.index_select(axis, torch.from_numpy(index))

    return select


def _normalise(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(tensor.float())
