"""One seed: train, measure, and write its directory whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model import PlugLMPreTrainedModel
from trainer.export import write_json, write_text
from trainer.finetune.encoded import EncodedRows
from trainer.finetune.heads import Head, Prediction
from trainer.finetune.loop import TaskTrainer, make_trainer, training_arguments
from trainer.finetune.memory import ReadMemory, RenewKeys
from trainer.finetune.settings import FinetuneSettings
from trainer.finetune.start import Start, build_model

METRICS, PREDICTIONS, WITHOUT = "metrics.json", "predictions.jsonl", "without_memory"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all seeds share.

    Attributes:
        encoded: each split's rows, tokenised.
        memory: what the model reads; None: nothing.
    """

    settings: FinetuneSettings
    head: Head
    start: Start
    encoded: dict[str, EncodedRows]
    memory: ReadMemory | None
    device: str
    say: Callable[[str], None]


def seed_directory(home: Path, seed: int) -> Path:
    """Where a finished seed lies."""
    return home / f"seed-{seed}"


def run_seed(job: Job, seed: int) -> None:
    """Train with one seed and write `seed-N/`: model, metrics.json, predictions.jsonl. Blocks.

    Raises:
        TrainingError: the loss is no number any more.
    """
    settings, home = job.settings, Path(job.settings.run.dir)
    work = home / f".work-seed-{seed}"
    began = time.monotonic()
    if job.memory is not None:
        job.memory.reset()
    model = build_model(job.start, job.head, seed=seed)
    _plug(job, model, job.memory)
    arguments = training_arguments(settings, job.head, work=work, seed=seed, device=job.device)
    if arguments.world_size > 1 and isinstance(model, PlugLMPreTrainedModel):
        model.share_statistics()
    if arguments.process_index == 0:
        shutil.rmtree(work, ignore_errors=True)
    trainer = make_trainer(
        settings,
        job.head,
        model,
        job.encoded,
        arguments=arguments,
        tokenizer=job.start.tokenizer,
        seed=seed,
        memory=job.memory,
        leave_out=int(one_is_left_over(job)),
        say=job.say if arguments.process_index == 0 else _silent,
    )
    every = settings.memory.refresh_every_steps
    if job.memory is not None and every:
        trainer.add_callback(RenewKeys(job.memory, every))
    trainer.train()
    if job.memory is not None and every:
        # The best weights were loaded again; the saved model makes these keys from itself.
        job.memory.renew(model, trainer.state.global_step)
    measured, predicted = _measure(job, trainer, model)
    if trainer.is_world_process_zero():
        record = {
            "seed": seed,
            **measured,
            **_history(trainer, settings.task.deciding_metric),
            "cut_rows": {split: rows.cut for split, rows in job.encoded.items()},
            "words_left_out": {split: rows.words_left_out for split, rows in job.encoded.items()},
            "seconds": round(time.monotonic() - began, 3),
        }
        _write(job, model, seed, record, predicted)
        shutil.rmtree(work, ignore_errors=True)


def one_is_left_over(job: Job) -> bool:
    """Whether an epoch's last batch would be a single sequence where training needs two.

    Normalising queries over the batch does; nothing else, so nothing else leaves out rows. With
    several processes accelerate fills short batches up.
    """
    if not job.start.needs_two_sequences or job.memory is None:
        return False
    return len(job.encoded["train"]) % job.settings.train.batch_size == 1


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as they are written: float32, which counts them, has no more digits to tell."""
    return {metric: round(value, 6) for metric, value in scores.items()}


def _measure(
    job: Job, trainer: TaskTrainer, model: Any
) -> tuple[dict[str, Any], dict[str, list[Prediction]]]:
    """Scores of dev and test, and the predictions that are written: test's, or else dev's."""
    reported = "test" if "test" in job.encoded else "dev"
    # It is dev's, and predict would apply it to any split.
    trainer.compute_metrics = None
    scores: dict[str, Any] = {}
    files: dict[str, list[Prediction]] = {}

    def measure(split: str, name: str) -> list[Prediction]:
        logits = trainer.predict(job.encoded[split]).predictions
        found = job.head.predictions(split, job.encoded[split], logits)
        scores[name] = rounded(job.head.scores(found))
        return found

    for split in ("dev", "test"):
        if split in job.encoded:
            found = measure(split, split)
            if split == reported:
                files[PREDICTIONS] = found
    if job.settings.evaluate.without_memory and job.memory is not None:
        _plug(job, model, None)
        name = f"{reported}_{WITHOUT}"
        files[f"predictions_{WITHOUT}.jsonl"] = measure(reported, name)
        _plug(job, model, job.memory)
    return scores, files


def _plug(job: Job, model: Any, memory: ReadMemory | None) -> None:
    """Attach a memory to a PlugLM, or say that it reads none on purpose."""
    if memory is not None:
        memory.plug_into(model)
    elif job.start.is_pluglm:
        model.attach(None)


def _history(trainer: TaskTrainer, metric: str) -> dict[str, Any]:
    epochs = [entry for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    best = next(e for e in epochs if e["step"] == trainer.state.best_global_step)
    return {
        "best_epoch": best["epoch"],
        "epochs": [
            {
                "epoch": e["epoch"],
                "step": e["step"],
                **rounded({metric: e[f"eval_{metric}"]}),
            }
            for e in epochs
        ],
    }


def _write(
    job: Job,
    model: Any,
    seed: int,
    record: dict[str, Any],
    predicted: dict[str, list[Prediction]],
) -> None:
    final = seed_directory(Path(job.settings.run.dir), seed)
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary / "model")
    job.start.tokenizer.save_pretrained(temporary / "model")
    write_json(temporary / "model" / "finetuned.json", _about(job, seed))
    for name, predictions in predicted.items():
        lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions]
        write_text(temporary / name, "".join(lines))
    write_json(temporary / METRICS, record)
    temporary.rename(final)


def _about(job: Job, seed: int) -> dict[str, Any]:
    """What a model's directory tells about how it was made, and which memory it reads."""
    settings, memory = job.settings, None
    if job.memory is not None:
        info, vectors = job.memory.memory.info(), job.memory.vectors
        renewed = settings.memory.refresh_every_steps > 0
        memory = {
            "store": str(Path(settings.memory.store).expanduser().resolve()),
            "content_version": info.content_version,
            "domains": list(settings.memory.domains),
            "mode": settings.memory.mode,
            "top_k": settings.memory.top_k,
            "vectors": None if vectors is None else str(vectors.resolve()),
            "keys_made_with": "this model" if renewed else str(job.start.path.resolve()),
        }
    return {
        "task": settings.task.kind,
        "metric": settings.task.deciding_metric,
        "max_length": settings.task.max_length,
        "start": str(job.start.path.resolve()),
        "tokenizer_fingerprint": job.start.fingerprint,
        "seed": seed,
        "memory": memory,
    }


def _silent(line: str) -> None:
    """What the other processes of a run say."""
