"""docs/memory.md: its commands and its block run as they stand, one after another."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.cli.registry import find_command
from memory_server.store.store import Store
from tests.cluster.memory_support import Capture, OwnMemory
from tests.cluster.tiny_run import TinyRun
from tests.ray_fixture import local_ray
from tests.trainer.corpus.samples import make_rows, write_json_lines

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
    if line.startswith("pluglm ")
]
SERVED = next(n for n, line in enumerate(LINES) if " serve " in line)


@pytest.fixture
def home(
    own_memory: OwnMemory, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A directory as the page has it: a corpus, a run that was trained on it, and some files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    own_memory.corpus.rename(tmp_path / "data" / "articles")
    run = Path(shutil.copytree(tiny_run.run, tmp_path / "runs" / "first"))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(tiny_run.corpus), "data/articles"))
    for seed, name in enumerate(("news", "may", "june")):
        write_json_lines(tmp_path / f"{name}.jsonl", make_rows(4, seed=seed))
    store = Store.open("data/articles/memory")
    segment = store.segment(store.manifest().segments[0])
    ids = segment.ids.tolist()
    rows = [{"id": i, "text": f"a corrected king {i % 7}"} for i in ids[-2:]]
    write_json_lines(tmp_path / "corrections.jsonl", rows)
    (tmp_path / "page.txt").write_text("the river\n\nthe city")
    (tmp_path / "withdrawn.txt").write_text(f"{ids[-1]}\n")
    # The page's document 7.
    added = [{"doc_id": 7, "text": "an old page"}]
    write_json_lines(tmp_path / "seven.jsonl", added)
    assert main(["memory", "add", "data/articles", "seven.jsonl"]) == 0
    return tmp_path


def test_its_commands_run_one_after_another(home: Path, capsys: Capture) -> None:
    assert SERVED > 15
    for line in LINES[:SERVED]:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    messages = [entry.message for entry in Store.open("data/articles/memory").log()]
    assert "news of May" in messages
    assert "corrections" in messages
    assert "swap may for june from june.jsonl" in messages


def test_the_block_of_python_runs(home: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(block, "docs/memory.md", "exec"), {})
    store = Store.open("data/articles/memory")
    assert store.manifest().message == "a fact"


@pytest.mark.integration
def test_its_server_serves(home: Path, capsys: Capture) -> None:
    with local_ray():
        for line in LINES[SERVED:]:
            assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)


def test_every_command_that_it_names_is_one() -> None:
    named = re.findall(r"`pluglm (\w[^`]*)`", PAGE)
    assert named
    for line in named:
        if "COMMAND" not in line:
            find_command(shlex.split(line))
