"""The references are as the program has them, and no document names what the program lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.registry import find_command, is_only_a_group
from cluster.reference.__main__ import PAGES, main

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
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
            if re.match(r"--[a-z]", option) and not set(option.split("|")) <= known:
                return f"{command.name} has no {option}"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_is_one_of_the_programs(document: Path) -> None:
    lines = list(commands_in(document.read_text(encoding="utf-8")))
    wrong = {line: said for line in lines if (said := wrong_with(line))}
    assert not wrong


def test_the_check_finds_what_is_wrong() -> None:
    text = "`pluglm memory ad x`\n```\npluglm pretrain C --resum\npluglm doctor | x --y\n```\n"
    in_block, piped, in_line = (wrong_with(line) for line in commands_in(text))
    assert in_block == "pretrain has no --resum"
    assert piped is None
    assert in_line is not None
    assert "no such command" in in_line
