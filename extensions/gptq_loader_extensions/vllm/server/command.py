"""Write the command line and the environment of vLLM's server."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.server.guard import guard_environment
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
CONTEXTS = 4  # full ones that fit into a CPU's cache, unless memory is short
MEMORY_DIVISOR = 4  # a quarter of free memory: the weights, and other programs, need the rest
FEW_CORES = 2
DEFAULT_CACHE_BYTES = 4 * GIB  # where a model's shape is not known


def write_command(
    options: ServeOptions,
    planned: VllmPlan,
    *,
    folder: Path,
    name: str,
    template: Path,
    generation: Path,
    port: int,
    tokenizer: Path | None = None,
) -> list[str]:
    """Write the command that serves a checkpoint.

    Args:
        options: the user's.
        planned: whose GPTQ runs the checkpoint, and on which device.
        folder: the checkpoint's.
        name: the model's name for clients.
        template: the file of its template.
        generation: the folder of its generation_config.json.
        port: the port to listen on.
        tokenizer: the folder of its tokenizer, where that is not the checkpoint's.
    """
    settings, on_cpu = options.settings, planned.plan.device.type == "cpu"
    # vLLM has one dtype for all; on a CPU, the one the kernels compute in
    dtype = options.load.dtype_name or (planned.plan.dtype if on_cpu else None)
    flags = {
        "--model": folder,
        "--tokenizer": tokenizer,
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
        "--quantization": NAME if planned.implementation == NAME else None,
        "--additional-config": None
        if options.load.backend is None
        else json.dumps({NAME: {"backend": options.load.backend}}),
    }
    # torch.compile takes minutes on a CPU before the first answer
    eager = ["--enforce-eager"] if on_cpu else []
    program = [sys.executable, "-P", "-m", "gptq_loader_extensions.vllm.program"]
    return [*program, *_to_arguments(flags), *eager]


def environment(
    settings: Settings,
    planned: VllmPlan,
    *,
    stops: Sequence[str],
    context: int | None,
    workers: int,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the environment of vLLM's server: the user's, and our settings for vLLM.

    Args:
        settings: who may use the server.
        planned: the device.
        stops: the texts that end a chat's reply.
        context: the longest sequence, where it is known.
        workers: how many processes share each layer.
        environ: the user's, which takes precedence.

    Raises:
        OptionInvalid: this CPU has fewer cores than workers.
    """
    ours, defaults = guard_environment(settings, stops), {"VLLM_NO_USAGE_STATS": "1"}
    enabled = environ.get("VLLM_PLUGINS")
    if enabled is not None and NAME not in enabled.split(","):
        ours["VLLM_PLUGINS"] = f"{enabled},{NAME}" if enabled else NAME
    if planned.plan.device.type == "cpu":
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(planned, context, workers))
        # vLLM reserves one core for its server: of two that would be half
        if workers > 1 or len(_cores()) == FEW_CORES:
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = _shared_cores(workers)
    return {**defaults, **environ, **ours}


def _to_arguments(flags: Mapping[str, object]) -> list[str]:
    set_flags = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    return [word for pair in set_flags for word in pair]


def _cache_gib(planned: VllmPlan, context: int | None, workers: int) -> int:
    """Return each worker's memory for keys and values in GiB; vLLM's default is nearly all."""
    token_bytes = planned.plan.kv_bytes_per_token
    needed = token_bytes * context * CONTEXTS if token_bytes and context else DEFAULT_CACHE_BYTES
    limit = free_memory() // MEMORY_DIVISOR
    return max(1, -(-min(needed, limit) // (GIB * workers)))


def _cores() -> list[int]:
    """List the cores that this process may use."""
    all_cores = range(os.cpu_count() or 1)
    return sorted(os.sched_getaffinity(0) if sys.platform == "linux" else all_cores)


def _shared_cores(workers: int) -> str:
    """Return separate cores for each worker, as vLLM writes them: 0,1|2,3."""
    cores = _cores()
    if len(cores) < workers:
        raise OptionInvalid(
            f"{workers} workers need a core each, and this process may use only {len(cores)}",
            hint=f"use --tensor-parallel {len(cores)} or less",
        )
    each = len(cores) // workers
    shares = [cores[i * each : (i + 1) * each] for i in range(workers)]
    return "|".join(",".join(map(str, share)) for share in shares)
