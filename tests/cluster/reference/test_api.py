"""The reference of Python names: all can be imported, and they take what it says."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.reference.api import PUBLIC, api_reference, public_definitions
from cluster.reference.docstrings import docstring_markdown
from cluster.reference.sources import Definition, Module

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("model", "memory_server", "trainer", "cluster")
NAMES = {f"{module}.{each.name}": each for module, found in public_definitions() for each in found}


def imported_in(document: Path) -> set[str]:
    """The project's names that a document's blocks of Python import."""
    text = document.read_text(encoding="utf-8")
    found = set()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.split(".")[0] in PACKAGES:
                found |= {f"{module}.{each.name}" for each in node.names}
    return found


def test_what_the_documents_import_is_told() -> None:
    imported = {name for document in DOCUMENTS for name in imported_in(document)}
    assert "memory_server.local.LocalMemory" in imported
    assert sorted(imported - set(NAMES)) == []


@pytest.mark.parametrize("module", [module for module, _ in PUBLIC])
def test_what_is_told_can_be_imported_and_takes_these_arguments(module: str) -> None:
    real = importlib.import_module(module)
    for name, definition in NAMES.items():
        if name.rpartition(".")[0] == module:
            same_arguments(getattr(real, definition.name), definition)
            for method in definition.methods:
                owner, attribute = method.name.split(".")
                held = inspect.getattr_static(getattr(real, owner), attribute)
                same_arguments(getattr(held, "__func__", held), method)


def same_arguments(real: Any, told: Definition) -> None:
    """Compare a function's parameters with the ones in the text, which a parser reads anew."""
    if not inspect.isfunction(real):
        return
    node = ast.parse(f"{told.code}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    said = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    said += [each for each in (arguments.vararg, arguments.kwarg) if each]
    # What decorators make of a function is theirs.
    taken = inspect.signature(inspect.unwrap(real)).parameters
    assert {each.arg for each in said} == set(taken), told.name


def test_the_page_shows_classes_with_their_methods() -> None:
    page = api_reference()
    for text in (
        "### `memory_server.local.LocalMemory`\n\n```python\nclass LocalMemory:\n    def __init__(",
        "#### `LocalMemory.search`\n\n```python\ndef search(\n    self,\n    queries_BQ: Tensor,",
        "#### `Store.open`\n\n```python\n@classmethod\ndef open(\n    cls,",
        "- `StoreNotFound`: no store at `path`. StoreDamaged: names the damaged file.",
        "### `model.PlugLMForMaskedLM`",
    ):
        assert text in page


SOURCE = '''"""A module."""

import functools
from told.other import Far as Near, _hidden
from collections.abc import Callable

Map = Callable[[int], "str"]
"""From numbers to words."""
_private = 1


def plain(a: int, /, b: str = "ö: x", *rest: int, c: bool = False) -> "dict[str, int]": return {}


@functools.cache
def noted(
    a: int,
    # A comment is for those who read the code.
    b: int = 2,
) -> int:
    # So is this.
    return a


class Thing(Exception):
    """A thing."""

    size: int = 1
    _secret: int = 2

    def __init__(self, size: int) -> None:
        """Make it.

        Args:
            size: in metres.
        """

    @property
    def width(self) -> int: ...

    @width.setter
    def width(self, value: int) -> None: ...

    def _inner(self) -> None: ...

    def __len__(self) -> int: ...

    def __call__(self) -> None: ...
'''


@pytest.fixture
def told(tmp_path: Path) -> Module:
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "__init__.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "told" / "other.py").write_text('class Far:\n    """Far away."""\n')
    return Module("told", tmp_path)


def test_signatures_are_as_they_are_written(told: Module) -> None:
    assert told.public_names == ("Map", "plain", "noted", "Thing")
    alias = told.definition("Map")
    assert (alias.code, alias.docstring) == (
        'Map = Callable[[int], "str"]',
        "From numbers to words.",
    )
    assert told.definition("plain").code == (
        'def plain(a: int, /, b: str = "ö: x", *rest: int, c: bool = False) -> "dict[str, int]"'
    )
    assert told.definition("noted").code == (
        "@functools.cache\ndef noted(\n    a: int,\n    b: int = 2,\n) -> int"
    )
    thing = told.definition("Thing")
    assert thing.code == (
        "class Thing(Exception):\n    size: int = 1\n    def __init__(self, size: int) -> None"
    )
    assert thing.docstring == "A thing.\n\nMake it.\n\nArgs:\n    size: in metres."
    assert [method.name for method in thing.methods] == ["Thing.width", "Thing.__call__"]
    assert thing.methods[0].code == "@property\ndef width(self) -> int"


def test_a_name_that_is_handed_on_is_told_as_it_is_where_it_comes_from(told: Module) -> None:
    assert told.definition("Near").docstring == "Far away."
    with pytest.raises(ValueError, match="told has no Fra"):
        told.definition("Fra")
    with pytest.raises(ValueError, match="no such module"):
        Module("told.elsewhere", ROOT)


def test_a_docstrings_sections_become_lists() -> None:
    docstring = """Find *all* [a](b).

        Args:
            a, b: numbers,
                two of them.
            *rest: more, 1 <= n.

        Returns:
            Their sum; `a*b`
            is another thing.

        Raises:
            ValueError: bad.
            KeyError, OSError: worse. TypeError: worst.

        Not a section.
    """
    assert docstring_markdown(docstring) == (
        "Find \\*all\\* [a\\](b).\n\n"
        "Args:\n\n- `a`, `b`: numbers, two of them.\n- `*rest`: more, 1 <= n.\n\n"
        "Returns: Their sum; `a*b`\nis another thing.\n\n"
        "Raises:\n\n- `ValueError`: bad.\n- `KeyError`, `OSError`: worse. TypeError: worst.\n\n"
        "Not a section."
    )
