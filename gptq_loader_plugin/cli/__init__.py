"""The command: gptq-loader inspect | explain | chat | generate | quantize | ...

Results go to stdout and words to stderr. Exit codes: 0 done; 1 one of our errors, as `error:` and
`hint:`; 2 usage; 130 on Ctrl-C.
"""

from __future__ import annotations

try:
    from gptq_loader_plugin.cli.app import app, main
except KeyboardInterrupt:  # Ctrl-C at once: there is nothing to say yet
    raise SystemExit(130) from None

__all__ = ["app", "main"]
