"""Read config.json as transformers does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.vocabulary import fit_vocabulary
from gptq_loader_plugin.errors import UnsupportedFormat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["UNBUILDABLE", "read_config", "unknown_model"]

# What transformers raises for a config that it cannot make a model of.
UNBUILDABLE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
)  # fmt: skip


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read config.json as transformers does, without what it says of quantisation.

    Raises:
        ConfigInvalid: config.json is missing or broken.
        UnsupportedFormat: transformers does not know the model, or it needs code of its own.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = checkpoint.model_config
    model_type = fields["model_type"]
    file = checkpoint.folder / "config.json"
    # as JSON: 4.0 is 4 to Python, and not to transformers
    as_it_stands = json.dumps(fields) == json.dumps(read_json(file))
    config: PreTrainedConfig
    try:
        if as_it_stands or model_type not in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(dict(fields))
    except (*UNBUILDABLE, OSError, StrictDataclassError) as error:
        raise unknown_model(model_type, file, error) from error
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    fit_vocabulary(config, checkpoint.headers)
    return config


def unknown_model(model_type: str, path: Any, error: Exception) -> UnsupportedFormat:  # noqa: ANN401
    """Return the error for a config that transformers could not make a model of."""
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    words = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in words or "custom code" in words:
        return UnsupportedFormat(
            f"{model_type} models bring Python code of their own, which is not run",
            path=path,
            hint="use a version of this model for an architecture that transformers has, or its "
            "GGUF version, which llama.cpp runs",
        )
    if model_type not in CONFIG_MAPPING:
        return UnsupportedFormat(
            f"transformers {version} has no {model_type} models",
            path=path,
            hint="update transformers: pip install -U transformers; or check model_type",
        )
    if words.startswith("Unrecognized configuration class"):
        return UnsupportedFormat(
            f"a {model_type} model is none that goes on with a text",
            path=path,
            hint="use a model for text generation; or check model_type",
        )
    return UnsupportedFormat(
        f"transformers {version} cannot build a {model_type} model ({words[:200]})",
        path=path,
        hint="correct config.json, or copy it from the model this was made of",
    )
