"""Sequences per second that one core reads and masks, over what one core trains on.

The embedded Wikipedia summaries become two corpora, whose sequences are read from disk, shuffled,
masked and given their right entries by the very code of a training run, on one thread:

  one corpus     as configs/quickstart.toml reads it
  two corpora    mixed by weight
  buckets        a step's sequences of like length together
  token budget   steps of so many tokens, in buckets
  short phase    cut to a quarter of their length

The peer is the trainer's need, in the same turn: forward, backward and AdamW of the quickstart's
model, without its memory (which would need less data per second), on the same core with the batches
just read. The page cache is warm, as it is in training after the first epoch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    note,
    positive,
    spread_of_ratios,
    table,
    turn_by_turn,
)

from cluster.config import load_config
from cluster.presets import preset
from memory_server.store.store import Store
from model import PlugLMForMaskedLM
from trainer.build import build_model, model_config
from trainer.corpus.build import build_corpus
from trainer.corpus.embedded import TEXT_FIELD, TITLE_FIELD, embedded_corpus_path
from trainer.corpus.info import CorpusInfo
from trainer.data.cursor import Cursor
from trainer.data.joined import JoinedSequences
from trainer.data.masking import MaskingSettings
from trainer.data.order import order_of
from trainer.data.pieces import Phases
from trainer.data.positives import PositiveEntries
from trainer.data.sequences import SequenceDataset
from trainer.data.stream import Cutting, TrainBatch, step_batches
from trainer.optim import make_optimizer
from trainer.settings import OptimSettings
from trainer.task import corpora_vocab

ENTRY_TOKENS = 64
NEED = "the trainer's need"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of reading: sequences per second and core, and that over the trainer's need."""

    way: str
    sequences_per_s: Spread
    over_need: Spread | None


class Reader:
    """Reads step after step; each call says how many sequences per second it read."""

    def __init__(
        self, infos: list[CorpusInfo], cutting: Cutting, *, steps: int, weights: tuple[float, ...]
    ) -> None:
        datasets = [SequenceDataset(info.sequences_path) for info in infos]
        self._data = JoinedSequences(datasets, pad_token_id=infos[0].pad_token_id)
        self._positives = PositiveEntries(Store.open(infos[0].memory_path))
        self._masking = MaskingSettings(vocab=corpora_vocab(infos), salient=0.5)
        self._order = order_of([d.rows for d in datasets], weights=weights, files=0, seed=0)
        self._cutting, self._steps, self._cursor = cutting, steps, Cursor()
        self.last: list[TrainBatch] = []

    def __call__(self) -> float:
        """Read the next steps."""
        began, count = time.perf_counter(), 0
        for _ in range(self._steps):
            self.last, self._cursor = step_batches(
                self._data,
                self._positives,
                self._masking,
                seed=0,
                cutting=self._cutting,
                rank=0,
                world_size=1,
                cursor=self._cursor,
                order=self._order,
            )
            count += sum(len(batch.doc_ids) for batch in self.last)
        return count / (time.perf_counter() - began)


class Trainer:
    """What a reader's last step is trained on; each call says how many sequences per second."""

    def __init__(self, info: CorpusInfo, source: Reader) -> None:
        settings = load_config(preset("quickstart"), ["data.corpus=none"]).model
        shape = model_config(settings, vocab_size=info.vocab_size, pad_token_id=info.pad_token_id)
        self.model: PlugLMForMaskedLM = build_model(shape, seed=0)
        self._optimizer = make_optimizer(self.model, OptimSettings())
        self._source = source

    def __call__(self) -> float:
        """One optimizer step."""
        batches = self._source.last
        began = time.perf_counter()
        for batch in batches:
            output = self.model(batch.input_ids, batch.attention_mask, labels=batch.labels)
            output.loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sum(len(b.doc_ids) for b in batches) / (time.perf_counter() - began)


def build(folder: Path, args: argparse.Namespace) -> list[CorpusInfo]:
    """The embedded text, and a part of it again as another corpus of the same tokenizer."""
    sizes = {"sequence_length": ENTRY_TOKENS + 1, "entry_tokens": ENTRY_TOKENS, "workers": 1}
    fields = {"text_field": TEXT_FIELD, "title_field": TITLE_FIELD}
    text = embedded_corpus_path()
    first = build_corpus(
        [text],
        folder / "first",
        tokenizer="train:8192",
        limit_documents=args.documents,
        **sizes,
        **fields,
    )
    # A copy: another name makes it another source, with documents of its own.
    again = shutil.copy(text, folder / "again.json")
    second = build_corpus(
        [again],
        folder / "second",
        tokenizer=str(first.tokenizer_path),
        limit_documents=max(2, first.documents // 5),
        **sizes,
        **fields,
    )
    return [first, second]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=positive, default=64, help="sequences per step")
    parser.add_argument("--steps", type=positive, default=20, help="steps read per turn")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--documents", type=positive, help="of the text; all unless given")
    args = parser.parse_args()
    facts = begin()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        note("building two corpora ...")
        infos = build(Path(folder), args)
        plain = Cutting(batch_size=args.batch, micro_batch_size=args.batch)
        buckets = replace(plain, micro_batch_size=max(1, args.batch // 4), length_buckets=True)
        if args.batch % buckets.micro_batch_size:
            parser.error(f"--batch {args.batch}: must be a multiple of 4, or below it")
        length = infos[0].sequence_length
        ways: dict[str, tuple[list[CorpusInfo], Cutting, tuple[float, ...]]] = {
            "one corpus": (infos[:1], plain, ()),
            "two corpora": (infos, plain, (1.0, 3.0)),
            "buckets": (infos[:1], buckets, ()),
            "token budget": (
                infos[:1],
                replace(buckets, batch_tokens=max(4, args.batch // 2) * length),
                (),
            ),
            "short phase": (infos[:1], replace(plain, phases=Phases((length // 4,))), ()),
        }
        readers = {
            name: Reader(given, cutting, steps=args.steps, weights=weights)
            for name, (given, cutting, weights) in ways.items()
        }
        readers["one corpus"]()
        calls: dict[str, Callable[[], float]] = {
            **readers,
            NEED: Trainer(infos[0], readers["one corpus"]),
        }
        taken = turn_by_turn(calls, repeats=args.repeats)
    rows = [
        Row(
            way=name,
            sequences_per_s=Spread.of(speeds),
            over_need=None if name == NEED else spread_of_ratios(speeds, taken[NEED]),
        )
        for name, speeds in taken.items()
    ]
    shown = [
        [
            row.way,
            row.sequences_per_s.shown(0),
            "" if row.over_need is None else row.over_need.shown(0),
        ]
        for row in rows
    ]
    print(table(["", "sequences/s per core", "over the need"], shown))
    finish(args.json, facts, args, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
