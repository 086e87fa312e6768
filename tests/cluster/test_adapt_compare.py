"""`pluglm adapt compare`: real fine-tunings under each condition, their table, and refusals."""

import json
import math
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.adaptation.outcome import outcome_text
from cluster.adaptation.presets import adaptation_comparison, load_adaptation_config
from cluster.adaptation.settings import CONDITIONS, AdaptationConfig
from cluster.cli import main
from cluster.config_sections import build_config
from cluster.presets import preset
from cluster.run_lock import run_lock
from memory_server.store.store import Store
from tests.cluster.comparisons import Home, make_home
from tests.cluster.memory_support import Capture
from trainer.finetune.measures import class_scores

ALL = tuple(CONDITIONS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("compare") / "home")


def words(home: Home, out: Path, *settings: str) -> list[str]:
    given = home.settings(
        'compare.domain=["places"]',
        f"compare.baseline={home.path / 'bert'}",
        f"compare.dapt={home.path / 'dapt'}",
        *settings,
    )
    return ["adapt", "compare", str(preset("adaptation")), *given, "--out", str(out)]


@pytest.fixture(scope="module")
def finished(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One comparison of all conditions, over two seeds."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert main(words(home, out)) == 0
    return out


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return found


def test_the_preset_loads_and_comes_back_equal() -> None:
    config = load_adaptation_config(preset("adaptation"))
    assert build_config(AdaptationConfig, tomllib.loads(config.to_toml())) == config
    assert config.compare.conditions == ALL
    assert len(config.train.seeds) == 5


def test_every_condition_is_a_fine_tuning_of_its_own_model_and_memory(
    home: Home, finished: Path
) -> None:
    found = result(finished)
    assert [row["name"] for row in found["conditions"]] == list(ALL)
    assert found["unfinished"] == []
    read = {
        row["name"]: row["memory"] and tuple(row["memory"]["domains"])
        for row in found["conditions"]
    }
    assert read == {
        "no-memory": None,
        "general": ("default",),
        "general+domain": ("default", "places"),
        "domain": ("places",),
        "baseline": None,
        "dapt": None,
    }
    entries = Store.open(home.path / "store").manifest().domains()
    assert entries == {"default": 8, "places": 3}
    for row in found["conditions"]:
        for seed in (4, 5):
            metrics = json.loads(
                (finished / row["name"] / f"seed-{seed}" / "metrics.json").read_text()
            )
            at = [4, 5].index(seed)
            assert row["scores"]["test"][at] == metrics["test"]
    models = {row["name"]: Path(row["model"]).name for row in found["conditions"]}
    assert (models["baseline"], models["dapt"], models["general"]) == ("bert", "dapt", "pluglm")
    assert (finished / "adaptation.toml").is_file()


def test_differences_are_paired_by_seed(finished: Path) -> None:
    found = result(finished)
    scores = {
        row["name"]: [seed["accuracy"] for seed in row["scores"]["test"]]
        for row in found["conditions"]
    }
    tested = 0
    for row in found["differences"]:
        if (row["measured"], row["metric"]) != ("test", "accuracy"):
            continue
        pairs = zip(scores[row["condition"]], scores[row["against"]], strict=True)
        differences = [round(a - b, 9) for a, b in pairs]
        mean, spread = statistics.fmean(differences), statistics.stdev(differences)
        assert row["mean"] == pytest.approx(mean, abs=1e-8)
        assert row["std"] == pytest.approx(spread, abs=1e-8)
        if spread:
            # Student's t with one degree of freedom is Cauchy's.
            t = abs(mean) / (spread / math.sqrt(2))
            assert row["p"] == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-8)
        tested += 1
    assert tested == 5 + 5
    assert {row["against"] for row in found["differences"]} == {"no-memory", "general"}


def test_rows_whose_text_was_trained_on_are_told_and_left_out_beside(finished: Path) -> None:
    found = result(finished)
    assert found["leaks"]["test"] == {"rows": 12, "seen_in_training": 3}
    assert found["leaks"]["dev"]["seen_in_training"] == 0
    for row in found["conditions"]:
        for at, seed in enumerate((4, 5)):
            path = finished / row["name"] / f"seed-{seed}" / "predictions.jsonl"
            kept = [json.loads(line) for line in path.open(encoding="utf-8")][3:]
            assert len(kept) == 9
            index = {"fruit": 0, "pet": 1}
            by_hand = class_scores(
                [index[p["predicted"]] for p in kept], [index[p["gold"]] for p in kept], 2
            )
            assert row["scores"]["test_unseen"][at] == pytest.approx(by_hand, abs=1e-6)


def test_the_table_says_what_the_file_does(finished: Path) -> None:
    found = result(finished)
    text = outcome_text(found, ["no-memory", "general"])
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "accuracy, 2 seeds"
    assert "test, unseen rows" in lines[0]
    for line, row in zip(lines[1:7], found["conditions"], strict=True):
        assert line.startswith(row["name"] + " ")
        assert f"{row['summary']['test']['accuracy']['mean']:.4f} ± " in line
    assert "3 of 12 test rows have the text of a training row" in text
    assert "1 degrees of freedom, on the unseen rows" in text


def test_what_is_finished_is_not_trained_again(home: Home, tmp_path: Path, capsys: Capture) -> None:
    few = 'compare.conditions=["no-memory", "general+domain"]'
    out = tmp_path / "run"
    assert main(words(home, out, few, "train.seeds=[4]")) == 0
    first = {p: p.stat().st_mtime_ns for p in out.glob("*/seed-4/**/*") if p.is_file()}
    assert first
    assert main(words(home, out, few)) == 2
    assert "holds finished seeds already; go on with --resume" in capsys.readouterr().err
    # One of two conditions is left without its second seed, as after an interruption.
    assert main([*words(home, out, few), "--resume"]) == 0
    told = capsys.readouterr().err
    assert told.count("seed 4 is finished") == 2
    assert {p: p.stat().st_mtime_ns for p in first} == first
    assert result(out)["seeds"] == [4, 5]
    # A domain that none of the conditions reads plays no part.
    later = ["adapt", str(home.path / "store"), "--name", "later"]
    assert main([*later, "--text", "a plum", "--tokenizer", str(home.path / "pluglm")]) == 0
    capsys.readouterr()
    assert main([*words(home, out, few), "--resume"]) == 0
    assert main([*later, "--undo"]) == 0
    assert "epoch" not in capsys.readouterr().err
    # More conditions may be asked for; other settings may not.
    more = 'compare.conditions=["no-memory", "domain"]'
    assert main([*words(home, out, more, "train.lr=0.1"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "train.lr was 0.005 and is 0.1 now" in said
    assert not (out / "domain" / "seed-4").exists()


def test_results_so_far_are_kept_when_a_condition_fails(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    few = 'compare.conditions=["no-memory", "general"]'
    with run_lock(out / "general"):
        assert main(words(home, out, few, "train.seeds=[4]")) == 1
    assert "is in use by process" in capsys.readouterr().err
    found = result(out)
    assert [row["name"] for row in found["conditions"]] == ["no-memory"]
    assert found["unfinished"] == ["general"]


def test_a_check_trains_nothing(home: Home, tmp_path: Path, capsys: Capture) -> None:
    assert main([*words(home, tmp_path / "run"), "--check"]) == 0
    told = capsys.readouterr().out
    assert "3 of 12 test rows have the text of a training row\n" in told
    assert "general+domain: the same, with the general memory and the domain's" in told
    assert told.endswith("everything fits\n")
    assert not (tmp_path / "run").exists()


def test_a_baseline_of_another_size_is_noted(home: Home, tmp_path: Path) -> None:
    config = json.loads((home.path / "bert" / "config.json").read_text())
    config["num_hidden_layers"] = 7
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    given = load_adaptation_config(
        preset("adaptation"),
        [
            f"model.path={home.path / 'pluglm'}",
            f"memory.store={home.path / 'store'}",
            'compare.domain=["places"]',
            f"compare.baseline={other}",
            'compare.conditions=["no-memory", "baseline"]',
        ],
    )
    notes = adaptation_comparison(given).notes
    assert notes == {
        "baseline": f"not of the same size as {home.path / 'pluglm'}: num_hidden_layers 7 instead "
        "of 2"
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('compare.domain=["law"]', "has no domain 'law'; it has default, places"),
        ('compare.domain=["default"]', "default is in compare.general already"),
        ("compare.domain=[]", "compare.domain = []: must be a list of strings"),
        ('compare.conditions=["genral"]', "'genral' must be one of"),
        ('compare.conditions=["general", "general"]', "one is given twice"),
        ("compare.baseline=", 'leave "baseline" out of compare.conditions'),
        ("compare.baseline={home}/pluglm", "is a PlugLM with memory layers"),
        ("model.path={home}/bert", "reads no memory, so there is nothing to compare"),
        ("model.path={home}", "holds no config.json; give the directory of a PlugLM"),
        ("compare.dapt=none", "model.path = 'none': holds no config.json"),
        ('memory.domains=["default"]', 'memory.domains = ["default"]: must be empty'),
        ("memory.store=", "memory.store is empty"),
        ("memory.top_k=4", "memory.top_k = 4: must be at most 3"),
        ("task.dev={home}/odd.jsonl", "the label 'plant' is not in the training file"),
        ("task.train=none.jsonl", "there is no such file"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    home: Home, tmp_path: Path, capsys: Capture, setting: str, message: str
) -> None:
    (home.path / "odd.jsonl").write_text('{"text": "a fig", "label": "plant"}\n')
    out = tmp_path / "run"
    assert main(words(home, out, setting.format(home=home.path))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not out.exists()


def test_torchrun_is_refused(
    home: Home, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words(home, tmp_path / "run")) == 1
    assert "a comparison runs in one process" in capsys.readouterr().err
