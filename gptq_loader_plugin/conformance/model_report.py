"""What came of one family's checks."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ModelReport"]


@dataclass(slots=True)
class ModelReport:
    """What came of one family.

    Attributes:
        family: its name.
        passed: the checks that held, and how far the worst logits were off.
        failed: those that did not, and why.
        not_paged: why no engine runs it, where one was to.
        fused: whether the engine's steps fuse its layers.
    """

    family: str
    passed: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_paged: str | None = None
    fused: bool = False
