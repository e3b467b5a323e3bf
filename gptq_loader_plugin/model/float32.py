"""What transformers keeps in float32 whatever dtype a model is loaded in: routers, mostly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["kept_in_float32"]


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what the names of such tensors match; None where the class has none.

    Args:
        model: its class says which.
        dtype: what the rest of the model is loaded in.
    """
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001 - no public name
    return re.compile("|".join(name.replace("*", ".*") for name in plan)) if plan else None
