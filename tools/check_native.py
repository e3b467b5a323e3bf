"""Compile the native library with every warning an error, by each compiler that is installed.

    python3 tools/check_native.py

What is compiled is thrown away but for its names: code behind a C interface must not throw, so no
object may call the allocating `new` or one of the standard library's ways to throw. Takes seconds,
and no time where nothing changed since (build/native holds what was checked).
"""

import ast
import concurrent.futures
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = os.path.join(ROOT, "kernels", "csrc")
TESTS = os.path.join(ROOT, "tests", "native")
BUILT = os.path.join(ROOT, "build", "native")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# gcc finds some only where it optimises; clang's come from reading alone, where nothing is linked.
COMPILERS = {"g++": ["-O2"], "clang++": ["-O1"]}
THROWS = re.compile(r"\b(_Zn[wa]\w*|_ZSt\d+__throw\w*|__cxa_throw\w*|__cxa_allocate_exception)\b")


def main():
    folders = (SOURCES, TESTS)
    sources = [it for folder in folders for it in sorted(glob.glob(os.path.join(folder, "*.cpp")))]
    failed = False
    for name, how in COMPILERS.items():
        compiler = find(name)
        if compiler is None:
            print("%s is not installed: its warnings are left out" % name)
            continue
        failed |= not check(name, [compiler, *arguments(), *how, *WARNINGS], sources)
    return 1 if failed else 0


def find(name):
    """Find a compiler by its name, or by that of its newest version."""
    numbered = [
        path
        for folder in os.get_exec_path()
        for path in glob.glob(os.path.join(folder, name + "-[0-9]*"))
        if path.rpartition("-")[2].isdigit()
    ]
    newest = max(numbered, key=lambda path: int(path.rpartition("-")[2]), default=None)
    return shutil.which(name) or newest


def arguments():
    """Take from setup.py what the library is compiled with, but for how well and what for."""
    with open(os.path.join(ROOT, "setup.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    flags = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ARGUMENTS"
    )
    threads = ["-Wno-unknown-pragmas"] if sys.platform == "darwin" else ["-fopenmp"]
    return [flag for flag in flags if not flag.startswith(("-O", "-g"))] + ["-fPIC", *threads]


def check(name, command, sources):
    """Compile every source; True where none has a warning and none of the library's can throw."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    content = version + repr(command).encode() + read(os.path.abspath(__file__))
    for inside in (SOURCES, TESTS):
        content += b"".join(map(read, sorted(glob.glob(os.path.join(inside, "*")))))
    fingerprint = hashlib.sha256(content).hexdigest()
    folder = os.path.join(BUILT, name)
    os.makedirs(folder, exist_ok=True)
    stamp = os.path.join(folder, "checked")
    if os.path.exists(stamp) and read(stamp).decode() == fingerprint:
        print("%s: nothing changed since it had no warning" % name)
        return True
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(lambda source: compile_one(command, source, folder), sources))
    wrong = "".join(answers)
    print(wrong or "%s: no warning in %d files" % (name, len(sources)))
    if not wrong:
        with open(stamp, "w", encoding="utf-8") as file:
            file.write(fingerprint)
    return not wrong


def compile_one(command, source, folder):
    """Compile a source: what is wrong with it, or nothing."""
    name = os.path.basename(source)
    made = os.path.join(folder, name + ".o")
    done = subprocess.run([*command, "-c", source, "-o", made], capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    if not source.startswith(SOURCES):
        return ""
    names = subprocess.run(["nm", "-u", made], capture_output=True, text=True, check=True).stdout
    found = sorted(set(THROWS.findall(names)))
    return "%s: it may throw, by %s\n" % (name, ", ".join(found)) if found else ""


def read(path):
    with open(path, "rb") as file:
        return file.read()


if __name__ == "__main__":
    sys.exit(main())
