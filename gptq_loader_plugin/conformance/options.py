"""The suite's own options: which kernel, on which device."""

from __future__ import annotations

import pytest

from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.plugins import Plugins


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --kernel and --device."""
    group = parser.getgroup("gptq_loader_plugin")
    group.addoption("--kernel", help="the kernel to test, by the name of its plugin's offer")
    group.addoption("--device", default=None, help="where to test it; the best one by default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `kernel` for the one named, or for all that are installed."""
    if "kernel" not in metafunc.fixturenames:
        return
    kernels = {it.name: it for it in Plugins(installed=True).kernels()}
    named = metafunc.config.getoption("--kernel")
    if named is not None and named not in kernels:
        raise pytest.UsageError(
            f"no installed plugin offers a kernel named {named!r}; there is {', '.join(kernels)}"
        )
    chosen = [kernels[named]] if named else list(kernels.values())
    metafunc.parametrize("kernel", chosen, ids=lambda it: it.name)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """Where the kernel is tested."""
    return find_device(request.config.getoption("--device"))
