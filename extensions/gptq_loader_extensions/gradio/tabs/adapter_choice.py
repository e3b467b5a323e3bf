"""Choose the LoRA adapter that writes the replies, beside the model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models

__all__ = ["AdapterChoice"]

ALONE = ("Base model", "")


class AdapterChoice:
    """The list of adapters; made inside the page's head, and seen where the model has some.

    Args:
        models: holds the model.

    Attributes:
        part: the component; its value is a name, "" for the model alone, None where there are none.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self.part = gr.Dropdown(
            [],
            value=None,
            label="Adapter",
            elem_id=elements.ADAPTER,
            visible=False,
            scale=0,
            min_width=220,
        )

    def show(self) -> Any:  # noqa: ANN401 - an update of a component
        """Return the update that lists the model's adapters, and leaves which one is chosen."""
        names = self._names()
        choices = [ALONE, *((name, name) for name in names)] if names else []
        return gr.update(choices=choices, visible=bool(names))

    def choose(self, name: str | None = None) -> Any:  # noqa: ANN401 - an update of a component
        """Return the update that also chooses one: the model's own where it lacks that one."""
        update, names = self.show(), self._names()
        loaded = self._models.loaded
        own = (loaded.model.adapter or "") if loaded is not None and names else None
        update["value"] = name if names and name in ("", *names) else own
        return update

    def _names(self) -> list[str]:
        loaded = self._models.loaded
        if loaded is None or loaded.model.adapters is None:
            return []
        return list(loaded.model.adapters.updates)
