"""Build wheels for other platforms here, look into them, and run their libraries where that works.

    .venv/bin/python tools/cross.py [TARGET...]

A target is a name of setup.py's TARGETS, for which zig's clang compiles (PyPI: ziglang); else those
of README's platforms that this machine is not. Each is compiled with every warning an error, and its
wheel built. Then its library's answers are held against vectors of the reference kernel
(tools/write_vectors.py) by tests/native/vectors.cpp, under qemu for Linux on ARM and under Wine for
Windows; nothing here runs a Mac's programs, which are compiled alone. Wheels and programs stay in
build/cross.
"""

import ast
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

from check_native import ROOT, WARNINGS, arguments

BUILT = os.path.join(ROOT, "build", "cross")
PROGRAM = os.path.join(ROOT, "tests", "native", "vectors.cpp")
SYSROOT = "/usr/aarch64-linux-gnu"  # Debian's libc6-arm64-cross
# Without products of bytes, with them, and with those of small matrices.
PROCESSORS = ("cortex-a53", "neoverse-n1", "max")
ZIG = [sys.executable, "-m", "ziglang", "c++"]
NAMES = ("aarch64-linux", "x86_64-windows", "aarch64-macos", "x86_64-macos")
# The first bytes of a library, the file's bytes that name its processor, and what it may not need:
# a runtime that another machine may lack, or torch has one of already.
KINDS = {
    "aarch64-linux": (b"\x7fELF", slice(18, 20), b"\xb7\x00"),
    "x86_64-linux": (b"\x7fELF", slice(18, 20), b"\x3e\x00"),
    "x86_64-windows": (b"MZ", None, b""),
    "aarch64-macos": (b"\xcf\xfa\xed\xfe", slice(4, 8), b"\x0c\x00\x00\x01"),
    "x86_64-macos": (b"\xcf\xfa\xed\xfe", slice(4, 8), b"\x07\x00\x00\x01"),
}
RUNTIMES = (b"libgomp", b"libomp", b"libiomp", b"libstdc++.so", b"libc++.1", b"libgcc_s", b"MSVCP")


def main():
    names = sys.argv[1:] or NAMES
    targets = read_targets()
    for name in names:
        if name not in targets:
            sys.exit(
                "error: there is no target %s\nhint: name some of %s" % (name, " ".join(targets))
            )
    os.makedirs(BUILT, exist_ok=True)
    vectors = os.path.join(BUILT, "vectors.bin")
    write = [sys.executable, os.path.join(ROOT, "tools", "write_vectors.py"), vectors]
    subprocess.run(write, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    unsuccessful = [name for name in names if not check(name, *targets[name], vectors)]
    if unsuccessful:
        sys.exit("error: wrong for " + ", ".join(unsuccessful))


def read_targets():
    with open(os.path.join(ROOT, "setup.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "TARGETS"
    )


def check(name, target, platform, vectors):
    """Build and try one target; True where nothing is wrong."""
    began = time.time()
    folder = os.path.join(BUILT, name)
    os.makedirs(folder, exist_ok=True)
    wrong = compile_program(target, folder)
    if not wrong:
        wheel = build_wheel(name, folder)
        wrong = look_into(wheel, name, platform) if wheel else "its wheel was not built"
    words = wrong or "nothing runs its programs here: compiled alone"
    if not wrong and not name.endswith("macos"):
        wrong, words = run(name, folder, vectors)
    print("%s: %s, %.0f s" % (name, words.strip(), time.time() - began), flush=True)
    return not wrong


def compile_program(target, folder):
    """Compile and link the program that loads the library: the words of what is wrong."""
    made = program_of(folder, "windows" in target)
    flags = [flag for flag in arguments() if flag != "-fopenmp"] + WARNINGS
    more = ["-ldl"] if "linux" in target else []
    command = [*ZIG, "-target", target, "-O3", "-s", *flags, PROGRAM, "-o", made, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def program_of(folder, windows):
    return os.path.join(folder, "vectors" + (".exe" if windows else ""))


def build_wheel(name, folder):
    """Build a wheel where no other build's files lie: its path, or None."""
    for old in glob.glob(os.path.join(folder, "*.whl")):
        os.remove(old)
    shutil.rmtree(os.path.join(folder, "base"), ignore_errors=True)
    for part in ("base", "info"):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        os.path.join(folder, "info"),
    ]
    command += ["build", "--build-base", os.path.join(folder, "base")]
    command += ["bdist_wheel", "--dist-dir", folder]
    environment = {**os.environ, "GPTQ_LOADER_TARGET": name, "PYTHONWARNINGS": "ignore"}
    environment["CXXFLAGS"] = " ".join(WARNINGS)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
        return None
    return glob.glob(os.path.join(folder, "*.whl"))[0]


def look_into(wheel, name, platform):
    """Take the library out of a wheel: the words of what is wrong with either."""
    if not wheel.endswith("-py3-none-%s.whl" % platform):
        return "its wheel is named " + os.path.basename(wheel)
    with zipfile.ZipFile(wheel) as files:
        held = [it for it in files.namelist() if it.endswith((".so", ".dll", ".dylib", ".pdb"))]
        if held != [library_in(name)]:
            return "its wheel holds the libraries %s" % held
        content = files.read(held[0])
        if ("gptq_loader_kernels/cpu/library.py") not in files.namelist():
            return "its wheel lacks the package"
    magic, where, processor = KINDS[name]
    if not content.startswith(magic) or (where and content[where] != processor):
        return "its library is for another platform"
    needed = [it.decode() for it in RUNTIMES if it in content]
    if needed:
        return "its library needs " + ", ".join(needed)
    with open(os.path.join(os.path.dirname(wheel), os.path.basename(held[0])), "wb") as file:
        file.write(content)
    return ""


def library_in(name):
    return "gptq_loader_kernels/cpu/_gptq_cpu" + (".dll" if name.endswith("windows") else ".so")


def run(name, folder, vectors):
    """Run the program with the wheel's library: what is wrong, and what to print."""
    windows = name.endswith("windows")
    library = os.path.join(folder, os.path.basename(library_in(name)))
    command = [program_of(folder, windows), library, vectors]
    by_each = [command]
    if windows:
        wine = shutil.which("wine64") or shutil.which("wine")
        if wine is None and os.path.exists("/usr/lib/wine/wine64"):
            wine = "/usr/lib/wine/wine64"  # where Debian has it, without the package wine
        if wine is None:
            return "", "compiled and linked; to run it: apt install wine64"
        by_each = [[wine, *command]]
    elif name == "aarch64-linux":
        qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
        if qemu is None or not os.path.isdir(SYSROOT):
            return "", "compiled and linked; to run it: apt install qemu-user libc6-arm64-cross"
        by_each = [[qemu, "-L", SYSROOT, "-cpu", cpu, *command] for cpu in PROCESSORS]
    # Wine's folder has a link to /, which whatever walks through build/ would follow.
    words = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as prefix:
        environment = {**os.environ, "WINEPREFIX": prefix, "WINEDEBUG": "-all"}
        for command in by_each:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            words.append(done.stdout.strip() or done.stderr[-2000:])
            if done.returncode:
                return words[-1] + done.stderr[-2000:], words[-1]
    return "", "; ".join(words)


if __name__ == "__main__":
    main()
