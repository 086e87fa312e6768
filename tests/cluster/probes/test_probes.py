"""Probes are read as LAMA writes them, and scored as one would by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.cli import main
from cluster.config import ConfigError
from cluster.memory_tools import sentence_tokens
from cluster.probes.consistency import consistency, read_patterns, summed
from cluster.probes.edits import Edits
from cluster.probes.reading import Columns, Probe, fit, read_probes
from cluster.probes.scoring import Answered, ask, by_group, figures
from cluster.probes.updating import update_knowledge
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun, make_tiny_run
from trainer.finetune.errors import TaskDataError

K = 3
# Words of the tiny corpus that its tokenizer has whole.
FACTS = [
    {"relation": "P1", "sub": "island", "obj": "river", "template": "The [X] is by the [Y]."},
    {"relation": "P1", "sub": "mountain", "obj": "empire", "template": "The [X] is by the [Y]."},
    {"relation": "P2", "sub": "painter", "obj": "king", "template": "[X] of the [Y]"},
    {"relation": "P2", "sub": "temple", "obj": "battle", "template": "[X] of the [Y]"},
]


@dataclass(frozen=True)
class Opened:
    run: TinyRun
    trained: TrainedModel
    memory: LocalMemory
    store: Store


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    run = make_tiny_run(tmp_path_factory.mktemp("probed"))
    trained = load_trained_model(run.model)
    with trained.memory(run.store) as memory:
        yield Opened(run, trained, memory, Store.open(run.store))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_templates_and_sentences_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", FACTS)
    probes = read_probes(path)
    assert probes[0] == Probe(
        subject="island", answer="river", text="The island is by the [MASK].", relation="P1"
    )
    rows = [
        {"sub_label": "a", "obj_label": "b", "masked_sentences": ["x [MASK].", "y"], "can": "True"},
        {"sub_label": "c", "obj_label": "d", "masked_sentences": ["z [MASK]"], "can": False},
    ]
    read = read_probes(write(tmp_path / "more.jsonl", rows), columns=Columns(known="can"))
    assert [probe.text for probe in read] == ["x [MASK]. y", "z [MASK]"]
    assert [probe.known for probe in read] == [True, False]
    # Of rows of both kinds each is asked as it can be.
    sentence = {"sub": "king", "obj": "river", "masked_sentence": "A king by the [MASK]."}
    both = [FACTS[0], sentence, FACTS[2] | {"masked_sentence": "not [MASK] this"}]
    asked = [probe.text for probe in read_probes(write(tmp_path / "both.jsonl", both))]
    assert asked[:2] == ["The island is by the [MASK].", "A king by the [MASK]."]
    assert asked[2:] == ["painter of the [MASK]"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"sub": "a", "obj": "b", "template": "[X] only"}, r"line 1.*\[Y\] 0 times"),
        ({"sub": "a", "obj": "b", "template": "[X] [X] [Y]"}, r"\[X\] 2 times"),
        ({"sub": "a", "obj": "b", "masked_sentence": "no mask"}, r"has no \[MASK\]"),
        ({"sub": "a", "obj": "", "template": "[X] [Y]"}, "'obj': is empty"),
        ({"subj": "a", "obj": "b", "template": "[X] [Y]"}, "no column sub or sub_label"),
        ({"sub": "a", "obj": "b"}, r"no column template or masked_sentence; .* with \[MASK\]"),
        ({"sub": ["a"], "obj": "b", "template": "[X] [Y]"}, "'sub': holds list, not text"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskDataError, match=says):
        read_probes(write(tmp_path / "bad.jsonl", [row]))


def test_what_does_not_fit_the_model_is_told(opened: Opened) -> None:
    good = Probe(subject="s", answer="river", text="the [MASK]")
    long = Probe(subject="s", answer="river", text="river " * 40 + "[MASK]")
    several = Probe(subject="s", answer="unpronounceable", text="the [MASK]")
    twice = Probe(subject="s", answer="river", text="[MASK] is [MASK]")
    with pytest.raises(ConfigError, match=r"2 of 3 probes .*unpronounceable.*--skip-unfit"):
        fit(opened.trained, [good, several, long])
    with pytest.raises(ConfigError, match="has 2 masks, not 1"):
        fit(opened.trained, [good, twice])
    fitted = fit(opened.trained, [good, several, long, good], skip_unfit=True)
    assert fitted.probes == (good,)
    assert fitted.repeated == 1
    assert len(fitted.unfit) == 2
    with pytest.raises(ConfigError, match="no probe is left"):
        fit(opened.trained, [several], skip_unfit=True)


def test_answers_are_those_of_the_model_one_by_one(opened: Opened) -> None:
    probes = [Probe(subject="", answer=f["obj"], text=f"{f['sub']} [MASK] " * 1) for f in FACTS]
    probes.append(Probe(subject="", answer="king", text="the river by the old [MASK] and the sea"))
    fitted = fit(opened.trained, probes)
    for memory in (opened.memory, None):
        found = ask(opened.trained, memory, fitted, k=K, batch_size=2)
        for probe, token, answer in zip(probes, fitted.answers, found, strict=True):
            lookup = None if memory is None else lambda q, m=memory: m.search(q, K)
            ids_1T = sentence_tokens(opened.trained, probe.text)
            mask = ids_1T[0].tolist().index(opened.trained.tokenizer.mask_token_id)
            with torch.no_grad():
                row_V = opened.trained.model(ids_1T, lookup=lookup).logits[0, mask]
            assert answer.top == int(row_V.argmax())
            assert answer.rank == int((row_V >= row_V[token]).sum())
            assert answer.probability == pytest.approx(float(row_V.softmax(-1)[token]), rel=1e-4)


def test_figures_by_hand() -> None:
    answers = [
        Answered(rank=rank, probability=p, top=0) for rank, p in ((1, 0.8), (4, 0.2), (20, 0.0))
    ]
    told = figures(answers)
    assert (told.p_at_1, told.p_at_10) == pytest.approx((1 / 3, 2 / 3))
    assert told.mrr == pytest.approx((1 + 1 / 4 + 1 / 20) / 3)
    assert told.probability == pytest.approx(1 / 3)


def test_groups_by_relation_and_by_what_the_memory_can_know(opened: Opened) -> None:
    probes = [
        Probe(subject="", answer="river", text=f"{n} [MASK]", relation=r, known=known)
        for n, r, known in (("a", "P1", True), ("b", "P1", False), ("c", "P2", True))
    ]
    ranks = [1, 3, 2]
    answers = [Answered(rank=rank, probability=0.0, top=0) for rank in ranks]
    found = by_group(fit(opened.trained, probes), answers)
    assert found["all"].p_at_1 == pytest.approx(1 / 3)
    assert found["mean over relations"].p_at_1 == pytest.approx((1 / 2 + 0) / 2)
    assert found["the memory can know it"].count == 2
    assert found["the memory cannot know it"].mrr == pytest.approx(1 / 3)
    assert found["relation P2"].mrr == 0.5


def test_consistency_by_hand() -> None:
    told = summed([[1, 1, 2], [3, 3, 3]], [1, 4], patterns=3)
    assert told.consistency == pytest.approx((1 / 3 + 1) / 2)
    assert told.accuracy == pytest.approx((2 / 3 + 0) / 2)
    assert told.all_right == 0
    assert told.when_right == pytest.approx(1 / 3), "only the first fact's first answer is right"
    assert summed([[1, 2]], [3], patterns=2).when_right is None


def test_consistency_answers_with_the_relations_objects(opened: Opened, tmp_path: Path) -> None:
    rows = [
        {"relation": "P1", "template": template}
        for template in ("The [X] is by the [Y].", "[Y] by the [X]", "[X], [Y]")
    ]
    patterns = read_patterns(write(tmp_path / "patterns.jsonl", rows))
    probes = read_probes(write(tmp_path / "facts.jsonl", FACTS))
    told = consistency(opened.trained, opened.memory, probes, patterns, k=K, skip_unfit=False)
    assert (told.facts, told.patterns) == (2, 3)
    assert 0 <= told.all_right <= told.accuracy <= 1
    with pytest.raises(TaskDataError, match="no relation of the probes"):
        consistency(opened.trained, None, probes, {"P9": ["a", "b"]}, k=K, skip_unfit=False)


def test_an_update_is_measured_and_undone(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    trained, store = load_trained_model(run.model), Store.open(run.store)
    weights = {name: p.clone() for name, p in trained.model.state_dict().items()}
    rows = [fact | {"snippet": f"the {fact['sub']} {fact['obj']} " * 3} for fact in FACTS]
    path = write(tmp_path / "facts.jsonl", rows)
    fitted = fit(trained, read_probes(path, columns=Columns(snippet="snippet")))
    before = store.manifest()
    done = update_knowledge(trained, store, fitted, Edits(snippets=True), k=200, locality=fitted)
    stages = {name: groups["all"] for name, groups in done.stages.items()}
    assert list(stages) == ["without memory", "before", "after", "rolled back"]
    assert stages["before"] != stages["without memory"], "the memory is read"
    assert stages["after"].probability != pytest.approx(stages["before"].probability, abs=1e-6)
    assert stages["rolled back"].probability == pytest.approx(stages["before"].probability)
    assert (done.returned, done.kept) == (1.0, False)
    assert done.entries[1] == done.entries[0] + len(FACTS)
    assert done.entries[2] == done.entries[0] == before.entries
    assert done.locality is not None
    assert done.locality.probability_change > 0
    assert done.locality.returned == 1.0
    assert store.manifest().segments == before.segments
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    kept = update_knowledge(trained, store, fitted, Edits(snippets=True), k=200, keep=True)
    assert store.manifest().domains() == {"default": before.entries, "snippets": len(FACTS)}
    assert kept.kept
    again = [store.manifest().segments]
    with pytest.raises(ConfigError, match="nothing is edited"):
        update_knowledge(trained, store, fitted, Edits(), k=200)
    assert [store.manifest().segments] == again


def test_an_update_that_fails_leaves_the_memory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_tiny_run(tmp_path)
    trained, store = load_trained_model(run.model), Store.open(run.store)
    fitted = fit(trained, read_probes(write(tmp_path / "facts.jsonl", FACTS)))
    with trained.memory(run.store) as memory:
        (found,) = memory.search(torch.ones(1, 8), 1).ids[0].tolist()
    before, asked = store.manifest(), []

    def failing(*args: Any, **named: Any) -> Any:
        asked.append(store.manifest().entries)
        if len(asked) == 3:
            raise RuntimeError("the disk is gone")
        return ask(*args, **named)

    monkeypatch.setattr("cluster.probes.updating.ask", failing)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        update_knowledge(trained, store, fitted, Edits(remove_ids=(found,)), k=K)
    assert asked == [before.entries, before.entries, before.entries - 1]
    assert store.manifest().segments == before.segments


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_tiny_run(tmp_path)
    facts = write(tmp_path / "facts.jsonl", [f | {"new": "harbour"} for f in FACTS])
    assert main(["probe", str(run.run), str(facts), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["with"]["all"]["count"] == 4
    added = write(tmp_path / "new.jsonl", [{"title": "t", "text": "the island harbour"}])
    words = ["update", str(run.run), str(facts), "--add", str(added), "--new-answer", "new"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "after, new answer" in out
    assert "the memory is as it was: no weight has changed" in out
    for words, says in (
        (["probe", str(run.store), str(facts)], "--model is needed"),
        (["probe", str(run.run), str(tmp_path / "none.jsonl")], "no such file"),
        (["update", str(run.run), str(facts)], "nothing is edited"),
        (["update", str(run.run), str(facts), "--snippets", "nothing"], "no column 'nothing'"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err
