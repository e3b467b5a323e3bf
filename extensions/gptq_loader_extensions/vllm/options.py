"""What vLLM is told, and the names it knows us by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["LOOPBACK", "NAME", "WRITTEN_FOR", "ServeOptions"]

NAME = "gptq_loader"  # what users pass as vLLM's `quantization`
WRITTEN_FOR = "0.32"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How vLLM's server is to serve.

    Attributes:
        settings: where to listen, and whom to let in.
        load: the kernel, the template, the context and the dtype; None of a dtype takes what
            kernels compute in, or vLLM's choice.
        tensor_parallel: how many devices share each layer.
        max_num_seqs: how many replies are written side by side; None is vLLM's choice.
    """

    settings: Settings
    load: LoadOptions = field(default_factory=LoadOptions)
    tensor_parallel: int = 1
    max_num_seqs: int | None = None

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
        how = ("backend", "template", "context", "dtype")
        load = LoadOptions(**{name: given.pop(name) for name in how if name in given})
        return cls(settings, load, **given)
