"""docs/adapt.md: its commands parse, and what it says of settings is so."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.adaptation import in_task_settings, settings
from cluster.cli.registry import find_command

PAGE = (Path(__file__).parents[2] / "docs" / "adapt.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of every `pluglm` line in a code block."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("pluglm ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_parses(words: list[str]) -> None:
    command, rest = find_command(words)
    command.parser().parse_intermixed_args(rest)


def test_the_page_shows_every_command_of_the_group() -> None:
    shown = {find_command(words)[0].name for words in commands()}
    assert {"adapt", "adapt compare", "adapt baseline", "in-task"} <= shown


@pytest.mark.parametrize(
    ("section", "conditions"),
    [
        (settings.CompareSettings, settings.CONDITIONS),
        (in_task_settings.InTaskSettings, in_task_settings.CONDITIONS),
    ],
)
def test_every_setting_and_condition_is_told(section: type, conditions: dict[str, str]) -> None:
    names = [*(item.name for item in fields(section)), *conditions]
    assert [name for name in names if f"`{name}`" not in PAGE] == []
