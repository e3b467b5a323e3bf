"""The native library's own threads: OpenMP's numbers to the bit, and no waiting for who is away."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import run_process
from test_native_step import build, by_steps, install
from waiting import eventually

from gptq_loader_kernels.cpu.library import find_library, load_library
from gptq_loader_kernels.cpu.linear import NativeLinear
from gptq_loader_plugin.conformance.layers import Case, make_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="the native library was not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at threads as Linux shows them"),
]

# Whoever gets the signal stays in its handler until it is let go, as if the system had put the
# thread aside.
HOLD = r"""
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
static volatile int held, go;
static void hold(int number) {
  __atomic_add_fetch(&held, 1, __ATOMIC_SEQ_CST);
  while (!go) usleep(1000);
}
void prepare(void) { go = 0; signal(SIGUSR2, hold); }
int stop(int thread) { return syscall(SYS_tgkill, getpid(), thread, SIGUSR2); }
int count(void) { return held; }
void let_go(void) { go = 1; }
"""


@pytest.fixture
def own() -> Iterator[Callable[[int], None]]:
    """Choose whose threads share the work: 1 the library's own, 0 OpenMP's."""
    library, threads = load_library(), torch.get_num_threads()
    before = library.gptq_own_threads(-1)
    yield library.gptq_own_threads
    library.gptq_own_threads(before)
    torch.set_num_threads(threads)


def alone(call: Callable[[], Any]) -> Any:
    """Call it on a thread that has no team yet, and takes it along when it ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def layer(columns: int = 200, **fields: Any) -> NativeLinear:
    _, packed, _ = make_layer(Case(rows=256, columns=columns, **fields))
    return NativeLinear(packed, in_features=256, out_features=columns)


def threads_here() -> set[int]:
    return {int(it.name) for it in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bits", [3, 4])
def test_rows_are_openmps(bits: int, rows: int, threads: int, own: Callable[[int], None]) -> None:
    linear = layer(bits=bits, act_order=True)
    torch.manual_seed(0)
    x = torch.randn(rows, 256)
    torch.set_num_threads(threads)
    outcome = []
    for kind in (0, 1):
        own(kind)
        outcome.append(linear(x))
    assert torch.equal(*outcome)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "olmo2", "qwen2_moe"])
def test_replies_are_openmps(family: str, dtype: torch.dtype, own: Callable[[int], None]) -> None:
    """A prompt, by panels where this processor has them, and steps of one token and of three."""
    model = build(family, dtype=dtype)
    install(model)
    ids = torch.randint(0, 300, (1, 56))
    torch.set_num_threads(3)
    outcome = []
    for kind in (0, 1):
        own(kind)
        outcome.append(by_steps(model, ids, 50, (1, 3, 1, 1)))
    assert torch.equal(*outcome)


def test_there_are_torchs_threads(own: Callable[[int], None]) -> None:
    """The caller and one less, whatever was before."""
    linear, x = layer(), torch.randn(1, 256)
    own(1)

    def count() -> list[int]:
        found = []
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            before = threads_here()
            linear(x)
            found.append(len(threads_here() - before))
        return found

    assert alone(count) == [0, 2, 1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_nobody_waits_for_a_thread_that_is_put_aside(
    tmp_path: Path, own: Callable[[int], None]
) -> None:
    path = tmp_path / "hold.so"
    run_process(
        ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", path], input=HOLD, check=True
    )
    hold = ctypes.CDLL(str(path))
    linear, x = layer(columns=1024), torch.randn(1, 256)
    torch.set_num_threads(3)
    own(1)

    def call() -> bool:
        before = threads_here()
        right = linear(x)
        team = threads_here() - before
        assert len(team) == 2
        hold.prepare()
        for thread in team:
            assert hold.stop(thread) == 0
        eventually(lambda: hold.count() == 2, awaited="both threads to be put aside")
        try:  # which never ends where it waits for them
            return torch.equal(linear(x), right)
        finally:
            hold.let_go()

    assert alone(call)


def test_a_forked_child_has_a_team_of_its_own(own: Callable[[int], None]) -> None:
    linear, x = layer(), torch.randn(1, 256)
    torch.set_num_threads(3)
    own(1)
    right = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), right) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(linear(x), right)


def test_the_environment_chooses(tmp_path: Path) -> None:
    code = (
        "from gptq_loader_kernels.cpu.library import load_library as it\n"
        "print(it().gptq_own_threads(-1))"
    )
    for kind, answer in (("own", "1"), ("openmp", "0"), ("", "0")):
        environment = {**os.environ, "GPTQ_LOADER_THREADS": kind}
        done = run_process([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
        assert done.stdout.strip() == answer
    environment = {**os.environ, "GPTQ_LOADER_THREADS": "many"}
    done = run_process([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    assert "GPTQ_LOADER_THREADS is 'many'" in done.stderr
