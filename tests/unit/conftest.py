"""What several unit tests use: a hub on loopback that this process takes for the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hub_server import HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, and an empty cache in `tmp_path / "hf"`."""
    from huggingface_hub import close_session

    with HubServer() as server:
        constants = "huggingface_hub.constants"
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GPTQ_LOADER_MODELS", str(tmp_path / "models"))
        yield server
        close_session()


@pytest.fixture(autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps what it measures, in place of the user's own folder."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("GPTQ_LOADER_DATA", str(folder))
    return folder
