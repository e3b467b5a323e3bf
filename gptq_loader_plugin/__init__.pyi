# The public names, each with its home; __init__.py finds them there on first use.

from .catalog.report import CheckpointReport
from .chat.encode import encode_messages
from .chat.template import Template
from .checkpoint.config import QuantConfig
from .errors import (
    AmbiguousReference,
    BadReference,
    CheckpointError,
    CheckpointNotFound,
    CodeTooLarge,
    ConfigInvalid,
    CorruptCheckpoint,
    DownloadCancelled,
    EmptyPrompt,
    GPTQLoaderError,
    HubError,
    NoBackend,
    NotEnoughMemory,
    OptionInvalid,
    PluginError,
    PromptTooLong,
    QuantizeError,
    TemplateError,
    TensorMismatch,
    UnsafeFile,
    UnsupportedFormat,
)
from .events import LoadRequest, Progress
from .generation.generate import Piece, Reply
from .generation.loaded import LoadedModel
from .generation.options import GenerateOptions
from .hookspecs import hookimpl
from .host import Host
from .kernel import Device, Kernel, LayerSpec, PackedLinear
from .load_options import LoadOptions
from .loading import explain, inspect, load
from .planning.plan import Plan
from .plugins.manager import Plugins
from .plugins.transformers_host import disable_transformers, enable_transformers
from .verdict import Accepted, Declined

__all__ = [
    "Accepted",
    "AmbiguousReference",
    "BadReference",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointReport",
    "CodeTooLarge",
    "ConfigInvalid",
    "CorruptCheckpoint",
    "Declined",
    "Device",
    "DownloadCancelled",
    "EmptyPrompt",
    "GPTQLoaderError",
    "GenerateOptions",
    "Host",
    "HubError",
    "Kernel",
    "LayerSpec",
    "LoadOptions",
    "LoadRequest",
    "LoadedModel",
    "NoBackend",
    "NotEnoughMemory",
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
    "encode_messages",
    "explain",
    "hookimpl",
    "inspect",
    "load",
]
