"""Run the evaluation harness's own command, with the model type `gptq-loader` added to it."""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import sys

from gptq_loader_extensions.lm_eval import LMEvalHost
from gptq_loader_plugin.errors import GPTQLoaderError

__all__ = ["main"]


def main() -> None:
    """Run with the harness's arguments: `--model gptq-loader --model_args pretrained=REF ...`."""
    try:
        LMEvalHost().install()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except GPTQLoaderError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
