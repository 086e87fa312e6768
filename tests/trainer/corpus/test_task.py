"""A run's right entries are those of the memory content that it began with."""

from __future__ import annotations

from pathlib import Path

from memory_server.store.store import Store
from tests.trainer.corpus.samples import Build, make_rows, write_json_lines
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
