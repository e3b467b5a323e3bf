"""The host "lm-eval": GPTQ checkpoints as a model type of EleutherAI's evaluation harness.

The harness loads no plugins, so ours must be imported before it runs: by this package's own
command, `gptq-loader-lm-eval`, which is the harness's with `--model gptq-loader` added, or by a
script that calls `install`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import OptionInvalid, PluginError
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import NotReady, check_package

if TYPE_CHECKING:
    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["LMEvalHost", "gptq_hosts"]


@dataclass(frozen=True, slots=True)
class LMEvalHost:
    """Register the model type `gptq-loader` with the harness, in this process."""

    name: str = "lm-eval"

    def install(self, **options: object) -> None:
        """Let `simple_evaluate(model="gptq-loader", model_args=...)` find it; may be called twice.

        Raises:
            OptionInvalid: there are no options.
            PluginError: the harness is not installed, or is too old.
        """
        if options:
            raise OptionInvalid(
                f"lm-eval takes no option {', '.join(sorted(options))} here",
                hint="pass options to the model: --model_args pretrained=REF,backend=cpu",
            )
        readiness = self.check()
        if isinstance(readiness, NotReady):
            raise PluginError(readiness.reason, hint=readiness.hint)
        # Its own types first: the harness imports them only while its registry is empty.
        import lm_eval.models  # noqa: F401 - importing it registers them

        import gptq_loader_extensions.lm_eval.model  # noqa: F401 - importing it registers the type

    def check(self) -> Readiness:
        """Look for the harness."""
        return check_package(
            "lm_eval", oldest="0.4.13", newest="0.4.13", install="pip install lm_eval"
        )


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer the harness."""
    return [LMEvalHost()]
