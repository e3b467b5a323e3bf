"""Apply an engine's rules to a checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.engines.engine import Answer, Engine
from gptq_loader_plugin.catalog.engines.table import ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptq_loader_plugin.catalog.engines.facts import Facts
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["ask_engines", "judge"]

V1_V2 = ("gptq", "gptq_v2")  # whose codes lie alike
SMALLEST_POWER = 32  # rows of a group


def ask_engines(facts: Facts) -> tuple[Answer, ...]:
    """Ask every engine of the table, in its order."""
    return tuple(judge(engine, facts) for engine in ENGINES)


def judge(engine: Engine, facts: Facts) -> Answer:
    """Return whether an engine takes a checkpoint, with the first reason against it."""
    reason = next(_reasons(engine, facts), None)
    takes: bool | None = reason is None
    if reason is None and engine.without_g_idx and facts.without_g_idx:
        takes, reason = None, f"{facts.without_g_idx} layers have no g_idx; what it does is unknown"
    return Answer(
        engine=engine.name,
        version=engine.version,
        takes=takes,
        reason=reason or engine.note or "takes it as it is",
        source=engine.source,
        date=engine.date,
    )


def _reasons(engine: Engine, facts: Facts) -> Iterator[str]:
    """Return what speaks against it, what the engine looks at first first."""
    if engine.refusal:
        yield engine.refusal
        return
    odd = [name for name in facts.files if not re.fullmatch(engine.file_names, name)]
    if odd:
        yield f"it does not open a file called {odd[0]}"
    if engine.experts_alone and not facts.experts:
        yield "it takes GPTQ for the experts of a mixture alone, and this is none"
    name = next((name for name in engine.configs if name in facts.configs), None)
    if engine.configs and name is None:
        yield f"it reads {' or '.join(engine.configs)}, which says nothing of quantisation here"
        return
    config = facts.configs.get(name or "config.json", {})
    yield from _of_config(engine, name or "config.json", config, facts)
    if engine.g_idx and facts.without_g_idx:
        yield f"{facts.without_g_idx} layers have no g_idx, without which it fails"
    layers = [
        layer for layer in facts.layers if not engine.experts_alone or ".experts." in layer.name
    ]
    for layer in dict.fromkeys(_kind(layer) for layer in layers):
        yield from _of_layer(engine, layer, config.get("group_size"))


def _of_keys(engine: Engine, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Return what the config should say and does not, or the other way around."""
    if missing := [key for key in engine.keys if config.get(key) is None]:
        yield f"{name} does not say {' and '.join(missing)}"
    if refused := [key for key in engine.refused_keys if key in config]:
        yield f"{name} has {' and '.join(refused)}, by which it takes the file for another format"


def _of_config(engine: Engine, name: str, config: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """Return what speaks against the config, by itself and beside the tensors."""
    if not engine.configs:
        label = facts.configs.get("config.json", {}).get("checkpoint_format", "gptq")
        yield from _of_zeros(engine, label, facts)
        return
    method = config.get("quant_method")
    if engine.method and str(method).lower() != "gptq":
        says = f"says the method is {method}" if method else "names no method"
        yield f"it wants the method gptq, and {name} {says}"
    yield from _of_keys(engine, name, config)
    label = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if engine.formats is not None and label not in engine.formats:
        yield f"it does not read the format {label}"
    if engine.formats is None and label not in V1_V2:
        yield f"it would answer wrongly: it takes the format {label} for gptq"
    bits, sym, group = config.get("bits"), config.get("sym"), config.get("group_size")
    if isinstance(bits, int) and bits not in engine.bits:
        yield _widths(engine, bits)
    if sym is False and isinstance(bits, int) and (reason := _of_asym(engine, bits)):
        yield reason
    if config.get("desc_act"):
        yield from _of_stated_order(engine, name, config)
    if isinstance(group, int) and (reason := _of_group(engine, group)):
        yield reason
    yield from _of_lies(engine, name, config, facts)
    yield from _of_zeros(engine, label, facts)


def _of_stated_order(engine: Engine, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Return what speaks against a config that says act-order."""
    if engine.order == "never":
        yield f"it refuses act-order, which {name} says"
    if engine.order == "without groups" and config.get("group_size") != -1:
        yield f"it refuses act-order with groups, which {name} says"
    if engine.order == "static" and not (
        config.get("static_groups") and config.get("true_sequential")
    ):
        yield f"it takes act-order only with static_groups and true_sequential, which {name} lacks"


def _of_lies(engine: Engine, name: str, config: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """Return where an engine that believes the config would compute something else."""
    ordered = any(layer.desc_act and layer.groups > 1 for layer in facts.layers)
    if ordered and not config.get("desc_act") and engine.order not in ("read", "ignored"):
        yield f"it would answer wrongly: rows are in act-order, and {name} does not say so"
    if engine.order == "by config" and config.get("desc_act") and facts.without_g_idx:
        yield f"{name} says act-order, and {facts.without_g_idx} layers have no g_idx"
    if engine.dynamic and config.get("dynamic"):
        return
    for layer in facts.layers:
        stated = config.get("bits")
        if isinstance(stated, int) and stated != layer.bits:
            yield f"{name} says {stated} bits, and {layer.name} has {layer.bits}"
        if config.get("sym") is True and not layer.sym:
            yield f"it would answer wrongly: {name} says sym, and {layer.name} is asymmetric"


def _of_zeros(engine: Engine, label: str, facts: Facts) -> Iterator[str]:
    if engine.zeros == "ignored":
        return
    asym = any(not layer.sym for layer in facts.layers)
    read = engine.zeros if engine.zeros in ("v1", "v2") else "v1" if label == "gptq" else "v2"
    if read != facts.zeros and (asym or engine.sym_zeros):
        yield f"it would answer wrongly: it reads zeros as {read}, and these are {facts.zeros}"


def _kind(layer: LayerSpec) -> LayerSpec:
    return replace(layer, name=layer.name.rpartition(".")[2], bias=False)


def _of_layer(engine: Engine, layer: LayerSpec, group_size: object) -> Iterator[str]:
    """Return what speaks against a layer, whatever the config says of it but its groups."""
    if layer.bits not in engine.bits:
        yield _widths(engine, layer.bits)
    if not layer.sym and (reason := _of_asym(engine, layer.bits)):
        yield reason
    if layer.groups > 1 and layer.desc_act and engine.order in ("without groups", "never"):
        yield f"it would answer wrongly: {layer.name} is in act-order"
    if layer.groups > 1 and layer.desc_act and engine.order == "ignored":
        yield f"it would answer wrongly: it passes over g_idx, and {layer.name} is in act-order"
    rows, columns = layer.in_features, layer.out_features
    # one group of as many rows as the layer has is a group to engines, and none to us
    group = rows if layer.groups == 1 and group_size == rows else layer.group_size
    if group != rows and (reason := _of_group(engine, group)):
        yield reason
    uneven = layer.groups > 1 and layer.group_rows[0] != layer.group_rows[1]
    if uneven and engine.uneven_bits is not None and layer.bits not in engine.uneven_bits:
        yield f"groups of {layer.group_size} do not divide the {rows} rows of {layer.name}"
    if rows % engine.row_unit:
        yield f"it takes rows in multiples of {engine.row_unit}; {layer.name} has {rows}"
    if columns % engine.column_unit:
        yield f"it takes columns in multiples of {engine.column_unit}; {layer.name} has {columns}"
    if layer.groups == 1 and rows > engine.block_rows and rows % engine.block_rows:
        yield (
            f"it would fail: without groups it cuts rows into blocks of {engine.block_rows}, and "
            f"{layer.name} has {rows}"
        )


def _of_asym(engine: Engine, bits: int) -> str | None:
    if engine.asym_bits is None or bits in engine.asym_bits:
        return None
    if not engine.asym_bits:
        return "it takes symmetric zeros only, and these are not"
    return f"with asymmetric zeros it takes {_listed(engine.asym_bits)} bits, and this has {bits}"


def _of_group(engine: Engine, group: int) -> str | None:
    if group < 0 and not engine.no_groups:
        return "it fails where there are no groups"
    if engine.groups is not None and group not in engine.groups:
        return f"it has no kernel for groups of {group}"
    if engine.power_of_two_groups and group > 0 and (group & (group - 1) or group < SMALLEST_POWER):
        return f"it takes groups of a power of two from {SMALLEST_POWER} up; these have {group}"
    return None


def _widths(engine: Engine, bits: int) -> str:
    return f"it takes {_listed(engine.bits)} bits, and this has {bits}"


def _listed(numbers: tuple[int, ...]) -> str:
    return " or ".join(str(number) for number in numbers)
