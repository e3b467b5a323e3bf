"""Describe a checkpoint by its headers, wherever it is: on this machine, or on the hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_plugin.catalog.remote_branch import PICKLE, outline_branch
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.hub.error_messages import explained
from gptq_loader_plugin.hub.fetch import LOOK_UP_LIMIT
from gptq_loader_plugin.hub.remote import look_up, read
from gptq_loader_plugin.hub.workers import run_jobs
from gptq_loader_plugin.reference import parse_hub_reference, resolve
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.workers import Stop
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["with_config", "with_headers"]

Result = TypeVar("Result")


def with_headers(
    reference: str,
    use: Callable[[Checkpoint], Result],
    *,
    revision: str | None = None,
    plugins: Plugins,
    files: Sequence[str] = (),
) -> Result:
    """Describe a checkpoint and return what `use` makes of it; nothing else is downloaded.

    Args:
        reference: as for `load`.
        use: called with the checkpoint, whose config files are there until it returns.
        revision: as for `load`.
        plugins: the plugins in force.
        files: small files that are fetched, too, where the hub has them.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    located = _find(reference, revision, plugins)
    if isinstance(located, Path):
        return use(open_checkpoint(located, plugins.readers()))

    def job(stop: Stop) -> Result:
        with TemporaryDirectory() as temporary:
            remote = look_up(located, stop)
            for name in files:
                if (file := remote.file(name)) is not None:
                    (Path(temporary) / name).write_bytes(read(file, stop))
            checkpoint = outline_branch(remote, Path(temporary), stop)
            if checkpoint is None:
                raise CheckpointNotFound(
                    f"{located}: {PICKLE}",
                    reference=str(located),
                    tried=(),
                    hint=f"fetch it first: gptq-loader download {located}",
                )
            return use(checkpoint)

    return _run(located, job)


def with_config(
    reference: str,
    use: Callable[[Path], Result],
    *,
    revision: str | None = None,
    plugins: Plugins,
) -> Result:
    """Return what `use` makes of the folder of a model's config.json.

    Args:
        reference: as for `load`.
        use: called with the folder, which is there until it returns.
        revision: as for `load`.
        plugins: the plugins in force.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    located = _find(reference, revision, plugins)
    if isinstance(located, Path):
        return use(located if located.is_dir() else located.parent)

    def job(stop: Stop) -> Result:
        with TemporaryDirectory() as temporary:
            remote = look_up(located, stop)
            if (file := remote.file("config.json")) is not None:
                (Path(temporary) / file.name).write_bytes(read(file, stop))
            return use(Path(temporary))

    return _run(located, job)


def _find(reference: str, revision: str | None, plugins: Plugins) -> Path | HubReference:
    try:
        return resolve(reference, plugins=plugins, revision=revision, download=False)
    except CheckpointNotFound:
        hub = parse_hub_reference(reference, revision=revision)
        if hub is None or local_path(reference).is_absolute():
            raise
        return hub


def _run(hub: HubReference, job: Callable[[Stop], Result]) -> Result:
    try:
        return run_jobs([job], workers=1, limit=LOOK_UP_LIMIT)[0]
    except Exception as error:
        raise explained(hub, error) from error
