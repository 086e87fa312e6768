"""Questions and memory show the same world at every step, on every rank and after a resume."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memory_server.store.store import Store
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.data.stream import TrainBatch
from trainer.follower import RefreshClock
from trainer.settings import (
    ConfigError,
    DataSettings,
    EvaluateSettings,
    MemorySettings,
    OptimSettings,
    RunSettings,
    RuntimeSettings,
    TrainSettings,
)
from trainer.task import Task
from trainer.world.prepare import prepare_world
from trainer.world.task import WorldTask, worlds_needed


def settings(*, steps: int = 50, every: int = 20, **sections: Any) -> TrainSettings:
    parts: dict[str, Any] = {
        "data": DataSettings(corpus="not read"),
        "memory": MemorySettings(refresh="sync", refresh_every_steps=every),
        "optim": OptimSettings(steps=steps, batch_size=16),
        "runtime": RuntimeSettings(trainers=1),
        "evaluate": EvaluateSettings(sequences=100),
    }
    return TrainSettings(**(parts | sections))


def task_of(steps: int, every: int) -> WorldTask:
    versions = tuple(f"v{i}" for i in range(worlds_needed(steps, every) + 1))
    return WorldTask(
        store=Path("store"),
        versions=versions,
        seed=1,
        size=50,
        refresh_every_steps=every,
        steps=steps,
    )


def world_of(batch: TrainBatch) -> set[int]:
    return set((batch.positive_ids // 1000).tolist())


def read(task: WorldTask, given: TrainSettings, cursor: Cursor, steps: int) -> list[TrainBatch]:
    stream = task.open(given, rank=0, world_size=1, cursor=cursor)
    return [next(stream)[0] for _ in range(steps)]


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 40),
    every=st.integers(1, 15),
    resumed=st.integers(0, 39),
)
def test_the_trainer_publishes_the_world_that_the_step_asks_about(
    steps: int, every: int, resumed: int
) -> None:
    """The trainer's own clock, from the first step or from a checkpoint taken after any step."""
    given = settings(steps=steps, every=every)
    task, clock = task_of(steps, every), RefreshClock(given.memory)
    cursor, published = Cursor(), 0
    content = task.content_version(0)
    for step in range(steps):
        if step in (0, resumed):
            stream = task.open(given, rank=0, world_size=1, cursor=cursor)
        if clock.due(step, published):
            published, content = step, task.content_version(step)
        (batch,) = next(stream)
        cursor = stream.cursor
        assert {f"v{world}" for world in world_of(batch)} == {content}
    assert task.content_version(steps) == task.versions[-1]
    assert content != task.versions[-1]


def test_the_prepared_store_has_the_facts_that_a_step_asks_about(tmp_path: Path) -> None:
    given = settings()
    prepared = prepare_world(tmp_path, given)
    assert prepared.task.versions[-1] == Store.open(prepared.store).head()
    tokenizer = load_tokenizer(prepared.tokenizer)
    assert len(tokenizer) == prepared.vocab_size
    assert tokenizer.pad_token_id == prepared.pad_token_id
    store = Store.open(prepared.store)
    for step, batch in enumerate(read(prepared.task, given, Cursor(), 50)):
        (ref,) = store.manifest(prepared.task.content_version(step)).segments
        segment = store.segment(ref)
        rows = batch.positive_ids - int(segment.ids[0])
        there = torch.from_numpy(segment.tokens.astype("int64"))[rows]
        torch.testing.assert_close(batch.positive_tokens, there)
        torch.testing.assert_close(batch.doc_ids, batch.positive_ids)
        # Only the thing is masked; all else is the entry's own words.
        masked = batch.labels != -100
        assert masked.sum(1).tolist() == [1] * 16
        whole = torch.where(masked, batch.labels, batch.input_ids)
        torch.testing.assert_close(whole[:, :5], there)
        assert (batch.input_ids[masked] == tokenizer.mask_token_id).all()


def test_new_facts_are_never_asked_about_in_training(tmp_path: Path) -> None:
    given = settings()
    task = prepare_world(tmp_path, given).task
    asked = {int(i) for b in read(task, given, Cursor(), 50) for i in b.positive_ids}
    batches = list(task.heldout(given))
    heldout = {int(i) for batch in batches for i in batch.positive_ids}
    assert len(heldout) == 100
    assert not asked & heldout
    assert heldout <= {fact.id for fact in task.new_facts}
    again = list(task.heldout(given))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


def test_ranks_and_micro_batches_cut_the_same_batch() -> None:
    task = task_of(50, 20)
    given = settings(runtime=RuntimeSettings(trainers=2, micro_batch_size=4))
    (whole,) = read(task, settings(), Cursor(epoch=25), 1)
    parts = []
    for rank in range(2):
        stream = task.open(given, rank=rank, world_size=2, cursor=Cursor(epoch=25))
        parts += next(stream)
    assert [len(part.doc_ids) for part in parts] == [4] * 4
    torch.testing.assert_close(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    heldout = [list(task.heldout(given, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in heldout] == [1, 1]
    ids = torch.cat([batch.positive_ids for batches in heldout for batch in batches])
    assert len(set(ids.tolist())) == len(ids) == 50


def test_a_task_travels_to_other_processes() -> None:
    task: Task = task_of(50, 20)
    assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (settings(memory=MemorySettings(refresh_every_steps=20)), "memory.refresh = 'async'"),
        (settings(every=10), "memory.refresh_every_steps = 10: must be 20"),
        (settings(steps=60), "optim.steps = 60: must be 50"),
        (settings(evaluate=EvaluateSettings(every_steps=5)), "evaluate.every_steps = 5: must be 0"),
        (
            settings(
                memory=MemorySettings(
                    refresh="sync", refresh_every_steps=20, exclude_own_document=True
                )
            ),
            "memory.exclude_own_document = True",
        ),
    ],
)
def test_settings_that_part_questions_and_memory_are_refused(
    given: TrainSettings, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(50, 20).open(given, rank=0, world_size=1, cursor=Cursor())
    assert message in str(error.value)


def test_a_corpus_cursor_and_too_few_versions_are_refused() -> None:
    task = task_of(50, 20)
    with pytest.raises(ValueError, match="not of the synthetic world"):
        task.open(settings(), rank=0, world_size=1, cursor=Cursor(0, 64))
    with pytest.raises(ValueError, match="4 are needed"):
        replace(task, versions=("a", "b"))


def test_a_prepared_world_is_found_again_and_no_other_run_takes_it(tmp_path: Path) -> None:
    first = prepare_world(tmp_path, settings())
    assert prepare_world(tmp_path, settings()) == first
    with pytest.raises(ConfigError, match=r"optim\.steps = 70: .* made with 50"):
        prepare_world(tmp_path, settings(steps=70))
    with pytest.raises(ConfigError, match=r"run\.seed = 9"):
        prepare_world(tmp_path, settings(run=RunSettings(seed=9)))


def test_a_half_made_world_is_made_again_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    prepared = prepare_world(tmp_path, settings())
    manifest = tmp_path / "world" / "world.json"
    manifest.unlink()
    again = prepare_world(tmp_path, settings())
    assert again.task.world(0) == prepared.task.world(0)
    assert Store.open(again.store).head() == again.task.versions[-1]
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "tokenizer_fingerprint": "another"}))
    with pytest.raises(ConfigError, match="another version of this program"):
        prepare_world(tmp_path, settings())
    manifest.write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        prepare_world(tmp_path, settings())
