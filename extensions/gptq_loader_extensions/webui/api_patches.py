"""Have the host's API report why a load failed, and count the tokens that were generated.

The host tokenises a reply's text again to count it, with a beginning-of-text token before it.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.webui.generate import find_generate
from gptq_loader_extensions.webui.host_modules import NAME
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.system.patch import Patch, patch_imports

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from gptq_loader_extensions.webui.host_modules import Webui

__all__ = ["patch_api"]

SCRIPT, COMPLETIONS = "modules.api.script", "modules.api.completions"
MODELS = "modules.api.models"


def patch_api(
    webui: Webui, patched: Collection[object], loading: Callable[[], bool]
) -> list[Patch]:
    """Make the patches of the API's modules, where the API runs.

    Args:
        webui: the host's modules.
        patched: the modules that are patched already.
        loading: returns whether a load of ours is under way.
    """
    patches: list[Patch] = []
    script: Any = sys.modules.get(SCRIPT)
    completions: Any = sys.modules.get(COMPLETIONS)
    if hasattr(script, "HTTPException") and script not in patched:
        patches.append(Patch(script, "HTTPException", _ExplainingError(script.HTTPException)))
    models: Any = sys.modules.get(MODELS)
    if hasattr(models, "get_current_model_info") and models not in patched:
        named = _naming_us(models.get_current_model_info, loading)
        patches += patch_imports(models.get_current_model_info, named)
    names = ("encode", "generate_reply", "generate_chat_reply")
    if all(hasattr(completions, name) for name in names) and completions not in patched:
        patches += _count_replies(completions, webui)
    return patches


def _naming_us(
    original: Callable[[], dict[str, Any]], loading: Callable[[], bool]
) -> Callable[[], dict[str, Any]]:
    """Wrap what the API says of the model: the host sees its own loader while ours loads."""

    @functools.wraps(original)
    def get_current_model_info() -> dict[str, Any]:
        info = original()
        return {**info, "loader": NAME} if loading() else info

    return get_current_model_info


class _ExplainingError:
    """Make the host's HTTP error, with our message where it answers an error of ours."""

    def __init__(self, original: Callable[..., Exception]) -> None:
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Exception:  # noqa: ANN401 - fastapi's own
        error = sys.exc_info()[1]
        if isinstance(error, GPTQLoaderError):
            kwargs["detail"] = f"{error.message}\nhint: {error.hint}"
        return self._original(*args, **kwargs)


def _count_replies(completions: Any, webui: Webui) -> list[Patch]:  # noqa: ANN401 - a module of the host's
    encode = _CountingEncode(completions.encode, webui)
    replacements: dict[str, object] = {
        "encode": encode,
        "generate_reply": encode.watch(completions.generate_reply, _text),
        "generate_chat_reply": encode.watch(completions.generate_chat_reply, _last_turn),
    }
    return [Patch(completions, name, replacement) for name, replacement in replacements.items()]


class _CountingEncode:
    """The API's `encode`; for the reply that has just ended, it returns the generated tokens.

    A reply ends and is counted on one thread, with nothing between.
    """

    def __init__(self, original: Callable[..., Any], webui: Webui) -> None:
        self._original = original
        self._webui = webui
        self._ended = threading.local()

    def __call__(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's
        ended, self._ended.reply = getattr(self._ended, "reply", None), None
        if ended is not None and ended[0] == prompt and not args and not kwargs:
            return ended[1][None]
        return self._original(prompt, *args, **kwargs)

    def watch(
        self, generate: Callable[..., Iterator[Any]], text_of: Callable[[Any], Any]
    ) -> Callable[..., Iterator[Any]]:
        """Wrap a function that generates a reply, to remember the reply's text and its tokens."""

        def generate_and_remember(*args: Any, **kwargs: Any) -> Iterator[Any]:  # noqa: ANN401 - the host's
            self._ended.reply = None
            last = None
            for last in generate(*args, **kwargs):
                yield last
            ours = find_generate(self._webui.shared.model)
            if ours is not None:
                self._ended.reply = text_of(last), ours.reply_tokens

        return generate_and_remember


def _text(reply: Any) -> Any:  # noqa: ANN401 - the host's
    return reply


def _last_turn(history: Any) -> Any:  # noqa: ANN401 - the host's
    return history["internal"][-1][1] if history else None
