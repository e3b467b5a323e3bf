"""The host "llm": GPTQ checkpoints as models of the command `llm`, named gptq/NAME.

llm finds this module by its own entry points and calls `register_models` and `register_commands`;
nothing here imports llm, so that the module can be imported where it is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import check_package

if TYPE_CHECKING:
    from collections.abc import Callable

    import click

    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["LLMHost", "gptq_hosts", "register_commands", "register_models"]

llm_hookimpl = pluggy.HookimplMarker("llm")


@dataclass(frozen=True, slots=True)
class LLMHost:
    """Provide the models of `llm -m gptq/NAME`."""

    name: str = "llm"

    def install(self, **options: object) -> None:
        """Do nothing: llm finds the plugin by itself, once both are in one environment.

        Raises:
            OptionInvalid: there are no options.
        """
        if options:
            raise OptionInvalid(
                f"llm takes no option {', '.join(sorted(options))} here",
                hint="leave it out; give options to the model: llm -m gptq/NAME -o NAME VALUE",
            )

    def check(self) -> Readiness:
        """Look for llm."""
        return check_package("llm", oldest="0.24", newest="0.36")


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer llm."""
    return [LLMHost()]


@llm_hookimpl
def register_models(register: Callable[..., object]) -> None:
    """Register a model for each checkpoint of this machine; called by llm."""
    from gptq_loader_extensions.llm.models import make_models

    for model, async_model in make_models():
        register(model, async_model)


@llm_hookimpl
def register_commands(cli: click.Group) -> None:
    """Add `llm gptq`; called by llm."""
    from gptq_loader_extensions.llm.commands import gptq

    cli.add_command(gptq)
