"""Count the rooms of each package, the imports between them, and those that run in circles.

    python3 tools/structure.py [--arrows] [FOLDER...]

A room is a module or a folder directly inside a package; an arrow is one room importing another,
whether at the top of a file, inside a function or for types alone. A circle is a set of files
that import each other. Arrows "up" are those that must be turned round before the rooms can
stand in one order, each importing only from those before it. FOLDER is a package, or one of its
folders; without it, every package and each of its folders.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "kernels", ROOT / "extensions")
PACKAGES = (
    ROOT / "gptq_loader_plugin",
    ROOT / "kernels" / "gptq_loader_kernels",
    ROOT / "extensions" / "gptq_loader_extensions",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--arrows", action="store_true", help="list the arrows that run up")
    arguments = parser.parse_args()
    files = {name: path for package in PACKAGES for name, path in modules(package).items()}
    imports = {name: imported(path, name, files) for name, path in files.items()}
    folders = [it.resolve() for it in arguments.folders] or all_folders()
    print("%-52s %6s %7s %4s" % ("folder", "rooms", "arrows", "up"))
    for folder in folders:
        rooms, arrows = rooms_of(folder, files, imports)
        up = arrows_up(rooms, arrows)
        name = str(folder.relative_to(ROOT))
        print("%-52s %6d %7d %4d" % (name, len(rooms), len(arrows), len(up)))
        if arguments.arrows:
            for one, other in up:
                print("    up: %s -> %s" % (one, other))
    circles = [it for it in components(sorted(imports), imports) if len(it) > 1]
    print("\n%d circles of files that import each other" % len(circles))
    for circle in circles:
        print("  " + ", ".join(sorted(circle)))
    return 0


def all_folders():
    """List the packages, and each folder of theirs that holds more than one room."""
    found = []
    for package in PACKAGES:
        found.append(package)
        found += sorted(it.parent for it in package.rglob("*/__init__.py"))
    return [it for it in found if len(list(it.glob("*.py"))) > 2 or any(it.glob("*/__init__.py"))]


def modules(package):
    """Name every module of a package: {dotted name: file}."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path, name, files):
    """Name the modules of this tree that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(it.name for it in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for it in node.names:
                inner = "%s.%s" % (node.module, it.name)
                found.add(inner if inner in files else node.module)
    return {it for it in found if it in files and it != name}


def rooms_of(folder, files, imports):
    """List a folder's rooms and the arrows between them; its own __init__ is none."""
    prefix = next(
        ".".join(folder.relative_to(source).parts)
        for source in reversed(SOURCES)
        if folder.is_relative_to(source)
    )

    def room(name):
        inner = name[len(prefix) + 1 :] if name.startswith(prefix + ".") else ""
        return inner.partition(".")[0]

    rooms = sorted({room(it) for it in files} - {"", "__main__"})
    arrows = {
        (room(name), room(other))
        for name, others in imports.items()
        for other in others
        if room(name) in rooms and room(other) in rooms and room(name) != room(other)
    }
    return rooms, sorted(arrows)


def components(nodes, edges):
    """Find the strongly connected components (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(stack[at:])
            del stack[at:]

    sys.setrecursionlimit(10_000)
    for node in nodes:
        if node not in index:
            visit(node)
    return found


def arrows_up(rooms, arrows):
    """List arrows that must be turned round for an order to exist (Eades, Lin and Smyth 1993)."""
    left, first, last = set(rooms), [], []
    out = {it: {b for a, b in arrows if a == it} for it in rooms}
    into = {it: {a for a, b in arrows if b == it} for it in rooms}
    while left:
        sinks = sorted(it for it in left if not out[it] & left)
        sources = sorted(it for it in left if not into[it] & left)
        if sinks:
            last.insert(0, sinks[0])
            left.remove(sinks[0])
        elif sources:
            first.append(sources[0])
            left.remove(sources[0])
        else:
            most = max(sorted(left), key=lambda it: len(out[it] & left) - len(into[it] & left))
            first.append(most)
            left.remove(most)
    place = {room: at for at, room in enumerate(first + last)}
    return [(a, b) for a, b in arrows if place[a] > place[b]]


if __name__ == "__main__":
    sys.exit(main())
