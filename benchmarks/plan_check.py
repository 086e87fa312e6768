"""Plans of `pluglm plan --local` against what is measured: memory, search and refresh on this CPU.

The machine is calibrated as `pluglm calibrate` does, again before every third configuration,
because a busy machine changes. Each configuration's store is built, and a new process serves it:
its own bytes (USS, which counts mapped tokens that no other process maps) with one epoch live, its
peak while a refresh stages a second one (the largest resident size, libraries included), the bytes
that the memory itself tells by part, milliseconds of a search, and seconds of a refresh. Queries
are in no particular direction; an approximate index answers whatever its recall (`min_recall` 0).
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import (
    argument_parser,
    begin,
    finish,
    in_fresh_process,
    note,
    peak_resident_bytes,
    positive,
    table,
)

from cluster.planning.constants import Constants
from cluster.planning.measure import calibrate
from cluster.planning.memory_parts import Place
from cluster.planning.plan import Plan, make_plan
from cluster.planning.question import Options, ask
from cluster.planning.rates import calibrated
from cluster.planning.timing import Clock
from memory_server.index.base import IndexSettings
from memory_server.local import LocalMemory
from model import KeyEncoderFactory

HIDDEN, TOKENS, VOCABULARY, TOP_K = 256, 64, 30_522, 5
CONFIGURATIONS = [
    "10000/128/float32/flat",
    "100000/128/float32/flat",
    "1000000/128/float32/flat",
    "300000/64/float32/flat",
    "300000/256/float32/flat",
    "300000/128/bfloat16/flat",
    "300000/128/int8/flat",
    "1000000/128/int8/flat",
    "300000/128/float32/ivf",
    "300000/128/float32/pq",
]
CALIBRATED_FOR = 3  # configurations
BETWEEN_LOGGED = 16  # searches, so that a recall can be measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    entries: int
    width: int
    dtype: str
    index: str

    @classmethod
    def of(cls, text: str) -> Case:
        entries, width, dtype, index = text.split("/")
        return cls(entries=int(entries), width=int(width), dtype=dtype, index=index)

    @property
    def settings(self) -> IndexSettings:
        return IndexSettings(kind=self.index, key_dtype=self.dtype, min_recall=0.0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a process of its own told; `exact`: searches were answered exactly."""

    own_bytes: int
    peak_bytes: int
    parts: dict[str, int]
    search_s: float
    refresh_s: float
    exact: bool


def build(path: Path, case: Case) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write the store; the encoder's config and weights."""
    from cluster.planning.measure_memory import invented_store, make_world

    world = make_world(
        torch.device("cpu"),
        entries=case.entries,
        hidden=HIDDEN,
        tokens=TOKENS,
        width=case.width,
        vocabulary=VOCABULARY,
    )
    invented_store(path, world)
    return world.config.to_dict(), world.weights


def serve(
    path: Path,
    case: Case,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    batch: int,
    threads: int,
    processor_time: bool,
) -> Measured:
    """Load, search, refresh: in the process that is asked."""
    torch.set_num_threads(threads)
    clock = Clock(device=torch.device("cpu"), seconds_each=1.0, processor_time=processor_time)
    queries = torch.randn(batch, case.width, generator=torch.Generator().manual_seed(3))
    memory = LocalMemory(
        path, encoder=KeyEncoderFactory(config), weights=weights, index=case.settings
    )
    gc.collect()
    own_bytes = psutil.Process().memory_full_info().uss
    for seed in range(BETWEEN_LOGGED):
        generator = torch.Generator().manual_seed(100 + seed)
        memory.search(torch.randn(8, case.width, generator=generator), TOP_K)

    def refresh(step: int) -> float:
        before, began = memory.info().epoch, clock.now()
        epoch = memory.stage(encoder_step=step, weights=weights)
        memory.wait_sealed(epoch, 3600)
        spent = clock.now() - began if processor_time else memory.staging(epoch).seconds
        memory.activate(epoch)
        memory.release(before)
        return spent

    refresh_s = statistics.median(refresh(step) for step in (1, 2, 3))
    found = memory.search(queries, TOP_K)
    search_s = clock.wall(partial(memory.search, queries, TOP_K)).median
    measured = Measured(
        own_bytes=own_bytes,
        peak_bytes=peak_resident_bytes(),
        parts=dict(memory.info().bytes),
        search_s=search_s,
        refresh_s=refresh_s,
        exact=found.exact,
    )
    memory.close()
    return measured


def planned(case: Case, constants: Constants, batch: int) -> Plan:
    """As `pluglm plan --local` reckons it."""
    question = ask(
        Options(
            config=None,
            overrides=(
                f"model.key_size={case.width}",
                f"model.hidden_size={HIDDEN}",
                "model.num_heads=4",
                f"memory.index={case.index}",
                f"memory.key_dtype={case.dtype}",
            ),
            entries=case.entries,
            entry_tokens=TOKENS,
            vocabulary=VOCABULARY,
            cores=constants.threads,
            local=True,
        )
    )
    return make_plan(question.wanted, gpu=None, host=calibrated(constants), batch=batch)


def compared(plan: Plan, measured: Measured) -> dict[str, tuple[float, float]]:
    """(planned, measured) by what is compared."""
    (place,) = [place for place in plan.places if place.name == "this process"]
    assert plan.refresh is not None
    extra = _part(place, "staging (refresh)") + _part(place, "searching")
    return {
        "keys": (_part(place, "keys"), measured.parts["keys"]),
        "own": (place.needed - extra + _part(place, "tokens (page cache)"), measured.own_bytes),
        "peak": (place.wished, measured.peak_bytes),
        "search": (plan.search.alone_s, measured.search_s),
        "refresh": (plan.refresh.seconds, measured.refresh_s),
    }


def _part(place: Place, name: str) -> int:
    return sum(part.bytes for part in place.parts if part.name == name)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--configurations",
        nargs="+",
        default=CONFIGURATIONS,
        metavar="ENTRIES/WIDTH/DTYPE/INDEX",
    )
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of the one thread, beside other work",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of the calibration")
    parser.add_argument("--directory", type=Path, help="for the stores; by default a temporary one")
    args = parser.parse_args()
    on_processors = args.clock == "cpu"
    if on_processors and args.threads > 1:
        parser.error("--clock cpu is for --threads 1")
    facts = begin()
    rows, figures = [], []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for number, text in enumerate(args.configurations):
            if number % CALIBRATED_FOR == 0:
                note("calibrating")
                constants = in_fresh_process(
                    calibrate,
                    "cpu",
                    seconds=args.seconds,
                    directory=Path(directory),
                    threads=args.threads,
                    processor_time=on_processors,
                )
            case, path = Case.of(text), Path(directory) / "store"
            config, weights = in_fresh_process(build, path, case)
            measured = in_fresh_process(
                serve, path, case, config, weights, args.batch, args.threads, on_processors
            )
            shutil.rmtree(path)
            pairs = compared(planned(case, constants, args.batch), measured)
            note(f"{text}: {measured}")
            figures.append(
                {
                    "case": case,
                    "measured": measured,
                    "planned_and_measured": pairs,
                    "calibration": constants,
                }
            )
            rows.append(
                [
                    f"{case.entries:,} x {case.width}, {case.dtype}, {case.index}",
                    *(_shown(pairs[name], 2**20) for name in ("keys", "own", "peak")),
                    _shown(pairs["search"], 1e-3),
                    _shown(pairs["refresh"], 1.0),
                ]
            )
    print(
        f"\nplanned / measured (error), H={HIDDEN}, {TOKENS} tokens, batch {args.batch}, "
        f"{args.threads} thread(s), {args.clock} time\n"
    )
    headers = ["entries", "keys, MiB", "own, MiB", "peak, MiB", "search, ms", "refresh, s"]
    print(table(headers, rows))
    for what, names, bar in (
        ("memory", ("keys", "own", "peak"), 25),
        ("times", ("search", "refresh"), 50),
    ):
        errors = [abs(_error(f["planned_and_measured"][n])) for f in figures for n in names]
        within = sum(100 * error <= bar for error in errors)
        print(
            f"\n{what}: {within} of {len(errors)} within {bar} %, the median error "
            f"{100 * statistics.median(errors):.0f} %, the largest {100 * max(errors):.0f} %"
        )
    finish(args.json, facts, args, figures)


def _error(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] - 1


def _shown(pair: tuple[float, float], unit: float) -> str:
    digits = 2 if pair[1] / unit < 10 else 1 if pair[1] / unit < 100 else 0
    plan, real = (f"{number / unit:,.{digits}f}" for number in pair)
    return f"{plan} / {real} ({100 * _error(pair):+.0f} %)"


if __name__ == "__main__":
    main()
