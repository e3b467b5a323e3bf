"""Set up .venv for a make target, once; say what is going on; fail in one line with the next step.

    python3 tools/set_up.py demo|page|test|check|cross|docs
    python3 tools/set_up.py hosts [NAME...]

"demo" is what an answer in the terminal takes, "page" what the chat page takes beside it.

"hosts" sets up .venv as "test" does, and then the environments of tests/hosts/environments.toml in
.venvs, all or those named.

Needs nothing but Python and, the first time, a package index. What a target needs is in
pyproject.toml; a stamp of it in .venv makes a second run take no time. The syntax here is old
enough for an old Python to get as far as being told that it is.
"""

import hashlib
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
HOSTS = os.path.join(ROOT, ".venvs")
ENVIRONMENTS = os.path.join(ROOT, "tests", "hosts", "environments.toml")
SOURCES = os.path.join(ROOT, "kernels", "csrc")
LOG = os.path.join(VENV, "set_up.log")
OLDEST = (3, 11)
# Alone and first: resolved together with the rest, another torch may come with gigabytes of CUDA.
TORCH = "torch==2.13.0"
# Files that are no Python of today's are passed over.
COMPILE = (
    "import compileall, sysconfig; "
    "compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
)
EXTRAS = {
    "demo": "demo",
    "page": "demo,gradio,server",
    "test": "demo,gradio,server",
    "check": "demo,gradio,server",
    "cross": "demo,gradio,server",
}
GROUPS = {
    "demo": (),
    "page": (),
    "test": ("test",),
    "check": ("test", "lint"),
    "cross": ("test", "cross"),
    "docs": ("docs",),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(message, hint):
    say("error: " + message + "\nhint: " + hint)
    sys.exit(1)


def main():
    target = sys.argv[1] if len(sys.argv) > 1 else "demo"
    if sys.version_info < OLDEST:
        newer = find_newer()
        if newer:
            os.execv(newer, [newer] + sys.argv)
        fail(
            "Python %d.%d is too old; %d.%d or newer is needed" % (sys.version_info[:2] + OLDEST),
            "install Python %d.%d, then: make %s PYTHON=python%d.%d"
            % (OLDEST + (target,) + OLDEST),
        )
    if target != "hosts":
        set_up(target, VENV, plan)
        return
    set_up("test", VENV, plan)
    for name, environment in environments(sys.argv[2:]):
        if os.environ.get("GPTQ_HOST_PYTHON_" + name.upper().replace("-", "_")):
            continue  # the tests take that one
        needed = environment.get("needs")
        if needed and not os.environ.get(needed):
            say("%s: left out, as %s is not set" % (name, needed))
            continue
        set_up(
            "hosts",
            os.path.join(HOSTS, name),
            lambda _: plan_host(name, environment),
            repr(environment),
        )


def set_up(target, venv, plan, more=""):
    """Do what `plan` lists, unless `venv` has a stamp that says it is done."""
    stamp = os.path.join(venv, ".set-up-" + target)
    wanted = fingerprint(target + more)
    if os.path.exists(stamp) and read(stamp) == wanted.encode():
        return
    began = time.time()
    steps = plan(target)
    for number, (words, command) in enumerate(steps, 1):
        say("[%d/%d] %s" % (number, len(steps), words))
        run(command, target)
    with open(stamp, "w") as file:
        file.write(wanted)
    say("set up in %.0f s" % (time.time() - began))


def environments(names):
    """List the hosts' environments, all or those named."""
    import tomllib

    with open(ENVIRONMENTS, "rb") as file:
        known = tomllib.load(file)
    for name in names:
        if name not in known:
            fail("there is no host environment %s" % name, "name some of: %s" % ", ".join(known))
    return [(name, known[name]) for name in names or known]


def plan_host(name, environment):
    """List (words, command) for the environment of one host."""
    venv = os.path.join(HOSTS, name)
    python = python_in(venv)
    steps = []
    if not os.path.exists(python):
        steps.append(("creating .venvs/" + name, [sys.executable, "-m", "venv", venv]))
    steps.append((name + ": installing torch", pip_install(python, TORCH)))
    package = () if environment.get("alone") else ("-e", ".")
    rest = uv_install(python, TORCH, *package, *environment["requirements"])
    steps.append((name + ": installing the rest", rest))
    if "without_dependencies" in environment:
        alone = uv_install(
            python, "--no-deps", "--no-build-isolation", *environment["without_dependencies"]
        )
        steps.append((name + ": installing what names another torch", alone))
    if "remove" in environment:
        remove = [python, "-m", "pip", "uninstall", "--yes", *environment["remove"]]
        steps.append((name + ": removing what is built for another torch", remove))
    return steps


def pip_install(python, *requirements):
    """Have pip install into the environment of a Python; it compiles nothing that is not used."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    return [*pip, *requirements]


def uv_install(python, *requirements):
    """Have uv, which pip has installed into .venv, install for a Python: some ten times faster."""
    uv = os.path.join(os.path.dirname(python_in(VENV)), "uv.exe" if os.name == "nt" else "uv")
    return [uv, "pip", "install", "--native-tls", "--python", python, *requirements]


def python_in(venv):
    """Name the Python of a virtual environment."""
    return os.path.join(venv, "Scripts" if os.name == "nt" else "bin", "python")


def find_newer():
    """Find a newer Python beside this one."""
    import shutil

    for minor in (14, 13, 12, 11):
        found = shutil.which("python3.%d" % minor)
        if found:
            return found
    return None


def fingerprint(target):
    """Sum up all that the set-up of `target` depends on."""
    content = b"".join(
        read(os.path.join(ROOT, *path))
        for path in (
            ("pyproject.toml",),
            ("setup.py",),
            *(("kernels", "csrc", it) for it in sorted(os.listdir(SOURCES))),
            ("tools", "set_up.py"),
        )
    )
    return hashlib.sha256(content + target.encode() + sys.version.encode()).hexdigest()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def plan(target):
    """List (words, command) for what is to be done."""
    import tomllib

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        groups = tomllib.load(file)["dependency-groups"]
    python = python_in(VENV)
    more = [it for group in GROUPS[target] for it in groups[group]]
    steps = []
    if not os.path.exists(python):
        steps.append(("creating .venv", [sys.executable, "-m", "venv", VENV]))
    by_uv = "installing uv, which installs the rest", pip_install(python, "uv")
    if target not in EXTRAS:  # docs: pages are made from the source, which is not installed
        return [*steps, by_uv, ("installing what makes the pages", uv_install(python, *more))]
    package = "-e", ".[%s]" % EXTRAS[target]
    words = "installing torch, the largest part, about 200 MB or more"
    steps.append((words, pip_install(python, TORCH)))
    steps.append(by_uv)
    words = "installing gptq-loader-plugin and what it needs"
    steps.append((words, uv_install(python, TORCH, *package, *more)))
    if target in ("test", "check"):  # their programs begin some hundred times
        steps.append(("compiling what was installed", [python, "-c", COMPILE]))
    return steps


def run(command, target):
    """Run one step: its output to the terminal where there is one, and to a log otherwise."""
    by_uv = os.path.basename(command[0]).startswith("uv")
    code, output = call(command, uv_settings(command[5]) if by_uv else {})
    if code and by_uv:  # as behind a proxy that only pip knows
        say("uv could not install it; pip tries")
        code, output = call(pip_install(*command[5:]), {})
    if code == 0:
        return
    again = "then run it again: make " + ("demo" if target == "page" else target)
    if "No space left" in output or "Errno 28" in output:
        fail("the disk is full", "free 3 GB, " + again)
    if "ensurepip" in output or command[1:3] == ["-m", "venv"]:
        fail(
            "this Python cannot make virtual environments",
            "install its venv module (on Debian and Ubuntu: apt install python3-venv), " + again,
        )
    lines = [line for line in output.splitlines() if line.startswith("ERROR")]
    fail(
        "pip could not install what is needed" + (": " + lines[-1][7:] if lines else ""),
        "check the network and the package index, %s (all of pip's words: %s)"
        % (again, os.path.relpath(LOG, ROOT)),
    )


def uv_settings(python):
    """Return, as uv's environment, where pip is configured to look for packages."""
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True
    ).stdout
    names = {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS"}
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = names.get(key.rpartition(".")[2])
        if name and name not in os.environ:
            found[name] = value.strip("'\"")
    return found


def call(command, environment):
    """Run a command; return its exit code, and its output where no terminal has shown it."""
    settings = {"cwd": ROOT, "env": {**os.environ, **environment}}
    try:
        if sys.stderr.isatty() and "pip" in command:
            return subprocess.call(command, stdout=sys.stderr, **settings), ""
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings
        )
    except FileNotFoundError as error:
        return 1, "ERROR: %s" % error
    if os.path.isdir(VENV):
        with open(LOG, "a") as log:
            log.write(done.stdout)
    return done.returncode, done.stdout


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on")
        sys.exit(130)
    except OSError as error:
        fail(str(error), "check free disk space and the permissions of this folder")
