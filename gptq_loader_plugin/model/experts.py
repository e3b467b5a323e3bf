"""A mixture's experts as separate linears, where transformers 5 keeps one fused parameter.

GPTQ quantises every expert's projections by themselves, and packed weights of different experts
cannot be joined, so the fused module is replaced by this one, which answers the same call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.kernel import Stackable
from gptq_loader_plugin.model.watch import CountedModule, CountedModuleDict, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "ExpertsLayout",
    "PackedExperts",
    "expert_weights",
    "experts_layout",
    "stack_experts",
    "watch",
]

DEFAULT_GATE = "transformers.integrations.moe"  # where act_fn(gate) * up is written
STACKED_ROWS = 256  # tokens; a prompt's are of nearly all experts, which read many rows each


@dataclass(frozen=True, slots=True)
class ExpertsLayout:
    """How a fused module keeps its experts.

    Attributes:
        count: how many there are.
        gated: whether each has a gate beside its up projection, in one tensor with it.
        transposed: whether weights are [experts, inputs, outputs].
        interleaved: whether the columns of gate and up alternate.
        bias: whether the projections have biases.
    """

    count: int
    gated: bool
    transposed: bool
    interleaved: bool
    bias: bool

    @property
    def first(self) -> str:
        """The name of the parameter that reads the hidden states."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        weights = (self.first, "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.bias else weights

    @property
    def roles(self) -> tuple[str, ...]:
        """The projections of an expert."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def cut(self, columns: int) -> dict[str, torch.Tensor]:
        """Return which columns of a joined gate and up are those of each, int64."""
        parts = _interleaved if self.interleaved else _side_by_side
        return dict(zip(("gate", "up"), parts(torch.arange(columns), 2), strict=True))


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return how a module keeps its experts; None where it fuses none."""
    down, first = (_stacked(module, name) for name in ("down_proj", "gate_up_proj"))
    gated = first is not None
    if first is None and _stacked(module, "gate_proj") is None:
        first = _stacked(module, "up_proj")
    if down is None or first is None:
        return None
    inner = 2 * down.shape[1] if gated else down.shape[1]
    return ExpertsLayout(
        count=len(down),
        gated=gated,
        transposed=getattr(module, "is_transposed", gated and first.shape[2] == inner),
        interleaved=gated and not getattr(module, "is_concatenated", True),
        bias=getattr(module, "down_proj_bias", None) is not None,
    )


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A mixture's experts as two products.

    Attributes:
        first: what `Stackable.stack` made of what reads the hidden states.
        down: the same of what returns them.
        separate: whether gate and up were prepared each by itself.
        watch: everything that they were made of.
    """

    first: nn.Module
    down: nn.Module
    separate: bool
    watch: Watch

    def same(self) -> bool:
        """Return whether the experts are still those."""
        return self.watch.unchanged()


class PackedExperts(nn.Module):
    """Experts of separate linears each, with the gate of the module that they stand in for.

    Args:
        fused: the fused module; its parameters are taken from it.

    Raises:
        TypeError: it fuses no experts.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        layout = experts_layout(fused)
        if layout is None:
            raise TypeError(f"{type(fused).__name__} fuses no experts")
        self.layout = layout
        self.num_experts = layout.count
        for name in layout.parameters:
            delattr(fused, name)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._fused: tuple[Any] = (fused,)  # in a tuple, so that it is no submodule
        self.experts = nn.ModuleList(CountedModuleDict() for _ in range(layout.count))
        self._stacked: _Stacked | None = None

    @property
    def fused(self) -> nn.Module:
        """The module that they stand in for: what its class computes is computed here."""
        module: nn.Module = self._fused[0]
        return module

    @property
    def passes_on(self) -> bool:
        """Whether experts past the last one answer with what they read (LongCat)."""
        return hasattr(self._fused[0], "identity_expert")

    def place(self, expert: int, role: str, module: nn.Module) -> None:
        """Put one projection in its place; `role` is "gate", "up", "gate_up" or "down"."""
        self._expert(expert)[role] = module

    def missing(self) -> list[str]:
        """Name the projections that are not in place yet."""
        return [
            f"{expert}.{role}"
            for expert in range(self.num_experts)
            for role in self.layout.roles
            if role not in self._expert(expert)
            and not (role in ("gate", "up") and "gate_up" in self._expert(expert))
        ]

    def stack(self, root: Any) -> bool:  # noqa: ANN401 - a transformers model
        """Have a few tokens sent through their experts without looking up which those are.

        Args:
            root: the model or decoder that they are of.

        Returns:
            Whether the kernel that prepared them can.
        """
        gated = "gate" in self._expert(0)
        roles = ("gate", "up") if gated else ("gate_up",) if self.layout.gated else ("up",)
        if self.passes_on or self.missing():
            return False
        first, down = self._stack(roles), self._stack(("down",))
        if first is None or down is None:
            return False
        self._stacked = _Stacked(first, down, gated, watch(root, list(self.modules())))
        return True

    def _stack(self, roles: tuple[str, ...]) -> nn.Module | None:
        parts = [[self._expert(i)[role] for role in roles] for i in range(self.num_experts)]
        first = parts[0][0]
        return first.stack(parts) if isinstance(first, Stackable) else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send every token through its experts and add their answers, weighted.

        Args:
            hidden_states: [tokens, hidden]; [experts * tokens, hidden], every expert's own,
                weighted, where nothing else is passed (Llama 4).
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden].
        """
        if top_k_index is None or top_k_weights is None:
            return self._forward_sorted(hidden_states)
        if (
            self._stacked is not None
            and len(hidden_states) <= STACKED_ROWS
            and self._stacked.same()
        ):
            return self._forward_stacked(self._stacked, hidden_states, top_k_index, top_k_weights)
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, slots = torch.where(top_k_index == expert)
            x = hidden_states[tokens]
            if expert < self.num_experts:
                y = self._run(expert, x)
            elif self.passes_on:
                y = x
            else:  # transformers' mark for "not on this rank"
                continue
            y = y * top_k_weights[tokens, slots, None]
            total.index_add_(0, tokens, y.to(total.dtype))
        return total

    def _forward_stacked(
        self,
        stacked: _Stacked,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Send tokens through their experts, a row for each: [tokens, hidden]."""
        fused: Any = self.fused
        experts = top_k_index.flatten().long()
        inner = stacked.first(x, experts)
        if not self.layout.gated:
            inner = fused.act_fn(inner)
        elif stacked.separate and self._own_gate and self.layout.interleaved:
            inner = self._apply_gate(torch.stack(inner.chunk(2, -1), -1).flatten(-2))
        elif stacked.separate and not self._own_gate:
            gate, up = inner.chunk(2, dim=-1)
            inner = fused.act_fn(gate) * up
        else:
            inner = self._apply_gate(inner)
        y = self._normed(stacked.down(inner, experts)) * top_k_weights.flatten()[:, None]
        total: torch.Tensor = y.view(*top_k_index.shape, -1).sum(dim=1)
        return total.to(x.dtype)

    def _forward_sorted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send each expert the states that are its own; those of other experts are zero."""
        answers = torch.zeros_like(hidden_states)
        parts = zip(
            hidden_states.chunk(self.num_experts), answers.chunk(self.num_experts), strict=True
        )
        for expert, (x, y) in enumerate(parts):
            rows = x.any(dim=-1).nonzero()[:, 0]
            if len(rows):
                y[rows] = self._run(expert, x[rows]).to(y.dtype)
        return answers

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        fused, projections = self._fused[0], self._expert(expert)
        if not self.layout.gated:
            inner = fused.act_fn(projections["up"](x))
        elif "gate_up" in projections or self._own_gate:
            inner = self._apply_gate(self._gate_up(projections, x))
        else:
            inner = fused.act_fn(projections["gate"](x)) * projections["up"](x)
        return self._normed(projections["down"](inner))

    @property
    def _own_gate(self) -> bool:
        """Whether the class computes something else than act(gate) * up."""
        gate = getattr(type(self._fused[0]), "_apply_gate", None)
        return gate is not None and gate.__module__ != DEFAULT_GATE

    def _normed(self, y: torch.Tensor) -> torch.Tensor:
        fused = self._fused[0]
        if getattr(fused, "has_post_expert_norm", False):
            y = fused.post_expert_norm(y)
        return y

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        fused = self._fused[0]
        if hasattr(fused, "_apply_gate"):
            own: torch.Tensor = fused._apply_gate(gate_up)  # noqa: SLF001 - the class's own gate
            return own
        gate, up = gate_up.chunk(2, dim=-1)
        default: torch.Tensor = fused.act_fn(gate) * up
        return default

    def _gate_up(self, projections: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        """Lay gate and up side by side as the fused module has them."""
        if "gate_up" in projections:
            joined: torch.Tensor = projections["gate_up"](x)
            return joined
        both = (projections["gate"](x), projections["up"](x))
        return torch.stack(both, -1).flatten(-2) if self.layout.interleaved else torch.cat(both, -1)

    def _expert(self, index: int) -> nn.ModuleDict:
        expert = self.experts[index]
        if not isinstance(expert, nn.ModuleDict):
            raise TypeError(f"expert {index} is a {type(expert).__name__}")
        return expert


def watch(root: Any, inside: Sequence[nn.Module]) -> Watch:  # noqa: ANN401 - transformers' model
    """Watch modules of a model or decoder; experts' linears, which are many, by what they count."""
    counted = [
        it
        for module in inside
        if isinstance(module, PackedExperts)
        for it in module.experts.modules()
        if isinstance(it, CountedModule)
    ]
    many = set(map(id, counted))
    return Watch(root, [it for it in inside if id(it) not in many], counted)


def stack_experts(model: nn.Module) -> bool:
    """Stack the experts of every mixture in a model; return whether all could be."""
    mixtures = [it for it in model.modules() if isinstance(it, PackedExperts)]
    with torch.inference_mode(mode=False):
        stacked = [it.stack(model) for it in mixtures]
    return all(stacked)


def expert_weights(
    fused: nn.Module, layout: ExpertsLayout
) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor | None]]:
    """Cut a fused module into projections: expert, role, weight [outputs, inputs] and bias."""
    for name, roles in ((layout.first, layout.roles[:-1]), ("down_proj", ("down",))):
        weights: Any = getattr(fused, name)
        biases: Any = getattr(fused, f"{name}_bias") if layout.bias else None
        for expert in range(layout.count):
            rows = weights[expert].t() if layout.transposed else weights[expert]
            cut = _interleaved if layout.interleaved and len(roles) > 1 else _side_by_side
            parts = cut(rows, len(roles))
            bias = [None] * len(roles) if biases is None else cut(biases[expert], len(roles))
            for role, weight, own in zip(roles, parts, bias, strict=True):
                yield expert, role, weight, own


def _side_by_side(rows: torch.Tensor, count: int) -> list[torch.Tensor]:
    return list(rows.chunk(count))


def _interleaved(rows: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [rows[i::count] for i in range(count)]


def _stacked(module: nn.Module, name: str) -> nn.Parameter | None:
    parameter = getattr(module, name, None)
    return parameter if isinstance(parameter, nn.Parameter) and parameter.dim() == 3 else None
