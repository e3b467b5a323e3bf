"""The angles that a decoder rotates by, computed by its own module; imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from gptq_loader_kernels.cpu.tensors import check_tensor
from gptq_loader_plugin.generation.rotation import rope_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_kernels.cpu.describe import Described

__all__ = ["Angles"]

AHEAD = 256  # positions whose angles are computed at once, and kept for the tokens that follow


class Angles:
    """Cosines and sines of positions, of a token at a time taken from those computed before.

    Args:
        repeated: whether the module's angles come each twice side by side.
        once: whether they come once; else all of them twice.
    """

    def __init__(self, *, repeated: bool, once: bool = False) -> None:
        self._repeated, self._once = repeated, once
        self._first = 0  # position of the tables
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._state: _State | None = None  # what they were computed by

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was computed."""
        return {**self.__dict__, "_tables": None, "_state": None}

    def of(
        self,
        rotary: Any,  # noqa: ANN401 - a rotary module of transformers
        positions: Sequence[int],
        built: Described,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute angles of some positions: cosines and sines, float32 [tables, positions, size].

        Raises:
            ValueError: the module's angles are of another shape or type.
        """
        first, count = positions[0], len(positions)
        in_a_row = count < AHEAD and [*positions] == [*range(first, first + count)]
        plain = type(rotary).__module__.startswith("transformers.") and not _is_watched(rotary)
        if not in_a_row or not plain or rope_limit(rotary) is not None:
            return self._compute(rotary, positions, built)
        begins = first - self._first
        current = self._state is not None and self._state.is_now(rotary, built)
        if self._tables is None or not current or not 0 <= begins <= AHEAD - count:
            self._tables = self._compute(rotary, range(first, first + AHEAD), built)
            self._first, self._state, begins = first, _State(rotary, built), 0
        cos, sin = (it[:, begins : begins + count].contiguous() for it in self._tables)
        return cos, sin

    def _compute(
        self,
        rotary: Any,  # noqa: ANN401
        positions: Sequence[int],
        built: Described,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.tensor([[*positions]], device="cpu")
        # It names a type and a device.
        x = torch.empty(1, 0, built.model.hidden, dtype=torch.float32, device="cpu")
        tables = [rotary(x, places, layer_type=name) for name in built.tables] or [
            _parts(rotary(x, places))
        ]
        cos, sin = (torch.cat(parts).contiguous() for parts in zip(*tables, strict=True))
        if self._repeated:  # here each comes once, and then all again
            cos, sin = (torch.cat((it[..., ::2],) * 2, dim=-1) for it in (cos, sin))
        if self._once:
            cos, sin = (torch.cat((it, it), dim=-1) for it in (cos, sin))
        shape = (len(tables), len(positions), built.model.rotary_dim)
        for name, angles in (("cos", cos), ("sin", sin)):
            check_tensor(name, angles, shape, torch.float32)
        return cos, sin


def _parts(angles: Any) -> Any:  # noqa: ANN401
    """Return cosines and sines, of complex numbers all of them twice."""
    if not isinstance(angles, torch.Tensor):
        return angles
    return tuple(torch.cat((it, it), dim=-1) for it in (angles.real, angles.imag))


class _State:
    """What a module's angles were computed by. It may be written into, whoever holds it."""

    def __init__(self, rotary: Any, built: Described) -> None:  # noqa: ANN401
        self._rotary, self._built = rotary, built
        self._numbers = _numbers(rotary)
        self._names = [name for name, _ in rotary.named_buffers()]
        self._values = [it.clone() for it in rotary.buffers()]

    def is_now(self, rotary: Any, built: Described) -> bool:  # noqa: ANN401
        """Return whether the same module would compute the same angles."""
        own = rotary._buffers  # noqa: SLF001 - its named_buffers takes long, for each token
        return (
            rotary is self._rotary
            and built is self._built
            and list(own) == self._names
            and all(map(torch.equal, own.values(), self._values))
            and _numbers(rotary) == self._numbers
        )


def _numbers(rotary: Any) -> dict[str, Any]:  # noqa: ANN401
    own = vars(rotary)
    return {name: it for name, it in own.items() if isinstance(it, int | float | str)}


def _is_watched(rotary: Any) -> bool:  # noqa: ANN401
    """Return whether something is to see every call."""
    return bool(
        rotary._forward_hooks  # noqa: SLF001 - torch has no other way to tell
        or rotary._forward_pre_hooks  # noqa: SLF001
        or torch_module._global_forward_hooks  # noqa: SLF001
        or torch_module._global_forward_pre_hooks  # noqa: SLF001
        or "forward" in vars(rotary)
    )
