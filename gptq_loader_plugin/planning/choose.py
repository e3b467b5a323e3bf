"""Choose a kernel for one layer: ask every kernel, keep every answer."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import (
    GPTQLoaderError,
    NoBackend,
    OptionInvalid,
    PluginError,
    is_out_of_memory,
)
from gptq_loader_plugin.verdict import Accepted, Declined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear
    from gptq_loader_plugin.verdict import Verdict

__all__ = ["Choice", "choose", "depends_on_memory", "prepared"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel chosen for a layer, the ones it outranks, and the ones that declined.

    Attributes:
        layer: the layer.
        kernel: the chosen kernel.
        accepted: every acceptance, the chosen one first.
        declined: every refusal, by kernel name.
        headroom: what decided where a kernel's rank goes by free memory, in words; "" elsewhere.
    """

    layer: LayerSpec
    kernel: Kernel
    accepted: tuple[Accepted, ...]
    declined: tuple[Declined, ...]
    headroom: str = ""

    @property
    def chosen(self) -> Accepted:
        """What the chosen kernel said when it accepted."""
        return self.accepted[0]

    def reasons(self) -> tuple[tuple[str, str], ...]:
        """Return what became of every kernel: (name, words), the chosen one first."""
        chosen, *others = self.accepted
        notes = [chosen.note, self.headroom if chosen.rank_if_fits is not None else ""]
        note = "; ".join(note for note in notes if note)
        lines = [(chosen.kernel, f"chosen: {note}" if note else "chosen")]
        lines += [
            (other.kernel, f"could run it, in {other.dtype}; {self._why_outranked(other)}")
            for other in others
        ]
        lines += [(verdict.kernel, verdict.reason) for verdict in self.declined]
        return tuple(lines)

    def _why_outranked(self, other: Accepted) -> str:
        """Say why a kernel that accepted was not chosen: its rank, or the device's memory."""
        if self.headroom and (other.rank_if_fits or 0) > self.chosen.rank:
            return self.headroom
        return f"ranks below {self.chosen.kernel}"


def choose(
    layer: LayerSpec,
    device: Device,
    kernels: Sequence[Kernel],
    *,
    only: str | None = None,
    if_fits: bool = False,
) -> Choice:
    """Choose the highest-ranked kernel that accepts `layer` on `device`.

    Args:
        layer: the layer, by its headers.
        device: where it will run.
        kernels: the kernels to ask; each is asked.
        only: accept this kernel and no other. Never a preference: a named kernel that declines is
            an error, so that a slow fallback cannot pass for the kernel that was asked for.
        if_fits: rank each kernel as where the device's free memory holds the whole model by it.

    Raises:
        NoBackend: every kernel declined; the error carries each one's reason.
        OptionInvalid: no kernel has that name.
        PluginError: a kernel failed instead of answering.
    """
    accepted: list[tuple[Accepted, Kernel]] = []
    declined: list[Declined] = []
    _check_name(only, kernels)
    for kernel in kernels:
        verdict = _ask(kernel, layer, device)
        if isinstance(verdict, Declined):
            declined.append(verdict)
        elif only is not None and kernel.name != only:
            declined.append(Declined(kernel.name, f"not {only}, which was asked for by name"))
        else:
            accepted.append((verdict, kernel))
    if not accepted:
        raise NoBackend(f"{layer.name} ({layer}) on {device}", declined, hint=_hint(only))
    accepted.sort(key=lambda pair: (-_rank(pair[0], if_fits=if_fits), pair[0].kernel))
    return Choice(
        layer=layer,
        kernel=accepted[0][1],
        accepted=tuple(verdict for verdict, _ in accepted),
        declined=tuple(declined),
    )


def depends_on_memory(choice: Choice) -> bool:
    """Return whether a choice made with `if_fits` would be another one without."""
    return any(verdict.rank > choice.chosen.rank for verdict in choice.accepted)


def _rank(verdict: Accepted, *, if_fits: bool) -> int:
    return verdict.rank_if_fits if if_fits and verdict.rank_if_fits is not None else verdict.rank


def _ask(kernel: Kernel, layer: LayerSpec, device: Device) -> Verdict:
    try:
        verdict = kernel.consider(layer, device)
    except GPTQLoaderError:
        raise
    except Exception as error:
        raise PluginError(
            f"the kernel {kernel.name} failed when asked about {layer.name}: {error}",
            hint="update the package that brings it, or leave it out with GPTQ_LOADER_PLUGINS",
        ) from error
    if not isinstance(verdict, Accepted | Declined):
        raise PluginError(
            f"the kernel {kernel.name} answered {verdict!r}",
            hint="answer Accepted or Declined from Kernel.consider",
        )
    return verdict


def prepared(kernel: Kernel, layer: LayerSpec, packed: PackedLinear, device: Device) -> nn.Module:
    """Have a kernel prepare a layer.

    Raises:
        PluginError: it fails, or answers something that is no module.
    """
    from torch import nn

    try:
        module: object = kernel.prepare(layer, packed, device)
    except (GPTQLoaderError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):  # which a load reports
            raise
        raise PluginError(
            f"the kernel {kernel.name} failed to prepare {layer.name}: {error}",
            hint="update the package that brings it, or leave it out with GPTQ_LOADER_PLUGINS",
        ) from error
    if isinstance(module, nn.Module):
        return module
    raise PluginError(
        f"the kernel {kernel.name} prepared {module!r} for {layer.name}",
        hint="answer a torch module from Kernel.prepare",
    )


def _check_name(only: str | None, kernels: Sequence[Kernel]) -> None:
    """Refuse a kernel's name that none has.

    Raises:
        OptionInvalid: none has it.
    """
    names = [kernel.name for kernel in kernels]
    if only is None or only in names or not names:
        return
    near = get_close_matches(only, names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise OptionInvalid(
        f"there is no kernel {only}",
        hint=f"{guess}name a kernel that is installed: {', '.join(names)}",
    )


def _hint(only: str | None) -> str:
    if only is not None:
        return "leave backend out, and the best kernel that can run it is chosen"
    return "install gptq-loader-plugin's own kernels again: reference runs every layer"
