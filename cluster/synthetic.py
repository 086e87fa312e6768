"""`pluglm quickstart --synthetic`: facts drawn afresh, so a right answer is one that was read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.checks import Source
from cluster.config import load_config
from cluster.presets import preset
from cluster.pretrain import run_task, to_stderr
from cluster.quickstart import fitting_trainers, is_complete, show_again
from memory_server.store.store import Store
from trainer.checkpoint import latest_checkpoint
from trainer.corpus.tokenizer import load_tokenizer
from trainer.export import read_exported, write_json
from trainer.job import TrainJob
from trainer.world.exam import Exam, describe_exam, run_exam
from trainer.world.prepare import prepare_world

_NOTES = {
    "source": "the synthetic world: facts made by this program, new ones every few steps",
    "licence": "none needed: no text of anyone's",
}


def synthetic_world(
    *, directory: str | Path = "runs/synthetic", seed: int = 0, overrides: Sequence[str] = ()
) -> int:
    """Train on the synthetic world through the same engines, then examine the model.

    The exam: facts that were never trained on are put into the memory and asked; one is edited,
    some are removed, and the memory is rolled back, and each time the answers are compared.

    Args:
        directory: receives the world and the run; an unfinished run there is resumed.
        seed: of the weights and of the facts.
        overrides: ``section.key=value``, over the shipped configuration.

    Returns:
        The exit code, as `cluster.pretrain.run_task`; exam.json holds the figures.

    Raises:
        As `cluster.pretrain.pretrain`.
    """
    started = time.monotonic()
    run_dir = Path(directory).resolve() / f"run-seed{seed}"
    config = load_config(
        preset("synthetic"),
        [f"run.dir={run_dir}", f"run.seed={seed}", *fitting_trainers(), *overrides],
    )
    if is_complete(run_dir, config):
        return show_again(run_dir)
    world = prepare_world(run_dir, config)
    source = Source(
        store=world.store,
        tokenizer=world.tokenizer,
        tokenizer_fingerprint=Store.open(world.store).meta.tokenizer_fingerprint,
        vocab_size=world.vocab_size,
        pad_token_id=world.pad_token_id,
        sequence_length=_LONGEST,
    )

    def examine(job: TrainJob) -> list[str]:
        exam = run_exam(
            read_exported(job.run_dir),
            job.memory,
            Store.open(world.store),
            load_tokenizer(world.tokenizer),
            world.task.new_facts,
            k=config.memory.top_k,
        )
        write_json(job.run_dir / "exam.json", asdict(exam))
        write_json(job.run_dir / "edits.json", _as_edits(exam))
        return describe_exam(exam)

    code = run_task(
        config,
        source,
        lambda version: world.task,
        first_content=world.task.versions[0],
        resume=latest_checkpoint(run_dir) is not None,
        say=to_stderr,
        notes=_NOTES,
        after=examine,
    )
    to_stderr(f"{time.monotonic() - started:.0f} s in all")
    return code


# [CLS], the three words of a question, [MASK] and [SEP].
_LONGEST = 6


def _as_edits(exam: Exam) -> dict[str, Any]:
    """The exam's edit in the form that the report shows."""
    case = {
        "sentence": exam.fact.question,
        "before": exam.answer,
        "edited_to": exam.edited.thing,
        "after": exam.answer_after_edit,
        "put_back": exam.answer_after_rollback,
    }
    return {
        "edits": 1,
        "followed": int(exam.answer_after_edit == exam.edited.thing),
        "returned": int(exam.answer_after_rollback == exam.answer),
        "cases": [case],
    }
