"""Offer the host "gradio": a page that loads models and chats with them, or a part of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import check_package

if TYPE_CHECKING:
    import gradio

    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["GradioHost", "gptq_hosts", "registry"]

EXTRA = "pip install 'gptq-loader-plugin[gradio]'"
OPTIONS = ("model", "host", "port", "open_browser", "models_dir")


@dataclass(frozen=True, slots=True)
class GradioHost:
    """Open a page in the browser that loads models and chats with them."""

    name: str = "gradio"

    def install(self, **options: Any) -> None:  # noqa: ANN401 - Host's signature; checked here
        """Open the page and serve it until Ctrl-C.

        Args:
            **options: `model`, a LoadedModel, or None to choose one in the page; `host`, the
                address to serve on, by default "127.0.0.1"; `port`, None for the first free one
                from 7860 on, 0 for any; `open_browser`, whether to open the page in this machine's
                browser, by default True; `models_dir`, the folder whose folders are models.

        Raises:
            PluginError: gradio is not installed.
            OptionInvalid: an option is unknown, or the page cannot be served there.
        """
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise OptionInvalid(
                f"unknown options of the page: {', '.join(unknown)}",
                hint=f"use {', '.join(OPTIONS)}",
            )
        from gptq_loader_extensions.gradio.serving import serve

        serve(
            options.get("model"),
            host=options.get("host") or "127.0.0.1",
            port=options.get("port"),
            open_browser=options.get("open_browser", True),
            models_dir=options.get("models_dir"),
        )

    def mount(self, app: Any, server: Any) -> None:  # noqa: ANN401 - Mountable's signature
        """Show the page in the server "openai", over the model that it serves."""
        from gptq_loader_extensions.gradio.serving import mount_page

        mount_page(app, server)

    def check(self) -> Readiness:
        """Look for Gradio."""
        return check_package("gradio", oldest="4.37", newest="6.31", install=EXTRA)


def registry(
    name: str,
    token: str | None = None,
    *,
    device: str | None = None,
    backend: str | None = None,
    template: str | None = None,
    context: int | None = None,
    system: str = "",
) -> gradio.Blocks:
    """Build a chat with a model, for `gr.load(name, src=registry)` in your own application.

    Args:
        name: a folder, a file, `owner/repo:branch`, or "demo".
        token: gradio's; a private repository's comes from `HF_TOKEN`.
        device: as for `gptq_loader_plugin.load`.
        backend: as for `load`.
        template: as for `load`.
        context: as for `load`.
        system: the system message at the start.

    Raises:
        GPTQLoaderError: the model cannot be loaded.
    """
    del token
    import gptq_loader_plugin as gptq
    from gptq_loader_extensions.gradio.embedding import chat_interface

    model = gptq.load(name, device=device, backend=backend, template=template, context=context)
    return chat_interface(model, system=system)


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer the page."""
    return [GradioHost()]
