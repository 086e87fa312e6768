"""Finished chunks to a finished corpus: files joined, memory committed, corpus.json at the end."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from memory_server.store.segments import SegmentMeta
from memory_server.store.store import Store
from trainer.corpus.assemble import JoinTask, join, plan
from trainer.corpus.encode import ENTRIES, HELDOUT, TRAIN, ChunkDone, TokenizerFacts
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import CORPUS_FORMAT, MANIFEST
from trainer.corpus.parts import Int64Array
from trainer.corpus.pool import run_tasks
from trainer.corpus.progress import BuildProgress, Report
from trainer.corpus.settings import BuildSettings
from trainer.corpus.sources import Source
from trainer.corpus.workspace import Workspace, remove, write_json


def finish(
    space: Workspace,
    *,
    settings: BuildSettings,
    sources: Sequence[Source],
    tokenizer: TokenizerFacts,
    done: Sequence[ChunkDone],
    request: Mapping[str, Any],
    workers: int,
    report: Report,
) -> None:
    """Make the corpus of all chunks, which are kept till the end: interrupted, it begins anew.

    Raises:
        CorpusError: there is nothing to train on.
    """
    totals = _totals(done)
    _refuse_empty(totals, settings, sources)
    remove(space.final)
    space.final.mkdir()
    shutil.copytree(space.tokenizer, space.final / "tokenizer")
    meta = SegmentMeta(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        entry_tokens=settings.entry_tokens,
        pad_token_id=tokenizer.pad,
    )
    store = Store.create(
        space.final / "memory",
        tokenizer_fingerprint=meta.tokenizer_fingerprint,
        entry_tokens=meta.entry_tokens,
        vocab_size=meta.vocab_size,
        pad_token_id=meta.pad_token_id,
    )
    places = {
        ENTRIES: store.incoming,
        TRAIN: space.final / "sequences",
        HELDOUT: space.final / "heldout",
    }
    tasks: list[JoinTask] = []
    for kind, place in places.items():
        place.mkdir(exist_ok=True)
        tasks += plan(kind, done, space.chunks, place, settings.rows_per_file, meta)
    counts, rows = _join(tasks, workers, report)
    counts[[tokenizer.pad, tokenizer.cls, tokenizer.sep]] = 0
    np.save(space.final / "token_counts.npy", counts)
    store.commit(
        add_segments=[Path(task.file) for task in tasks if task.kind == ENTRIES],
        message=f"corpus of {', '.join(source.name for source in sources)}",
    )
    space.publish()
    write_json(space.out / MANIFEST, _manifest(settings, sources, tokenizer, done, rows, request))
    space.discard()


def _join(
    tasks: Sequence[JoinTask], workers: int, report: Report
) -> tuple[Int64Array, dict[str, int]]:
    """Write all files; (tokens of the training sequences, counted; rows of their files)."""
    rows: dict[str, int] = {}
    counts: Int64Array = np.zeros(tasks[0].meta.vocab_size, dtype=np.int64)
    for number, joined in enumerate(run_tasks(join, tasks, workers=min(workers, len(tasks))), 1):
        if joined.kind == TRAIN and joined.counts is not None:
            counts += joined.counts
            rows[Path(joined.file).name] = joined.rows
        report(BuildProgress(stage="writing", done=number, total=len(tasks)))
    return counts, rows


def _totals(done: Sequence[ChunkDone]) -> dict[str, int]:
    names = [field.name for field in fields(ChunkDone) if field.name not in ("index", "base")]
    return {name: sum(getattr(chunk, name) for chunk in done) for name in names}


def _refuse_empty(
    totals: Mapping[str, int], settings: BuildSettings, sources: Sequence[Source]
) -> None:
    if not totals["documents"]:
        raise no_documents(sources)
    if not totals["sequences"]:
        raise CorpusError(
            f"no training sequence: of {totals['documents']} documents "
            f"{totals['heldout_documents']} are held out, and the others have fewer than "
            f"{settings.minimum_sequence_tokens} tokens; give more text, or lower "
            "heldout_fraction or minimum_sequence_tokens"
        )


def no_documents(sources: Sequence[Source]) -> CorpusError:
    """The error for sources without any text."""
    names = ", ".join(source.name for source in sources)
    return CorpusError(f"{names}: no document holds any text; give files with text in them")


def _manifest(
    settings: BuildSettings,
    sources: Sequence[Source],
    tokenizer: TokenizerFacts,
    done: Sequence[ChunkDone],
    sequence_rows: Mapping[str, int],
    request: Mapping[str, Any],
) -> dict[str, Any]:
    totals = _totals(done)
    totals["heldout_sequences"] = totals.pop("heldout")
    per_source = []
    for source in sources:
        counts = _totals([chunk for chunk in done if chunk.base == source.base])
        per_source.append(
            {
                "name": source.name,
                "base": source.base,
                "documents": counts["documents"],
                "entries": counts["entries"],
            }
        )
    return {
        "format": CORPUS_FORMAT,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad,
        "sequence_length": settings.sequence_length,
        "entry_tokens": settings.entry_tokens,
        **totals,
        "sources": per_source,
        # So that whoever fetches parts one by one knows which rows are where.
        "sequence_rows": dict(sorted(sequence_rows.items())),
        **request,
    }
