"""docs/tutorial.md: every block runs as it stands, in order, and what the text claims is so."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memory_server.store.store import Store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
RUN = Path("runs/tutorial/run")
GUESS = re.compile(r"^\[MASK\]: (\w+) [\d.]+ %", re.M)


def told_by(words: list[str]) -> str:
    """What a command prints, in a process of its own as a person starts it."""
    program = "import sys; from cluster.cli import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, (words, ran.returncode, ran.stderr[-3000:])
    return ran.stdout


def right(evaluation: str, memory: str) -> float:
    """The share, in percent, that is right with the own entry in the memory."""
    (line,) = [line for line in evaluation.splitlines() if "own entry in the memory:" in line]
    found = re.search(rf"{memory} [\d.]+ \(([\d.]+)% right\)", line)
    assert found, line
    return float(found[1])


def precision(told: str, memory: str) -> float:
    """The column P@1 of a probe's table."""
    found = re.search(rf"^all +{memory} +60 +([\d.]+) %", told, re.M)
    assert found, told
    return float(found[1])


def no_claim(told: str) -> None:
    """Of commands about which the text says only that they work."""


def corpus(told: str) -> None:
    assert "500 documents" in told or re.search(r"documents +500, of them 45 held out", told)


def evaluated(told: str) -> None:
    assert right(told, "with the memory") > 95
    assert right(told, "no memory") < 65
    assert right(told, "shuffled memory") < 65


def diff(told: str) -> None:
    assert "< 500 winenstead: The village of winenstead" in told
    assert "known for its honey." in told
    assert "> 500 winenstead: The village of winenstead" in told
    assert "known for its bells." in told


def explained(told: str) -> None:
    guess = GUESS.search(told)
    assert guess
    assert guess[1] == "bells"
    first = re.search(r"^ +1 +[\d.]+ +([\d.]+) % █+ +(-?[+\d.]+) +winenstead +north ", told, re.M)
    assert first, told
    assert float(first[1]) > 50
    assert float(first[2]) < -50
    assert "winenstead" in Path("runs/tutorial/why.html").read_text(encoding="utf-8")


def explained_again(told: str) -> None:
    guess = GUESS.search(told)
    assert guess
    assert guess[1] == "honey"


def log(told: str) -> None:
    for message in ("winenstead makes bells now", "adapt to north", "roll back to", "unplug north"):
        assert message in told


def verified(told: str) -> None:
    assert "verified" in told
    store = Store.open("runs/tutorial/corpus/memory")
    assert sum(len(store.live_rows(ref)) for ref in store.manifest().segments) == 500


CLAIMS: list[tuple[str, Callable[[str], None]]] = [
    ("corpus build", corpus),
    ("corpus info", corpus),
    ("pretrain", no_claim),
    ("evaluate", evaluated),
    ("probe", lambda told: _knows(told, nothing=True)),
    ("adapt", no_claim),
    ("probe", lambda told: _knows(told, nothing=False)),
    ("memory update", no_claim),
    ("memory diff", diff),
    ("explain", explained),
    ("memory rollback", no_claim),
    ("explain", explained_again),
    ("adapt", no_claim),
    ("memory log", log),
    ("memory verify", verified),
]
"""Every command of the page, and what its text says of it."""


def _knows(told: str, *, nothing: bool) -> None:
    assert precision(told, "without") < 30
    assert (precision(told, "with") < 30) if nothing else (precision(told, "with") > 90)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.long
def test_the_tutorial_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    claims = iter(CLAIMS)
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "docs/tutorial.md", "exec"), {})
        elif not language:
            for line in block.splitlines():
                words = shlex.split(line)
                assert words[0] == "pluglm"
                name, claim = next(claims)
                assert words[1 : 1 + len(name.split())] == name.split()
                claim(told_by(words[1:]))
    assert list(claims) == []
    evaluation = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation
    assert (RUN / "report.html").is_file()


def test_its_commands_are_those_that_are_held_to_something() -> None:
    """Without running it: a command that is added to the page is added to the claims."""
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    assert len(lines) == len(CLAIMS)
    for line, (name, _) in zip(lines, CLAIMS, strict=True):
        assert line.startswith(f"pluglm {name} "), line


def test_the_rows_that_it_shows_are_those_that_its_block_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = [block for language, block in BLOCKS if language == "python"]
    exec(compile(source, "docs/tutorial.md", "exec"), {})
    first = Path("runs/tutorial/north.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (shown,) = re.findall(r"^(\{.*), \.\.\.$", PAGE, re.M)
    assert first.startswith(shown)
