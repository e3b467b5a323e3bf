"""What a check finds, and the verdict of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Check", "Diagnosis", "Finding", "Report", "Symptom"]

Symptom = Literal["gibberish", "never-stops", "slow", "nan", "crash"]
Check = Literal[
    "files", "config", "zeros", "layers", "tensors", "kernels", "activations", "split", "batch",
    "text", "reference",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or that a user should know.

    Attributes:
        check: which check it came from.
        wrong: whether the checkpoint is wrong because of it; else it is a note.
        message: what, in one sentence.
        where: the layer or the file, or "".
        fix: what to do about it, in the imperative.
    """

    check: Check
    wrong: bool
    message: str
    where: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Something that goes wrong, or may.

    Attributes:
        cause: what it is.
        evidence: how that is known.
        fix: what to do about it, in the imperative.
        about: what is to blame: the checkpoint, how it is loaded, or the machine.
    """

    cause: str
    evidence: str
    fix: str
    about: Literal["checkpoint", "options", "machine"] = "checkpoint"


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` says of a checkpoint.

    Attributes:
        reference: what the user typed.
        findings: what the checks found, in their order.
        facts: what they measured.
        seconds: how long each took.
    """

    reference: str
    findings: tuple[Finding, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.wrong for finding in self.findings)

    @property
    def line(self) -> str:
        """The verdict in one line."""
        wrong = [finding for finding in self.findings if finding.wrong]
        if not wrong:
            notes = f", {len(self.findings)} notes" if self.findings else ""
            return f"{self.reference}: right{notes}"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"{self.reference}: wrong: {wrong[0].message}{more}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, for `verify --json`."""
        return {"right": self.right, "line": self.line, **asdict(self)}
