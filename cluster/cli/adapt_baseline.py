"""`pluglm adapt baseline`: plain BERT pre-trained on text, for a comparison to have a baseline."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import some_path, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.editing.passages import Knowledge


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate: a number above 0, below 1")
    return rate


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=some_path, nargs="+", metavar="FILE", help="text to train on")
    parser.add_argument(
        "--from", dest="start", type=some_path, metavar="DIR", help="go on with this plain BERT"
    )
    parser.add_argument(
        "--like",
        type=some_path,
        metavar="DIR",
        help="begin with random weights: plain BERT of this PlugLM's size, with its tokenizer",
    )
    parser.add_argument(
        "--out", type=some_path, required=True, metavar="DIR", help="where the model is written"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=1000,
        metavar="N",
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="B",
        help="sequences of a step (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        type=positive,
        default=128,
        metavar="T",
        help="tokens of the longest sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--lr", type=_rate, default=1e-4, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        metavar="N",
        help="of random weights, the order of the text and the masks (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto: a GPU if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="number format of activations (default: %(default)s)",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a row that holds the text (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> int:
    if (options.start is None) == (options.like is None):
        raise UsageError(
            "give either --from (a plain BERT to go on with) or --like (a PlugLM of the size "
            "wanted); see `pluglm adapt baseline --help`"
        )
    if options.sequence_length < 3:
        raise UsageError("--sequence-length: must be at least 3, as [CLS] and [SEP] take two")
    from cluster.editing.passages import Knowledge
    from cluster.finetune import quiet_transformers
    from cluster.memory_tools import chosen_device
    from trainer.finetune.plain_bert import (
        ABOUT,
        PlainTraining,
        open_plain,
        plain_like,
        pretrain_plain,
    )

    quiet_transformers()
    knowledge = Knowledge(files=tuple(options.files), text_field=options.text_field)
    given = options.start if options.start is not None else options.like
    model = open_plain(given) if options.start is not None else plain_like(given, seed=options.seed)
    told = pretrain_plain(
        model,
        given,
        _texts(knowledge),
        options.out,
        PlainTraining(
            steps=options.steps,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            lr=options.lr,
            seed=options.seed,
            device=chosen_device(options.device),
            precision=options.precision,
        ),
        about={
            "start": str(given.resolve()),
            "weights": "went on" if options.start is not None else "random, of its size",
            "files": [str(file) for file in options.files],
        },
        say=_say,
    )
    last = f"; masked-LM loss {told['losses'][-1]['loss']:.3f}" if told["losses"] else ""
    print(f"{told['steps']:,} steps in {told['seconds']:.0f} s{last}: {options.out / ABOUT}")
    return 0


def _texts(knowledge: Knowledge) -> Iterator[str]:
    return (passage.text for passage in knowledge.passages() if not passage.empty)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


BASELINE = Command(
    name="adapt baseline",
    summary="pre-train plain BERT on text: the baselines of a comparison",
    description="""\
Pre-train plain BERT, which reads no memory, on text by masked language modelling (15 %
of the tokens, dynamic masks). --from goes on with a BERT: on the domain's text that is
DAPT, the further pre-training that a memory is compared with. --like begins with random
weights in the size of a PlugLM: on the text that this was pre-trained on, for as many
steps of as many sequences, that is plain BERT of the same size and training.""",
    example="""\
pluglm adapt baseline articles.jsonl --like runs/first/model --steps 8000 --out runs/bert
pluglm adapt baseline papers.parquet --from runs/bert --steps 1000 --out runs/bert-biomed""",
    configure=_arguments,
    run=_run,
    after_interrupt="nothing was written: the model appears when it is whole",
)
