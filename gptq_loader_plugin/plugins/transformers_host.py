"""Let transformers load GPTQ checkpoints through us, by the host plugin of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gptq_loader_plugin.errors import PluginError
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host

__all__ = ["disable_transformers", "enable_transformers"]


@runtime_checkable
class _Removable(Protocol):
    def remove(self) -> None: ...


def enable_transformers(*, plugins: Plugins | None = None) -> None:
    """Make `AutoModelForCausalLM.from_pretrained` load GPTQ checkpoints through us.

    Raises:
        PluginError: no installed plugin offers the transformers host.
    """
    _host(plugins).install()


def disable_transformers(*, plugins: Plugins | None = None) -> None:
    """Undo `enable_transformers`.

    Raises:
        PluginError: no installed plugin offers the transformers host, or it cannot be undone.
    """
    host = _host(plugins)
    if not isinstance(host, _Removable):
        raise PluginError(
            f"the host {host.name} cannot be removed again", hint="start Python anew instead"
        )
    host.remove()


def _host(plugins: Plugins | None) -> Host:
    return (plugins or Plugins(installed=True)).host("transformers")
