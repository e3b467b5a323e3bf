"""What vLLM is told, and the names it knows us by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.opening import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["NAME", "ServeOptions"]

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user asked for.

    Attributes:
        settings: where to listen, and whom to let in.
        tensor_parallel: how many devices share each layer.
        backend: the kernel to use, or None.
        template: the template's name, or a .jinja file; None finds the checkpoint's.
        context: the longest sequence; None takes the model's.
        dtype: what is not quantised; None takes what kernels compute in, or vLLM's choice.
        most_at_once: how many replies are written side by side; None is vLLM's choice.
    """

    settings: Settings
    tensor_parallel: int = 1
    backend: str | None = None
    template: str | None = None
    context: int | None = None
    dtype: str | None = None
    most_at_once: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServeOptions:
        """Read the options of `gptq-loader serve`, by their names there.

        Raises:
            OptionInvalid: one makes no sense, or lets strangers in unasked.
        """
        given = dict(options)
        host = given.pop("host", LOOPBACK)
        if given.pop("listen", False) and host == LOOPBACK:
            host = "0.0.0.0"  # noqa: S104 - as asked for
        names = ("port", "api_key", "no_auth", "max_body", "max_new_tokens", "grace", "as_json")
        settings = Settings(
            host=host,
            allowed_hosts=tuple(given.pop("allow_host", None) or ()),
            cors=tuple(given.pop("cors", None) or ()),
            **{name: given.pop(name) for name in names if name in given},
        )
        settings.check()
        asked = cls(settings, **given)
        if asked.dtype not in (None, *DTYPES):
            raise OptionInvalid(
                f"no model computes in {asked.dtype}", hint=f"name one of {', '.join(DTYPES)}"
            )
        return asked


NAME = "gptq_loader"  # what users pass as vLLM's `quantization`
WRITTEN_FOR = "0.32"
