"""Make the application that Ray Serve deploys, on this machine or on a cluster.

On a cluster, a configuration names `gptq_loader_extensions.ray.application:build` and its options:

    serve deploy examples/ray.yaml
"""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.ray.options import Options, read_options
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["NAME", "application", "build"]

NAME = "gptq-loader"
# What a replica takes besides the replies it writes: a next one to begin with as soon as a reply
# ends, and the questions about its health.
BESIDES = 4
# Of the replies that one replica writes side by side, those at which another replica is worth its
# memory. SmolLM2-135M's step of 8 sequences takes 1.5 times that of one, and of 16 twice.
BUSY = 0.5
RETRY_SECONDS = 5  # as the server itself says when too much waits


def build(arguments: dict[str, Any]) -> Application:
    """Make the application from the arguments of a configuration file, or of `serve run`.

    Raises:
        OptionInvalid: an argument is unknown or impossible, or nothing keeps strangers out.
    """
    options = read_options(arguments)
    if options.api_key is None and not options.no_auth:
        raise OptionInvalid(
            "everyone who can reach the cluster could use this application",
            hint="set GPTQ_LOADER_API_KEY where the cluster's head runs, or say no_auth: true "
            "where the network itself keeps others out",
        )
    return application(options)


def application(options: Options, *, tries: int = 20) -> Application:
    """Make the application from options that were read.

    Args:
        options: what is served, and how.
        tries: how often a first replica may fail to start.

    Raises:
        OptionInvalid: the options make no sense.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, BackpressureConfig
    from ray.serve.schema import LoggingConfig

    from gptq_loader_extensions.ray.replica import Replica

    settings = options.settings()
    least, most = options.least_and_most()
    scaling: dict[str, Any] = {"num_replicas": most}
    if least < most:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                target_ongoing_requests=max(1, options.max_num_seqs * BUSY),
            )
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        logging_config=LoggingConfig(enable_access_log=False),  # the server has its own
        max_ongoing_requests=options.max_num_seqs + BESIDES,
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
