"""The model hub: download a branch so that it arrives whole; `listing` lists them.

huggingface_hub knows the addresses, the token and the cache; the transfer is ours, because its own
neither goes on where a killed process stopped nor compares hashes (huggingface_hub 2.4).
`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean here what they mean to it.
"""

from __future__ import annotations

from gptq_loader_plugin.hub.cache import cached_folder
from gptq_loader_plugin.hub.fetch import Downloading, download, download_folder

__all__ = ["Downloading", "cached_folder", "download", "download_folder"]
