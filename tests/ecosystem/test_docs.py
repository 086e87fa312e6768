"""docs/ecosystem.md: its blocks run as they stand, one after another."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.cli.registry import find_command
from tests.ecosystem.colours import make_store

PAGE = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_page_runs_as_it_stands(
    reader_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(reader_dir)
    make_store(tmp_path / "my-memory")
    assert len(BLOCKS) >= 6
    names: dict[str, Any] = {}
    printed = []
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/ecosystem.md, block {number}", "exec"), names)
        printed += capsys.readouterr().out.split("\n")
    # What the memory knows is what the page's pipeline, graphs and compiled layers answer.
    assert [line for line in printed if line in ("white", "black", "green")] == [
        "white",
        "black",
        "green",
    ]
    assert names["judge"].has_memory
    assert {p.dtype for p in names["small"].parameters()} == {torch.bfloat16}
    torch.compiler.reset()


def test_its_commands_are_commands() -> None:
    lines = re.findall(r"`pluglm (\w[^`]*)`", PAGE)
    assert lines
    for line in lines:
        command, words = find_command(shlex.split(line))
        if words:
            command.parser().parse_intermixed_args(words)
