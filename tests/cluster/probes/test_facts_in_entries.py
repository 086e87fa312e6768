"""Facts are found in the memory's entries, changed where they stand, and answered from a list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.config import ConfigError
from cluster.probes.edits import Edits, planned
from cluster.probes.knowing import knowing, stating_entries
from cluster.probes.reading import Columns, Fitted, fit, read_probes
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.store.store import Store
from tests.cluster.probes.test_probes import FACTS, write
from tests.cluster.tiny_run import TinyRun, make_tiny_run

# What the memory is told of FACTS: the second twice, the last not at all. The other two rows hold a
# subject or an object alone.
TOLD = ["the island river", "the mountain empire", "an empire mountain", "old painter king"]
ASIDE = ["the temple sea", "the battle"]


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    made = make_tiny_run(tmp_path)
    rows = [{"id": 9000 + at, "text": text} for at, text in enumerate([*TOLD, *ASIDE])]
    added = write(tmp_path / "told.jsonl", rows)
    # The corpus's own entries could tell the facts by chance.
    assert main(["memory", "swap", str(made.run), "default", "facts", "--from", str(added)]) == 0
    return made


def opened(run: TinyRun, path: Path, **columns: str) -> tuple[TrainedModel, Store, Fitted]:
    trained = load_trained_model(run.model)
    probes = read_probes(path, columns=Columns(**columns))
    return trained, Store.open(run.store), fit(trained, probes)


def texts(store: Store) -> set[str]:
    manifest = store.manifest()
    return {
        text
        for ref in manifest.segments
        if ref.domain == "facts"
        for text in store.segment(ref).texts(store.live_rows(ref))
    }


def test_what_the_memory_can_know_is_found_in_its_entries(run: TinyRun, tmp_path: Path) -> None:
    trained, store, probes = opened(run, write(tmp_path / "facts.jsonl", FACTS))
    found = stating_entries(trained, store, probes)
    assert found == [(9000,), (9001, 9002), (9003,), ()]
    assert [p.known for p in knowing(probes, found).probes] == [True, True, True, False]
    # One word cannot be both subject and object.
    same = write(tmp_path / "same.jsonl", [{**FACTS[0], "sub": "battle", "obj": "battle"}])
    assert stating_entries(*opened(run, same)) == [()]


def test_facts_are_replaced_where_they_stand(run: TinyRun, tmp_path: Path) -> None:
    rows = [f | {"now": f"the {f['sub']} harbour"} for f in FACTS[:2]]
    trained, store, probes = opened(run, write(tmp_path / "facts.jsonl", rows), replacement="now")
    plan = planned(trained, store, probes, Edits(replace_facts=True), tmp_path)
    # The second of a fact's two entries goes, as it would still tell the old one.
    assert plan.remove_ids == (9002,)
    (rows_of,) = plan.replace
    (path,) = rows_of.files
    given = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert given == [
        {"id": 9000, "text": "the island harbour"},
        {"id": 9001, "text": "the mountain harbour"},
    ]


def test_the_command_replaces_and_takes_back(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f | {"now": f"the {f['sub']} harbour", "new": "harbour"} for f in FACTS[:2]]
    facts, store = write(tmp_path / "facts.jsonl", rows), Store.open(run.store)
    before = texts(store)
    words = ["update", str(run.run), str(facts), "--replace-with", "now", "--new-answer", "new"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entries"] == [6, 5, 6]
    assert texts(store) == before
    assert main([*words, "--keep"]) == 0
    changed = {"the island harbour", "the mountain harbour"}
    assert texts(store) == (before | changed) - set(TOLD[:3])


def test_the_command_removes_what_tells_the_facts(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = write(tmp_path / "facts.jsonl", FACTS)
    assert main(["update", str(run.run), str(facts), "--remove-facts", "--keep"]) == 0
    assert texts(Store.open(run.store)) == set(ASIDE)
    capsys.readouterr()
    # There is nothing left to remove, and that is said before anything is asked.
    assert main(["update", str(run.run), str(facts), "--remove-facts"]) == 2
    assert "no entry of the memory holds the subject and the object" in capsys.readouterr().err


def test_entries_that_a_column_names_are_taken(run: TinyRun, tmp_path: Path) -> None:
    rows = [FACTS[3] | {"at": 9004}]
    trained, store, probes = opened(run, write(tmp_path / "facts.jsonl", rows), entry="at")
    plan = planned(trained, store, probes, Edits(remove_facts=True), tmp_path)
    assert plan.remove_ids == (9004,)


def test_two_texts_for_one_entry_and_two_ways_at_once_are_refused(
    run: TinyRun, tmp_path: Path
) -> None:
    rows = [f | {"now": f"now {at}", "at": 9000} for at, f in enumerate(FACTS[:2])]
    path = write(tmp_path / "facts.jsonl", rows)
    trained, store, probes = opened(run, path, entry="at", replacement="now")
    with pytest.raises(ConfigError, match="entry 9000 would become two texts"):
        planned(trained, store, probes, Edits(replace_facts=True), tmp_path)
    long = replace(probes.probes[0], replacement="river " * 99)
    with pytest.raises(ConfigError, match=r"of --replace-with has 99 tokens, and entry 9000 has"):
        planned(
            trained, store, replace(probes, probes=(long,)), Edits(replace_facts=True), tmp_path
        )
    with pytest.raises(ConfigError, match="change the same entries"):
        planned(trained, store, probes, Edits(replace_facts=True, remove_facts=True), tmp_path)


def told_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_only_the_answers_of_a_file_are_given(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = write(tmp_path / "facts.jsonl", FACTS)
    only = tmp_path / "answers.txt"
    only.write_text("river\n\nriver\n", encoding="utf-8")
    words = ["probe", str(run.run), str(facts), "--answers", str(only)]
    told = told_by([*words, "--skip-unfit"], capsys)
    # The other facts' objects are none of the answers, so they cannot be asked.
    assert told["memory"]["with"]["all"]["count"] == 1
    assert told["memory"]["with"]["all"]["p_at_1"] == 1.0
    assert main([*words[:-1], str(tmp_path / "none.txt")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    only.write_text("\n", encoding="utf-8")
    assert main(words) == 2
    assert "has no answer" in capsys.readouterr().err


def test_figures_are_split_by_what_the_memory_can_know(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = write(tmp_path / "facts.jsonl", FACTS)
    told = told_by(["probe", str(run.run), str(facts), "--known-by-memory"], capsys)
    groups = told["memory"]["with"]
    assert groups["the memory can know it"]["count"] == 3
    assert groups["the memory cannot know it"]["count"] == 1
