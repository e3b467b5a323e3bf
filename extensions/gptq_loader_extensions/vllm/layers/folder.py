"""Find the folder of the checkpoint that vLLM loads, as its own loader does; imports vLLM."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

__all__ = ["find_folder"]

WEIGHTS = ["*.safetensors", "*.bin", "*.pt"]  # in vLLM's order: the first that matches


def find_folder(model: str, revision: str | None) -> Path:
    """Return a model's folder; download a hub repository to where vLLM's loader looks for it.

    Args:
        model: the user's model: a folder, or a repository on the hub.
        revision: the repository's branch, tag or commit.
    """
    if Path(model).is_dir():
        return Path(model)
    cache = get_current_vllm_config().load_config.download_dir
    snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=["*.json"])
    return Path(download_weights_from_hf(model, cache, WEIGHTS, revision))
