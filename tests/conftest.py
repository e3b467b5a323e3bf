"""What every test has: empty folders in place of the user's own, and Ctrl-C as in a terminal."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

FOLDERS = ("GPTQ_LOADER_CACHE", "GPTQ_LOADER_CONFIG", "GPTQ_LOADER_DATA", "GPTQ_LOADER_MODELS")
# Where the user's model is that tests/hosts/server_process.py was told to serve.
OF_MODELS = frozenset({"GPTQ_LOADER_CACHE", "GPTQ_LOADER_MODELS"})
OURS = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Before a test is imported: huggingface_hub reads HF_HOME once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = config.stash[OURS] = Path(tempfile.mkdtemp(prefix="gptq-loader-tests-"))
    kept = OF_MODELS if os.environ.get("GPTQ_HOST_MODEL") else frozenset[str]()
    for name in set(FOLDERS) - kept:
        os.environ[name] = str(folder / name.removeprefix("GPTQ_LOADER_").lower())
    os.environ["HF_HOME"] = str(folder / "huggingface")
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[OURS], ignore_errors=True)
