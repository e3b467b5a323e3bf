"""Collect the words of every error, messages and hints, from the source alone."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ErrorText", "collect", "own_names"]

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "gptq_loader_plugin",
    "kernels/gptq_loader_kernels",
    "extensions/gptq_loader_extensions",
)
BASE = "GPTQLoaderError"
VALUE = "{…}"  # stands for what is known when the error is raised
DEEPEST = 8  # steps from an expression to its text

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True, slots=True)
class ErrorText:
    """The words of one error.

    Attributes:
        messages: what it says is wrong; several where the source chooses between them.
        hints: what it says to do next.
        error: its class.
    """

    messages: tuple[str, ...]
    hints: tuple[str, ...]
    error: str

    def text(self) -> str:
        """Write it as it stands in tests/golden/messages.txt."""
        lines = [f"{self.error}: {message}" for message in self.messages]
        return "\n".join([*lines, *(f"  hint: {hint}" for hint in self.hints)])


def collect() -> list[ErrorText]:
    """Collect the words of every error that the packages make, each once, sorted."""
    modules = [Module(tree) for tree in trees()]
    errors = subclasses([module.tree for module in modules])
    constants = {name: node for module in modules for name, node in module.constants.items()}
    found = {text for module in modules for text in module.errors(errors, constants)}
    return sorted(found)


def own_names() -> set[str]:
    """List the names of our functions that no user types: those with an underscore inside."""
    return {
        node.name
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, Function) and "_" in node.name.strip("_")
    }


def trees() -> Iterator[ast.Module]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ast.parse(path.read_text(encoding="utf-8"))


def subclasses(modules: list[ast.Module]) -> set[str]:
    """List the names of the base of all errors and of its subclasses."""
    classes = [it for tree in modules for it in ast.walk(tree) if isinstance(it, ast.ClassDef)]
    found = {BASE}
    while more := {it.name for it in classes if found & set(map(name_of, it.bases))} - found:
        found |= more
    return found


def name_of(node: ast.expr) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


class Module:
    """The source of one module: its errors, and what their words are made of."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.constants = {
            name_of(target): node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
        }
        self.functions = {it.name: it for it in ast.walk(tree) if isinstance(it, Function)}
        self.calls = [it for it in ast.walk(tree) if isinstance(it, ast.Call)]
        # the function that each node stands in, the innermost one
        self.inside: dict[ast.AST, Function] = {}
        for function in self.functions.values():  # ast.walk comes to the inner ones later
            self.inside |= dict.fromkeys(ast.walk(function), function)

    def errors(self, names: set[str], constants: dict[str, ast.expr]) -> Iterator[ErrorText]:
        """Give the words of each error that is made here, but not of those that only hand on."""
        words = Words(self, constants)
        for call in self.calls:
            hint = next((it.value for it in call.keywords if it.arg == "hint"), None)
            if name_of(call.func) not in names or hint is None or not call.args:
                continue
            text = ErrorText(
                tuple(sorted(set(words.of(call.args[0])))),
                tuple(sorted(set(words.of(hint)))),
                name_of(call.func),
            )
            if {*text.messages, *text.hints} != {VALUE}:
                yield text


class Words:
    """Works out what texts an expression can give."""

    def __init__(self, module: Module, constants: dict[str, ast.expr]) -> None:
        self.module = module
        self.constants = constants | module.constants

    def of(self, node: ast.expr, depth: int = 0) -> list[str]:
        """List the texts that an expression can give; VALUE is what the source does not say."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self.joined(parts, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.joined([left, right], depth)
        choices = self.choices(node) if depth < DEEPEST else []
        return [text for choice in choices for text in self.of(choice, depth + 1)] or [VALUE]

    def joined(self, parts: list[ast.expr], depth: int) -> list[str]:
        return ["".join(texts) for texts in product(*(self.of(part, depth + 1) for part in parts))]

    def choices(self, node: ast.expr) -> list[ast.expr]:  # noqa: PLR0911 - one for each kind
        """List the expressions that one stands for."""
        match node:
            case ast.FormattedValue(value=ast.Name(id=name)) if name in self.constants:
                return [self.constants[name]]
            case ast.FormattedValue(value=ast.IfExp() as value):
                return [value]
            case ast.IfExp(body=body, orelse=other):
                return [body, other]
            case ast.BoolOp(values=values):
                return values
            case ast.Name(id=name):
                return self.values_of(name, node)
            case ast.Call(func=ast.Name(id=name)) if name in self.module.functions:
                returns = ast.walk(self.module.functions[name])
                return [it.value for it in returns if isinstance(it, ast.Return) and it.value]
            case _:
                return []

    def values_of(self, name: str, node: ast.expr) -> list[ast.expr]:
        """List what a name can stand for: in its function, else for its callers, else here."""
        function = self.module.inside.get(node)
        if function is not None:
            assigned = [
                it.value
                for it in ast.walk(function)
                if isinstance(it, ast.Assign) and name in map(name_of, it.targets)
            ]
            if assigned:
                return assigned
            arguments = function.args
            positions = [it.arg for it in (*arguments.posonlyargs, *arguments.args)]
            if name in positions or name in [it.arg for it in arguments.kwonlyargs]:
                return self.passed(function.name, name, positions)
        return [self.constants[name]] if name in self.constants else []

    def passed(self, function: str, name: str, positions: list[str]) -> list[ast.expr]:
        """List what callers in this module pass for an argument."""
        found = []
        for call in self.module.calls:
            if name_of(call.func) != function:
                continue
            named = {it.arg: it.value for it in call.keywords}
            ours = positions[1:] if positions[:1] == ["self"] else positions
            found += [value for arg, value in zip(ours, call.args, strict=False) if arg == name]
            found += [named[name]] if name in named else []
        return found
