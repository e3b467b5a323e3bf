"""Check the wheel that is installed in this Python, as its user would meet it.

    python tools/check_wheel.py CHECKPOINT

It is imported, describes and plans the checkpoint by its command, and answers with it; its native
library is there and is what answers, but after `--plain`, where it must not be there. Run it with
another Python than .venv's, from any folder.

    python tools/check_wheel.py --library WHEEL

looks only for the native library in the file, and loads it: for a machine that has no torch.
"""

import ctypes
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARY = "gptq_loader_kernels/cpu/_gptq_cpu" + (".dll" if sys.platform == "win32" else ".so")


def main():
    if sys.argv[1] == "--library":
        check_library(sys.argv[2])
        return
    check_installed(os.path.abspath(sys.argv[-1]), native=sys.argv[1] != "--plain")


def check_library(wheel):
    """Take the native library out of a wheel and load it."""
    with tempfile.TemporaryDirectory() as folder:
        library = zipfile.ZipFile(wheel).extract(LIBRARY, folder)
        print("loaded", ctypes.CDLL(library))


def check_installed(checkpoint, native):
    """Use what is installed: import it, inspect, explain, generate."""
    import gptq_loader_plugin

    where = os.path.abspath(gptq_loader_plugin.__file__)
    assert not where.startswith(ROOT + os.sep), "this is the source, not a wheel: " + where
    inspected = json.loads(run("inspect", checkpoint, "--json"))
    assert inspected["bits"] == 4, inspected
    plan = json.loads(run("explain", checkpoint, "--device", "cpu", "--json"))
    kernels = {layer["kernel"] for layer in plan["layers"]}
    run("plugins")
    assert (kernels == {"cpu"}) == native, plan["layers"][0]
    if native:
        check_one_openmp()
    asked = ["--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "0", "--json"]
    reply = json.loads(run("generate", checkpoint, "--device", "cpu", *asked))
    assert reply["tokens"] > 0, reply
    print("%s: %s answers with %s" % (where, checkpoint, ", ".join(sorted(kernels))))


def check_one_openmp():
    """Fail where torch and the native library each bring threads, which wait for each other."""
    import torch

    from gptq_loader_kernels.cpu.library import load_library

    load_library()
    torch.ones(512, 512) @ torch.ones(512, 512)
    if not os.path.exists("/proc/self/maps"):
        return
    with open("/proc/self/maps") as file:
        loaded = {os.path.realpath(line.split()[-1]) for line in file if "omp" in line}
    assert len([name for name in loaded if "libgomp" in name or "libiomp" in name]) <= 1, loaded


def run(*arguments):
    """Run the command, its script beside this Python; give its stdout."""
    script = os.path.join(sysconfig.get_path("scripts"), "gptq-loader")
    done = subprocess.run([script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
