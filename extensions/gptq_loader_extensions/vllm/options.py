"""Read the options of vLLM's server; the names that vLLM has for this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["LOOPBACK", "NAME", "NEWEST", "OLDEST", "ServeOptions"]

NAME = "gptq_loader"  # what users pass as vLLM's `quantization`
OLDEST, NEWEST = "0.32", "0.33"  # of vLLM, that this was tried with
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How vLLM's server serves.

    Attributes:
        settings: the address, and who may use it.
        load: the kernel, the template, the context and the dtype; without a dtype it is the one
            that the kernels compute in, or vLLM's choice.
        tensor_parallel: how many devices share each layer.
        max_num_seqs: how many sequences are in a batch; None is vLLM's choice.
    """

    settings: Settings
    load: LoadOptions = field(default_factory=LoadOptions)
    tensor_parallel: int = 1
    max_num_seqs: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServeOptions:
        """Read the options of `gptq-loader serve`, by their names there.

        Raises:
            OptionInvalid: a value is impossible, or the address is open to others without a key.
        """
        values = dict(options)
        host = values.pop("host", LOOPBACK)
        if values.pop("listen", False) and host == LOOPBACK:
            host = "0.0.0.0"  # noqa: S104 - as requested
        names = ("port", "api_key", "no_auth", "max_body", "max_new_tokens", "grace", "as_json")
        settings = Settings(
            host=host,
            allowed_hosts=tuple(values.pop("allow_host", None) or ()),
            cors=tuple(values.pop("cors", None) or ()),
            **{name: values.pop(name) for name in names if name in values},
        )
        settings.check()
        load_names = ("backend", "template", "context", "dtype")
        load = LoadOptions(**{name: values.pop(name) for name in load_names if name in values})
        return cls(settings, load, **values)
