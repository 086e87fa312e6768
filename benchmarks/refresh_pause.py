"""Seconds that training stands still per refresh of the keys: async against sync.

Runs `pluglm pretrain` on the shipped quickstart configuration (Ray, two shards, two trainers) once
per mode and turn, and reads the refresh lines of its metrics.jsonl. The refresh after the last
step, for which training has nothing left to do, is not counted. The peer of async is sync in the
same run of the benchmark; "off" shows the speed of steps that no refresh disturbs, and a step's
time with async over its time with off is what refreshing costs training: waiting, and computing
power that the shards took from the trainers. Both are told apart: what training waited is measured
where it waits, the copy of the weights (publishing) apart from the switch of all ranks.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import (
    REPOSITORY,
    Spread,
    argument_parser,
    begin,
    finish,
    note,
    positive,
    spread_of_ratios,
    table,
)
from invented import write_documents
from watch import PLUGLM, watch

from cluster.presets import preset
from trainer.corpus.build import build_corpus
from trainer.corpus.info import load_corpus_info
from trainer.metrics_lines import read_metrics

MODES = ("async", "sync", "off")
ENTRY_TOKENS = 64
_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Paused:
    """One run's figures.

    Attributes:
        stood_still, total: seconds of each refresh: of training's pause, and from the publication
            of the weights to the switch.
        publishing: seconds of each pause that were not the switch; none with sync.
        waited, switched, data: shares of the run's time that training waited for publishing, for
            switching (with sync: for the whole refresh), and for sequences to be read, masked and
            copied to the device.
        staleness: optimizer steps between the weights that a step trains and those that made the
            keys that it searches, for every step.
        steps_per_s: over the whole run but its first step, pauses included.
        missed: refreshes that were due but not switched to before the end.
    """

    mode: str
    stood_still: list[float]
    total: list[float]
    publishing: list[float]
    waited: float
    switched: float
    data: float
    staleness: list[int]
    steps_per_s: float
    missed: int


def read_run(run_dir: Path, *, mode: str, steps: int, every: int, batch: int) -> Paused:
    """The figures of a finished run."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    refreshes = [x for x in lines if x["kind"] == "refresh" and x["step"] < steps]
    logged = [x for x in lines if x["kind"] == "train"]
    seconds, data, before = 0.0, 0.0, logged[0]["step"]
    for line in logged[1:]:
        seconds += (line["step"] - before) * batch / line["sequences_per_s"]
        data += (line["step"] - before) * line["data_ms"] / 1000
        before = line["step"]
    switches = {int(x["step"]): int(x["encoder_step"]) for x in refreshes}
    staleness, encoder_step = [], 0
    for step in range(steps):
        encoder_step = switches.get(step, encoder_step)
        staleness.append(step - encoder_step)
    due = 0 if mode == "off" else (steps - 1) // every
    still = [float(x["seconds_stood_still"]) for x in refreshes]
    publishing = [float(x["seconds_publishing"]) for x in refreshes]
    return Paused(
        mode=mode,
        stood_still=still,
        publishing=publishing,
        waited=sum(publishing) / seconds,
        data=data / seconds,
        switched=(sum(still) - sum(publishing)) / seconds,
        total=[float(x["seconds_total"]) for x in refreshes],
        staleness=staleness,
        steps_per_s=(logged[-1]["step"] - logged[0]["step"]) / seconds,
        missed=due - len(refreshes),
    )


def run_once(corpus: Path, home: Path, *, mode: str, turn: int, args: argparse.Namespace) -> Paused:
    """One pre-training through the command, then its figures."""
    run_dir = home / f"{mode}-{turn}"
    overrides = [
        f"run.dir={run_dir}",
        f"data.corpus={corpus}",
        f"memory.refresh={mode}",
        f"memory.refresh_every_steps={args.every}",
        f"optim.steps={args.steps}",
        f"optim.batch_size={args.batch}",
        f"optim.retrieval_warmup_steps={args.steps}",
        "checkpoint.every_steps=0",
        "evaluate.every_steps=0",
        "evaluate.sequences=32",
        "evaluate.samples=0",
        f"logging.log_every_steps={_LOG_EVERY}",
        "logging.progress=false",
    ]
    command = [*PLUGLM, "pretrain", preset("quickstart"), *overrides, *args.set]
    watch(command, cwd=REPOSITORY, log=home / f"{mode}-{turn}.log")
    paused = read_run(run_dir, mode=mode, steps=args.steps, every=args.every, batch=args.batch)
    note(f"{mode}, turn {turn + 1}: {paused}")
    return paused


def invented_corpus(home: Path, documents: int) -> Path:
    """Build a corpus from invented text."""
    text = home / "documents.jsonl"
    write_documents(text, documents)
    info = build_corpus(
        [text],
        home / "corpus",
        tokenizer="train:8192",
        sequence_length=ENTRY_TOKENS + 1,
        entry_tokens=ENTRY_TOKENS,
    )
    return info.path


def _row(mode: str, runs: list[Paused]) -> list[str]:
    still = [seconds for run in runs for seconds in run.stood_still]
    total = [seconds for run in runs for seconds in run.total]
    staleness = Spread.of([float(step) for run in runs for step in run.staleness])
    speed = Spread.of([run.steps_per_s for run in runs])
    shares_waited = [
        [getattr(run, name) for run in runs] for name in ("waited", "switched", "data")
    ]
    return [
        mode,
        str(len(still)),
        str(sum(run.missed for run in runs)),
        *(Spread.of(seconds).shown(3) if seconds else "none" for seconds in (still, total)),
        f"{staleness.median:.0f}, {staleness.high:.0f}",
        *(f"{100 * Spread.of(shares).median:.2f} %" for shares in shares_waited),
        speed.shown(),
    ]


_HEADERS = [
    "refresh",
    "refreshes",
    "missed",
    "stood still, s",
    "from publishing to switching, s",
    "staleness, steps (median, most)",
    "waited to publish",
    "waited to switch",
    "waited for data",
    "steps/s",
]


def _step_time(runs: dict[str, list[Paused]]) -> Spread | None:
    """Seconds of a step with async over those with off, turn by turn."""
    if not {"async", "off"} <= runs.keys():
        return None
    steps_per_s = {mode: [run.steps_per_s for run in runs[mode]] for mode in ("async", "off")}
    return spread_of_ratios(steps_per_s["off"], steps_per_s["async"])


def _ratios(runs: dict[str, list[Paused]]) -> dict[str, float]:
    """Async over sync, of medians."""
    if not {"async", "sync"} <= runs.keys():
        return {}
    still = {
        mode: [seconds for run in runs[mode] for seconds in run.stood_still]
        for mode in ("async", "sync")
    }
    speed = {
        mode: Spread.of([run.steps_per_s for run in runs[mode]]).median
        for mode in ("async", "sync")
    }
    ratios = {"steps_per_s": speed["async"] / speed["sync"]}
    if all(still.values()):
        ratios["stood_still"] = Spread.of(still["async"]).median / Spread.of(still["sync"]).median
    return ratios


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="made by `pluglm corpus build`; else invented"
    )
    parser.add_argument(
        "--documents", type=positive, default=6000, help="of the invented corpus (default: 6000)"
    )
    parser.add_argument("--steps", type=positive, default=120, help="per run (default: 120)")
    parser.add_argument(
        "--every", type=positive, default=30, help="steps to a refresh (default: 30)"
    )
    parser.add_argument("--batch", type=positive, default=64, help="sequences (default: 64)")
    parser.add_argument("--repeats", type=positive, default=1, help="runs per mode (default: 1)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of the runs"
    )
    args = parser.parse_args()
    if args.steps <= max(args.every, _LOG_EVERY):
        parser.error(f"--steps {args.steps}: must be above --every and {_LOG_EVERY}")
    return args


def main() -> None:
    args = _arguments()
    facts = begin()
    runs: dict[str, list[Paused]] = {mode: [] for mode in args.modes}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        corpus = args.corpus.resolve() if args.corpus else invented_corpus(home, args.documents)
        info = load_corpus_info(corpus)
        print(
            f"{info.entries:,} entries of {info.entry_tokens} tokens, vocabulary "
            f"{info.vocab_size:,}; {args.steps} steps of {args.batch} sequences, refresh every "
            f"{args.every}; {args.repeats} run(s) per mode: median (lowest to highest)\n",
            flush=True,
        )
        for turn in range(args.repeats):
            for mode in args.modes:
                runs[mode].append(run_once(corpus, home, mode=mode, turn=turn, args=args))
    print(table(_HEADERS, [_row(mode, done) for mode, done in runs.items()]))
    ratios = _ratios(runs)
    if ratios:
        words = [f"{name} {value:.3f}" for name, value in ratios.items()]
        print(f"\nasync over sync, medians: {', '.join(words)}")
    step_time = _step_time(runs)
    if step_time is not None:
        print(f"step time, async over off: {step_time.shown(3)}")
    figures: dict[str, Any] = {
        "entries": info.entries,
        "runs": {mode: [asdict(run) for run in done] for mode, done in runs.items()},
        "async_over_sync": ratios,
        "step_time_async_over_off": step_time,
    }
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
