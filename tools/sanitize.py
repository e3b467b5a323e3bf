"""Run the native library's tests by sanitizers: of memory and undefined behaviour, and of threads.

    python3 tools/sanitize.py [memory] [threads]

memory: the library, built with gcc's AddressSanitizer and UndefinedBehaviorSanitizer, beneath the
tests of kernels, steps, prompts, packing and heads.

threads: tests/native/threads.cpp, built with gcc's ThreadSanitizer, which sees vectors and memcpy
where clang 14's sees neither, on LLVM's OpenMP, whose tool "archer" tells the sanitizer of barriers;
gcc's own OpenMP tells it nothing, and every barrier would be a race.

Each is shown a mistake first, which it must find. Builds stay in build/native, until a source changes.
"""

import concurrent.futures
import glob
import hashlib
import os
import subprocess
import sys
import time

from check_native import BUILT, ROOT, SOURCES, arguments, find, read

TESTS = os.path.join(ROOT, "tests", "unit")
PROGRAMS = os.path.join(ROOT, "tests", "native")
PYTHON = os.path.join(ROOT, ".venv", "bin", "python")
# test_native_memory has a library of its own loaded before all others, as a sanitizer's must be.
NAMES = (
    "test_kernel_cpu test_native_pack test_native_step test_native_checks test_native_changes "
    "test_top_logits test_head test_autograd"
).split()
FOUND = 66  # ThreadSanitizer's exit code
# Mistakes of a caller, and what the sanitizers say of them: words too small for what is packed, and
# a width that cannot be.
MISTAKES = {"heap-buffer-overflow": (4, 8), "division by zero": (0, 2048)}
MISTAKE = """
import ctypes, numpy, sys
from gptq_loader_kernels.cpu.library import load_library
bits, size = map(int, sys.argv[1:])
rows, words = numpy.arange(256, dtype=numpy.int32), numpy.zeros(size, dtype=numpy.int32)
qweight = numpy.zeros((32, 64), dtype=numpy.int32)
places = [it.ctypes.data for it in (qweight, rows, words)]
load_library().gptq_pack(bits, 0, *places[:2], 256, 32, 64, places[2], 1)
"""


def main():
    names = sys.argv[1:] or ["memory", "threads"]
    if not set(names) <= {"memory", "threads"}:
        sys.exit(__doc__)
    if find("g++") is None:
        sys.exit("error: there is no gcc\nhint: apt install g++")
    for name in names:
        began = time.time()
        {"memory": check_memory, "threads": check_threads}[name]()
        print("%s: nothing found in %.0f s" % (name, time.time() - began), flush=True)


def check_memory():
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folder = build("memory", ["-fno-omit-frame-pointer", *flags], library_sources())
    library = os.path.join(folder, "_gptq_cpu.so")
    link([*objects(folder), "-shared", "-fopenmp", *flags], library)
    first = [ask_compiler("libasan.so"), ask_compiler("libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "GPTQ_LOADER_LIBRARY": library,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python keeps what it has
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    for words, numbers in MISTAKES.items():
        command = [PYTHON, "-c", MISTAKE, *map(str, numbers)]
        shown = run(command, environment, capture_output=True, text=True)
        if words not in shown.stderr:
            sys.exit("error: it did not find a %s:\n%s" % (words, shown.stderr[-2000:]))
    tests = [os.path.join(TESTS, name + ".py") for name in NAMES]
    for path in tests:
        if not os.path.exists(path):
            sys.exit("error: there is no " + os.path.relpath(path, ROOT))
    if run([PYTHON, "-m", "pytest", "-q", "-n", "2", *tests], environment).returncode:
        sys.exit(1)


def check_threads():
    archer = sorted(glob.glob("/usr/lib/llvm-*/lib/libarcher.so"))
    if not archer:
        sys.exit("error: there is no LLVM OpenMP with archer\nhint: apt install libomp-14-dev")
    folder = os.path.dirname(archer[-1])
    flags = ["-fsanitize=thread"]
    openmp = ["-L" + folder, "-Wl,-rpath," + folder, "-lomp"]
    environment = {
        **os.environ,
        "OMP_TOOL_LIBRARIES": archer[-1],
        "TSAN_OPTIONS": "exitcode=%d suppressions=%s"
        % (FOUND, os.path.join(PROGRAMS, "openmp.supp")),
    }
    built = build("races", flags, [os.path.join(PROGRAMS, "races.cpp")])
    races = os.path.join(built, "races")
    link([*objects(built), *flags, *openmp], races)
    for kind, code in (("none", 0), ("number", FOUND), ("vector", FOUND), ("copy", FOUND)):
        shown = run([races, kind], environment, capture_output=True)
        if shown.returncode != code:
            sys.exit("error: a race, %s, was %s" % (kind, "made up" if code == 0 else "not seen"))
    sources = [*library_sources(), os.path.join(PROGRAMS, "threads.cpp")]
    built = build("threads", flags, sources)
    program = os.path.join(built, "threads")
    link([*objects(built), *flags, *openmp], program)
    shown = run([program], environment, capture_output=True, text=True)
    print(shown.stdout, end="")
    if shown.returncode:  # else archer has but told that it would rather see nothing but our code
        sys.exit(shown.stderr)


def library_sources():
    return sorted(glob.glob(os.path.join(SOURCES, "*.cpp")))


def build(name, flags, sources):
    """Compile sources, those that changed since; the folder of their objects."""
    folder = os.path.join(BUILT, name)
    os.makedirs(folder, exist_ok=True)
    command = [find("g++"), *arguments(), "-O1", "-g", *flags]
    headers = b"".join(map(read, sorted(glob.glob(os.path.join(SOURCES, "*.h")))))
    wanted = {os.path.join(folder, os.path.basename(it) + ".o"): it for it in sources}
    for made in set(objects(folder)) - set(wanted):
        os.remove(made)

    def compile_one(made):
        source = wanted[made]
        content = headers + read(source) + repr(command).encode()
        fingerprint = hashlib.sha256(content).hexdigest().encode()
        if os.path.exists(made) and os.path.exists(made + ".of"):
            if read(made + ".of") == fingerprint:
                return 0
        code = subprocess.call([*command, "-c", source, "-o", made])
        if code == 0:
            with open(made + ".of", "wb") as file:
                file.write(fingerprint)
        return code

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(list(pool.map(compile_one, wanted))):
            sys.exit("error: the library was not compiled")
    return folder


def objects(folder):
    return sorted(glob.glob(os.path.join(folder, "*.o")))


def link(what, made):
    if subprocess.call([find("g++"), *what, "-o", made]):
        sys.exit("error: %s was not linked" % made)


def ask_compiler(library):
    """Find a library of the compiler's own."""
    command = [find("g++"), "-print-file-name=" + library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(command, environment, **how):
    return subprocess.run(command, cwd=ROOT, env=environment, **how)


if __name__ == "__main__":
    main()
