r"""Turn what a user typed into a checkpoint's folder or file.

In this order: what a plugin finds (ours finds "demo"); a path that exists; a folder of that name in
a models directory (`GPTQ_LOADER_MODELS`, else ./models); `owner/repo` or `owner/repo:branch` on
the hub, or the address of its page there. `C:\models\x` is a path and no branch.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.weight_files import WEIGHT_SUFFIXES
from gptq_loader_plugin.errors import (
    CheckpointNotFound,
    OptionInvalid,
    PluginError,
    UnsupportedFormat,
)
from gptq_loader_plugin.hub.hub_reference import HubReference, parse_hub_reference
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["HubReference", "models_folders", "parse_hub_reference", "resolve"]

WHAT_TO_NAME = "name a folder, a .safetensors or .pt file, owner/repo:branch on the hub, or demo"


def models_folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """List the folders whose folders are models: `GPTQ_LOADER_MODELS`, or ./models."""
    named = environ.get("GPTQ_LOADER_MODELS")
    return [
        local_path(folder)
        for folder in (named.split(os.pathsep) if named else ["models"])
        if folder
    ]


def resolve(
    reference: str | Path,
    *,
    plugins: Plugins,
    revision: str | None = None,
    download: bool = True,
    progress: Callable[[Progress], None] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Find the folder or file that `reference` names.

    Args:
        reference: as the user wrote it.
        plugins: asked first.
        revision: the branch, tag or commit of a hub repository.
        download: whether to fetch a hub repository that is not on this machine yet.
        progress: called with how far a download, or the demo's preparation, has come.
        environ: where `GPTQ_LOADER_MODELS` is looked up.

    Raises:
        CheckpointNotFound: it names nothing that exists; says where it was looked for.
        OptionInvalid: a revision is named of what is no repository on the hub.
        UnsupportedFormat: it names a file of another kind.
        HubError: the hub could not be reached, or refused.
        PluginError: a plugin failed, or answered a path where nothing is.
    """
    text = str(reference)
    if not text.strip():
        raise CheckpointNotFound(
            "the reference is empty", reference=text, tried=(), hint=WHAT_TO_NAME
        )
    progress = progress or plugins.progress
    hub = parse_hub_reference(text, revision=revision)
    answered = _ask_plugins(text, plugins, progress)
    path = local_path(text)
    if answered or path.exists() or path.is_symlink():
        if revision not in (None, "main") and (hub is None or not answered):
            raise OptionInvalid(
                f"{text} is on this machine and has no revision {revision}",
                hint="leave the revision out, or name owner/repo on the hub",
            )
        return answered or _checked(text, path)
    # a folder that is named without its branch is not the one for another
    names = [text, re.sub(r"[/:]", "_", text)] if hub is None or revision is None else []
    names += [hub.folder_name, re.sub(r"[/:]", "_", str(hub))] if hub else []
    tried = [str(path)]
    for folder in models_folders(environ):
        for name in dict.fromkeys(names):
            tried.append(str(folder / name))
            if (folder / name).is_dir():
                return folder / name
    if hub is None or path.is_absolute():
        raise _not_found(text, tried, _names(environ))
    from gptq_loader_plugin.hub import cached_folder, download_folder

    if not download:
        cached = cached_folder(hub)
        if cached is not None:
            return cached
        raise CheckpointNotFound(
            f"{text} is not on this machine",
            reference=text,
            tried=tried,
            hint=f"fetch it first: gptq-loader download {text}"
            + (
                f"; or correct the path: {path.parent} holds no {path.name}"
                if _is_near(path)
                else ""
            ),
        )
    return download_folder(hub, progress=progress)


def _ask_plugins(text: str, plugins: Plugins, progress: Callable[[Progress], None]) -> Path | None:
    answer: Path | None = plugins.hook.gptq_resolve(reference=text, progress=progress)
    if answer is None or Path(answer).exists():
        return answer and Path(answer)
    raise PluginError(
        f"a plugin answered {answer} for {text}, and there is no such file or folder",
        hint="find it with gptq-loader plugins; leave it out with GPTQ_LOADER_PLUGINS",
    )


def _checked(text: str, path: Path) -> Path:
    if not path.exists():
        raise CheckpointNotFound(
            f"{text} is a link to {path.readlink()}, which is not there",
            reference=text,
            tried=[str(path)],
            hint="put back what it points to, or name another folder",
        )
    if path.is_dir() or path.suffix in WEIGHT_SUFFIXES:
        return path
    hint = "name the folder of a GPTQ checkpoint, or its .safetensors or .pt file"
    if path.suffix == ".gguf":
        hint = "load a GGUF file with llama.cpp; GPTQ checkpoints are .safetensors or .pt"
    raise UnsupportedFormat("this is no weight file", path=path, hint=hint)


def _is_near(path: Path) -> bool:
    """Return whether what looks like a repository was rather meant as a folder that is here."""
    return path.parent.is_dir() and path.parent != Path()


def _names(environ: Mapping[str, str]) -> list[str]:
    """List the names of what is in the models folders, and of the demo."""
    names = ["demo"]
    for folder in models_folders(environ):
        with suppress(OSError):  # there is none, or it may not be read
            names += sorted(path.name for path in folder.iterdir() if path.is_dir())
    return names


def _not_found(
    reference: str, tried: Sequence[str], names: Sequence[str] = ()
) -> CheckpointNotFound:
    near = get_close_matches(reference, names, n=1)
    return CheckpointNotFound(
        f"{reference} names no checkpoint; looked in {', '.join(dict.fromkeys(tried))}",
        reference=reference,
        tried=tried,
        hint=f"did you mean {near[0]}? else {WHAT_TO_NAME}" if near else WHAT_TO_NAME,
    )
