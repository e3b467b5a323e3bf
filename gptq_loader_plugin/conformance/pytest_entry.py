"""Give pytest the suite's options, and only where the suite is run.

pytest reads the options of a `conftest.py` only from folders named on its command line, not from
packages named with `--pyargs`; and an option that stood in every run of an environment could be
some other project's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

SUITE = "gptq_loader_plugin.conformance"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: Sequence[str]) -> None:
    """Add the suite's options where a package or path on the command line is the suite."""
    if any(SUITE in argument.replace(os.sep, ".") for argument in args):
        early_config.pluginmanager.import_plugin(f"{SUITE}.options")
