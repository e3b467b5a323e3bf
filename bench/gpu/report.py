"""Print what came of it all as plain tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["model_ratios", "print_report"]

SHARE, TIMES = 0.85, 10  # the aims: docs/kernels/gpu.md
KERNELS = 9  # of a layer in a step
FEW = 16  # rows for which the first one holds


def print_report(results: dict[str, Any]) -> bool:
    """Print it; return whether a check failed or a part crashed."""
    machine = results["machine"]
    versions = ", ".join(
        f"{it} {machine[it]}" for it in ("torch", "triton", "transformers") if it in machine
    )
    print(f"\n{machine['name']} ({machine['device']}), Python {machine['python']}, {versions}\n")
    rows = []
    for name, part in results["parts"].items():
        checks = part.get("checks", [])
        counts = [sum(it["passed"] is value for it in checks) for value in (True, False, None)]
        rows.append((name, part["state"], f"{part.get('seconds', 0):.0f}", *map(str, counts)))
    _print_table(("part", "state", "s", "passed", "failed", "not made here"), rows)
    failed = False
    for name, part in results["parts"].items():
        for check in part.get("checks", []):
            if check["passed"] is False:
                failed = True
                print(f"FAILED {name}: {check['name']}: {check['detail']}")
            elif check["passed"] is None:
                print(f"not made: {name}: {check['name']}: {check['detail'][:200]}")
        if part["state"] == "crashed":
            failed = True
            print(f"CRASHED {name}: {part['error']}")
    for steps in _figures(results, "capture", "steps"):
        _print_steps(steps)
    _print_layers(_figures(results, "layers", "layer"))
    _print_replies(results)
    return failed


def model_ratios(results: dict[str, Any]) -> list[dict[str, float]]:
    """Return each measured step over what bench/step_model.py says, by the card's own figures."""
    loaded = _figures(results, "llama", "loaded")
    if not loaded or results["tiny"]:
        return []
    model = _step_model()
    ratios = []
    for reply in _figures(results, "llama", "replies"):
        worked_out = model.LLAMA_2_7B.step_seconds(
            loaded[0]["bandwidth"],
            sequences=reply["sequences"],
            context=reply["prompt"] + reply["reply"] / 2,
            launch=loaded[0]["launch_seconds"],
        )
        ratios.append(
            {
                "sequences": reply["sequences"],
                "measured": reply["step_seconds"],
                "model": worked_out,
                "ratio": reply["step_seconds"] / worked_out,
            }
        )
    return ratios


def _figures(results: dict[str, Any], part: str, name: str) -> list[dict[str, Any]]:
    figures = results["parts"].get(part, {}).get("figures", [])
    return [it for it in figures if it["name"] == name]


def _print_steps(steps: dict[str, Any]) -> None:
    if "kernels_a_step" not in steps:
        return
    a_layer = steps["kernels_a_step"] / steps["layers"]
    print(
        f"\na step of {steps['sequences']} sequences and {steps['layers']} layers: "
        f"{steps['kernels_a_step']:.0f} kernels ({a_layer:.1f} a layer, all counted; aim "
        f"{KERNELS}), {steps['launches_a_step']:.0f} launched one by one, "
        f"{steps['graph_launches_a_step']:.0f} graphs, {steps['waits_a_step']:.0f} waits, "
        f"{steps['allocations_a_step']:.0f} allocations"
    )


def _print_layers(layers: list[dict[str, Any]]) -> None:
    if not layers:
        return
    rows_of = sorted({it["rows"] for it in layers})
    first = layers[0]
    print(
        f"\n{first['inputs']} x {first['outputs']}: "
        "microseconds, share of memory's speed, times as fast as torch's float16"
    )
    kernels = dict.fromkeys(it["kernel"] for it in layers)
    table = []
    for kernel in kernels:
        by_rows = {it["rows"]: it for it in layers if it["kernel"] == kernel}
        cells = [_cell(by_rows[rows]) if rows in by_rows else "-" for rows in rows_of]
        table.append((kernel, *cells))
    _print_table(("kernel", *(f"M={rows}" for rows in rows_of)), table)
    few = [it for it in layers if "4-bit" in it["kernel"] and it["rows"] <= FEW]
    if few:  # by the kernel that is fastest at them
        best: dict[tuple[int, bool], float] = {}
        for it in few:
            key = it["rows"], it["kernel"].endswith(" act")
            best[key] = max(best.get(key, 0.0), it["share_of_memory"])
        least = min(best.values())
        print(
            f"4 bits, {FEW} rows or fewer: at least {100 * least:.0f} % of memory's speed, "
            f"aim {100 * SHARE:.0f} %"
        )


def _cell(layer: dict[str, Any]) -> str:
    microseconds, share = 1e6 * layer["seconds"], 100 * layer["share_of_memory"]
    return f"{microseconds:.1f} {share:.0f}% {layer['times_float16']:.2f}x"


def _print_replies(results: dict[str, Any]) -> None:
    replies = _figures(results, "llama", "replies")
    if not replies:
        return
    print("\nLlama-2-7B's shape" + " (tiny)" * results["tiny"])
    _print_table(
        ("sequences", "prompt tok/s", "tok/s", "ms a step", "weights of memory", "with keys"),
        [
            (
                str(it["sequences"]),
                f"{it['prompt_tokens_a_second']:.0f}",
                f"{it['tokens_a_second']:.1f}",
                f"{1e3 * it['step_seconds']:.3f}",
                f"{100 * it['share_of_memory']:.0f}%",
                f"{100 * it['share_of_memory_with_kv']:.0f}%",
            )
            for it in replies
        ],
    )
    if len(replies) > 1:
        times = replies[-1]["tokens_a_second"] / replies[0]["tokens_a_second"]
        print(
            f"{replies[-1]['sequences']} sequences: {times:.1f} times one's tokens a second, "
            f"aim {TIMES}"
        )
    for it in model_ratios(results):
        print(
            f"{it['sequences']} sequences: {1e3 * it['measured']:.3f} ms a step, "
            f"{1e3 * it['model']:.3f} by the model: ratio {it['ratio']:.2f}"
        )


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _step_model() -> ModuleType:
    """Import bench/step_model.py; its folder is not importable: it would hide others' packages."""
    file = Path(__file__).resolve().parents[1] / "step_model.py"
    spec = importlib.util.spec_from_file_location("step_model", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not there")
    module = sys.modules["step_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
