"""Build the application that Ray Serve deploys, on this machine or on a cluster.

On a cluster, a configuration names `gptq_loader_extensions.ray.application:build` and its options:

    serve deploy examples/ray.yaml
"""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.ray.options import DeploymentOptions, parse_options
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["NAME", "application", "build"]

NAME = "gptq-loader"
# Requests that a replica accepts beyond its batch: one to begin as soon as a reply ends, and health
# checks.
EXTRA_REQUESTS = 4
# The share of a replica's batch at which another replica is worth its memory. SmolLM2-135M's step
# of 8 sequences takes 1.5 times that of one, and of 16 twice.
TARGET_LOAD = 0.5
RETRY_SECONDS = 5  # as in the server's own answer to a full queue


def build(arguments: dict[str, Any]) -> Application:
    """Build the application from the arguments of a configuration file, or of `serve run`.

    Raises:
        OptionInvalid: an argument is unknown or impossible, or there is no key.
    """
    options = parse_options(arguments)
    if options.api_key is None and not options.no_auth:
        raise OptionInvalid(
            "everyone who can reach the cluster could use this application",
            hint="set GPTQ_LOADER_API_KEY where the cluster's head runs, or no_auth: true if the "
            "network itself keeps others out",
        )
    return application(options)


def application(options: DeploymentOptions, *, tries: int = 20) -> Application:
    """Build the application from parsed options.

    Args:
        options: what is served, and how.
        tries: how often a first replica may fail to start.

    Raises:
        OptionInvalid: an option is impossible.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig
    from ray.serve.schema import LoggingConfig

    from gptq_loader_extensions.ray.replica import Replica

    settings = options.settings()
    min_replicas, max_replicas = options.replica_range()
    scaling: dict[str, Any] = {"num_replicas": max_replicas}
    if min_replicas < max_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=min_replicas,
                max_replicas=max_replicas,
                target_ongoing_requests=max(1, options.max_num_seqs * TARGET_LOAD),
            )
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        logging_config=LoggingConfig(enable_access_log=False),  # the server has its own
        max_ongoing_requests=options.max_num_seqs + EXTRA_REQUESTS,
        max_queued_requests=settings.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        max_constructor_retry_count=tries,
        # A replica that is no longer needed ends when its replies have.
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={
            "num_cpus": options.threads,
            "num_gpus": options.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(options.threads)}},
        },
        **scaling,
    )
    bound: Application = deployment.bind(options)
    return bound
