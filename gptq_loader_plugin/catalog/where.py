"""Where a checkpoint runs: other programs by their rules, and ours with each host."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from gptq_loader_plugin.catalog.engines.engine import OURS, Answer
from gptq_loader_plugin.catalog.engines.facts import gather_facts
from gptq_loader_plugin.catalog.engines.judge import ask_engines
from gptq_loader_plugin.catalog.headers_alone import with_headers
from gptq_loader_plugin.checkpoint.architectures.translate import refuse, translate_config
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.host import Host
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["ask_where", "find_where"]


def find_where(
    reference: str, *, revision: str | None = None, plugins: Plugins
) -> tuple[Answer, ...]:
    """Ask every engine about a checkpoint on this machine, or by its headers on the hub.

    Args:
        reference: as for `load`.
        revision: as for `load`.
        plugins: the plugins in force.

    Raises:
        GPTQLoaderError: see `errors`; each says what to do next.
    """
    hosts = plugins.hosts()
    return with_headers(
        reference,
        lambda checkpoint: ask_where(checkpoint, hosts),
        revision=revision,
        plugins=plugins,
    )


def ask_where(checkpoint: Checkpoint, hosts: Sequence[Host]) -> tuple[Answer, ...]:
    """Ask every engine that is known, then ours with each host.

    Args:
        checkpoint: the open checkpoint, or its outline.
        hosts: the hosts that are installed.
    """
    reason = _our_reason(checkpoint)
    ours = Answer(
        engine=OURS,
        version=version("gptq-loader-plugin"),
        takes=reason is None,
        reason=reason or "every layer has a kernel here: gptq-loader explain",
        source="gptq_loader_plugin/planning/plan.py",
        date=datetime.now(tz=UTC).date().isoformat(),
    )
    names = [OURS, *(f"{OURS}+{host.name}" for host in hosts)]
    return (
        *ask_engines(gather_facts(checkpoint)),
        *(replace(ours, engine=name) for name in names),
    )


def _our_reason(checkpoint: Checkpoint) -> str | None:
    """Return why this package would not load a checkpoint; None where it would."""
    from transformers import CONFIG_MAPPING

    try:
        config = checkpoint.model_config
        path = checkpoint.folder / "config.json"
        translated = translate_config(config, path)
        if translated is None:
            refuse(translated := config, path)
    except GPTQLoaderError as error:
        return error.message
    if translated["model_type"] not in CONFIG_MAPPING:
        return f"transformers has no {translated['model_type']} models"
    return None
