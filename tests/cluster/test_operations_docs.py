"""docs/operations.md: its commands parse, its settings exist, and its backup restores a store."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from cluster.cli.registry import find_command
from cluster.config import PretrainConfig
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of every `pluglm` line in a code block."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("pluglm ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_parses(words: list[str]) -> None:
    command, rest = find_command(words)
    command.parser().parse_intermixed_args(rest)


def test_commands_in_the_text_are_commands() -> None:
    named = re.findall(r"`pluglm ([a-z-]+(?: [a-z-]+)?)", PAGE.replace("\n", " "))
    assert len(named) >= 12
    for words in named:
        find_command(words.split())


def test_every_setting_that_is_named_is_one() -> None:
    sections = get_type_hints(PretrainConfig)
    known = {
        f"{item.name}.{setting.name}"
        for item in fields(PretrainConfig)
        for setting in fields(sections[item.name])
    }
    named = re.findall(r"`([a-z]+\.[a-z_]+)(?: = [^`]+)?`", PAGE)
    files = {name for name in named if name.endswith((".jsonl", ".txt", ".html", ".json"))}
    assert len(set(named) - files) >= 12
    assert sorted(set(named) - files - known) == []


def test_a_copy_without_servers_and_incoming_is_a_whole_store(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    """As the page copies it: it verifies, is edited, and a damaged file is put back from it."""
    store, copy = tmp_path / "store", tmp_path / "copy"
    shutil.copytree(tiny_run.store, store)
    skipped = shutil.ignore_patterns("servers", "incoming")
    shutil.copytree(store, copy, ignore=skipped)
    restored = Store.open(copy)
    restored.verify(all_versions=True)
    assert restored.head() == Store.open(store).head()

    segment = next((store / "segments").glob("*.arrow"))
    segment.chmod(0o644)
    segment.write_bytes(segment.read_bytes()[:-40])
    with pytest.raises(Exception, match=segment.name):
        Store.open(store).verify()
    shutil.copy(copy / "segments" / segment.name, segment)
    Store.open(store).verify(all_versions=True)

    document = restored.manifest().segments[0].min_doc_id
    assert document is not None
    restored.commit(remove_doc_ids=[document], message="after restoring")
    restored.verify(all_versions=True)
