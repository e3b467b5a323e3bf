"""Count identifiers that are this project's own words for what the field calls otherwise.

    python3 tools/words.py [--where]

Identifiers of the packages are counted wherever they stand, and those of kernels/csrc; comments,
docstrings and texts are not, nor are names that other libraries give. ARCHITECTURE.md explains
the few words that are ours.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "gptq_loader_plugin",
    "kernels/gptq_loader_kernels",
    "extensions/gptq_loader_extensions",
)
# A part of an identifier (`told` of `was_told`), in Python
PARTS = """told tell tells asked said given found most least seen aside wanted likeliest hollow
survey shelf roomy""".split()
# Whole identifiers, in Python
WHOLE = """put drop take read_part never_ids hidden_ids KeptCache RoomyLayer Hollow narrow_head
shorten Survey Shelf in_words as_words Asked Said moment Moment drawn Drawing steady TWO_BYTES
ONE_BYTE given""".split()
# Whole identifiers, in C++
NATIVE = """most least seen look see weigh Desk Room Sight Near near gather_near gather gather_row
TWO_BYTES ONE_BYTE BLOCK found told asked given taken""".split()
NATIVE_IN = {"decode_attention.h": ["weight"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--where", action="store_true", help="list the files, the most first")
    arguments = parser.parse_args()
    words, files = Counter(), Counter()
    sources = [it for folder in PACKAGES for it in sorted((ROOT / folder).rglob("*.py"))]
    ours = set().union(*(defined(it) for it in sources))
    for path in sources:
        for name in names(path):
            word = own_word(name) if name in ours else None
            if word:
                words[word] += 1
                files[path] += 1
    for path in sorted((ROOT / "kernels" / "csrc").iterdir()):
        counted = native_names(path)
        for word in NATIVE + NATIVE_IN.get(path.name, []):
            if counted[word]:
                words[word + " (C++)"] += counted[word]
                files[path] += counted[word]
    for word, count in words.most_common():
        print("%6d  %s" % (count, word))
    print("%6d  in all" % sum(words.values()))
    if arguments.where:
        for path, count in files.most_common():
            print("%6d  %s" % (count, path.relative_to(ROOT)))
    return 0


def own_word(name):
    """Find the word of the list that an identifier is, or holds."""
    if name in WHOLE:
        return name
    name = re.sub(r"not_?found", "", name, flags=re.IGNORECASE)  # as in FileNotFoundError
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    return next((it for it in PARTS if it in parts), None)


def defined(path):
    """Name all that a file defines: functions, classes, arguments, variables, attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def names(path):
    """List the names in a file, each as often as it stands there."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [it.string for it in tokens if it.type == tokenize.NAME]


def native_names(path):
    """Count the identifiers of a C++ file, comments and texts left out."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', " ", text, flags=re.DOTALL)
    return Counter(re.findall(r"[A-Za-z_]\w*", text))


if __name__ == "__main__":
    sys.exit(main())
