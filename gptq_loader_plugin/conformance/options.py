"""The suite's own options: which kernel, on which device."""

from __future__ import annotations

import pytest

from gptq_loader_plugin.conformance.declined import ALLOW_NONE
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.plugins import Plugins


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --kernel, --device and --allow-none."""
    group = parser.getgroup("gptq_loader_plugin")
    group.addoption("--kernel", help="the kernel to test, by the name of its plugin's offer")
    group.addoption("--device", default=None, help="where to test it; the best one by default")
    group.addoption("--allow-none", action="store_true", help=ALLOW_NONE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `kernel` for the one named, or for all; `cell` for the cover."""
    if "kernel" in metafunc.fixturenames:
        kernels = {kernel.name: kernel for kernel in Plugins(installed=True).kernels()}
        named = metafunc.config.getoption("--kernel")
        if named is not None and named not in kernels:
            raise pytest.UsageError(
                f"no installed plugin offers a kernel named {named!r}; there is "
                f"{', '.join(kernels)}"
            )
        chosen = [kernels[named]] if named else list(kernels.values())
        metafunc.parametrize("kernel", chosen, ids=lambda kernel: kernel.name, scope="module")
    if "cell" in metafunc.fixturenames:
        from gptq_loader_plugin.conformance.cover import pairwise_cover
        from gptq_loader_plugin.conformance.grid import possible_layers

        metafunc.parametrize("cell", pairwise_cover(possible_layers()), ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """Where the kernel is tested."""
    return find_device(request.config.getoption("--device"))
