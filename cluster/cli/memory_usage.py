"""`pluglm memory usage`: which entries a model reads on held-out text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cluster.cli.command import Command, positive
from cluster.cli.memory_options import add_json
from cluster.cli.text import table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a finished run")
    parser.add_argument(
        "--sequences",
        type=positive,
        metavar="N",
        help="held-out sequences (default: the run's setting)",
    )
    parser.add_argument(
        "-k", type=positive, metavar="K", help="entries per sequence (default: as trained)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="another setting"
    )
    add_json(parser)


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.places import run_config, run_model, with_corpus
    from cluster.evaluate import memory_usage

    overrides = list(options.set)
    if options.sequences is not None:
        overrides.append(f"evaluate.sequences={options.sequences}")
    if options.k is not None:
        overrides.append(f"memory.top_k={options.k}")
    config = run_config(with_corpus(options.run), overrides)
    told = memory_usage(
        config,
        run_model(options.run),
        run=options.run,
        say=lambda line: print(line, file=sys.stderr),
    )
    if options.json:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(describe_usage(told))
    return 0


def describe_usage(told: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{told['sequences']:,} held-out sequences read {told['k']} entries each, of "
        f"{told['entries']:,}"
    ]
    rows = [
        [
            str(layer["layer"]),
            f"{layer['used']:,}",
            f"{100 * layer['never_used_share']:.1f} %",
            f"{100 * layer['reading_of_most_used_hundredth']:.1f} %",
            f"{layer['attention_entropy']:.2f}",
        ]
        for layer in told["layers"]
    ]
    head = ("layer", "read", "never read", "by the most read 1 %", "attention entropy")
    lines.append(table(head, rows, most=(5, 14, 10, 20, 17), right=(0, 1, 2, 3, 4)))
    for name, title in (("by_domain", "domain"), ("by_source", "source")):
        shares = [[key, f"{100 * share:.1f} %"] for key, share in told[name].items()]
        if len(shares) > 1:
            lines.append(table((title, "reading"), shares, most=(40, 8), right=(1,)))
    times = ", ".join(
        f"{one['entries']:,} {_times(one['from'], one['to'])}" for one in told["times_read"]
    )
    lines.append(f"entries read: {times}")
    used = [[str(e["times"]), e["title"], e["text"]] for e in told["most_used"]]
    lines.append(table(("times", "title", "text"), used, most=(6, 28, 70), right=(0,)))
    if told["alike"]:
        pairs = [
            [
                f"{pair['cosine']:.3f}",
                *(str(value) for e in pair["entries"] for value in (e["id"], e["text"])),
            ]
            for pair in told["alike"]
        ]
        lines.append("entries that are nearly the same, among those read most:")
        head = ("cosine", "id", "one", "id", "other")
        lines.append(table(head, pairs, most=(6, 20, 36, 20, 36), right=(0,)))
    if training := told.get("training"):
        lines += _training(training)
    return "\n\n".join(lines)


def _times(least: int, most: int) -> str:
    if most > least:
        return f"{least:,} to {most:,} times"
    return "once" if most == 1 else f"{most:,} times"


def _training(told: dict[str, Any]) -> list[str]:
    about = "about " if told["estimated"] else ""
    lines = [
        f"training read {about}{told['used']:,} of {told['entries']:,} entries in steps "
        f"{told['from_step'] + 1:,} to {told['to_step']:,} ({told['reads']:,} reads); never read: "
        f"{about}{100 * told['never_used_share']:.1f} %"
    ]
    if told["reads"]:
        lines[0] += (
            f"; the most read 1 % has {100 * told['reading_of_most_used_hundredth']:.1f} % of the "
            f"reading, the first entry {100 * told['top_read_share']:.2f} %; evenness "
            f"{told['read_evenness']:.2f}"
        )
    for name, title in (("by_domain", "domain"), ("by_source", "source")):
        attended = told[f"attended_{name}"]
        shares = [
            [key, f"{100 * share:.1f} %", f"{100 * attended.get(key, 0.0):.1f} %"]
            for key, share in told[name].items()
        ]
        if len(shares) > 1:
            head = (title, "read in training", "attention")
            lines.append(table(head, shares, most=(40, 16, 9), right=(1, 2)))
    return lines


USAGE = Command(
    name="memory usage",
    summary="tell which entries a model reads, and which are alike",
    description="""\
Run a trained model over its held-out text and tell how it uses its memory: how many
entries are read and how often, the share that never is, how evenly attention is
spread, what is read by domain and source, and which entries have nearly the same key.
What training read is told from its newest checkpoint (logging.memory_usage).""",
    example="""\
pluglm memory usage runs/first
pluglm memory usage runs/first --sequences 2000 --json""",
    configure=_arguments,
    run=_run,
)
