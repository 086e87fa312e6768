"""The references are as the program has them, and no document names what the program lacks."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.cli.command import Command
from cluster.cli.registry import COMMANDS, find_command, is_only_a_group
from cluster.config import PretrainConfig
from cluster.finetune import FinetuneConfig
from cluster.reference.__main__ import PAGES, main
from cluster.reference.commands import commands_reference
from cluster.reference.configuration import configuration_reference, sections_of

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SECTION = re.MULTILINE | re.DOTALL
GENERAL = {"-h", "--help", "--version", "--traceback"}


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_the_program_says(name: str) -> None:
    committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert committed == PAGES[name](), "run `make docs` and commit what it writes"


def test_a_page_that_differs_is_named_and_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--to", str(tmp_path)]) == 0
    assert main(["--to", str(tmp_path), "--check"]) == 0
    page = tmp_path / "commands.md"
    page.write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert main(["--to", str(tmp_path), "--check"]) == 1
    assert "commands.md" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "old"
    assert main(["--to", str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8") == PAGES["commands.md"]()


def commands_in(text: str) -> Iterator[str]:
    """Command lines that begin with `pluglm`, in blocks of code and between backquotes."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if re.match(r"\s*pluglm (?!=)", line):
                yield line.strip()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (found for found in re.findall(r"`(pluglm [^`]+)`", outside))


def words_of(line: str) -> list[str]:
    """The words of the one `pluglm` command; what a shell makes of the rest is left out."""
    try:
        words = shlex.split(line.replace("\n", " "), comments=True)
    except ValueError:  # prose with an apostrophe, such as the output of a command
        words = line.split()
    for end, word in enumerate(words):
        if word in ("|", "&&", ";", ">", "&", "...", "\u2026") or word.endswith(";"):
            return words[1:end]
    return words[1:]


def wrong_with(line: str) -> str | None:
    words = words_of(line)
    if (
        not words
        or words[0] in GENERAL
        or words[0].isupper()
        or (is_only_a_group(words[0]) and len(words) == 1)
    ):
        return None
    # `pluglm memory add|remove` stands for both; `pluglm convert COMMAND` for any.
    choices = words[1].split("|") if len(words) > 1 else [""]
    for choice in choices:
        asked = [words[0], *([choice] if choice else []), *words[2:]]
        if is_only_a_group(asked[0]) and (asked[1].isupper() or asked[1] in GENERAL):
            continue
        try:
            command, rest = find_command(asked)
        except ValueError as error:
            return str(error)
        known = set(command.parser()._option_string_actions) | GENERAL
        for word in rest:
            option = word.partition("=")[0].strip("[]")
            if re.match(r"--?[a-z]", option) and not set(option.split("|")) <= known:
                return f"{command.name} has no {option}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_is_one_of_the_programs(document: Path) -> None:
    lines = list(commands_in(document.read_text(encoding="utf-8")))
    wrong = {line: said for line in lines if (said := wrong_with(line))}
    assert not wrong


def test_the_check_finds_what_is_wrong() -> None:
    text = (
        "`pluglm memory ad x`\n"
        "```\npluglm pretrain C --resum\npluglm doctor | x --y\npluglm evaluate R -k 3 -q\n```\n"
    )
    in_block, piped, short, in_line = (wrong_with(line) for line in commands_in(text))
    assert short == "evaluate has no -q"
    assert in_block == "pretrain has no --resum"
    assert piped is None
    assert in_line is not None
    assert "no such command" in in_line


def test_the_pages_are_the_same_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    page = commands_reference()
    for columns in ("30", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert commands_reference() == page


def test_every_argument_of_every_command_is_told_with_its_default() -> None:
    sections = dict(
        re.findall(r"^## pluglm (.+?)\n(.*?)(?=^## |\Z)", commands_reference(), SECTION)
    )
    assert list(sections) == [command.name for command in COMMANDS]
    for command in COMMANDS:
        section = sections[command.name]
        assert command.example.strip() in section
        assert "%(" not in section
        for option in command.parser()._option_string_actions:
            if option not in GENERAL:
                assert f"`{option}" in section or f", {option}" in section, (command.name, option)
    assert "(default: 128)" in sections["corpus build"]


def test_a_command_shows_what_it_needs_and_all_its_spellings() -> None:
    def configure(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("words", nargs="+", metavar="A|B", help="100%% *read*")
        parser.add_argument("--out", required=True, metavar="DIR", help="there")
        one = parser.add_mutually_exclusive_group(required=True)
        one.add_argument("--yes", action="store_true", help="do")
        one.add_argument("--no", action="store_true", help="do not")
        how = parser.add_argument_group("how it is done")
        how.add_argument("-k", "--keep", choices=("a", "b"), default="a", help="(%(default)s)")
        parser.add_argument("--secret", help=argparse.SUPPRESS)

    page = commands_reference(
        [
            Command(
                name="try",
                summary="a trial",
                description="It tries:\n  one   thing\n\nUse `a *b*` or *c*.",
                example="pluglm try x --out y --yes",
                configure=configure,
                run=lambda options: 0,
            )
        ]
    )
    assert "pluglm try A|B ... --out DIR (--yes | --no) [options]\n" in page
    assert r"| `A\|B ...` | 100% \*read\* |" in page
    assert "| `--out DIR` | there (needed) |" in page
    assert (
        "How it is done:\n\n| argument | meaning |\n|---|---|\n| `-k, --keep {a,b}` | (a) |" in page
    )
    assert "```\nIt tries:\n  one   thing\n```\n\nUse `a *b*` or \\*c\\*." in page
    assert "secret" not in page


def test_every_key_of_every_configuration_is_told() -> None:
    page = configuration_reference()
    for kind in (PretrainConfig, FinetuneConfig, AdaptationConfig, InTaskConfig):
        for name, section in sections_of(kind).items():
            tables = re.findall(rf"^### `\[{name}\]` of .*?\n(.*?)(?=^##|\Z)", page, SECTION)
            told = [set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) for table in tables]
            assert {item.name for item in fields(section)} in told, name


def test_a_key_has_its_type_range_and_default() -> None:
    rows = configuration_reference().splitlines()
    starts = (
        "| `mask_probability` | a number, above 0 and below 1 | `0.15` | ",
        '| `query_norm` | `batch`, `layer`, `none` | `"layer"` | ',
        "| `corpus` | a string | must be given | ",
        "| `phase_steps` | a list of whole numbers, such as [0, 1, 2], each at least 1, may be",
        "| `seeds` | a list of one or more whole numbers, such as [0, 1, 2], each from 0 to 4294",
    )
    for start in starts:
        assert any(row.startswith(start) for row in rows), start


@pytest.mark.parametrize("name", PAGES)
def test_links_within_a_page_lead_somewhere(name: str) -> None:
    page = PAGES[name]()
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings]
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert links
    assert set(links) <= set(anchors)
