"""The command: gptq-loader inspect | explain | chat | generate | quantize | ...

Results go to stdout and words to stderr. Exit codes: 0 done; 1 one of our errors, as `error:` and
`hint:`; 2 usage; 130 on Ctrl-C.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command; Ctrl-C is heard from the first import on."""
    try:
        from gptq_loader_plugin.cli.app import run

        run()
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("\nstopped\n")
        sys.exit(130)
