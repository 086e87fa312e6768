"""`pluglm convert`: published checkpoints both ways, and BERTs that become PlugLMs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, positive
from cluster.cli.text import pairs

if TYPE_CHECKING:
    from trainer.convert.report import ConversionReport


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the directory to make"
    )


def _published_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT.pt", help="what the published code saved"
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="JSON", help="the config.json beside it"
    )
    parser.add_argument(
        "--documents", type=Path, metavar="NPY", help="tokens of the memory's entries, int16 [N,S]"
    )
    parser.add_argument("--keys", type=Path, metavar="NPY", help="their keys, float16 [N,Q]")
    parser.add_argument("--values", type=Path, metavar="NPY", help="their values, float16 [N,H]")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the tokenizer, a directory or a vocabulary file; gives the entries their text",
    )
    _out(parser)


def _published(options: argparse.Namespace) -> int:
    from trainer.convert.published import MODEL, convert_published

    report = convert_published(
        options.checkpoint,
        options.config,
        options.out,
        keys=options.keys,
        values=options.values,
        documents=options.documents,
        tokenizer=options.tokenizer,
    )
    print(_describe(report))
    print(f"\nnext: AutoModelForMaskedLM.from_pretrained({str(options.out / MODEL)!r})")
    return 0


def _to_published_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="DIR",
        help="what `convert published` made, or a legacy model's directory",
    )
    _out(parser)


def _to_published(options: argparse.Namespace) -> int:
    from trainer.convert.to_published import convert_to_published

    report = convert_to_published(options.source, options.out)
    rows = [
        ("written", ", ".join(sorted(path.name for path in options.out.iterdir()))),
        ("tensors", f"{len(report.taken):,}, aliases included"),
        *((name, f"{value:,}") for name, value in report.memory.items()),
        *(("note", note) for note in report.notes),
    ]
    print(pairs([("out", str(options.out)), *rows]))
    return 0


def _bert_arguments(parser: argparse.ArgumentParser) -> None:
    from trainer.convert.bert import MemoryParts

    parser.add_argument(
        "source",
        metavar="DIR_OR_NAME",
        help="a BERT-like checkpoint: a directory, which is read offline, or a hub's name",
    )
    _out(parser)
    parser.add_argument(
        "--memory-layers",
        type=_whole,
        default=MemoryParts.memory_layers,
        metavar="M",
        help="how many layers, the last ones, read the memory (default: %(default)s)",
    )
    parser.add_argument(
        "--key-size",
        type=positive,
        default=MemoryParts.key_size,
        metavar="Q",
        help="width of queries and keys (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-ffn-size",
        type=_whole,
        metavar="WIDTH",
        help="width of the feed-forward part beside the memory; 0 leaves it out (default: the "
        "encoder's own width)",
    )
    for name, choices, help in (
        ("memory_attention", "multi_head single_head sentence_level", "how entries are read"),
        ("value_pooling", "shared separate tokens", "what of an entry is read"),
        ("query_norm", "batch layer none", "normalisation of the query"),
        ("entry_pooler", "attentive mean max cls", "how an entry becomes one vector"),
        ("query_pooler", "attentive mean max cls", "how a sequence becomes one query"),
        ("memory_init", "normal copy", "how the memory's parts are made"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            choices=choices.split(),
            default=getattr(MemoryParts, name),
            help=f"{help} (default: %(default)s)",
        )
    parser.add_argument(
        "--entry-encoder",
        default=MemoryParts.entry_encoder,
        metavar="WHICH",
        help="what reads an entry's tokens: word_embedding, or first_N, which also runs the first "
        "N layers (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-beta-init",
        type=float,
        default=MemoryParts.memory_beta_init,
        metavar="BETA",
        help="start of the weight of query-key likeness (default: %(default)s)",
    )
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="make it in the published layout, for the published code",
    )
    parser.add_argument(
        "--seed", type=_whole, default=0, help="of the parts that are made (default: %(default)s)"
    )


def _bert(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from trainer.convert.bert import MemoryParts, convert_bert

    parts = MemoryParts(**{f.name: getattr(options, f.name) for f in fields(MemoryParts)})
    report = convert_bert(options.source, options.out, parts=parts, seed=options.seed)
    print(_describe(report))
    print(
        f"\nnext: AutoModelForMaskedLM.from_pretrained({str(options.out)!r}), or "
        f"model.init_from={options.out} in a pretrain configuration of these sizes"
    )
    return 0


def _describe(report: ConversionReport) -> str:
    """What became of the tensors, layers put together; conversion.json names each one."""
    from model.bert_weights import summarised
    from trainer.convert.report import REPORT

    rows = [("source", report.source), ("out", report.out)]
    for what, names in (
        ("taken", list(report.taken)),
        ("left", list(report.left)),
        ("made", list(report.made)),
        ("overridden", list(report.disagreeing)),
    ):
        if names or what in ("taken", "left", "made"):
            rows.append((what, f"{len(names):,} tensors"))
            rows += [("", part) for part in summarised(names)]
    if report.defaults:
        rows.append(("by default", f"{len(report.defaults):,} settings that the JSON leaves out"))
        rows += [("", f"{name} = {json.dumps(value)}") for name, value in report.defaults.items()]
    rows += [(name, f"{value}") for name, value in report.memory.items() if value is not None]
    rows += [("note", note) for note in report.notes]
    rows.append(("report", f"{report.out}/{REPORT} names every tensor"))
    return pairs(rows)


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return number


PUBLISHED = Command(
    name="convert published",
    summary="read a published checkpoint and its memory",
    description="""\
Read a published PlugLM checkpoint, its configuration and its memory's arrays:

  DIR/model     a model directory for transformers and for every pluglm command
  DIR/memory    the documents as a memory store; an entry's id is its row
  DIR/vectors   the keys and values as they are, for a memory that is searched
                without being encoded again

Everything is checked first: tensors that are missing, unknown or of another
shape, tokens beyond the vocabulary, entries longer than the model's positions,
arrays that do not belong together. Only tensors and numbers are read; a pickle
that holds code is refused and never run.""",
    example="""\
pluglm convert published ckpt_8000.pt --config config.json --out pluglm-wiki
pluglm convert published ckpt_8000.pt --config config.json --documents tokenized_wiki.npy \
--keys keys.npy --values values.npy --tokenizer vocab.txt --out pluglm-wiki""",
    configure=_published_arguments,
    run=_published,
    after_interrupt="nothing was written",
)

TO_PUBLISHED = Command(
    name="convert to-published",
    summary="write a legacy model for the published code",
    description="""\
Write a model in the published layout (legacy) and its memory as the files that
the published code reads: ckpt.pt, config.json, and tokenized.npy, keys.npy and
values.npy where there is a memory. What `convert published` read comes back
bit for bit.""",
    example="pluglm convert to-published pluglm-wiki --out for-the-published-code",
    configure=_to_published_arguments,
    run=_to_published,
    after_interrupt="nothing was written",
)

BERT = Command(
    name="convert bert",
    summary="start a PlugLM from a BERT-like checkpoint",
    description="""\
Make a PlugLM from a BERT-like checkpoint: the encoder, the embeddings and, where
there is one, the masked-LM head are taken; the memory's parts are made. The last
layers become memory layers, which keep BERT's attention and lose its feed-forward
part. DIR/conversion.json names every tensor that was taken, left or made.

The defaults are the paper's. To train it further, `--query-norm layer
--value-pooling tokens` learns to read the memory sooner (docs/concepts.md).""",
    example="""\
pluglm convert bert bert-base-uncased --out pluglm-start
pluglm convert bert ./minilm --out start --memory-layers 1 --query-norm layer \
--value-pooling tokens""",
    configure=_bert_arguments,
    run=_bert,
    after_interrupt="nothing was written",
)
