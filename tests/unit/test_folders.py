"""The folders of a user, on each system: those of earlier versions stay in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows, get_win_folder_from_env_vars

from gptq_loader_plugin.system.folders import cache_folder, config_folder, data_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from platformdirs.api import PlatformDirsABC

FOLDERS = {
    cache_folder: ("GPTQ_LOADER_CACHE", "XDG_CACHE_HOME", ".cache"),
    data_folder: ("GPTQ_LOADER_DATA", "XDG_DATA_HOME", ".local/share"),
    config_folder: ("GPTQ_LOADER_CONFIG", "XDG_CONFIG_HOME", ".config"),
}
# Below the home, where nothing of an earlier version is.
USUAL = {
    (Unix, cache_folder): ".cache/gptq-loader",
    (Unix, data_folder): ".local/share/gptq-loader",
    (Unix, config_folder): ".config/gptq-loader",
    (MacOS, cache_folder): "Library/Caches/gptq-loader",
    (MacOS, data_folder): "Library/Application Support/gptq-loader",
    (MacOS, config_folder): "Library/Application Support/gptq-loader",
    (Windows, cache_folder): "AppData/Local/gptq-loader/Cache",
    (Windows, data_folder): "AppData/Local/gptq-loader",
    (Windows, config_folder): "AppData/Roaming/gptq-loader",
}
EVERY = pytest.mark.parametrize("folder", FOLDERS)
EVERYWHERE = pytest.mark.parametrize("system", [Unix, MacOS, Windows])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for ours, xdg, _ in FOLDERS.values():
        monkeypatch.delenv(ours, raising=False)
        monkeypatch.delenv(xdg, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "AppData" / "Local"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "AppData" / "Roaming"))
    # as on Windows without its registry and its DLLs
    monkeypatch.setattr("platformdirs.windows.get_win_folder", get_win_folder_from_env_vars)
    return tmp_path


@EVERY
@EVERYWHERE
def test_a_folder_is_where_the_system_keeps_such_things(
    home: Path, system: type[PlatformDirsABC], folder: Callable[..., Path]
) -> None:
    assert folder(system=system) == home / USUAL[system, folder]


@EVERY
@EVERYWHERE
def test_a_folder_of_an_earlier_version_stays_in_use(
    home: Path, system: type[PlatformDirsABC], folder: Callable[..., Path]
) -> None:
    earlier = home / FOLDERS[folder][2] / "gptq-loader"
    earlier.mkdir(parents=True)
    assert folder(system=system) == earlier
    for other in set(FOLDERS) - {folder}:
        assert other(system=system) == home / USUAL[system, other]


@EVERY
@EVERYWHERE
def test_a_folder_can_be_named(
    home: Path, system: type[PlatformDirsABC], folder: Callable[..., Path]
) -> None:
    (home / FOLDERS[folder][2] / "gptq-loader").mkdir(parents=True)
    variable = FOLDERS[folder][0]
    assert folder({variable: "~/mine"}, system=system) == home / "mine"
    assert folder({variable: ""}, system=system) == folder({}, system=system)


@EVERY
def test_xdg_names_the_folders_of_linux(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    monkeypatch.setenv(FOLDERS[folder][1], str(home / "xdg"))
    assert folder(system=Unix) == home / "xdg" / "gptq-loader"
