"""Put ourselves before transformers' `from_pretrained`, and take ourselves away again.

Every model inherits one `from_pretrained`: it is replaced by one that hands GPTQ checkpoints over.
Two Auto classes have copies of another one, which are replaced by ones that note the dtype they
were given and call it: transformers 5.6 forgets that dtype before a model's own `from_pretrained`.
"""

from __future__ import annotations

import functools
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["install", "remove"]

METHOD = "from_pretrained"
_changing = threading.Lock()


class Handover(classmethod):  # type: ignore[type-arg]  # what it returns is the host's
    """A class method that stands in for another one, which it remembers.

    Args:
        function: what it calls.
        original: the class method as it stood in the class.
        asked: the dtype that an Auto class was asked for, in the calling thread.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        original: Any,  # noqa: ANN401 - a class method
        asked: ContextVar[Any],
    ) -> None:
        super().__init__(function)
        self.original = original
        self.asked = asked


def install() -> None:
    """Replace the class methods, where they are not replaced yet.

    Raises:
        PluginError: this transformers has no such methods.
    """
    asked: ContextVar[Any] = ContextVar("asked", default=None)
    models, *auto_classes = _owners()
    with _changing:
        for owner in (models, *auto_classes):
            original = vars(owner).get(METHOD)
            if isinstance(original, Handover):
                asked = original.asked
                continue
            if not isinstance(original, classmethod):
                raise PluginError(
                    f"this transformers has no {METHOD} in {owner.__name__} to be replaced",
                    hint="update gptq-loader-plugin, or use its own load() instead",
                )
            # One assignment: a thread inside from_pretrained goes on in the method it called.
            function = (_for_models if owner is models else _for_auto_classes)(original, asked)
            setattr(owner, METHOD, Handover(function, original=original, asked=asked))


def remove() -> None:
    """Put back the methods that `install` found."""
    with _changing:
        for owner in _owners():
            current = vars(owner).get(METHOD)
            if isinstance(current, Handover):
                setattr(owner, METHOD, current.original)


def _owners() -> tuple[Any, ...]:
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

    return PreTrainedModel, AutoModel, AutoModelForCausalLM


def _for_models(original: Any, asked: ContextVar[Any]) -> Callable[..., Any]:  # noqa: ANN401
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        from gptq_loader_extensions.transformers.detect import find_checkpoint

        name = kwargs.pop("pretrained_model_name_or_path", name)
        found = find_checkpoint(name, kwargs)
        if found is not None:
            from gptq_loader_extensions.transformers.loading import load_found, takes

            if takes(cls, found):
                return load_found(cls, found, args, kwargs, asked_dtype=asked.get())
        return original.__get__(None, cls)(name, *args, **kwargs)

    return from_pretrained


def _for_auto_classes(original: Any, asked: ContextVar[Any]) -> Callable[..., Any]:  # noqa: ANN401
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        token = asked.set(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        try:
            known = _known_class(cls, args, kwargs)
            if known is not None:
                return known.from_pretrained(*args, **kwargs)
            return original.__get__(None, cls)(*args, **kwargs)
        finally:
            asked.reset(token)

    return from_pretrained


def _known_class(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Find the class of a GPTQ checkpoint whose model type is not in transformers' words, or None.

    An Auto class would look for that type, and not find it.
    """
    from transformers import CONFIG_MAPPING

    from gptq_loader_extensions.transformers.detect import find_checkpoint

    if kwargs.get("config") is not None:
        return None
    name = kwargs.get("pretrained_model_name_or_path", args[0] if args else None)
    found = find_checkpoint(name, kwargs)
    if found is None or found.translated is None:
        return None
    return cls._model_mapping[CONFIG_MAPPING[found.translated["model_type"]]]
