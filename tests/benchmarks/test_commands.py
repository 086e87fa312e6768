"""The benchmarks are commands that work: their help, and a smallest run of the affordable ones."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.tiny_run import make_tiny_run

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"
SHARED = {
    "harness", "invented", "records", "recovery_watch", "served", "simulation_parts",
    "simulation_whole", "suite", "watch",
}  # fmt: skip
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def call(name: str, *words: str) -> str:
    """Run a benchmark as a person does; returns what it printed."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(name: str, tmp_path: Path, *words: str) -> Any:
    """Run a benchmark at a small size; returns the figures of its JSON."""
    path = tmp_path / "figures.json"
    printed = call(name, *words, "--json", str(path))
    written = json.loads(path.read_text(encoding="utf-8"))
    machine = written["machine"]
    assert machine["cpu"] in printed.splitlines()[0]
    assert {"cores", "ram_gib", "python", "versions", "commit", "date"} <= machine.keys()
    assert "| " in printed
    return written["figures"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_is_measured_and_is_in_the_documents(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, which has imported most of it for the command before.
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    first_line = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[0]
    assert first_line.strip('"') in printed
    assert "--json" in printed
    pages = (REPOSITORY / "docs").glob("*.md")
    documents = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert f"python benchmarks/{name}.py" in documents


def test_flat_search_finds_what_its_peer_finds(tmp_path: Path) -> None:
    words = ["--entries", "300", "--batches", "2", "--repeats", "2"]
    (row,) = figures("search_flat", tmp_path, *words)
    assert row["same_ids"] == 1.0
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


def test_the_help_is_there_at_once(tmp_path: Path) -> None:
    found = figures("imports", tmp_path, "--repeats", "1")
    ratios = {one["what"]: one["ratio"]["median"] for one in found["imports"]}
    assert ratios["pluglm --help"] < 1, "the map of commands does not import torch"
    assert min(found["lines"].values()) > 1000


@pytest.mark.multiprocess
def test_every_kind_of_search_finds_what_is_near(tmp_path: Path) -> None:
    words = ["--entries", "3000", "--batches", "2", "--repeats", "2", "--threads", "1"]
    rows = {row["name"]: row for row in figures("search_peers", tmp_path, *words)}
    for name in ("torch product and topk", "faiss.IndexFlatIP", "ours, exact"):
        assert rows[name]["recall"] == 1.0, name
    for name, row in rows.items():
        assert row["recall"] > 0.9, name
        assert row["bytes_per_entry"] > 100, name
    assert rows["faiss.IndexFlatIP"]["ratio"]["2"]["median"] == 1.0
    assert "ours, exact, over Ray" in rows


def test_a_checkpoint_is_compared_with_those_of_others(tmp_path: Path) -> None:
    words = ["--hidden", "16", "--layers", "2", "--repeats", "1"]
    ours, *others = figures("checkpoint_speed", tmp_path, *words)
    assert ours["save_ratio"] is None
    assert len(others) == 2
    # Weights and both moments; some hold the weights, or those of the keys, a second time.
    for other in others:
        assert other["bytes"] == pytest.approx(ours["bytes"], rel=0.3), other["way"]
        assert other["save_ratio"]["median"] > 0


def test_costs_at_a_size_become_laws(tmp_path: Path) -> None:
    (cost,) = figures("memory_at_size", tmp_path, "--entries", "300", "--batches", "1")
    assert cost["entries"] == 300
    assert all(cost[step] > 0 for step in ("refresh_s", "add_s", "remove_s", "swap_s", "resume_s"))
    whole = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    # Three measured sizes would take three times as long; a law is made of any figures.
    whole["figures"] = [cost | {"entries": 300 * times} for times in (1, 10, 100)]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- cost curves -->\n<!-- end of cost curves -->\nb\n", encoding="utf-8")
    call("cost_curves", str(path), "--draw", str(tmp_path), "--document", str(page))
    text = page.read_text(encoding="utf-8")
    assert "| refresh, s" in text
    assert "| search, batch 1, ms" in text
    assert text.endswith("b\n")
    assert (tmp_path / "cost_curves.svg").stat().st_size > 10_000
    assert (tmp_path / "cost_curves.png").stat().st_size > 10_000


def test_data_is_read_faster_than_it_is_needed(tmp_path: Path) -> None:
    words = ["--documents", "200", "--batch", "8", "--steps", "2", "--repeats", "2"]
    rows = figures("data_reading", tmp_path, *words)
    assert [row["over_need"] is None for row in rows] == [False] * 5 + [True]
    for row in rows[:-1]:
        assert row["over_need"]["median"] > 1


def test_steps_that_count_reads_are_compared_with_steps_that_do_not(tmp_path: Path) -> None:
    words = ["--entries", "200", "--known", "5000", "--batch", "4", "--repeats", "4"]
    found = figures("usage_overhead", tmp_path, *words, "--log-every", "2")
    assert 0 < found["in_the_counter_share"] < 1
    assert 0 < found["in_the_counter_ms"]["median"] < found["counted_ms"]["median"]


@pytest.mark.long
@pytest.mark.multiprocess
def test_trainers_together_are_compared_with_trainers_alone(tmp_path: Path) -> None:
    words = ["--trainers", "1", "2", "--batch", "2", "--steps", "2", "--warmup", "1"]
    rows = figures("weak_scaling", tmp_path, *words, "--repeats", "1", "--entries", "200")
    assert [(row["trainers"], row["together"]) for row in rows] == [
        (1, True),
        (2, True),
        (2, False),
    ]
    for row in rows:
        assert 0 < row["retrieval_s"] < row["step_s"]


def test_reduced_keys_are_compared_with_float32(tmp_path: Path) -> None:
    words = ["--entries", "9000", "--batches", "3", "--repeats", "1", "--dtypes", "int8", "float16"]
    rows = figures("search_int8", tmp_path, *words)
    assert len(rows) == 4
    for row in rows:
        assert row["recall"] >= 0.99
        assert row["key_bytes_per_entry"] <= {"int8": 136, "float16": 264}[row["dtype"]]
        assert row["exact_keys_per_query"] >= 5


def test_keys_by_tables_are_those_of_every_entry(tmp_path: Path) -> None:
    (row,) = figures("refresh_speed", tmp_path, "--small")
    assert row["largest_difference"] < 1e-5 < row["largest_key"]
    assert row["build_s"]["median"] > 0 < row["read_s"]["median"]
    assert row["table_bytes"] > 500 * (16 * 2 + 128) * 4
    assert str(row["best_batch"]) in row["direct_entries_per_s"]


def test_faiss_presets_are_compared_with_exact_search(tmp_path: Path) -> None:
    words = ["--entries", "20000", "--width", "16", "--repeats", "2", "--top-k", "2"]
    rows = figures("search_faiss", tmp_path, *words)
    assert [row["index"] for row in rows] == ["ivf", "pq"]
    for row in rows:
        assert 0.5 < row["recall"] <= 1
        assert 0.5 < row["kept_recall"] <= 1
        assert row["times_faster"]["low"] > 0
        assert row["kept_s"] > 0


def test_keys_and_queries_of_a_trained_model_are_written(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    out = tmp_path / "keys"
    words = [str(run.run), str(run.corpus), "--out", str(out), "--queries", "8"]
    (row,) = figures("trained_keys", tmp_path, *words)
    keys, queries = np.load(out / "keys.npy"), np.load(out / "queries.npy")
    assert keys.shape == (row["keys"], queries.shape[1])
    assert len(queries) == row["queries"] > 0
    assert np.isfinite(keys).all()


@pytest.mark.integration
def test_both_ways_of_travelling_bring_the_same_answer(tmp_path: Path) -> None:
    (row,) = figures("transport", tmp_path, "--batches", "3", "--repeats", "2")
    assert row["same_ids"] is True
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


def test_training_is_compared_with_its_peers(tmp_path: Path) -> None:
    words = ["--entries", "40", "--batch", "2", "--repeats", "2"]
    rows = {row["variant"]: row for row in figures("training_overhead", tmp_path, *words)}
    assert set(rows) == {"memory + warm-up", "memory", "no lookup", "plain layers"}
    assert rows["no lookup"]["speed_over"]["no lookup"]["median"] == 1.0
    searched = {name for name, row in rows.items() if row["parts_ms"]["retrieval"]["median"] > 0}
    assert searched == {"memory + warm-up", "memory"}


TINY = ("--hidden", "64", "--layers", "2", "--vocabulary", "1100", "--batch", "2")


def test_a_step_is_compared_with_plain_layers_and_bert(tmp_path: Path) -> None:
    words = [*TINY, "--tokens", "16", "--entries", "40", "--padding", "0.2", "--repeats", "2"]
    rows = {row["variant"]: row for row in figures("training_step", tmp_path, *words)}
    assert rows.keys() == {
        "PlugLM, paper's", "PlugLM, recipe's", "plain", "plain, chosen", "BertForMaskedLM",
    }  # fmt: skip
    for row in rows.values():
        assert row["peak_mib"] > 0
        assert row["over_bert"]["median"] > 0
    assert rows["BertForMaskedLM"]["peak_over_bert"] == 1.0


def test_utilisation_is_counted_work_over_the_peak(tmp_path: Path) -> None:
    words = [*TINY, "--entries", "40", "--repeats", "2", "--warmup", "1", "--device", "cpu"]
    given = figures("model_flops", tmp_path, *words, "--peak-tflops", "0.5")
    assert given["utilisation"] == pytest.approx(given["tflops"]["median"] / 0.5)
    assert given["peak_source"] == "--peak-tflops"
    # Each weight of a layer is read once per position, forward and twice backward; that is a lower
    # bound of the work, and the encoder alone with all its positions is not far above.
    weights, positions = 4 * 64 * 64 + 8 * 64 * 64 + 4 * 64 * 64, 2 * 128
    assert 1 < given["tflop_per_step"] * 1e12 / (6 * weights * positions) < 6


@pytest.mark.slow
def test_a_variant_is_trained_and_asked(tmp_path: Path) -> None:
    words = ["--steps", "4", "--only", "tokens-layer-copy-0.1", "--keep", str(tmp_path / "runs")]
    (row,) = figures("memory_is_read", tmp_path, *words)
    (run,) = row["runs"]
    assert run["steps"] == 4
    assert 0 <= run["accuracy"] <= 1
    assert 0 <= run["accuracy_without_memory"] <= 1
    # A passage's own words find it before anything is learned; guessing finds 5 of 500.
    assert run["right_entry_rate"] > 0.1
    assert (tmp_path / "runs" / "tokens-layer-copy-0.1-seed0" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_every_stage_has_the_losses_of_plain_torch(tmp_path: Path) -> None:
    words = ["--steps", "3", "--hidden", "32", "--batch", "4"]
    rows = figures("zero_losses", tmp_path, *words)
    assert [row["variant"] for row in rows] == [
        "plain torch", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3",
    ]  # fmt: skip
    for row in rows[1:]:
        assert len(row["losses"]) == 3
        assert 0 <= row["largest_difference"] < 1e-4
        assert row["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4)


def test_a_search_that_runs_beside_the_computation_is_compared(tmp_path: Path) -> None:
    words = ["--entries", "200", "--hidden", "64", "--layers", "2", "--batch", "4"]
    words += ["--tokens", "16", "--repeats", "2", "--delays", "0", "50"]
    rows = figures("overlap", tmp_path, *words)
    assert [(row["query_norm"], row["delay_ms"]) for row in rows] == [
        ("layer", 0.0), ("layer", 50.0), ("batch", 0.0), ("batch", 50.0),
    ]  # fmt: skip
    for row in rows[1::2]:
        assert row["whole_waits_ms"]["median"] >= 50
        assert row["hidden"] <= 1


def test_a_plan_is_compared_with_what_is_measured(tmp_path: Path) -> None:
    words = ["--configurations", "3000/16/int8/flat", "--seconds", "0.2", "--batch", "4"]
    (row,) = figures("plan_check", tmp_path, *words)
    pairs = row["planned_and_measured"]
    assert pairs["keys"] == [3000 * (16 + 6)] * 2
    for name in ("own", "peak"):
        planned, measured = pairs[name]
        assert 0.5 < planned / measured < 2
    assert min(pairs["search"] + pairs["refresh"]) > 0
