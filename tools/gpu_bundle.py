"""Fetch what a bare machine with a GPU lacks, as wheels that are carried there beside this tree.

    python3 tools/gpu_bundle.py [--python 3.12] [--folder build/wheels]

There are Python, torch, Triton and transformers with what they need themselves, and no network.
`make gpu` takes from the folder what is not installed there, and installs nothing.
"""

import argparse
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "build", "wheels")
# By whom each is needed. Those alone are fetched that are named: accelerate would bring torch.
NEEDED = {
    "accelerate": "the core, and transformers' device maps",
    "filelock": "the core: files that several processes change",
    "lazy_loader": "the core: imports at the first use",
    "platformdirs": "the core: the user's folders",
    "pluggy": "the core: plugins",
    "prompt_toolkit": "the core: chat in a terminal, with the next one",
    "wcwidth": "prompt_toolkit",
    "psutil": "the core, and accelerate",
    "pydantic": "the core: configs and requests, with the next three",
    "annotated-types": "pydantic",
    "pydantic-core": "pydantic",
    "typing-inspection": "pydantic",
}
# Of the core's dependencies, those that torch and transformers bring.
BROUGHT = (
    "huggingface_hub", "jinja2", "numpy", "packaging", "pyyaml", "rich", "safetensors", "torch",
    "transformers", "typer",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 60e6  # bytes: what may be carried, the tree included


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    parser.add_argument("--folder", default=FOLDER)
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    for file in os.listdir(options.folder):
        if file.endswith(".whl"):  # of another version
            os.remove(os.path.join(options.folder, file))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.python]
    for platform in PLATFORMS:
        pip += ["--platform", platform]
    pip += ["--dest", options.folder]
    # pydantic takes one version of pydantic-core alone, which pip finds with its needs.
    together = ["pydantic", "annotated-types", "pydantic-core", "typing-inspection"]
    alone = [name for name in NEEDED if name not in together]
    for command in ([*pip, *together], [*pip, "--no-deps", *alone]):
        if subprocess.call(command):
            print("error: pip could not fetch %s" % command[-1], file=sys.stderr)
            return 1
    wheels = sorted(file for file in os.listdir(options.folder) if file.endswith(".whl"))
    for file in wheels:
        name = file.split("-")[0].replace("_", "-")
        needed = NEEDED.get(name) or NEEDED.get(name.replace("-", "_")) or "one of these"
        print("%8.0f kB  %s: %s" % (size(options.folder, file) / 1e3, file, needed))
    carried = sum(size(options.folder, file) for file in wheels)
    tree = sum(size(ROOT, file) for file in tracked())
    print("%.1f MB of wheels and %.1f MB of files here" % (carried / 1e6, tree / 1e6))
    if carried + tree > LIMIT:
        print("error: that is more than %.0f MB" % (LIMIT / 1e6), file=sys.stderr)
        return 1
    return 0


def tracked():
    """List the files that git would carry: tracked, or neither tracked nor ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT).decode().split("\0")
    return [file for file in listed if file and os.path.isfile(os.path.join(ROOT, file))]


def size(folder, file):
    return os.path.getsize(os.path.join(folder, file))


if __name__ == "__main__":
    sys.exit(main())
