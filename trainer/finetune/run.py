"""A whole fine-tuning: check, train every seed that is not finished, and sum up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from trainer.export import write_json
from trainer.finetune.encoded import OWN_DOC_IDS, EncodedRows
from trainer.finetune.errors import TaskDataError
from trainer.finetune.heads import Head
from trainer.finetune.identity import first_difference, run_identity
from trainer.finetune.memory import VECTORS, ReadMemory, open_memory
from trainer.finetune.own_text import split_doc_ids
from trainer.finetune.results import RESULTS, seed_records, summary
from trainer.finetune.right_entries import with_named_entries, with_own_samples
from trainer.finetune.seed_run import Job, run_seed, seed_directory
from trainer.finetune.settings import FinetuneSettings
from trainer.finetune.start import Start, build_model, open_start
from trainer.finetune.task import read_task, refuse_measuring_on_train, splits_of
from trainer.settings_fields import ConfigError

IDENTITY = "inputs.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that was read and found to fit; nothing was trained."""

    head: Head
    start: Start
    encoded: dict[str, EncodedRows]
    device: str


def check(settings: FinetuneSettings, *, say: Say) -> Checked:
    """Read and check configuration, data, model, tokenizer and memory.

    Args:
        settings: what to do.
        say: told what was found.

    Raises:
        ConfigError, TaskDataError, CorpusError, StoreError, TokenizerMismatch, FileNotFoundError:
        the first thing that does not fit.
    """
    device = _device(settings)
    head = read_task(settings.task)
    refuse_measuring_on_train(settings.task)
    say(head.describe())
    start = open_start(settings)
    if start.note:
        say(start.note)
    encoded = {split: head.encode(split, start.tokenizer) for split in splits_of(settings.task)}
    for split, rows in encoded.items():
        if rows.cut:
            say(f"{split}: {rows.cut:,} rows are cut to task.max_length = "
                f"{settings.task.max_length} tokens")  # fmt: skip
        if rows.words_left_out:
            say(f"{split}: {rows.words_left_out:,} words have no token there, and are not "
                f"{'learned' if split == 'train' else 'scored'}")  # fmt: skip
    if start.memory is not None and start.memory.exclude_own_samples:
        encoded["train"] = _with_own_documents(settings, encoded["train"])
    if start.memory is not None and start.memory.retrieval_loss_weight:
        _check_retrieval_loss(settings, start)
    if start.memory is not None and start.memory.right_entry:
        encoded["train"] = with_named_entries(settings, start, encoded["train"])
    if start.memory is not None and start.memory.find_own_label:
        encoded["train"] = with_own_samples(settings, encoded["train"])
    if start.memory is not None and start.needs_two_sequences:
        _check_batches(settings, len(encoded["train"]))
    return Checked(head=head, start=start, encoded=encoded, device=device)


def claim(settings: FinetuneSettings, *, resume: bool) -> None:
    """Take the run's directory: a new one, or one whose finished seeds are of the same things.

    Raises:
        ConfigError: it holds finished seeds and `resume` is not set, or they are of other settings
            or files; names the first that differs.
    """
    home = Path(settings.run.dir)
    path, identity = home / IDENTITY, run_identity(settings)
    if path.is_file():
        difference = first_difference(json.loads(path.read_text(encoding="utf-8")), identity)
        if not any(home.glob("seed-*")):
            if difference:
                shutil.rmtree(home / VECTORS, ignore_errors=True)
        elif not resume:
            raise ConfigError(
                f"run.dir = {str(home)!r}: holds finished seeds already; go on with --resume, or "
                "choose another directory with --out DIR"
            )
        elif difference:
            raise ConfigError(
                f"run.dir = {str(home)!r}: its finished seeds are of another fine-tuning: "
                f"{difference}; change it back, or choose another directory with --out DIR"
            )
    home.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def finetune(settings: FinetuneSettings, checked: Checked, *, say: Say) -> dict[str, Any] | None:
    """Train every seed that is not finished and write results.json. Blocks.

    Args:
        settings: what to do.
        checked: what `check` found for them; the directory was taken with `claim`.
        say: told what is going on.

    Returns:
        What results.json holds; None in the processes of a torchrun beside the first one.

    Raises:
        TrainingError: a seed diverged; those before are kept. StoreError, RefreshFailed: the
        memory cannot be read.
    """
    home = Path(settings.run.dir)
    seeds = settings.train.seeds
    missing = [seed for seed in seeds if not seed_directory(home, seed).is_dir()]
    for seed in seeds:
        if seed not in missing:
            say(f"seed {seed} is finished: {seed_directory(home, seed)}")
    if missing:
        with contextlib.ExitStack() as stack:
            memory: ReadMemory | None = None
            if checked.start.memory is not None:
                model = build_model(checked.start, checked.head, seed=missing[0])
                torch.nn.Module.to(model, torch.device(checked.device))
                model.eval()
                memory = stack.enter_context(
                    open_memory(checked.start.memory, model, home, device=checked.device, say=say)
                )
                del model
            job = Job(
                settings=settings,
                head=checked.head,
                start=checked.start,
                encoded=checked.encoded,
                memory=memory,
                device=checked.device,
                say=say,
            )
            for seed in missing:
                run_seed(job, seed)
    if int(os.environ.get("RANK", "0")):
        return None
    return _conclude(settings, checked, home)


def _conclude(settings: FinetuneSettings, checked: Checked, home: Path) -> dict[str, Any]:
    records = seed_records(home, settings.train.seeds)
    memory = checked.start.memory
    results = {
        "task": settings.task.kind,
        "metric": settings.task.deciding_metric,
        "model": settings.model.path,
        "model_type": checked.start.config.model_type,
        "memory": None
        if memory is None
        else {
            "store": memory.store,
            "domains": list(memory.domains),
            "mode": memory.mode,
            "top_k": memory.top_k,
        },
        "note": checked.start.note,
        "sequences": {split: len(rows) for split, rows in checked.encoded.items()},
        "summary": summary(records),
        "seeds": records,
    }
    write_json(home / RESULTS, results)
    return results


def _with_own_documents(settings: FinetuneSettings, rows: EncodedRows) -> EncodedRows:
    """Training rows, each with the document that entries of its own text would be of."""
    if settings.task.kind not in ("classification", "regression"):
        raise ConfigError(
            "memory.exclude_own_samples = true: must be false with task.kind = "
            f'"{settings.task.kind}"; only rows of texts become entries'
        )
    doc_ids = split_doc_ids(settings.task)["train"]
    return rows.with_column(OWN_DOC_IDS, pa.array(doc_ids, pa.int64()))


def _check_retrieval_loss(settings: FinetuneSettings, start: Start) -> None:
    weight = f"memory.retrieval_loss_weight = {settings.memory.retrieval_loss_weight:g}"
    if settings.train.batch_size < 2:
        raise ConfigError(
            f"{weight}: needs a train.batch_size of at least 2, because a row's own text is told "
            "from those of the other rows of a pass; got 1"
        )
    if not start.config.output_retrievals:
        raise ConfigError(
            f"{weight}: needs a model that reports what it retrieves; set output_retrievals to "
            f"true in {start.path / 'config.json'}"
        )


def _check_batches(settings: FinetuneSettings, sequences: int) -> None:
    if settings.train.batch_size < 2:
        raise ConfigError(
            'train.batch_size = 1: must be at least 2, because the model\'s query_norm is "batch"'
        )
    if sequences < 2:
        raise TaskDataError(
            f"task.train = {settings.task.train!r}: gives one sequence, but the model's query_norm "
            'is "batch", which needs two'
        )


def _device(settings: FinetuneSettings) -> str:
    given, available = settings.train.device, torch.cuda.is_available()
    if given == "cuda" and not available:
        raise ConfigError('train.device = "cuda": this machine shows no CUDA GPU to torch')
    device = "cuda" if available and given == "auto" else given.replace("auto", "cpu")
    if settings.train.precision == "fp16" and device == "cpu":
        raise ConfigError('train.precision = "fp16": needs a GPU; use "fp32" or "bf16"')
    return device
