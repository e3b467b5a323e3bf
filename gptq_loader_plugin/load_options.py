"""How to load a checkpoint: one set of options for `load`, every command and every host."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Head
from gptq_loader_plugin.planning.placement import read_limits

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.chat.template import Template

__all__ = ["DTYPES", "LoadOptions"]

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How to load a checkpoint; None leaves a choice to the loader.

    The fields are the arguments of `gptq_loader_plugin.load`, which documents them. `dtype` and
    `max_memory` are normalised: torch.bfloat16 to "bfloat16", "cuda:0=8GB,cpu" to a mapping; and
    `lora` to a mapping of names.

    Raises:
        OptionInvalid: a value is impossible, or two options contradict each other.
    """

    device: str | None = None
    backend: str | None = None
    dtype: str | torch.dtype | None = None
    template: str | Template | None = None
    revision: str | None = None
    context: int | None = None
    head: Head | None = None
    check: bool = True
    device_map: str | Mapping[str, str] | None = None
    max_memory: str | Mapping[str, str | int] | None = None
    offload_folder: str | Path | None = None
    kv_cache: str | None = None
    draft: str | Path | None = None
    lora: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None

    def __post_init__(self) -> None:
        """Normalise what has several spellings, and refuse what makes no sense."""
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if isinstance(self.max_memory, str):
            object.__setattr__(self, "max_memory", read_limits(self.max_memory))
        object.__setattr__(self, "lora", read_adapters(self.lora))
        if self.offload_folder is not None:
            object.__setattr__(self, "offload_folder", Path(self.offload_folder))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionInvalid(
                f"unknown dtype {str(self.dtype)!r}", hint=f"use one of {', '.join(DTYPES)}"
            )
        if self.kv_cache not in (None, "int8"):
            raise OptionInvalid(
                f"unknown kv_cache {self.kv_cache!r}", hint='use "int8", or leave it out'
            )
        if self.head is not None and self.head not in get_args(Head):
            raise OptionInvalid(
                f"unknown head {self.head!r}", hint=f"use {' or '.join(get_args(Head))}"
            )
        if self.max_memory and self.device_map is None:
            raise OptionInvalid(
                "memory limits are for a model over several devices",
                hint='ask for that: device_map="auto", or --device-map auto',
            )
        if self.device is not None and self.device_map is not None:
            raise OptionInvalid(
                "both a device and a device map are given",
                hint="give one of them; a device map names its own devices",
            )

    @property
    def dtype_name(self) -> str | None:
        """The dtype as torch names it, "bfloat16"."""
        return None if self.dtype is None else str(self.dtype)

    @property
    def limits(self) -> Mapping[str, str | int] | None:
        """The memory limits by place."""
        return self.max_memory if not isinstance(self.max_memory, str) else None

    @property
    def adapters(self) -> Mapping[str, str | Path]:
        """The LoRA adapters by name."""
        return self.lora if isinstance(self.lora, Mapping) else {}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Make options of a mapping, such as a file or a request holds.

        Raises:
            OptionInvalid: a name is unknown, or a value is impossible.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise OptionInvalid(
                    f"there is no option {name!r}",
                    hint=f"did you mean {near[0]}?" if near else f"use {', '.join(names)}",
                )
        return cls(**values)


def read_adapters(
    named: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None,
) -> Mapping[str, str | Path] | None:
    """Read which LoRA adapters to load: "NAME=REF" each, or REF, whose last part is its name.

    Raises:
        OptionInvalid: two have one name, or one has none.
    """
    if named is None or isinstance(named, Mapping):
        return named or None
    adapters: dict[str, str | Path] = {}
    for entry in [named] if isinstance(named, str | Path) else named:
        name, _, reference = str(entry).partition("=")
        if not reference:
            reference = str(entry)
            name = reference.replace("\\", "/").rstrip("/").rpartition("/")[2]
        if not name or name in adapters:
            raise OptionInvalid(
                f"two adapters are called {name}" if name else f"{entry} gives an adapter no name",
                hint="name each by its own: --lora NAME=REF",
            )
        adapters[name] = reference
    return adapters or None
