"""Compare the ratios of the quick benchmarks with those recorded on the same kind of machine.

Ends with 1 when a ratio is worse than the recorded median by more than --tolerance (0.3: times 1.3
where lower is better, divided by 1.3 where higher is) and worse than all that the record saw, or
when a benchmark fails; with 2 when nothing is recorded for this machine: the same CPU, or the same
GPU for what runs on it. --record makes or renews the record. --results takes what run_all.py wrote
instead of running anything. On a busy machine a ratio says less: the load is told.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import begin, note
from records import (
    MISSING,
    RECORDED,
    WORSE,
    Ratio,
    compare,
    entry_of,
    find_record,
    ratios_of,
    ratios_of_entry,
    verdict_table,
    write_record,
)
from run_all import add_arguments, collected
from suite import Benchmark, Choice, chosen, gpu_name, read_suite, run_each

SIZE = "quick"
FAILED, NO_RECORD = 1, 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--tolerance", type=float, default=0.3, help="default: 0.3, which is 30 %%")
    parser.add_argument(
        "--recorded", type=Path, default=RECORDED, metavar="DIR", help="records, a file a machine"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="of run_all.py; run nothing")
    parser.add_argument("--record", action="store_true", help="record instead of comparing")
    parser.add_argument("--note", default="", help="with --record: what a reader should know")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, too")
    args = parser.parse_args()
    if not 0 < args.tolerance < 10:
        parser.error(f"--tolerance {args.tolerance}: allowed: above 0 and below 10; 0.3 is 30 %")
    if args.note and not args.record:
        parser.error("--note: goes with --record")
    try:
        args.suite = read_suite(args.suite)
        args.benchmarks = chosen(args.suite, SIZE, args.only)
        if args.results:
            args.results = _read_results(args.results)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = _arguments()
    facts = begin()
    gpu = gpu_name()
    if args.results:
        facts, gpu = args.results["machine"], args.results["gpu"]
        note("the results' machine is the one that counts")
    elif (cores := facts["usable"] or facts["threads"]) <= 2 * facts["load"]:
        note(f"this machine is busy (load {facts['load']} on {cores} cores): ratios say less")
    try:
        return _checked(args, facts, gpu)
    except ValueError as error:
        note(f"error: {error}")
        return NO_RECORD


def _checked(args: argparse.Namespace, facts: dict[str, Any], gpu: str | None) -> int:
    benchmarks, records = args.benchmarks, {}
    if not args.record:
        for one in benchmarks:
            record = find_record(args.recorded, one, cpu=facts["cpu"], gpu=gpu)
            if record is not None:
                records[one.name] = record
            else:
                note(f"{one.name}: nothing is recorded for this machine; it is not run")
        benchmarks = [one for one in benchmarks if one.name in records]
        if not benchmarks:
            raise ValueError(
                f"{args.recorded} has no record for this machine ({facts['cpu']}, "
                f"{gpu or 'no GPU'}): make one on a quiet machine with "
                "`python benchmarks/check.py --record`"
            )
    whole = args.results or _run(args, benchmarks, facts, gpu)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    failed = {one.name: whole["failed"].get(one.name) for one in benchmarks}
    failed = {name: reason for name, reason in failed.items() if reason}
    measured = {
        one.name: ratios_of(one, whole["benchmarks"][one.name]["figures"])
        for one in benchmarks
        if one.name in whole["benchmarks"]
    }
    for name, reason in failed.items():
        note(f"FAILED: {name}: {reason}")
    if args.record:
        return _record(args, whole, measured, facts, gpu) or (FAILED if failed else 0)
    return _compared(args, whole, measured, records) or (FAILED if failed else 0)


def _run(
    args: argparse.Namespace, benchmarks: list[Benchmark], facts: dict[str, Any], gpu: str | None
) -> dict[str, Any]:
    choice = Choice(gpu=gpu)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_each(
            benchmarks, SIZE, Path(folder), choice, again=True, timeout_s=args.timeout_s
        )
    return collected(SIZE, facts, gpu, args.suite, outcome)


def _record(
    args: argparse.Namespace,
    whole: dict[str, Any],
    measured: dict[str, list[Ratio]],
    facts: dict[str, Any],
    gpu: str | None,
) -> int:
    entries = {
        name: entry_of(whole["benchmarks"][name], ratios, note=args.note)
        for name, ratios in measured.items()
        if ratios
    }
    if not entries:
        note("error: there is no ratio to record")
        return FAILED
    path = write_record(args.recorded, entries, cpu=facts["cpu"], gpu=gpu)
    for name, ratios in measured.items():
        for one in ratios:
            if one.spread.high > 2 * one.spread.median or one.spread.median > 2 * one.spread.low:
                note(
                    f"{name}: {one.name}: {one.spread.shown()} is wide, so that little will ever "
                    "be worse; record it again on a quieter machine"
                )
    note(f"recorded: {', '.join(entries)}: {path}")
    return 0


def _compared(
    args: argparse.Namespace,
    whole: dict[str, Any],
    measured: dict[str, list[Ratio]],
    records: dict[str, Any],
) -> int:
    verdicts = []
    for name, ratios in measured.items():
        record = records[name]
        if (now := whole["benchmarks"][name]["words"]) != record["words"]:
            raise ValueError(
                f"{name} was recorded with other arguments ({' '.join(record['words'])}) than "
                f"now ({' '.join(now)}): record it again with --only {name} --record"
            )
        verdicts += compare(name, ratios, ratios_of_entry(record), args.tolerance)
        if record["note"]:
            note(f"{name}: recorded at load {record['machine']['load']}: {record['note']}")
    if not verdicts:
        note("error: nothing was compared")
        return FAILED
    print(verdict_table(verdicts))
    return FAILED if any(one.verdict in (WORSE, MISSING) for one in verdicts) else 0


def _read_results(path: Path) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--results {path}: {error}") from error
    if not isinstance(whole, dict) or whole.get("size") != SIZE or "benchmarks" not in whole:
        raise ValueError(
            f"--results {path}: must be what `run_all.py --size {SIZE}` wrote, at that size"
        )
    return whole


if __name__ == "__main__":
    sys.exit(main())
