"""What the memory is worth after `pluglm quickstart`, over seeds, with its time and memory.

Runs the whole command once per seed, each in a directory of its own, so that every wall time
includes building the corpus; or reads finished run directories. The peers are in the same
evaluation: the same trained model with a shuffled memory, and with none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import REPOSITORY, argument_parser, begin, finish, note, table
from watch import PLUGLM, watch

WATCHED = "watched.json"
CONDITIONS = ("right", "shuffled", "none")

Figures = dict[str, float]


def run_seed(home: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Run the command; returns its run directory, which then also holds watched.json."""
    command = [*PLUGLM, "quickstart", "--dir", str(home), "--seed", str(seed)]
    for override in overrides:
        command += ["--set", override]
    home.mkdir(parents=True)
    watched = watch(command, cwd=REPOSITORY, log=home / "quickstart.log")
    run_dir = home / f"run-seed{seed}"
    (run_dir / WATCHED).write_text(json.dumps(asdict(watched)) + "\n", encoding="utf-8")
    return run_dir


def read_run(run_dir: Path) -> Figures:
    """The figures of a finished run, by the words of the table.

    Raises:
        SystemExit: it is none.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        raise SystemExit(f"{run_dir}: holds no evaluation.json; give the directory of a whole run")
    evaluation = _read(path)
    figures: Figures = {}
    for case in evaluation["cases"]:
        for measure in ("loss", "accuracy"):
            for name in CONDITIONS:
                if name in case["conditions"]:
                    value = float(case["conditions"][name][measure])
                    figures[f"{case['name']}: {measure}, {name}"] = value
        if case["right_entry_rate"] is not None:
            figures[f"right entry in top-{evaluation['k']}"] = float(case["right_entry_rate"])
    if (run_dir / "edits.json").exists():
        edits = _read(run_dir / "edits.json")
        figures["edits"] = float(edits["edits"])
        figures["edits followed"] = float(edits["followed"])
        figures["edits returned"] = float(edits["returned"])
    if (run_dir / WATCHED).exists():
        watched = _read(run_dir / WATCHED)
        figures["wall seconds"] = float(watched["seconds"])
        figures["peak RSS, GiB"] = float(watched["peak_rss_gib"])
        if watched["peak_pss_gib"] is not None:
            figures["peak PSS, GiB"] = float(watched["peak_pss_gib"])
    return figures


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def rows_of(runs: Sequence[Figures]) -> list[list[str]]:
    """A row per figure: each run's, then mean and standard deviation over the runs that have it."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    rows = []
    for name in names:
        values = [run[name] for run in runs if name in run]
        show = _format(name)
        mean = show(statistics.mean(values))
        if len(values) > 1:
            mean += f" ± {show(statistics.stdev(values))}"
        rows.append([name, *(show(run[name]) if name in run else "" for run in runs), mean])
    return rows


def _format(name: str) -> Callable[[float], str]:
    if "accuracy" in name or "top-" in name:
        return "{:.1%}".format
    if name.startswith(("edits", "wall")):
        return "{:.1f}".format
    return "{:.3f}".format


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    source.add_argument(
        "--read", type=Path, nargs="+", metavar="RUN", help="finished run directories instead"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/quickstart-gain"),
        help="where the runs go, a new directory per seed (default: runs/quickstart-gain)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of the runs"
    )
    args = parser.parse_args()
    if not args.read:
        for seed in args.seeds:
            if (args.dir / f"seed{seed}").exists():
                parser.error(
                    f"{args.dir / f'seed{seed}'}: is there already; give another --dir, or read it "
                    f"with --read {args.dir / f'seed{seed}' / f'run-seed{seed}'}"
                )
    return args


def main() -> None:
    args = _arguments()
    facts = begin()
    run_dirs: list[Path] = args.read or []
    if not args.read:
        for seed in args.seeds:
            note(f"seed {seed} ...")
            run_dirs.append(run_seed((args.dir / f"seed{seed}").resolve(), seed, args.set))
    runs = [read_run(run_dir) for run_dir in run_dirs]
    print("\nHeld-out text; loss in nats per masked token; mean ± standard deviation\n")
    print(table(["", *(run_dir.name for run_dir in run_dirs), "mean"], rows_of(runs)))
    figures = {str(run_dir): run for run_dir, run in zip(run_dirs, runs, strict=True)}
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
