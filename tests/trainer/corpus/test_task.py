"""A run's right entries are those of the memory content that it began with."""

from __future__ import annotations

from pathlib import Path

from memory_server.store.store import Store
from tests.trainer.corpus.samples import Build, make_rows, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.data.cursor import Cursor
from trainer.settings import (
    DataSettings,
    EvaluateSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)
from trainer.task import CorpusTask


def test_a_task_chooses_from_its_version_though_the_store_moves_on(
    tmp_path: Path, build: Build
) -> None:
    info = build(write_json_lines(tmp_path / "a.jsonl", make_rows(40)), heldout_fraction=0.3)
    store = Store.open(info.memory_path)
    began_with = store.head()
    ids = [int(i) for ref in store.manifest().segments for i in store.segment(ref).ids]
    store.commit(remove_ids=ids[1:], message="the memory goes on without them")
    settings = TrainSettings(
        data=DataSettings(corpus="none"),
        optim=OptimSettings(batch_size=4),
        runtime=RuntimeSettings(trainers=1),
        evaluate=EvaluateSettings(sequences=4),
    )
    found = {}
    for version in (began_with, None):
        task = CorpusTask(tmp_path / "corpus", info.memory_path, version=version)
        stream = task.open(settings, rank=0, world_size=1, cursor=Cursor())
        try:
            (trained,) = next(stream)
        finally:
            stream.close()
        (held,) = task.heldout(settings)
        found[version] = [int((batch.positive_ids >= 0).sum()) for batch in (trained, held)]
    assert found[began_with] == [4, 4]
    assert sum(found[None]) <= 1


def test_two_corpora_are_learned_from_by_weight(tmp_path: Path, build: Build) -> None:
    first = build(write_json_lines(tmp_path / "a.jsonl", make_rows(40)), heldout_fraction=0.3)
    second = build_corpus(
        [write_json_lines(tmp_path / "b.jsonl", make_rows(30, seed=8))],
        tmp_path / "second",
        tokenizer=str(first.tokenizer_path),
        sequence_length=first.sequence_length * 2,
        entry_tokens=first.entry_tokens,
        heldout_fraction=0.2,
        workers=1,
    )
    settings = TrainSettings(
        data=DataSettings(
            corpus=str(first.path), more_corpora=(str(second.path),), weights=(1.0, 3.0)
        ),
        optim=OptimSettings(batch_size=64),
        runtime=RuntimeSettings(trainers=1),
        evaluate=EvaluateSettings(sequences=1000),
    )
    task = CorpusTask(first.path, first.memory_path)
    stream = task.open(settings, rank=0, world_size=1, cursor=Cursor())
    docs: list[int] = []
    for (batch,), _ in zip(stream, range(64), strict=False):
        docs += batch.doc_ids.tolist()
        from_second = batch.doc_ids >= second.sources[0].base
        if second.sources[0].base < first.sources[0].base:
            from_second = batch.doc_ids < first.sources[0].base
        # What is in the memory has a right entry; the second corpus's text has none.
        assert ((batch.positive_ids < 0) == from_second).all()
    stream.close()
    bases = [info.sources[0].base for info in (first, second)]
    shares = [sum(doc >> 39 == base >> 39 for doc in docs) for base in bases]
    assert shares == [1024, 3072]
    held = [int(doc) for batch in task.heldout(settings) for doc in batch.doc_ids]
    assert len(held) == first.heldout_sequences + second.heldout_sequences
    assert {doc >> 39 for doc in held} == {base >> 39 for base in bases}
