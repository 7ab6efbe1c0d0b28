"""`: Any` on the public signatures of a package: `python -m tests.any_count [FOLDER]` lists them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def loose(folder: Path) -> Iterator[str]:
    """`file:line function parameter` for every parameter and return of a public function that is `Any` alone, or one of
    several with `Any`; names with a leading underscore are not public, nor is what lies in them."""
    for path in sorted(folder.rglob("*.py")):
        for function in _public(ast.parse(path.read_text(encoding="utf-8")).body):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            places = [(each.arg, each.annotation) for each in named if each is not None]
            for name, annotation in [*places, ("return", function.returns)]:
                if annotation is not None and _is_any(annotation):
                    yield f"{path.relative_to(folder)}:{function.lineno} {function.name} {name}"


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node.body)
        # Of the names with two underscores those that are called are public; others are Python's or pydantic's.
        called = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in ("__init__", "__call__")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (called or not node.name.startswith("_")):
            yield node


def _is_any(annotation: ast.expr) -> bool:
    """`Any`, `Any | None`, `list[Any]`, `Sequence[Any]`, `tuple[Any, ...]`; not the values of a mapping, which are
    plain data."""
    if isinstance(annotation, ast.Name):
        return annotation.id == "Any"
    if isinstance(annotation, ast.BinOp):
        return _is_any(annotation.left) or _is_any(annotation.right)
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") not in ("dict", "Mapping"):
        inside = annotation.slice
        return any(_is_any(each) for each in (inside.elts if isinstance(inside, ast.Tuple) else [inside]))
    return False


if __name__ == "__main__":
    found = list(loose(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "opd"))
    print("\n".join([*found, f"{len(found)} in all"]))
