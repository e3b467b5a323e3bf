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
from gptq_loader_plugin.system.patch import Patch, apply_all

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["install", "remove"]

METHOD = "from_pretrained"
_changing = threading.Lock()
# The dtype that the running call of an Auto class was given.
_requested_dtype: ContextVar[Any] = ContextVar("requested_dtype", default=None)


class Handover(classmethod):  # type: ignore[type-arg]  # what it returns is the host's
    """A class method that stands in for another one, which `patch` puts back."""

    patch: Patch


def install() -> None:
    """Replace the class methods, where they are not replaced yet; all of them, or none.

    Raises:
        PluginError: this transformers has no such methods.
    """
    models, *auto_classes = _owners()
    replacements = {models: _for_models, **dict.fromkeys(auto_classes, _for_auto_classes)}
    with _changing:
        # One assignment each: a thread inside from_pretrained goes on in the method it called.
        apply_all(
            [
                _make_patch(owner, make)
                for owner, make in replacements.items()
                if _applied_patch(owner) is None
            ]
        )


def remove() -> None:
    """Put back the methods that `install` replaced."""
    with _changing:
        for owner in _owners():
            patch = _applied_patch(owner)
            if patch is not None:
                patch.undo()


def _applied_patch(owner: Any) -> Patch | None:  # noqa: ANN401 - a class of transformers
    current = vars(owner).get(METHOD)
    return current.patch if isinstance(current, Handover) else None


def _make_patch(owner: Any, make: Callable[[Any], Callable[..., Any]]) -> Patch:  # noqa: ANN401 - a class of transformers
    original = vars(owner).get(METHOD)
    if not isinstance(original, classmethod):
        raise PluginError(
            f"this transformers has no {METHOD} in {owner.__name__} to be replaced",
            hint="update gptq-loader-plugin, or use its own load() instead",
        )
    handover = Handover(make(original))
    handover.patch = Patch(owner, METHOD, handover)
    return handover.patch


def _owners() -> tuple[Any, ...]:
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

    return PreTrainedModel, AutoModel, AutoModelForCausalLM


def _for_models(original: Any) -> Callable[..., Any]:  # noqa: ANN401 - a class method
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, name: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        from gptq_loader_extensions.transformers.detect import find_checkpoint

        name = kwargs.pop("pretrained_model_name_or_path", name)
        source = find_checkpoint(name, kwargs)
        if source is not None:
            from gptq_loader_extensions.transformers.loading import can_load, load_checkpoint

            if can_load(cls, source):
                dtype = _requested_dtype.get()
                return load_checkpoint(cls, source, args, kwargs, requested_dtype=dtype)
        return original.__get__(None, cls)(name, *args, **kwargs)

    return from_pretrained


def _for_auto_classes(original: Any) -> Callable[..., Any]:  # noqa: ANN401 - a class method
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        token = _requested_dtype.set(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        try:
            known = _known_class(cls, args, kwargs)
            if known is not None:
                return known.from_pretrained(*args, **kwargs)
            return original.__get__(None, cls)(*args, **kwargs)
        finally:
            _requested_dtype.reset(token)

    return from_pretrained


def _known_class(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the class of a GPTQ checkpoint whose model type transformers does not know, or None.

    An Auto class would look that type up and fail.
    """
    from transformers import CONFIG_MAPPING

    from gptq_loader_extensions.transformers.detect import find_checkpoint

    if kwargs.get("config") is not None:
        return None
    name = kwargs.get("pretrained_model_name_or_path", args[0] if args else None)
    source = find_checkpoint(name, kwargs)
    if source is None or source.translated is None:
        return None
    return cls._model_mapping[CONFIG_MAPPING[source.translated["model_type"]]]
