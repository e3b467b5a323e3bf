"""Measure every kernel's choices on this GPU, as `gptq-loader tune` does."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from layers_part import make_spec

from gptq_loader_plugin.cli.tune import tune_kernels
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from record import Record
    from where import Where

__all__ = ["run"]

SIDES = ((4096, 11008), (11008, 4096), (4096, 4096))
BITS = (4, 3, 2, 8)


def run(record: Record, where: Where) -> None:
    """Tune for the layers of Llama-2-7B, 4 bits first; keep what was found in the results."""
    if not where.is_gpu:
        record.check("tune", passed=None, detail="there is no GPU")
        return
    plugins = Plugins(installed=True)
    for bits in BITS:
        if record.left < 0:
            record.check(f"tune {bits}-bit", passed=None, detail="no time was left")
            continue
        layers = [make_spec(sides, bits, act_order=False) for sides in SIDES]
        began = time.monotonic()
        with record.checking(f"tune {bits}-bit"):
            try:
                words = tune_kernels(layers, where.device, plugins)
            except OptionInvalid as error:  # no kernel here has anything to choose
                record.check(f"tune {bits}-bit", passed=None, detail=error.message)
                continue
            detail = "; ".join(f"{name}: {said}" for name, said in words.items())
            record.check(f"tune {bits}-bit", passed=True, detail=detail)
            record.figure(f"tune {bits}-bit", seconds=time.monotonic() - began)
    for file in sorted((cache_folder() / "tuned").glob("*.json")):
        record.figure("tuned", file=file.name, content=json.loads(file.read_text(encoding="utf-8")))
