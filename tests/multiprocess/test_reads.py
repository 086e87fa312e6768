"""Counted reads on several ranks, over stops and resumes, and when entries are removed."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_server.api import MemoryInfo
from memory_server.errors import ShardLost, UnknownEntry
from tests.multiprocess.loop_case import STEPS, Place, StopAfter, lines, numbers
from tests.multiprocess.ranks import run_ranks
from trainer.checkpoint import checkpoint_path, read_verified
from trainer.control import Control
from trainer.final import evaluate_run
from trainer.loop import run_rank
from trainer.reads.counter import ReadCounter
from trainer.reads.files import Counted, read_counted, write_counted
from trainer.reads.sample import UNITS, Limits, Reads, at_level
from trainer.settings import TrainSettings

pytestmark = pytest.mark.multiprocess

WINDOWS, READS = 6, 900
SMALL = Limits(sample=128, most_read=32)
EXACT = Limits(sample=1 << 14, most_read=32)


class Entries:
    """A memory that knows which entries it has, and may not answer."""

    def __init__(self, entries: int) -> None:
        self.present = set(range(entries))
        self.away = False

    def info(self) -> MemoryInfo:
        if self.away:
            raise ShardLost("shard 0 does not answer")
        return MemoryInfo(
            entries=len(self.present),
            shards=1,
            key_width=1,
            entry_tokens=1,
            epoch=1,
            encoder_step=0,
            content_version="",
            tokenizer_fingerprint="",
            pad_token_id=0,
            bytes={},
            index="flat",
        )

    def entries(self, ids: list[int]) -> list[Any]:
        unknown = [i for i in ids if i not in self.present]
        if unknown:
            error = UnknownEntry("some are not there")
            error.ids = tuple(unknown)
            raise error
        return []


def reads_of_window(window: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(window)
    ids = (1000 * rng.random(READS) ** 3).astype(np.int64)
    ids[::50] = -1
    return torch.from_numpy(ids), torch.full((READS,), 0.5)


def count(
    rank: int, ranks: int, limits: Limits, home: Path, cut_at: int = WINDOWS
) -> list[dict[str, float]]:
    """Count all windows, each rank its part; at `cut_at` go on with another counter."""
    memory: Any = Entries(1000)
    options: dict[str, Any] = {
        "rank": rank,
        "ranks": ranks,
        "device": torch.device("cpu"),
        "of_run": limits,
        "of_window": limits,
    }
    counter = ReadCounter(memory, **options)
    told = []
    for window in range(WINDOWS):
        ids, shares = reads_of_window(window)
        counter.add([(ids[rank::ranks], shares[rank::ranks])])
        if window % 2 == 0:
            kept = counter.counted()  # a checkpoint between two lines
            if kept is not None:
                write_counted(home, kept)
            if window == cut_at:
                found = read_counted(home) if rank == 0 else None
                counter = ReadCounter(memory, counted=found, **options)
        else:
            told.append(counter.figures("first"))
    kept = counter.counted()
    assert (kept is None) == (told[-1] == {}) == (rank != 0)
    if kept is not None:
        write_counted(home, kept)
    return told


def in_one_process(rank: int, home: Path) -> Any:
    (home / "alone").mkdir()
    (home / "cut").mkdir()
    return {
        "alone": count(rank, 1, EXACT, home / "alone"),
        "cut": count(rank, 1, EXACT, home / "cut", cut_at=2),
        "removed": removed(),
        "away": away(),
    }


def removed() -> dict[str, Any]:
    """Half of the entries that were read go, and come back."""
    memory = Entries(1000)
    counter = ReadCounter(memory, rank=0, ranks=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    every = torch.arange(100)
    counter.add([(every, torch.ones(100))])
    told = [counter.figures("first")]
    memory.present -= set(range(50))
    counter.add([(every[60:], torch.ones(40))])
    told.append(counter.figures("second"))
    counter.add([(torch.arange(200, 210), torch.ones(10))])
    told.append(counter.figures("second"))
    memory.present |= set(range(50))
    told.append(counter.figures("first"))
    return {"shares": [line["memory_used_share"] for line in told], "nothing": told[-1]}


def away() -> list[dict[str, float]]:
    memory = Entries(10)
    counter = ReadCounter(memory, rank=0, ranks=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    counter.add([(torch.arange(5), torch.ones(5))])
    memory.away = True
    told = [counter.figures("first")]
    memory.away = False
    return [*told, counter.figures("first")]


def in_three(rank: int, home: Path) -> list[list[dict[str, float]]]:
    for name in ("three", "sampled"):
        (home / name).mkdir(exist_ok=True)
    return [
        count(rank, 3, EXACT, home / "three"),
        count(rank, 3, SMALL, home / "sampled", cut_at=4),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reads")


@pytest.fixture(scope="module")
def one(home: Path) -> Any:
    return run_ranks(in_one_process, 1, home)[0]


@pytest.fixture(scope="module")
def three(home: Path) -> Any:
    return run_ranks(in_three, 3, home)


def kept(home: Path, name: str) -> Counted:
    found = read_counted(home / name)
    assert found is not None
    return found


def plainly() -> Counter[int]:
    every = (reads_of_window(window)[0].tolist() for window in range(WINDOWS))
    return Counter(i for ids in every for i in ids if i >= 0)


def as_counter(reads: Reads) -> Counter[int]:
    return Counter(dict(zip(reads.ids.tolist(), reads.times.tolist(), strict=True)))


@pytest.mark.usefixtures("one", "three")
@pytest.mark.parametrize("name", ["alone", "cut", "three"])
def test_however_ranks_and_resumes_cut_the_reads_counts_are_a_plain_counters(
    home: Path, name: str
) -> None:
    total = kept(home, name).total
    assert as_counter(total) == plainly()
    assert total.attended.tolist() == (total.times * UNITS // 2).tolist()
    assert kept(home, name).window.all_times == 0


def test_lines_of_metrics_do_not_hang_on_ranks_and_resumes(one: Any, three: Any) -> None:
    assert one["cut"] == one["alone"]
    assert three[0][0] == one["alone"]
    seen: set[int] = set()
    for place, line in enumerate(one["alone"]):
        ids = [i for w in (2 * place, 2 * place + 1) for i in reads_of_window(w)[0].tolist()]
        times = Counter(i for i in ids if i >= 0)
        seen |= set(times)
        assert line["memory_used_share"] == len(seen) / 1000
        assert line["memory_top_read_share"] == max(times.values()) / sum(times.values())


@pytest.mark.usefixtures("three")
def test_several_ranks_sample_what_one_would(home: Path) -> None:
    true, total = plainly(), kept(home, "sampled").total
    assert total.level > 0
    assert len(total.ids) <= SMALL.sample + SMALL.most_read
    sampled = {i for i in true if at_level(np.array([i]), total.level)[0]}
    assert set(total.ids[total.sampled].tolist()) == sampled
    for entry, times in as_counter(total).items():
        short = 0 if entry in sampled else total.short
        assert true[entry] - short <= times <= true[entry]


def test_removed_entries_do_not_count_as_used_and_count_when_they_are_back(one: Any) -> None:
    first, gone, more, back = one["removed"]["shares"]
    assert first == 100 / 1000
    assert gone == 50 / 950
    assert more == 60 / 950
    assert back == 110 / 1000
    assert set(one["removed"]["nothing"]) == {"memory_used_share"}


def test_a_memory_that_does_not_answer_costs_a_lines_figures(one: Any) -> None:
    silent, again = one["away"]
    assert silent == {}
    assert again["memory_used_share"] == 0.5


def test_without_a_file_nothing_was_counted(tmp_path: Path) -> None:
    assert read_counted(tmp_path) is None


# Whole runs.


class Watched:
    """A memory whose answers are written down."""

    def __init__(self, memory: Any, path: Path) -> None:
        self._memory, self._path = memory, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def search(self, *args: Any, **options: Any) -> Any:
        found = self._memory.search(*args, **options)
        with self._path.open("a") as file:
            file.write(json.dumps(found.ids.flatten().tolist()) + "\n")
        return found


def run_watched(
    place: Place, settings: TrainSettings, rank: int, resume: bool, stop_after: int
) -> None:
    job = place.job(settings, resume=resume)
    path = place.home / f"{Path(settings.run.dir).name}-{rank}.jsonl"
    memory: Any = Watched(job.memory, path)
    try:
        control = StopAfter(stop_after) if stop_after else Control()
        run_rank(replace(job, memory=memory), rank, control)
        if path.name in ("whole-0.jsonl", "still-0.jsonl"):
            evaluate_run(job)
    finally:
        job.memory.close()


def in_a_fork(place: Place, settings: TrainSettings, resume: bool = False, stop: int = 0) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(run_watched, (place, settings, 0, resume, stop))


def logged_every(settings: TrainSettings, steps: int, *, usage: bool = True) -> TrainSettings:
    logging = replace(settings.logging, log_every_steps=steps, memory_usage=usage)
    return replace(settings, logging=logging)


def runs_of_one(rank: int, place: Place) -> None:
    import deepspeed  # noqa: F401

    in_a_fork(place, logged_every(place.settings("whole"), 3))
    stopped = logged_every(place.settings("stopped"), 3)
    in_a_fork(place, stopped, stop=4)
    in_a_fork(place, stopped, resume=True)
    in_a_fork(place, logged_every(place.settings("silent"), 3, usage=False))
    in_a_fork(place, place.settings("still", refresh="off"))


def run_of_two(rank: int, place: Place) -> None:
    settings = place.settings("two", trainers=2, passes=2, refresh="off", dropout=0.0)
    run_watched(place, settings, rank, False, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place.make(tmp_path_factory.mktemp("runs"))
    run_ranks(runs_of_one, 1, found, timeout_s=240, process_group=False)
    (found.home / "two").mkdir()
    run_ranks(run_of_two, 2, found, timeout_s=180, process_group=False)
    return found


def answered(place: Place, name: str, rank: int = 0) -> Counter[int]:
    text = (place.home / f"{name}-{rank}.jsonl").read_text()
    return Counter(i for line in text.splitlines() for i in json.loads(line) if i >= 0)


def last(place: Place, name: str) -> Counted:
    checkpoint = checkpoint_path(place.home / name, STEPS)
    read_verified(checkpoint)
    found = read_counted(checkpoint)
    assert found is not None
    return found


@pytest.mark.slow
def test_a_run_counts_what_its_memory_answered(place: Place) -> None:
    told = last(place, "whole")
    assert as_counter(told.total) == answered(place, "whole")
    # Attention is shared out whole among a sequence's entries.
    assert told.total.all_attended == pytest.approx(8 * STEPS * UNITS, rel=1e-3)
    assert told.since_step == 0
    assert all(0 < line["memory_used_share"] <= 1 for line in lines(place, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "still"])
def test_what_was_counted_is_told_at_the_end(place: Place, name: str) -> None:
    told = json.loads((place.home / name / "usage.json").read_text())["training"]
    counted = answered(place, name)
    assert (told["from_step"], told["to_step"]) == (0, STEPS)
    assert told["reads"] == sum(counted.values())
    assert sum(one["entries"] for one in told["times_read"]) == len(counted)
    # At the end of the run with new keys the memory holds new facts alone: none was read.
    used = 0 if name == "whole" else len(counted)
    assert told["used"] == used
    assert told["never_used_share"] == 1 - used / told["entries"]
    assert [e["times"] for e in told["most_used"]] == [
        times for _, times in counted.most_common(min(used, 10))
    ]


@pytest.mark.slow
def test_two_ranks_count_what_both_were_answered(place: Place) -> None:
    both = answered(place, "two") + answered(place, "two", 1)
    assert as_counter(last(place, "two").total) == both


@pytest.mark.slow
def test_a_resumed_runs_counters_are_the_uninterrupted_ones(place: Place) -> None:
    one, other = last(place, "stopped"), last(place, "whole")
    for given, wanted in ((one.total, other.total), (one.window, other.window)):
        for name in ("ids", "times", "attended"):
            assert getattr(given, name).tolist() == getattr(wanted, name).tolist()
    assert one.present == other.present
    names = sorted(n for n in lines(place, "whole")[0] if n.startswith("memory_"))
    assert len(names) == 6  # with memory_bytes
    assert numbers(place, "stopped", *names) == numbers(place, "whole", *names)


@pytest.mark.slow
def test_nobody_counts_where_it_is_not_wanted(place: Place) -> None:
    assert read_counted(checkpoint_path(place.home / "silent", STEPS)) is None
    assert not any("memory_used_share" in line for line in lines(place, "silent"))
    # And counting changes nothing that is learned.
    losses = [[line["loss"] for line in lines(place, name)] for name in ("silent", "whole")]
    assert losses[0] == losses[1]
