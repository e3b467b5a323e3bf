"""Load any GPTQ checkpoint, exactly, and say which kernel runs it and why.

```python
import gptq_loader_plugin as gptq

with gptq.load("demo") as model:
    for piece in model.chat([{"role": "user", "content": "What is the capital of France?"}]):
        print(piece.text, end="", flush=True)
```

Importing this package imports neither torch nor pydantic: each name is found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.errors import (
        AmbiguousReference,
        BadReference,
        CheckpointError,
        CheckpointNotFound,
        ConfigInvalid,
        CorruptCheckpoint,
        DownloadCancelled,
        GPTQLoaderError,
        HubError,
        NoBackend,
        OptionInvalid,
        PluginError,
        PromptTooLong,
        QuantizeError,
        TemplateError,
        TensorMismatch,
        UnsafeFile,
        UnsupportedFormat,
    )
    from gptq_loader_plugin.events import LoadRequest, Progress
    from gptq_loader_plugin.generate import Piece, Reply
    from gptq_loader_plugin.hookspecs import hookimpl
    from gptq_loader_plugin.host import Host
    from gptq_loader_plugin.kernel import (
        Accepted,
        Declined,
        Device,
        Kernel,
        LayerSpec,
        PackedLinear,
    )
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.loading import explain, inspect, load
    from gptq_loader_plugin.options import GenerateOptions
    from gptq_loader_plugin.plan import Plan
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.report import CheckpointReport
    from gptq_loader_plugin.template import Template
    from gptq_loader_plugin.transformers_host import disable_transformers, enable_transformers

__all__ = [
    "Accepted",
    "AmbiguousReference",
    "BadReference",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointReport",
    "ConfigInvalid",
    "CorruptCheckpoint",
    "Declined",
    "Device",
    "DownloadCancelled",
    "GPTQLoaderError",
    "GenerateOptions",
    "Host",
    "HubError",
    "Kernel",
    "LayerSpec",
    "LoadRequest",
    "LoadedModel",
    "NoBackend",
    "OptionInvalid",
    "PackedLinear",
    "Piece",
    "Plan",
    "PluginError",
    "Plugins",
    "Progress",
    "PromptTooLong",
    "QuantConfig",
    "QuantizeError",
    "Reply",
    "Template",
    "TemplateError",
    "TensorMismatch",
    "UnsafeFile",
    "UnsupportedFormat",
    "disable_transformers",
    "enable_transformers",
    "explain",
    "hookimpl",
    "inspect",
    "load",
]

_HOMES = {
    "checkpoint.config": ("QuantConfig",),
    "errors": (
        "AmbiguousReference",
        "BadReference",
        "CheckpointError",
        "CheckpointNotFound",
        "ConfigInvalid",
        "CorruptCheckpoint",
        "DownloadCancelled",
        "GPTQLoaderError",
        "HubError",
        "NoBackend",
        "OptionInvalid",
        "PluginError",
        "PromptTooLong",
        "QuantizeError",
        "TemplateError",
        "TensorMismatch",
        "UnsafeFile",
        "UnsupportedFormat",
    ),
    "events": ("LoadRequest", "Progress"),
    "generate": ("Piece", "Reply"),
    "hookspecs": ("hookimpl",),
    "host": ("Host",),
    "kernel": ("Accepted", "Declined", "Device", "Kernel", "LayerSpec", "PackedLinear"),
    "loaded": ("LoadedModel",),
    "loading": ("explain", "inspect", "load"),
    "options": ("GenerateOptions",),
    "plan": ("Plan",),
    "plugins": ("Plugins",),
    "report": ("CheckpointReport",),
    "template": ("Template",),
    "transformers_host": ("disable_transformers", "enable_transformers"),
}


def __getattr__(name: str) -> object:
    """Find a public name in its module, on first use (PEP 562)."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
