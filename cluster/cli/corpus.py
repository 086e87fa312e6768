"""`pluglm corpus`: text to training sequences and a memory of entries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, positive
from cluster.cli.text import pairs

if TYPE_CHECKING:
    from trainer.corpus.info import CorpusInfo

DEFAULT_TOKENIZER = "train:16384"


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    from trainer.corpus.settings import BuildSettings

    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a file or a directory of files; see above"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the corpus directory to make"
    )
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        metavar="WHICH",
        help="train:SIZE for WordPiece trained on this text, or a name or path that transformers "
        "loads (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        type=positive,
        default=BuildSettings.sequence_length,
        metavar="T",
        help="tokens of a training sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--entry-tokens",
        type=positive,
        default=BuildSettings.entry_tokens,
        metavar="S",
        help="tokens of a memory entry (default: %(default)s)",
    )
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=BuildSettings.heldout_fraction,
        metavar="SHARE",
        help="share of the documents that training never sees (default: %(default)s)",
    )
    parser.add_argument(
        "--text-field",
        default=BuildSettings.text_field,
        metavar="NAME",
        help="field of a row that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--title-field",
        default=BuildSettings.title_field,
        metavar="NAME",
        help="field of a row that holds the title (default: %(default)s)",
    )
    parser.add_argument(
        "--title-in-entry",
        action="store_true",
        help="begin each entry's tokens with its document's title",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument(
        "--limit-documents", type=positive, metavar="N", help="read no more documents than this"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="throw away what DIR holds of an earlier build"
    )


def _build(options: argparse.Namespace) -> int:
    from trainer.corpus.build import build_corpus
    from trainer.corpus.progress import ProgressBar

    with ProgressBar() as progress:
        info = build_corpus(
            options.sources,
            options.out,
            tokenizer=options.tokenizer,
            sequence_length=options.sequence_length,
            entry_tokens=options.entry_tokens,
            heldout_fraction=options.heldout_fraction,
            text_field=options.text_field,
            title_field=options.title_field,
            title_in_entry=options.title_in_entry,
            limit_documents=options.limit_documents,
            workers=options.workers,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(describe_corpus(info))
    print(f"\nnext: pluglm pretrain CONFIG.toml data.corpus={options.out}")
    return 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=Path, metavar="DIR", help="the corpus directory")


def _info(options: argparse.Namespace) -> int:
    from trainer.corpus.info import load_corpus_info

    print(describe_corpus(load_corpus_info(options.corpus)))
    return 0


def describe_corpus(info: CorpusInfo) -> str:
    """What a corpus holds, one fact a line."""
    rows = [
        ("corpus", str(info.path)),
        ("documents", f"{info.documents:,}, of them {info.heldout_documents:,} held out"),
        ("tokens", f"{info.tokens:,}"),
        (
            "sequences",
            f"{info.sequences:,} of up to {info.sequence_length} tokens, and "
            f"{info.heldout_sequences:,} held out",
        ),
        ("entries", f"{info.entries:,} of up to {info.entry_tokens} tokens, in {info.memory_path}"),
        (
            "tokenizer",
            f"{info.vocab_size:,} tokens, fingerprint {info.tokenizer_fingerprint}, in "
            f"{info.tokenizer_path}",
        ),
    ]
    if info.empty_documents:
        rows.insert(2, ("", f"{info.empty_documents:,} of them tokenise to nothing"))
    for source in info.sources:
        rows.append(
            ("source", f"{source.name}: {source.documents:,} documents, {source.entries:,} entries")
        )
    return pairs(rows)


BUILD = Command(
    name="corpus build",
    summary="make training sequences and a memory of entries from text",
    description="""\
Make a corpus from text: token sequences to train on, and a memory whose entries
cover all documents. It streams, uses all cores, and when it is interrupted the
same command goes on where it was.

A SOURCE is one of these, or a directory of them:
  .txt                     documents parted by blank lines
  .jsonl .ndjson .json     rows, or an object of title to text or to row
  .csv .tsv                with a header
  .parquet .arrow .feather .ipc
  a Hugging Face dataset written by save_to_disk
Text files may be compressed as .gz.""",
    example="""\
pluglm corpus build articles.jsonl --out data/articles --tokenizer train:16384
pluglm corpus build wiki/ news.parquet --out data/mixed --tokenizer bert-base-uncased""",
    configure=_build_arguments,
    run=_build,
    after_interrupt="what was finished is kept: the same command goes on from there",
)

INFO = Command(
    name="corpus info",
    summary="tell what a corpus holds",
    description="Tell what a finished corpus holds, and where its parts are.",
    example="pluglm corpus info data/articles",
    configure=_info_arguments,
    run=_info,
)
