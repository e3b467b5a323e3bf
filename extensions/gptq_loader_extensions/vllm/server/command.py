"""Write the command line and the environment of vLLM's server."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.server.guard import as_environment
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_extensions.vllm.options import ServeOptions
    from gptq_loader_extensions.vllm.planning.explain import VllmPlan

__all__ = ["environment", "write_command"]

GIB = 2**30
CONTEXTS = 4  # full ones that the cache of a CPU has room for, unless memory is short
SHARE = 4  # of free memory, a quarter: the weights, and other programs, need the rest
FEW_CORES = 2
UNKNOWN = 4 * GIB  # for the cache, where a model's shape is not known


def write_command(
    options: ServeOptions,
    planned: VllmPlan,
    *,
    folder: Path,
    name: str,
    template: Path,
    generation: Path,
    port: int,
) -> list[str]:
    """Write the command that serves a checkpoint.

    Args:
        options: what the user asked for.
        planned: who takes the checkpoint, and on which device.
        folder: the checkpoint's.
        name: what clients call it.
        template: the file of its template.
        generation: the folder of its generation_config.json.
        port: where to listen.
    """
    settings, on_cpu = options.settings, planned.plan.device.type == "cpu"
    # vLLM takes one dtype for all; on a CPU that which the kernels compute in
    dtype = options.load.dtype_name or (planned.plan.dtype if on_cpu else None)
    flags = {
        "--model": folder,
        "--host": settings.host,
        "--port": port,
        "--served-model-name": name,
        "--chat-template": template,
        "--generation-config": generation,
        "--middleware": "gptq_loader_extensions.vllm.server.guard.ServerGuard",
        "--shutdown-timeout": settings.grace,
        "--disable-access-log-for-endpoints": "/health",
        "--max-num-seqs": options.max_num_seqs,
        "--max-model-len": options.load.context,
        "--dtype": dtype,
        "--tensor-parallel-size": options.tensor_parallel,
        "--quantization": NAME if planned.taker == NAME else None,
        "--additional-config": None
        if options.load.backend is None
        else json.dumps({NAME: {"backend": options.load.backend}}),
    }
    # torch.compile takes minutes on a CPU before the first answer
    eager = ["--enforce-eager"] if on_cpu else []
    program = [sys.executable, "-P", "-m", "gptq_loader_extensions.vllm.program"]
    return [*program, *_written(flags), *eager]


def environment(
    settings: Settings,
    planned: VllmPlan,
    *,
    stops: Sequence[str],
    context: int | None,
    workers: int,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Give the environment of vLLM's server: the user's, and what vLLM is told there.

    Args:
        settings: whom to let in.
        planned: on which device.
        stops: the texts that end a chat's reply.
        context: the longest sequence, where it is known.
        workers: how many processes share each layer.
        environ: the user's, which wins.

    Raises:
        OptionInvalid: this CPU has fewer cores than workers.
    """
    ours, usual = as_environment(settings, stops), {"VLLM_NO_USAGE_STATS": "1"}
    only = environ.get("VLLM_PLUGINS")
    if only is not None and NAME not in only.split(","):
        ours["VLLM_PLUGINS"] = ",".join(it for it in (only, NAME) if it)
    if planned.plan.device.type == "cpu":
        usual["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(planned, context, workers))
        # vLLM keeps one core for its server: of two that would be half
        if workers > 1 or len(_cores()) == FEW_CORES:
            usual["VLLM_CPU_OMP_THREADS_BIND"] = _shared_cores(workers)
    return {**usual, **environ, **ours}


def _written(flags: Mapping[str, object]) -> list[str]:
    return [str(it) for flag, value in flags.items() if value is not None for it in (flag, value)]


def _cache_gib(planned: VllmPlan, context: int | None, workers: int) -> int:
    """Give the room for keys and values, in GiB, for each worker; vLLM would take nearly all."""
    each = planned.plan.kv_bytes_per_token
    wanted = each * context * CONTEXTS if each and context else UNKNOWN
    most = free_memory() // SHARE
    return max(1, -(-min(wanted, most) // (GIB * workers)))


def _cores() -> list[int]:
    """List the cores that this process may use."""
    everywhere = range(os.cpu_count() or 1)
    return sorted(os.sched_getaffinity(0) if sys.platform == "linux" else everywhere)


def _shared_cores(workers: int) -> str:
    """Give each worker cores of its own, as vLLM wants them written: 0,1|2,3."""
    cores = _cores()
    if len(cores) < workers:
        raise OptionInvalid(
            f"{workers} workers need a core each, and this process may use {len(cores)}",
            hint=f"use --tensor-parallel {len(cores)} or less",
        )
    each = len(cores) // workers
    shares = [cores[i * each : (i + 1) * each] for i in range(workers)]
    return "|".join(",".join(map(str, share)) for share in shares)
