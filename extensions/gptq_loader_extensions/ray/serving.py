"""Serve on this machine: start Ray, deploy, print where it listens, and stop all at Ctrl-C."""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.serving import bind
from gptq_loader_extensions.ray.options import DeploymentOptions, parse_options
from gptq_loader_extensions.ray.proxy import CALLBACK
from gptq_loader_plugin.errors import OptionInvalid, PluginError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["serve"]

LOOPBACK = "127.0.0.1"
CLASS = re.compile(r"^[\w.]+: ")  # before an exception's message
TIMEOUT_MARGIN = 5  # seconds in which a replica itself answers that a request took too long
# Their names in `gptq-loader serve`, and those of the server.
RENAMED = {"allow_host": "allowed_hosts"}
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def serve(reference: str, args: Mapping[str, object]) -> None:
    """Serve until Ctrl-C; running replies get a few seconds to end.

    Args:
        reference: what to serve, as the user wrote it.
        args: options of `gptq-loader serve`.

    Raises:
        PluginError: Ray could not start, or no replica could.
        OptionInvalid: an option is impossible, or the address cannot be served on.
        GPTQLoaderError: there is no such checkpoint, or it cannot be loaded.
    """
    renamed = {RENAMED.get(name, name): value for name, value in args.items() if name != "listen"}
    if args.get("listen"):
        renamed.setdefault("host", "0.0.0.0")  # noqa: S104 - as requested
    options = parse_options({**renamed, "reference": reference})
    options.settings()
    plan, options = _plan(options)
    with bind(options.host, options.port) as listening:
        options = options.model_copy(update={"port": listening.getsockname()[1]})
    with _ray(options) as logs, _stop_signal() as stop:  # after Ray, which sets handlers too
        _deploy(options, stop)
        if not stop.is_set():
            _announce(options, plan, logs)
            stop.wait()
            _drain(options.grace)


def _plan(options: DeploymentOptions) -> tuple[Plan, DeploymentOptions]:
    """Find the checkpoint, once for all replicas, and share the machine among them."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import resolve

    if options.device is not None and ":" in options.device:
        raise OptionInvalid(
            f"{options.device} is one device, and Ray gives each replica its own",
            hint="use --device cuda",
        )
    path = resolve(options.reference, plugins=Plugins(installed=True)).resolve()
    plan = gptq.explain(path, device=options.device, backend=options.backend)
    is_path = Path(options.reference).expanduser().exists()
    template = Path(options.template or "")
    max_replicas = options.replica_range()[1]
    return plan, options.model_copy(
        update={
            "reference": str(path),  # replicas run in folders of their own
            "template": str(template.resolve()) if template.is_file() else options.template,
            "name": path.name if is_path else options.reference,
            "threads": _threads(max_replicas),
            "gpus": 1 if plan.device.type == "cuda" else 0,
        }
    )


def _threads(replicas: int) -> int:
    """Return each replica's share of the cores, or `OMP_NUM_THREADS` where that is set."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads):
        return int(threads)
    return max(1, _cores() // replicas)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Yield an event that is set at Ctrl-C, and at SIGTERM."""
    stop = threading.Event()
    handlers = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _ray(options: DeploymentOptions) -> Iterator[Path]:
    """Start a Ray of our own, reached from this machine alone; always shut it down.

    Yields:
        The folder of its logs.

    Raises:
        PluginError: it could not start.
    """
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = CALLBACK
    os.environ["RAY_AUTH_MODE"] = "token"  # a client of Ray may run any code
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    max_replicas = options.replica_range()[1]
    try:
        context = ray.init(
            "local",
            num_cpus=max(_cores(), options.threads * max_replicas),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=LOOPBACK,
        )
    except Exception as error:
        raise PluginError(
            f"Ray could not start: {_last_line(error)}",
            hint="free memory, or space in /tmp, or wait until this machine is less busy; then try "
            "again",
        ) from error
    try:
        yield Path(context["session_dir"]) / "logs" / "serve"
    finally:
        ray.shutdown()


def _deploy(options: DeploymentOptions, stop: threading.Event) -> None:
    """Start the replicas and wait until they answer, or until Ctrl-C."""
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from gptq_loader_extensions.ray.application import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    errors: list[Exception] = []

    def run() -> None:
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": options.host,
                    "port": options.port,
                    "request_timeout_s": options.timeout + TIMEOUT_MARGIN,
                },
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
            bound = application(_share_gpus(options), tries=1)
            ray_serve.run(bound, name=NAME, route_prefix="/")
        except Exception as error:  # noqa: BLE001 - raised below as a PluginError
            errors.append(error)

    starting = threading.Thread(target=run, daemon=True)
    starting.start()
    while starting.is_alive() and not stop.is_set():
        starting.join(timeout=0.1)
    if errors:
        reason, hint = _start_failure(errors[0])
        raise PluginError(
            f"the replicas could not start: {reason}",
            hint=hint or "try a single server: the same command without --engine ray",
        ) from errors[0]


def _start_failure(error: Exception) -> tuple[str, str]:
    """Return what the replicas died of, where Ray Serve knows it; else its own error.

    Returns:
        What is wrong, and the hint, where it is an error of this package.
    """
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from gptq_loader_extensions.ray.application import NAME

    try:
        deployed = ray_serve.status().applications.get(NAME)
    except (RayError, RayServeException):  # it is what died
        deployed = None
    messages = [it.message for it in deployed.deployments.values()] if deployed else []
    text, _, hint = "".join(messages).partition("\nhint: ")  # the error's note, after a traceback
    return _last_line(text or error), hint.partition("\n")[0]


def _share_gpus(options: DeploymentOptions) -> DeploymentOptions:
    """Share the GPUs where there are fewer than replicas."""
    import ray

    max_replicas = options.replica_range()[1]
    gpus = ray.cluster_resources().get("GPU", 0)
    return options.model_copy(update={"gpus": min(options.gpus, gpus / max_replicas)})


def _drain(grace: float) -> None:
    """Accept no more requests, and let the replies under way end."""
    from ray import serve as ray_serve

    from gptq_loader_extensions.ray.application import NAME

    ray_serve.delete(NAME, _blocking=False)
    deadline = time.monotonic() + grace
    while NAME in ray_serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)


def _announce(options: DeploymentOptions, plan: Plan, logs: Path) -> None:
    """Print what is served, by how many, where, and how to point a client at it."""
    host = LOOPBACK if options.host in ("0.0.0.0", "::", "") else options.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    key = "your key" if options.api_key else "anything"
    minimum, maximum = options.replica_range()
    count = str(maximum) if minimum == maximum else f"{minimum} to {maximum}"
    lines = [
        f"serving {options.name}: {plan.headline()}",
        f"  replicas on Ray Serve: {count}, {options.threads} thread(s) each",
        f"  the API is at {url}/v1, for any client of OpenAI's (API key: {key})",
        *(
            ["  anyone who can reach this address may use it: there is no key"]
            if options.no_auth and options.api_key is None
            else []
        ),
        f"  logs: {logs}",
        "  Ctrl-C ends it",
    ]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
    if options.as_json:
        status = {
            "url": url,
            "model": options.name,
            "kernels": plan.kernels(),
            "models": [options.name],
            "replicas": [minimum, maximum],
            "logs": str(logs),
        }
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()


def _last_line(error: Exception | str) -> str:
    """Return the message at the end of a traceback, without the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CLASS.sub("", lines[-1]) if lines else type(error).__name__
