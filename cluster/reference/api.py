"""docs/reference/api.md: what other programs may import, with signatures and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.reference.docstrings import rendered
from cluster.reference.markdown import block, code, link, page, paragraphs, prose, table
from cluster.reference.public import PUBLIC, PublicModule
from cluster.reference.signatures import class_signature, decorators, function_signature
from cluster.reference.sources import Declared, Function, declared, module_doc

_INTRODUCTION = """\
# Python interface

What other programs may import, package by package: each name with the module that one imports it
from. Names that are not here may move without a word; changes of those that are stand in
[CHANGELOG.md](../../CHANGELOG.md). [ecosystem.md](../ecosystem.md) shows the model in the tools of
the field, [memory.md](../memory.md) how a memory is edited from Python. Letters at the end of a
name are its shape: [CONTRIBUTING.md](../../CONTRIBUTING.md#letters-in-names)."""

Methods = Mapping[str, str]


def api_page(root: Path) -> str:
    """The page as Markdown.

    Args:
        root: the directory that holds the packages' sources.

    Raises:
        ValueError: a public name is not there, or has no docstring.
    """
    modules = {module: list(declared(root, module)) for each in PUBLIC.values() for module in each}
    protocol = _documented_methods(modules)
    lines = [_INTRODUCTION, ""]
    for package, each in PUBLIC.items():
        lines += [f"* {link(code(package), package)}: {prose(module_doc(root, package))}"]
        for module in each:
            names = ", ".join(_linked(found) for found in modules[module])
            lines += [f"  * {link(code(module.name), f'from {module.name}')}: {names}"]
    for package, each in PUBLIC.items():
        lines += ["", f"## {package}"]
        for module in each:
            lines += ["", f"### from {module.name}", "", *_module(root, module, modules[module])]
            for found in modules[module]:
                if not _is_row(found):
                    lines += ["", f"#### {_heading(found)}", "", *_declared(found, protocol)]
    return page(lines)


def _heading(found: Declared) -> str:
    # The kind, too: a function `figures` and a class `Figures` would be one place to GitHub.
    kind = "class " if isinstance(found.statement, ast.ClassDef) else ""
    return f"{kind}{found.module}.{found.name}"


def _linked(found: Declared) -> str:
    if _is_row(found):
        return code(found.name)
    return link(code(found.name), _heading(found))


def _module(root: Path, module: PublicModule, names: Sequence[Declared]) -> Iterator[str]:
    yield from paragraphs(module_doc(root, module.name))
    rows = [found for found in names if _is_row(found)]
    if rows:
        yield ""
        yield from table(
            ["error", "a kind of", "meaning"],
            [(code(found.name), _bases(found), prose(found.doc)) for found in rows],
        )


def _is_row(found: Declared) -> bool:
    """Whether a table says all of it: an error that is nothing but a name and a docstring."""
    statement = found.statement
    return isinstance(statement, ast.ClassDef) and bool(statement.bases) and len(
        statement.body
    ) == 1  # fmt: skip


def _bases(found: Declared) -> str:
    assert isinstance(found.statement, ast.ClassDef)
    return ", ".join(code(ast.unparse(base)) for base in found.statement.bases)


def _declared(found: Declared, protocol: Methods) -> Iterator[str]:
    statement = found.statement
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        yield from block(ast.unparse(statement), "python")
        yield ""
        yield from paragraphs(found.doc)
    elif isinstance(statement, ast.ClassDef):
        yield from _class(found, statement, protocol)
    else:
        yield from block(function_signature(statement), "python")
        yield ""
        yield from rendered(found.doc)


def _class(found: Declared, statement: ast.ClassDef, protocol: Methods) -> Iterator[str]:
    yield from block(class_signature(statement), "python")
    bases = [ast.unparse(base) for base in statement.bases]
    if bases and bases != ["Protocol"]:
        yield from ["", f"A {' and a '.join(map(code, bases))}."]
    yield ""
    yield from rendered(found.doc)
    for item in statement.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            if item.name == "__init__" and ast.get_docstring(item):
                yield ""
                yield from rendered(ast.get_docstring(item) or "")
            elif not item.name.startswith("_") and _is_told(item, protocol):
                yield from ["", *_method(found.name, item, protocol)]


def _is_told(item: Function, protocol: Methods) -> bool:
    """Whether something is said of it: hooks that only transformers calls have no docstring."""
    return bool(ast.get_docstring(item)) or item.name in protocol


def _method(owner: str, item: Function, protocol: Methods) -> Iterator[str]:
    kinds = decorators(item)
    if "property" in kinds:
        kind = f": {ast.unparse(item.returns)}" if item.returns else ""
        yield from block(f"{owner}.{item.name}{kind}", "python")
    else:
        mark = ["@classmethod"] if "classmethod" in kinds else []
        mark = ["@staticmethod"] if "staticmethod" in kinds else mark
        yield from block("\n".join([*mark, function_signature(item)]), "python")
    doc = ast.get_docstring(item)
    yield ""
    if doc:
        yield from rendered(doc)
    else:
        yield f"As {link(code(f'Memory.{item.name}'), protocol[item.name])} says."


def _documented_methods(modules: Mapping[PublicModule, Sequence[Declared]]) -> Methods:
    """The methods of the protocol that the memories implement, and where they are told of."""
    found = {}
    for each in (each for names in modules.values() for each in names):
        if each.name == "Memory" and isinstance(each.statement, ast.ClassDef):
            for item in each.statement.body:
                if isinstance(item, ast.FunctionDef):
                    found[item.name] = _heading(each)
    return found
