"""The host "gradio": open a chat page with a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host

__all__ = ["GradioHost", "gptq_hosts"]

OPTIONS = ("model", "host", "port", "open_browser")


@dataclass(frozen=True, slots=True)
class GradioHost:
    """Open a chat page in the browser."""

    name: str = "gradio"

    def install(self, **options: Any) -> None:  # noqa: ANN401 - Host's signature; checked here
        """Open the page and serve it until Ctrl-C.

        Args:
            **options: `model`, a LoadedModel; `host`, the address to serve on, "127.0.0.1" unless
                told; `port`, None for the first free one from 7860 on, 0 for any; `open_browser`,
                whether to open the page in this machine's browser, True unless told.

        Raises:
            PluginError: gradio is not installed, or no model was given.
            OptionInvalid: an option is unknown, or the page cannot be served there.
        """
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise OptionInvalid(
                f"the chat page has no option {', '.join(unknown)}",
                hint=f"the options are {', '.join(OPTIONS)}",
            )
        if options.get("model") is None:
            raise PluginError(
                "the chat page needs a loaded model",
                hint='load one, then hand it over: install(model=load("demo"))',
            )
        from gptq_loader_extensions.gradio.serving import serve

        serve(
            options["model"],
            host=options.get("host") or "127.0.0.1",
            port=options.get("port"),
            open_browser=options.get("open_browser", True),
        )


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer the chat page."""
    return [GradioHost()]
