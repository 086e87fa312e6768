"""The figures themselves: spreads, turns, tables, and what is read from a finished run."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a benchmark as a script does: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_spread_is_shown_with_its_range(load: Load) -> None:
    harness = load("harness")
    assert harness.Spread.of([3.0, 1.0, 2.0]).shown(1) == "2.0 (1.0 to 3.0)"
    assert harness.Spread.of([1234.5]).shown(0) == "1,234"
    with pytest.raises(ValueError, match="nothing was measured"):
        harness.Spread.of([])


def test_ratios_are_taken_within_a_turn(load: Load) -> None:
    ratio = load("harness").spread_of_ratios([2.0, 20.0, 9.0], [1.0, 10.0, 3.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 3.0)


def test_everyone_has_as_many_turns_and_each_comes_first(load: Load) -> None:
    order: list[str] = []

    def turn(name: str) -> int:
        order.append(name)
        return len(order)

    calls = {name: partial(turn, name) for name in "abc"}
    results = load("harness").turn_by_turn(calls, repeats=3, warmup=1)
    assert {name: len(kept) for name, kept in results.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[3::3] == ["a", "b", "c"]
    assert min(results["a"] + results["b"] + results["c"]) == 4, "the warm-up is not kept"


def test_the_law_of_a_cost_is_found(load: Load) -> None:
    fit = load("cost_curves").fit
    sizes = [1e4, 1e5, 1e6, 1e7]
    line = fit(sizes, [0.5 + 3e-6 * size for size in sizes])
    assert (line.power, line.worst) == (1.0, pytest.approx(0, abs=1e-9))
    assert line.at(1e8) == pytest.approx(300.5)
    assert line.shown() == "0.5 + 3 N/10^6"
    assert fit(sizes, [2e-3 * size**0.5 for size in sizes]).shown() == "2 sqrt(N)/10^3"
    assert fit(sizes, [7.0, 7.1, 6.9, 7.0]).shown().startswith("7")
    # Costs never fall with size, so what is measured as falling errs instead of being explained.
    falling = fit(sizes, [4.0, 3.0, 2.0, 1.0])
    assert min(falling.fixed, falling.slope) >= 0
    assert falling.worst > 0.3
    with pytest.raises(ValueError, match="two sizes"):
        fit([1e4], [1.0])
    with pytest.raises(ValueError, match="above 0"):
        fit([1e4, 1e5], [1.0, 0.0])


def test_curves_foretell_the_largest_size(load: Load) -> None:
    curves = load("cost_curves").curves
    costs = [
        {
            "entries": size,
            "load_s": 1 + size / 1e6,
            **dict.fromkeys(("build_s", "refresh_s", "add_s", "remove_s", "swap_s", "resume_s")),
            "search_ms": {"32": size / 1e4 * (2 if size == 10**7 else 1)},
            "own_bytes": 2**30,
            "peak_bytes": 2**31,
            "store_bytes": 150 * size,
        }
        for size in (10**4, 10**5, 10**6, 10**7)
    ]
    found = {curve.name: curve for curve in curves(costs)}
    assert "refresh" not in found
    assert found["load"].foretold == pytest.approx(0, abs=1e-9)
    assert found["search, batch 32"].foretold == pytest.approx(-0.5)
    assert found["process, one epoch"].law.at(10**9) == pytest.approx(1)


def test_a_table_is_aligned(load: Load) -> None:
    lines = load("harness").table(["name", "s"], [["long name", "1"], ["x", "12.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| long name |    1 |"


def test_a_refresh_run_leaves_out_the_refresh_after_the_last_step(
    load: Load, tmp_path: Path
) -> None:
    lines = [
        {"kind": "train", "step": 1, "sequences_per_s": 1.0, "data_ms": 90.0},
        {"kind": "refresh", "step": 7, "encoder_step": 4, "seconds_stood_still": 0.5,
         "seconds_publishing": 0.1, "seconds_total": 2.0},
        {"kind": "train", "step": 11, "sequences_per_s": 40.0, "data_ms": 2.0},
        {"kind": "refresh", "step": 12, "encoder_step": 12, "seconds_stood_still": 9.0,
         "seconds_publishing": 0.0, "seconds_total": 9.0},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    paused = load("refresh_pause").read_run(tmp_path, mode="async", steps=12, every=4, batch=8)
    assert (paused.stood_still, paused.total) == ([0.5], [2.0])
    assert paused.staleness == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]
    assert paused.steps_per_s == pytest.approx(5.0)
    assert paused.missed == 1
    assert (paused.waited, paused.switched, paused.data) == pytest.approx((0.05, 0.2, 0.01))


def test_pauses_are_told_from_what_is_usual(load: Load, tmp_path: Path) -> None:
    steps = load("recovery_watch").Steps(tmp_path / "metrics.jsonl")
    steps.moments, steps.steps = [1.0, 2.0, 3.0, 9.0, 10.0], [7, 8, 9, 6, 7]
    assert steps.longest_pause(3.5, 10.0) == 5.5
    assert steps.longest_pause(0.0, 3.0) == 1.0
    assert steps.longest_pause(4.0, 5.0) == 1.0, "nothing came at all"
    assert steps.again(9, since=3.5) == 4, "steps 6 to 9"
    assert steps.again(9, since=0.0) == 4
    assert steps.again(5, since=3.5) == 0


def test_a_quickstart_is_read_and_averaged(load: Load, tmp_path: Path) -> None:
    gain = load("quickstart_gain")
    runs = []
    for seed, loss in enumerate((2.0, 4.0)):
        run_dir = tmp_path / f"run-seed{seed}"
        run_dir.mkdir()
        conditions = {"right": {"loss": loss, "accuracy": 0.5, "masks": 9}}
        cases = [{"name": "own", "conditions": conditions, "right_entry_rate": 0.75}]
        evaluation = {"k": 5, "masks": 9, "cases": cases}
        (run_dir / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
        edits = {"edits": 20, "followed": 18, "returned": 20}
        (run_dir / "edits.json").write_text(json.dumps(edits), encoding="utf-8")
        runs.append(gain.read_run(run_dir))
    rows = {row[0]: row[1:] for row in gain.rows_of(runs)}
    assert rows["own: loss, right"] == ["2.000", "4.000", "3.000 ± 1.414"]
    assert rows["right entry in top-5"] == ["75.0%", "75.0%", "75.0% ± 0.0%"]
    assert rows["edits followed"][0] == "18.0"
    with pytest.raises(SystemExit, match=r"evaluation\.json"):
        gain.read_run(tmp_path)


def test_a_command_is_watched_and_a_failure_is_told(load: Load, tmp_path: Path) -> None:
    watch = load("watch")
    log = tmp_path / "log"
    hold = "x = bytearray(300 * 2**20); import time; time.sleep(1.5)"
    family = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    watched = watch.watch([sys.executable, "-c", family], cwd=tmp_path, log=log)
    assert watched.peak_rss_gib > 0.3
    assert watched.peak_processes == 2
    assert watched.seconds > 1.5
    failing = "print('out of tea'); raise SystemExit(3)"
    with pytest.raises(RuntimeError, match="ended with 3\nout of tea"):
        watch.watch([sys.executable, "-c", failing], cwd=tmp_path, log=log)


def test_cost_curves_refuses_what_is_no_measurement(load: Load, tmp_path: Path) -> None:
    read_costs = load("cost_curves").read_costs
    other = tmp_path / "other.json"
    for given in ("[1]", '{"figures": [{"rows": 3}]}', "no json"):
        other.write_text(given, encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"other\.json is not what `memory_at_size\.py --json`"
        ):
            read_costs(other)


def test_what_is_not_at_hand_is_left_out_with_its_option(load: Load, tmp_path: Path) -> None:
    suite = load("suite")
    tuned = suite.read_suite()["tuned_reads"]
    assert "--model and --test" in suite.Choice(gpu=None).lacks(tuned)
    choice = suite.Choice(gpu=None, model=tmp_path / "model", test=tmp_path / "test.parquet")
    assert choice.lacks(tuned) is None
    words = suite.words_of(tuned, "full", tmp_path, choice)
    assert words == [str(tmp_path / "model"), str(tmp_path / "test.parquet")]


def test_what_a_tuned_model_reads_is_refused_for_other_folders(load: Load, tmp_path: Path) -> None:
    opened = load("tuned_reads").opened
    with pytest.raises(ValueError, match="no fine-tuned model with a memory"):
        opened(tmp_path)
    about = tmp_path / "finetuned.json"
    about.write_text('{"memory": null}', encoding="utf-8")
    with pytest.raises(ValueError, match="no fine-tuned model with a memory"):
        opened(tmp_path)
    about.write_text(
        '{"memory": {"vectors": null, "keys_made_with": "/models/start"}}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"does not make itself; fine-tune it live"):
        opened(tmp_path)


def test_rows_that_read_their_own_article_are_told_from_others(load: Load) -> None:
    class Entries:
        def entries(self, ids: list[int]) -> list[Any]:
            titles = {4: "Lisbon", 5: "Porto", 6: "Faro"}
            return [SimpleNamespace(id=entry, title=titles[entry]) for entry in ids]

    figures = load("tuned_reads").own_article_read(
        Entries(),
        torch.tensor([[4, 5], [6, 5], [6, 4], [5, -1]]),
        ["Lisbon", "Porto", "Porto", "Faro"],
        torch.tensor([True, False, True, True]),
        torch.tensor([False, False, True, False]),
    )
    assert figures == {
        "read_their_own_article": 0.5,
        "read_it_first": 0.25,
        "right_own_article_read": 0.5,
        "right_unplugged_own_article_read": 0.0,
        "right_not_read": 1.0,
        "right_unplugged_not_read": 0.5,
    }
