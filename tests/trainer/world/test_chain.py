"""The whole chain on the synthetic world: train, read, edit, remove, roll back, resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import PretrainConfig, load_config
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMForMaskedLM
from tests.multiprocess.ranks import run_ranks
from trainer.build import build_model, model_config
from trainer.checkpoint import CheckpointState, checkpoint_path, read_key_weights, read_state
from trainer.control import Control
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.export import MODEL
from trainer.job import TrainJob, TrainOutcome
from trainer.loop import run_rank
from trainer.world.exam import CHANCE, Exam, describe_exam, run_exam
from trainer.world.prepare import PreparedWorld, prepare_world

CONFIG = Path(__file__).parents[3] / "configs" / "synthetic.toml"


def train(
    config: PretrainConfig, world: PreparedWorld, memory: LocalMemory, checkpoint: Path | None
) -> TrainOutcome:
    """One rank through the trainer's own loop, in a process started by `run_ranks`."""
    task = world.task
    content = task.content_version(0)
    assert content is not None
    start = CheckpointState(
        step=0,
        cursor=Cursor(),
        trainers=1,
        zero_stage=config.runtime.zero_stage,
        content_version=content,
        encoder_step=0,
        published_step=0,
    )
    job = TrainJob(
        settings=config,
        run_dir=Path(config.run.dir),
        task=task,
        memory=memory,
        epoch=memory.info().epoch,
        content_version=memory.info().content_version,
        tokenizer=world.tokenizer,
        model_config=shape_of(config, world).to_dict(),
        device="cpu",
        init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}",
        checkpoint=checkpoint,
        start=start if checkpoint is None else read_state(checkpoint),
        resolved_config={},
    )
    return run_rank(job, 0, Control())


def shape_of(config: PretrainConfig, world: PreparedWorld) -> Any:
    return model_config(config.model, vocab_size=world.vocab_size, pad_token_id=world.pad_token_id)


def open_memory(
    config: PretrainConfig, world: PreparedWorld, checkpoint: Path | None = None
) -> LocalMemory:
    shape = shape_of(config, world)
    state = None if checkpoint is None else read_state(checkpoint)
    weights = (
        build_model(shape, seed=config.run.seed).key_weights()
        if checkpoint is None
        else read_key_weights(checkpoint)
    )
    return LocalMemory(
        world.store,
        encoder=KeyEncoderFactory(shape.to_dict()),
        weights=weights,
        encoder_step=0 if state is None else state.encoder_step,
        content_version=world.task.content_version(0) if state is None else state.content_version,
    )


def configured(run_dir: Path, *overrides: str) -> PretrainConfig:
    return load_config(CONFIG, [f"run.dir={run_dir}", "runtime.trainers=1", *overrides])


def train_and_examine(rank: int, run_dir: Path, seed: int) -> tuple[str, str, Exam, Exam]:
    steps = 400
    config = configured(
        run_dir,
        f"optim.steps={steps}",
        f"optim.retrieval_warmup_steps={steps}",
        f"run.seed={seed}",
    )
    world = prepare_world(run_dir, config)
    with open_memory(config, world) as memory:
        outcome = train(config, world, memory, None)
        assert not outcome.stopped
        content = memory.info().content_version
        model = PlugLMForMaskedLM.from_pretrained(run_dir / MODEL)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}

        def examined() -> Exam:
            exam = run_exam(
                model,
                memory,
                Store.open(world.store),
                load_tokenizer(world.tokenizer),
                world.task.new_facts,
                k=config.memory.top_k,
            )
            after = model.state_dict()
            assert all(torch.equal(after[name], weight) for name, weight in before.items())
            return exam

        return world.task.versions[-1], content, examined(), examined()


def chance_allows(share: float, count: int) -> bool:
    """Whether guessing among all things would be right so often in at least 1 of 1,000 exams."""
    right = round(share * count)
    at_least = sum(
        math.comb(count, n) * CHANCE**n * (1 - CHANCE) ** (count - n)
        for n in range(right, count + 1)
    )
    return at_least >= 1e-3


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
)
def test_a_trained_model_reads_facts_that_no_weight_can_know(tmp_path: Path, seed: int) -> None:
    """A minute of training; then everything that a memory is for, on new facts."""
    ((new_facts, content, exam, again),) = run_ranks(
        train_and_examine, 1, tmp_path / "run", seed, timeout_s=600, process_group=False
    )
    number = len(exam.first.answers)
    # When training ends the memory holds the new facts, though nobody staged them.
    assert content == new_facts
    told = "\n".join(describe_exam(exam))
    assert exam.first.right_entry_rate >= 0.95, told
    assert exam.first.accuracy >= 0.95, told
    assert not chance_allows(exam.first.accuracy, number)
    assert chance_allows(exam.first.accuracy_without_memory, number), told
    # The edit, and nothing else, changes the answer.
    assert exam.answer == exam.fact.thing, told
    assert exam.answer_after_edit == exam.edited.thing != exam.fact.thing, told
    assert exam.others_unchanged_by_edit >= 0.98
    # What is not in the memory is not known: 100 facts, guessing gives one right.
    assert exam.removed == 100
    assert chance_allows(exam.accuracy_on_removed, exam.removed), told
    assert exam.accuracy_on_kept >= 0.95
    assert exam.answer_after_removal not in (exam.fact.thing, exam.edited.thing)
    # The version before the edit is back as it was, and so is the store: the exam can be repeated.
    assert exam.answer_after_rollback == exam.answer
    assert exam.unchanged_by_rollback == 1.0
    # A hundred edits at once are followed, and leave the other facts alone.
    assert exam.edited_together == 100
    assert exam.accuracy_on_edited >= 0.9, told
    assert exam.old_answers_on_edited <= 0.05, told
    assert exam.others_unchanged_by_edits >= 0.98, told
    assert exam.unchanged_at_the_end == 1.0
    assert again == exam


def train_briefly(rank: int, run_dir: Path, from_step: int | None) -> list[Any]:
    config = configured(
        run_dir, "optim.steps=44", "checkpoint.every_steps=30", "logging.log_every_steps=1"
    )
    checkpoint = None if from_step is None else checkpoint_path(run_dir, from_step)
    world = prepare_world(run_dir, config)
    with open_memory(config, world, checkpoint) as memory:
        started_with = memory.info().content_version
        assert started_with == world.task.versions[0 if from_step is None else 1]
        train(config, world, memory, checkpoint)
        assert memory.info().content_version == world.task.versions[-1]
    return losses(run_dir)


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss"], line["right_entry_rate"])
        for line in lines
        if line["kind"] == "train"
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_resumed_run_sees_the_same_worlds_in_questions_and_memory(tmp_path: Path) -> None:
    """Resumed in the middle of world 1; world 2 follows at step 40, as without the interruption."""
    run_dir = tmp_path / "run"
    # A process each, as a resumed run has.
    (whole,) = run_ranks(train_briefly, 1, run_dir, None, timeout_s=300, process_group=False)
    (resumed,) = run_ranks(train_briefly, 1, run_dir, 30, timeout_s=300, process_group=False)
    assert [step for step, *_ in whole] == list(range(1, 45))
    assert len(resumed) == len(whole)
    for before, after in zip(whole, resumed, strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-6)
