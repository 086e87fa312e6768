"""docs/tutorial.md: its commands, in their order, do what the text says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.registry import find_command

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
ASKED = "The lamp of Peltorta shines [MASK]."


def run_tutorial(home: Path, *, steps: int) -> Path:
    """Run all bash blocks in one shell, with this checkout's `pluglm`; returns runs/tutorial."""
    (home / "configs").symlink_to(CHECKOUT / "configs")
    programs = home / "bin"
    programs.mkdir()
    pluglm = programs / "pluglm"
    python = shlex.quote(sys.executable)
    start = "import sys; from cluster.cli import main; sys.exit(main())"
    pluglm.write_text(f'#!/bin/sh\nexec {python} -c "{start}" "$@"\n', encoding="utf-8")
    pluglm.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        "STEPS": str(steps),
    }
    script = "\n".join(["set -euo pipefail", *BLOCKS])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return home / "runs" / "tutorial"


def explanation(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == ASKED
    return lines


def first_guess(path: Path) -> str:
    (told,) = [line for line in explanation(path) if line.startswith("[MASK]: ")]
    return told.split()[1]


def entries_read(path: Path) -> list[str]:
    """The texts of the table's rows, as far as it shows them."""
    rows = [re.search(r"The lamp of .*", line) for line in explanation(path)[1:]]
    return [row.group() for row in rows if row]


def commands() -> list[list[str]]:
    """The words of every `pluglm` command of the blocks."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").replace("$STEPS", "12").splitlines()
    return [
        shlex.split(re.split(r" [|>] ", line)[0])[1:] for line in lines if line.startswith("pluglm")
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_parses(words: list[str]) -> None:
    command, rest = find_command(words)
    command.parser().parse_intermixed_args(rest)


def test_links_lead_to_files() -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert links
    assert [link for link in links if not (CHECKOUT / "docs" / link).exists()] == []


@pytest.mark.integration
@pytest.mark.slow
def test_its_commands_leave_the_files_that_it_names(tmp_path: Path) -> None:
    """With 12 steps, of which the page says that they are good for this and no more."""
    home = run_tutorial(tmp_path, steps=12)
    run = home / "run"
    for name in ["model/config.json", "metrics.jsonl", "report.html", "checkpoints/step-00000012"]:
        assert (run / name).exists(), name
    assert '{"doc_id": 1600, "title": "Peltorta", ' in PAGE
    first = (home / "south.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert first in PAGE.splitlines()

    assert "own entry in the memory" in (home / "evaluation.txt").read_text(encoding="utf-8")
    edit = (home / "edit.txt").read_text(encoding="utf-8").splitlines()
    for sign, colour in [("<", "white"), (">", "green")]:
        told = f" Peltorta: The lamp of Peltorta shines {colour}."
        assert any(line.startswith(sign) and line.endswith(told) for line in edit), edit
    assert "<html" in (home / "why.html").read_text(encoding="utf-8")

    log = (home / "log.txt").read_text(encoding="utf-8")
    assert "Peltorta is repainted" in log
    assert "before-the-edit" in log
    newest = log.splitlines()[1].split()
    assert "600" in newest, "the south is taken out at the end"
    # Whatever the weights are worth, the old sentence is not read after the edit.
    assert len(entries_read(home / "before.txt")) == 5
    assert "The lamp of Peltorta shines white." not in entries_read(home / "after.txt")
    assert explanation(home / "again.txt") == explanation(home / "before.txt")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.long
def test_with_300_steps_the_answers_are_those_of_the_text(tmp_path: Path) -> None:
    assert "STEPS=${STEPS:-300}" in PAGE
    home = run_tutorial(tmp_path, steps=300)
    answers = {name: first_guess(home / f"{name}.txt") for name in ("before", "after", "again")}
    assert answers == {"before": "white", "after": "green", "again": "white"}
    best = entries_read(home / "after.txt")[0]
    assert best == "The lamp of Peltorta shines green."
