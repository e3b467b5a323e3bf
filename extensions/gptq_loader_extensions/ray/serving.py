"""Serve on this machine: start Ray, deploy, say where it listens, and end it all at Ctrl-C."""

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
from gptq_loader_extensions.ray.options import Options, read_options
from gptq_loader_extensions.ray.proxy import CALLBACK
from gptq_loader_plugin.errors import OptionInvalid, PluginError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["serve"]

LOOPBACK = "127.0.0.1"
CLASS = re.compile(r"^[\w.]+: ")  # before the words of an exception
LAST_WORDS = 5  # seconds in which a replica says itself that a request took too long
# Their names in `gptq-loader serve`, and those of the server.
RENAMED = {"allow_host": "allowed_hosts"}
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def serve(reference: str, given: Mapping[str, object]) -> None:
    """Serve until Ctrl-C; running replies get a few seconds to end.

    Args:
        reference: what to serve, as the user wrote it.
        given: options of `gptq-loader serve`.

    Raises:
        PluginError: Ray could not start, or no replica could.
        OptionInvalid: an option makes no sense, or the address cannot be served on.
        GPTQLoaderError: there is no such checkpoint, or it cannot be loaded.
    """
    named = {RENAMED.get(it, it): value for it, value in given.items() if it != "listen"}
    if given.get("listen"):
        named.setdefault("host", "0.0.0.0")  # noqa: S104 - as asked for
    options = read_options({**named, "reference": reference})
    options.settings()
    plan, options = _planned(options)
    with bind(options.host, options.port) as listening:
        options = options.model_copy(update={"port": listening.getsockname()[1]})
    with _ray(options) as logs, _until_a_signal() as asked_to_end:  # Ray sets signals of its own
        _deploy(options, asked_to_end)
        if not asked_to_end.is_set():
            _announce(options, plan, logs)
            asked_to_end.wait()
            _drain(options.grace)


def _planned(options: Options) -> tuple[Plan, Options]:
    """Find the checkpoint, once for all replicas, and share the machine among them."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import resolve

    if options.device is not None and ":" in options.device:
        raise OptionInvalid(
            f"{options.device} is one device, and Ray gives each replica its own",
            hint="write --device cuda",
        )
    path = resolve(options.reference, plugins=Plugins(installed=True)).resolve()
    plan = gptq.explain(path, device=options.device, backend=options.backend)
    typed = Path(options.reference).expanduser().exists()
    template = Path(options.template or "")
    most = options.least_and_most()[1]
    return plan, options.model_copy(
        update={
            "reference": str(path),  # replicas run in folders of their own
            "template": str(template.resolve()) if template.is_file() else options.template,
            "name": path.name if typed else options.reference,
            "threads": _threads(most),
            "gpus": 1 if plan.device.type == "cuda" else 0,
        }
    )


def _threads(replicas: int) -> int:
    """Share the cores among the replicas; `OMP_NUM_THREADS` says otherwise."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named):
        return int(named)
    return max(1, _cores() // replicas)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _until_a_signal() -> Iterator[threading.Event]:
    """Give what is set at Ctrl-C, or when the system asks this program to end."""
    ended = threading.Event()
    before = {
        it: signal.signal(it, lambda *_: ended.set()) for it in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ray(options: Options) -> Iterator[Path]:
    """Start a Ray of our own, reached from this machine alone; end it whatever happens.

    Yields:
        Where its logs are.

    Raises:
        PluginError: it could not start.
    """
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = CALLBACK
    os.environ["RAY_AUTH_MODE"] = "token"  # whoever may talk to Ray may run what he likes
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    most = options.least_and_most()[1]
    try:
        context = ray.init(
            "local",
            num_cpus=max(_cores(), options.threads * most),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=LOOPBACK,
        )
    except Exception as error:
        raise PluginError(
            f"Ray could not start: {_last_line(error)}",
            hint="free memory, or space in /tmp, or wait until this machine has less to do; then "
            "try again",
        ) from error
    try:
        yield Path(context["session_dir"]) / "logs" / "serve"
    finally:
        ray.shutdown()


def _deploy(options: Options, asked_to_end: threading.Event) -> None:
    """Start the replicas and wait until they answer, or until Ctrl-C."""
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from gptq_loader_extensions.ray.application import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    failed: list[Exception] = []

    def run() -> None:
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": options.host,
                    "port": options.port,
                    "request_timeout_s": options.timeout + LAST_WORDS,
                },
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
            bound = application(_shared(options), tries=1)
            ray_serve.run(bound, name=NAME, route_prefix="/")
        except Exception as error:  # noqa: BLE001 - raised again below, in words
            failed.append(error)

    starting = threading.Thread(target=run, daemon=True)
    starting.start()
    while starting.is_alive() and not asked_to_end.is_set():
        starting.join(timeout=0.1)
    if failed:
        why, hint = _why(failed[0])
        raise PluginError(
            f"the replicas could not start: {why}",
            hint=hint or "see whether one server can: the same command without --engine ray",
        ) from failed[0]


def _why(error: Exception) -> tuple[str, str]:
    """Take from Ray Serve what its replicas died of, where it knows; else what it said itself.

    Returns:
        What is wrong, and the hint of an error of this package.
    """
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from gptq_loader_extensions.ray.application import NAME

    try:
        found = ray_serve.status().applications.get(NAME)
    except (RayError, RayServeException):  # it is what died
        found = None
    words = [it.message for it in found.deployments.values()] if found else []
    text, _, hint = "".join(words).partition("\nhint: ")  # the error's note, under its traceback
    return _last_line(text or error), hint.partition("\n")[0]


def _shared(options: Options) -> Options:
    """Share the GPUs where there are fewer than replicas."""
    import ray

    most = options.least_and_most()[1]
    there = ray.cluster_resources().get("GPU", 0)
    return options.model_copy(update={"gpus": min(options.gpus, there / most)})


def _drain(grace: float) -> None:
    """Take no more requests, and let the replies under way end."""
    from ray import serve as ray_serve

    from gptq_loader_extensions.ray.application import NAME

    ray_serve.delete(NAME, _blocking=False)
    until = time.monotonic() + grace
    while NAME in ray_serve.status().applications and time.monotonic() < until:
        time.sleep(0.1)


def _announce(options: Options, plan: Plan, logs: Path) -> None:
    """Say what is served, by how many, where, and how to point a client at it."""
    host = LOOPBACK if options.host in ("0.0.0.0", "::", "") else options.host  # noqa: S104 - compared, not bound
    url = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    key = "your key" if options.api_key else "anything"
    least, most = options.least_and_most()
    count = str(most) if least == most else f"{least} to {most}"
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
        told = {
            "url": url,
            "model": options.name,
            "kernels": plan.kernels(),
            "models": [options.name],
            "replicas": [least, most],
            "logs": str(logs),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


def _last_line(error: Exception | str) -> str:
    """Take what went wrong out of a traceback, without the name of its class."""
    lines = [it.strip() for it in str(error).splitlines() if it.strip()]
    return CLASS.sub("", lines[-1]) if lines else type(error).__name__
