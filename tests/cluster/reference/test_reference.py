"""docs/reference is what the code says, and all of it."""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.cli.command import Command
from cluster.cli.registry import COMMANDS
from cluster.config import PretrainConfig
from cluster.reference.__main__ import main
from cluster.reference.docstrings import items, rendered, sections
from cluster.reference.markdown import anchor, code, prose, table
from cluster.reference.pages import FOLDER, pages
from cluster.reference.public import PUBLIC
from cluster.reference.signatures import class_signature, function_signature
from trainer.finetune.settings import FinetuneSettings

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return pages(ROOT)


def committed(name: str) -> str:
    return (ROOT / FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "api.md"])
def test_what_is_committed_is_what_the_code_says(made: dict[Path, str], name: str) -> None:
    assert committed(name) == made[FOLDER / name], "run `make docs`"


def test_there_are_no_other_pages(made: dict[Path, str]) -> None:
    assert {path.relative_to(ROOT) for path in (ROOT / FOLDER).iterdir()} == set(made)


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneSettings, AdaptationConfig, InTaskConfig])
def test_every_key_of_every_file_is_told_with_its_default(kind: type[Any]) -> None:
    lines = committed("configuration.md").splitlines()
    hints = get_type_hints(kind)
    for section in fields(kind):
        for item in fields(hints[section.name]):
            rows = [line for line in lines if line.startswith(f"| `{item.name}` |")]
            assert rows, f"{section.name}.{item.name}"
            if item.default is MISSING:
                assert any("| required |" in row for row in rows)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_of_every_command_is_told(command: Command) -> None:
    page = committed("commands.md")
    part = page.split(f"\n## pluglm {command.name}\n")[1].split("\n## ")[0]
    for action in command.parser()._actions:
        assert action.help, f"pluglm {command.name}: {action.dest} has no help"
        if action.dest not in ("help", "traceback"):
            for flag in action.option_strings:
                assert re.search(rf"`{flag}[` ]", part), flag


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "api.md"])
def test_headings_differ_and_links_lead_to_them(name: str) -> None:
    page = re.sub(r"^```.*?^```", "", committed(name), flags=re.M | re.S)
    places = [anchor(heading) for heading in re.findall(r"^#+ (.*)$", page, re.M)]
    assert len(set(places)) == len(places)
    assert [to for to in re.findall(r"\]\(#([^)]*)\)", page) if to not in places] == []
    for to in re.findall(r"\]\(([^#)]+)[^)]*\)", page):
        if not to.startswith("http"):
            assert (ROOT / FOLDER / to).exists(), to


def test_what_the_documents_import_is_public() -> None:
    public = {module.name for each in PUBLIC.values() for module in each}
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    imported = []
    for document in documents:
        blocks = re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)
        for statement in (each for block in blocks for each in ast.walk(ast.parse(block))):
            if isinstance(statement, ast.ImportFrom) and statement.module:
                imported.append((document.name, statement.module))
    ours = [each for each in imported if each[1].split(".")[0] in PUBLIC]
    assert ours
    assert [each for each in ours if each[1] not in public] == []


def test_a_page_that_is_old_is_found_and_written_anew(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("configs", "model", "memory_server", "trainer", "cluster"):
        (tmp_path / name).symlink_to(ROOT / name)
    given = ["--root", str(tmp_path)]
    assert main([*given, "--check"]) == 1
    assert main(given) == 0
    assert main([*given, "--check"]) == 0
    page = tmp_path / FOLDER / "commands.md"
    page.write_text(page.read_text("utf-8").replace("a free one", "8080"), encoding="utf-8")
    capsys.readouterr()
    assert main([*given, "--check"]) == 1
    told = capsys.readouterr().err
    assert "commands.md is not what the code says" in told
    assert "8080" in told
    assert "api.md" not in told


def test_an_installed_package_says_that_there_is_nothing_to_write(
    tmp_path: Path, capsys: Capture
) -> None:
    assert main(["--root", str(tmp_path)]) == 2
    assert "has no docs/" in capsys.readouterr().err


DOCSTRING = """Find the best.

    A second paragraph about `scores_BK`.

    Args:
        scores: inner products,
            of float32.
        a, b: two more.

    Returns:
        The best.

    Raises:
        ValueError: it is bad; says why. KeyError, OSError: others.
    """


def test_a_docstring_is_taken_apart() -> None:
    assert [title for title, _ in sections(DOCSTRING)] == ["", "Args", "Returns", "Raises"]
    assert items(sections(DOCSTRING)[1][1]) == [
        ("scores", "inner products, of float32."),
        ("a, b", "two more."),
    ]
    lines = list(rendered(DOCSTRING))
    assert "* `ValueError`: it is bad; says why." in lines
    assert "* `KeyError, OSError`: others." in lines


def test_text_that_is_no_markup_stays_text() -> None:
    assert prose("a *b* and `a_*b*` <c> scores_BK") == r"a \*b\* and `a_*b*` \<c> scores_BK"
    assert code("a `b`") == "`` a `b` ``"
    assert table(["x"], [["a | b\nc"]])[-1] == r"| a \| b c |"


def test_signatures_are_those_of_the_source() -> None:
    source = "def f(self, a, /, b: int = 1, *c: str, d: 'list[int]', e=2, **g) -> None: ..."
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert (
        function_signature(function)
        == "def f(a, b: int = 1, *c: str, d: list[int], e=2, **g) -> None"
    )
    (kind,) = ast.parse("@dataclass\nclass A:\n    a: int\n    b: str = field(default='x')\n").body
    assert isinstance(kind, ast.ClassDef)
    assert class_signature(kind) == "class A(*, a: int, b: str = 'x')"
