"""What a module's source defines: signatures as they are written, with their docstrings.

Sources are read, not imported: nothing heavy is loaded, and a signature is told in the words of the
code, which no version of Python rewrites.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import dedent

_ROOT = Path(__file__).resolve().parents[2]
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_DECORATED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One name of a module.

    Attributes:
        name: as the module has it; a method's with its class: `Store.open`.
        code: the signature; of a class its fields and its constructor; of an alias the whole line.
        docstring: of a class its own, and then its constructor's; empty where there is none.
        methods: of a class, the public ones that it defines itself.
    """

    name: str
    code: str
    docstring: str
    methods: tuple[Definition, ...] = ()


class Module:
    """A module's source."""

    def __init__(self, name: str, root: Path = _ROOT) -> None:
        """Read it.

        Raises:
            ValueError: there is no such module below `root`.
        """
        self.name, self._root = name, root
        base = root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                self._text = path.read_text(encoding="utf-8")
                break
        else:
            raise ValueError(f"{name}: there is no such module below {root}")
        # As the parser counts lines; str.splitlines also ends them at form feeds and the like.
        self._lines = self._text.split("\n")
        self._tree = ast.parse(self._text)

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self._tree) or ""

    @cached_property
    def public_names(self) -> tuple[str, ...]:
        """What `__all__` lists; without one, what the module itself defines under public names."""
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and _target(node) == "__all__":
                return tuple(ast.literal_eval(node.value))
        names = (_name(node) for node in self._tree.body)
        return tuple(name for name in names if name and not name.startswith("_"))

    def definition(self, name: str) -> Definition:
        """A name's definition, also where the module only hands it on from another one.

        Raises:
            ValueError: the module has no such name.
        """
        for place, node in enumerate(self._tree.body):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for imported in node.names:
                    if (imported.asname or imported.name) == name:
                        return Module(node.module, self._root).definition(imported.name)
            elif _name(node) == name:
                if isinstance(node, ast.ClassDef):
                    return self._class(node)
                if isinstance(node, _Function):
                    return self._function(node)
                return Definition(
                    name=name,
                    code=self._cut(node.lineno, node.end_lineno or node.lineno),
                    docstring=_text_of(self._tree.body[place + 1 : place + 2]),
                )
        raise ValueError(f"{self.name} has no {name}")

    def _class(self, node: ast.ClassDef) -> Definition:
        fields = [
            self._cut(item.lineno, item.end_lineno or item.lineno)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and _is_field(item)
        ]
        functions = [item for item in node.body if isinstance(item, _Function)]
        made = [self._function(item) for item in functions if item.name == "__init__"]
        inside = [*fields, *(item.code for item in made)]
        indented = "\n".join(f"    {line}" for text in inside for line in text.splitlines())
        code = f"{self._head(node)}:\n{indented}" if inside else self._head(node)
        docstrings = [ast.get_docstring(node) or "", *(item.docstring for item in made)]
        return Definition(
            name=node.name,
            code=code,
            docstring="\n\n".join(text for text in docstrings if text),
            methods=tuple(
                self._function(item, inside=node.name)
                for item in functions
                if _is_public(item.name) and not _sets(item)
            ),
        )

    def _function(self, node: _Function, inside: str | None = None) -> Definition:
        return Definition(
            name=node.name if inside is None else f"{inside}.{node.name}",
            code=self._head(node),
            docstring=ast.get_docstring(node) or "",
        )

    def _head(self, node: _Function | ast.ClassDef) -> str:
        """Decorators and signature, up to the colon before the body."""
        first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
        body = node.body[0]
        decorators = body.decorator_list if isinstance(body, _DECORATED) else []
        last = min([body.lineno, *(item.lineno for item in decorators)])
        # `def epoch(self) -> int: ...` has its body on the line of the signature.
        before = self._lines[last - 1].encode()[: body.col_offset].decode()
        lines = [*self._lines[first - 1 : last - 1], before]
        kept = [line for line in lines if not line.lstrip().startswith("#")]
        return dedent("\n".join(kept)).rstrip().removesuffix(":")

    def _cut(self, first: int, last: int) -> str:
        return dedent("\n".join(self._lines[first - 1 : last]))


def _target(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target: ast.expr = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def _name(node: ast.stmt) -> str | None:
    """What a statement defines: a class, a function, or a name for a value."""
    if isinstance(node, _DECORATED):
        return node.name
    return _target(node)


def _text_of(following: Sequence[ast.stmt]) -> str:
    """The string behind an alias, which tells what it is."""
    for node in following:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    return ""


def _is_field(node: ast.AnnAssign) -> bool:
    name = _target(node)
    return bool(name) and not str(name).startswith("_") and "ClassVar" not in ast.dump(node)


def _is_public(method: str) -> bool:
    # What can be called is called; the other names with underscores are the language's own.
    return method == "__call__" or not method.startswith("_")


def _sets(node: _Function) -> bool:
    """Whether it is a property's setter, which has the property's name."""
    return any(
        isinstance(each, ast.Attribute) and each.attr == "setter" for each in node.decorator_list
    )
