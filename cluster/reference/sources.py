"""Public names as their source declares them. Nothing is imported, so nothing heavy is loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.reference.public import PublicModule

Function = ast.FunctionDef | ast.AsyncFunctionDef
Statement = ast.ClassDef | Function | ast.Assign | ast.AnnAssign


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A public name: where one imports it from, its statement, and the docstring below an alias."""

    module: str
    name: str
    statement: Statement
    alias_doc: str = ""

    @property
    def doc(self) -> str:
        """Its docstring; empty where there is none."""
        if isinstance(self.statement, ast.Assign | ast.AnnAssign):
            return self.alias_doc
        return ast.get_docstring(self.statement) or ""


def declared(root: Path, module: PublicModule) -> Iterator[Declared]:
    """The public names of a module, in the order of its source, or as they are listed.

    Args:
        root: the directory that holds the packages.

    Raises:
        ValueError: a listed name is not declared, or not documented.
    """
    tree = _tree(root, module.name)
    exported = module.names or _exported(tree)
    names = exported or tuple(name for name in _defined(tree) if not name.startswith("_"))
    for name in names:
        yield _find(root, module.name, name, shown_in=module.name)


def module_doc(root: Path, module: str) -> str:
    """The docstring of a module."""
    return ast.get_docstring(_tree(root, module)) or ""


def _find(root: Path, module: str, name: str, *, shown_in: str) -> Declared:
    tree = _tree(root, module)
    found = _defined(tree).get(name)
    if found is not None:
        made = Declared(module=shown_in, name=name, statement=found[0], alias_doc=found[1])
        if not made.doc:
            raise ValueError(f"{module}.{name} is public and has no docstring: write one")
        return made
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find(root, statement.module, alias.name, shown_in=shown_in)
    raise ValueError(f"{module} declares no {name}: correct cluster/reference/public.py")


def _tree(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _exported(tree: ast.Module) -> tuple[str, ...]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return tuple(ast.literal_eval(statement.value))
    return ()


def _defined(tree: ast.Module) -> dict[str, tuple[Statement, str]]:
    """Name to statement, and to the string below it: how an alias is documented."""
    found: dict[str, tuple[Statement, str]] = {}
    for statement, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[statement.name] = (statement, "")
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name):
                found[target.id] = (statement, _string(below))
    return found


def _string(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return value if isinstance(value, str) else ""
    return ""
