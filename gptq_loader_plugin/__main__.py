"""Run the command with python -m gptq_loader_plugin."""

from __future__ import annotations

from gptq_loader_plugin.cli import main

main()
