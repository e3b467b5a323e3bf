"""Offer the host "transformers": `from_pretrained` loads GPTQ checkpoints through us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import check_package

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["TransformersHost", "gptq_hosts"]


@dataclass(frozen=True, slots=True)
class TransformersHost:
    """Have transformers hand GPTQ checkpoints over to us."""

    name: str = "transformers"

    def install(self, **options: object) -> None:
        """Take over `from_pretrained` for GPTQ checkpoints; a second time changes nothing.

        Raises:
            OptionInvalid: an option was passed; there are none.
            PluginError: this transformers has no `from_pretrained` to replace.
        """
        if options:
            raise OptionInvalid(
                f"the transformers host has no option {', '.join(sorted(options))}",
                hint="pass options to each load: from_pretrained(...)",
            )
        from gptq_loader_extensions.transformers.patch import install

        install()

    def remove(self) -> None:
        """Put back exactly what `install` replaced; without it, do nothing.

        Models that were loaded meanwhile keep working.
        """
        from gptq_loader_extensions.transformers.patch import remove

        remove()

    def check(self) -> Readiness:
        """Return whether transformers is installed, in a version that is supported."""
        return check_package("transformers", oldest="5.6", newest="5.24")


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer transformers."""
    return [TransformersHost()]
