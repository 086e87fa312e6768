"""After the last step: what was learned, measured on held-out text, and some of it to look at."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.corpus.tokenizer import load_tokenizer
from trainer.evaluate import evaluation_report
from trainer.export import read_exported, write_json
from trainer.job import TrainJob
from trainer.reads.summary import counted_in, training_usage
from trainer.samples import make_samples
from trainer.usage import usage_report


def evaluate_run(job: TrainJob) -> dict[str, Any]:
    """Evaluate the exported model with the job's memory; writes evaluation.json, usage.json and
    samples.json.

    Returns:
        What `evaluation.json` holds.
    """
    settings = job.settings
    model = read_exported(job.run_dir)
    nn.Module.to(model, job.device)
    evaluation = evaluation_report(
        model,
        job.memory,
        lambda: job.task.heldout(settings),
        k=settings.memory.top_k,
        device=job.device,
    )
    write_json(job.run_dir / "evaluation.json", evaluation)
    # Of as many sequences as were evaluated, with the memory as it is now.
    usage = usage_report(
        model,
        job.memory,
        job.task.heldout(settings),
        k=settings.memory.top_k,
        device=job.device,
    )
    if settings.logging.memory_usage and (counted := counted_in(job.run_dir)) is not None:
        usage["training"] = training_usage(*counted, job.memory)
    write_json(job.run_dir / "usage.json", usage)
    samples: list[dict[str, Any]] = []
    if settings.evaluate.samples:
        batch = next(iter(job.task.heldout(settings)))
        rows = slice(0, settings.evaluate.samples)
        samples = make_samples(
            model,
            job.memory,
            load_tokenizer(job.tokenizer),
            batch.rows(rows),
            k=settings.memory.top_k,
            device=job.device,
        )
    write_json(job.run_dir / "samples.json", samples)
    return evaluation
