"""Where this package can be extended.

A plugin is a module (or an object) named in the entry-point group `gptq_loader_plugin`. It
implements any of these, marked `@hookimpl`, and takes only the arguments it needs. Importing it
must import neither torch nor a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import typer

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.reader import Reader
    from gptq_loader_plugin.events import LoadRequest, Progress
    from gptq_loader_plugin.host import Host
    from gptq_loader_plugin.kernel import Device, Kernel, PagedAttention

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("gptq_loader_plugin")
hookimpl = pluggy.HookimplMarker("gptq_loader_plugin")


@hookspec(firstresult=True)
def gptq_resolve(reference: str, progress: Callable[[Progress], None]) -> Path | None:
    """Find the folder that `reference` names.

    Asked until one plugin answers; the built-in rules (a path, a models folder, `owner/repo:branch`
    on the hub) come after every plugin. A host implements this to add its own models folder.

    Args:
        reference: as the user wrote it.
        progress: to be called with how far it has come, by a plugin that takes long.

    Returns:
        The checkpoint's folder or file, or None to let the next plugin answer.
    """


@hookspec
def gptq_readers() -> Iterable[Reader]:  # type: ignore[empty-body]
    """Offer checkpoint formats.

    Each reader is shown the folder, in the order of names, until one opens it; the built-in GPTQ
    reader comes after every plugin's.
    """


@hookspec
def gptq_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Offer kernels.

    Every kernel is asked about every layer, and rank decides: the order of registration never
    does. Offer a kernel whether or not this machine can run it; declining, with a reason, is
    `Kernel.consider`'s work.
    """


@hookspec(firstresult=True)
def gptq_paged_attention(device: Device) -> PagedAttention | None:
    """Offer attention over keys and values in blocks, for writing many replies at a time.

    Args:
        device: where the model is.

    Returns:
        It, or None to let the next plugin answer.
    """


@hookspec
def gptq_templates() -> Iterable[Template]:  # type: ignore[empty-body]
    """Offer chat templates, by name, for `template=`."""


@hookspec
def gptq_hosts() -> Iterable[Host]:  # type: ignore[empty-body]
    """Offer ways into a host: a page, an extension, another library's registry."""


@hookspec
def gptq_commands(app: typer.Typer) -> None:
    """Add commands to `gptq-loader`, with `app.command()` and typer's annotations.

    Errors of theirs are written as those of the built-in commands are, and so is Ctrl-C. A name
    that is taken is refused.

    Args:
        app: the command's application.
    """


@hookspec
def gptq_before_load(request: LoadRequest) -> None:
    """Hear that a load begins; raise a `GPTQLoaderError` to refuse it."""


@hookspec
def gptq_progress(progress: Progress) -> None:
    """Hear how far a piece of work has come, on the thread that does it."""


@hookspec
def gptq_after_load(request: LoadRequest, seconds: float) -> None:
    """Hear that a load ended well, and how long it took."""
