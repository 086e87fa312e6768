"""Run the benchmarks one after the other, and write their ratios into one file and a document.

Each runs in its own process; when one fails, the others go on, and the command ends with 1. What is
finished is not run again: a broken-off run goes on where it was. `suite.toml` says which there are
and how large they are at --size quick (some minutes on two cores) and at --size full (hours).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import REPOSITORY, begin, between_markers, describe_machine, note, positive
from records import Ratio, entry_of, ratio_table, ratios_of
from suite import SIZES, SUITE, Benchmark, Choice, chosen, gpu_name, read_suite, run_each

DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
BEGIN, END = "<!-- recorded -->", "<!-- end of recorded -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What run_all and check have in common."""
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument("--suite", type=Path, default=SUITE, metavar="FILE", help="another table")
    parser.add_argument("--timeout-s", type=positive, metavar="S", help="for each (default: none)")


def collected(
    size: str,
    facts: Mapping[str, Any],
    gpu: str | None,
    suite: Mapping[str, Benchmark],
    outcome: tuple[Mapping[str, dict[str, Any]], dict[str, str], dict[str, str]],
) -> dict[str, Any]:
    """One mapping of everything: machine, each benchmark's figures and ratios, failures.

    A benchmark whose figures lack a ratio that the table names is among the failures.
    """
    done, failed, left_out = outcome
    failed, benchmarks = dict(failed), {}
    for name, left in done.items():
        try:
            ratios = ratios_of(suite[name], left["figures"])
        except ValueError as error:
            failed[name] = str(error)
            note(f"{name}: FAILED: {error}")
            continue
        benchmarks[name] = {**entry_of(left, ratios), "figures": left["figures"]}
    return {
        "size": size,
        "machine": dict(facts),
        "gpu": gpu,
        "benchmarks": benchmarks,
        "failed": failed,
        "left_out": left_out,
    }


def markdown(whole: Mapping[str, Any], ratios: Mapping[str, Sequence[Ratio]]) -> str:
    """The table of the ratios, and what it was measured on."""
    loads = [one["machine"]["load"] for one in whole["benchmarks"].values()]
    machine = describe_machine(whole["machine"])
    lines = [
        f"`python benchmarks/run_all.py --size {whole['size']}` on {machine}"
        + (f"; {whole['gpu']}" if whole["gpu"] else "")
        + (f". Load when each began: {min(loads)} to {max(loads)}." if loads else "."),
        "",
        ratio_table(ratios),
    ]
    if whole["failed"]:
        lines += ["", f"Failed: {', '.join(whole['failed'])}."]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="quick")
    add_arguments(parser)
    parser.add_argument("--again", action="store_true", help="run finished ones, too")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results and logs (default: runs/benchmarks/SIZE)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="everything (default: results.json in --out)"
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=DOCUMENT,
        metavar="FILE",
        help=f"tables go there, between {BEGIN} and {END} (default: docs/benchmarks.md)",
    )
    parser.add_argument("--no-document", action="store_true", help="print the table only")
    parser.add_argument("--downloads", action="store_true", help="those that download, too")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="the corpus to read with it")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a fine-tuned one with a memory")
    parser.add_argument("--test", type=Path, metavar="FILE", help="the test file to ask it about")
    args = parser.parse_args()
    args.out = args.out or REPOSITORY / "runs" / "benchmarks" / args.size
    args.json = args.json or args.out / "results.json"
    try:
        args.suite = read_suite(args.suite)
        args.benchmarks = chosen(args.suite, args.size, args.only)
        if not args.no_document:  # before hours of work
            between_markers(args.document.read_text(encoding="utf-8"), "", BEGIN, END)
    except OSError as error:
        parser.error(f"--document: {error}")
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = _arguments()
    facts, gpu = begin(), gpu_name()
    choice = Choice(
        gpu=gpu,
        downloads=args.downloads,
        run=args.run,
        corpus=args.corpus,
        model=args.model,
        test=args.test,
    )
    outcome = run_each(
        args.benchmarks,
        args.size,
        args.out,
        choice,
        again=args.again,
        timeout_s=args.timeout_s,
    )
    whole = collected(args.size, facts, gpu, args.suite, outcome)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    note(f"written: {args.json}")
    ratios = {
        name: ratios_of(args.suite[name], one["figures"])
        for name, one in whole["benchmarks"].items()
    }
    shown = markdown(whole, ratios)
    print(shown)
    if not args.no_document:
        text = args.document.read_text(encoding="utf-8")
        args.document.write_text(between_markers(text, shown, BEGIN, END), encoding="utf-8")
        note(f"written: {args.document}")
    for name, reason in whole["failed"].items():
        note(f"FAILED: {name}: {reason}")
    return 1 if whole["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
