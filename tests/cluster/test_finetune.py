"""`pluglm finetune`: its configuration, its presets, its words, its refusals."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import ConfigError
from cluster.config_sections import build_config
from cluster.finetune import FinetuneConfig, load_finetune_config, results_table
from cluster.presets import preset
from cluster.run_lock import run_lock
from tests.trainer.finetune.tiny import (
    make_store,
    pet_or_fruit,
    same_rows,
    save_bert,
    save_pluglm,
    write_rows,
)

PRESETS = ["finetune-classification", "finetune-qa"]
SMALLEST = {
    "task": {"kind": "classification", "train": "a.csv", "dev": "b.csv"},
    "model": {"path": "m"},
}
SHORT = [
    "task.max_length=16",
    "train.lr=0.005",
    "train.batch_size=8",
    "train.epochs=2",
    "train.seeds=[4, 5]",
    "memory.top_k=2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finetune")
    train = write_rows(home / "train.jsonl", pet_or_fruit(32))
    for split in ("dev", "test"):
        same_rows(train, home / f"{split}.jsonl")
    save_pluglm(home / "pluglm")
    save_bert(home / "bert")
    make_store(home / "store")
    return home


def words(home: Path, *more: str, model: str = "pluglm") -> list[str]:
    """The shipped preset, with paths and a length for a test."""
    given = [
        f"model.path={home / model}",
        f"memory.store={home / 'store'}",
        *(f"task.{split}={home / split}.jsonl" for split in ("train", "dev", "test")),
        *SHORT,
    ]
    options = [word for setting in given for word in ("--set", setting)]
    return ["finetune", str(preset(PRESETS[0])), *options, *more]


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_load_and_come_back_equal(name: str) -> None:
    config = load_finetune_config(preset(name))
    assert build_config(FinetuneConfig, tomllib.loads(config.to_toml())) == config
    assert config.train.seeds == (0, 1, 2)


def test_seeds_are_a_list_of_whole_numbers() -> None:
    config = build_config(FinetuneConfig, SMALLEST, ["train.seeds=[7, 3]"])
    assert config.train.seeds == (7, 3)
    assert "seeds = [7, 3]" in config.to_toml()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seeds=[]", "must be a list of one or more whole numbers, such as [0, 1, 2]"),
        ("train.seeds=[1.5]", "train.seeds = [1.5]: must be a whole number"),
        ("train.seeds=3", "must be a list of one or more whole numbers"),
        ("train.seeds=[1, 1]", "one seed is given twice"),
        ("train.seeds=[-1]", "train.seeds = [-1]: must be from 0 to"),
        ("task.kind=clasification", 'did you mean "classification"?'),
        ("task.metric=f1", 'task.metric = "f1": must be one of "accuracy", "f1_micro"'),
        ("task.train=", "task.train is empty"),
        ("task.max_lenght=64", "did you mean task.max_length?"),
        ("model.path=", "model.path is empty"),
        ("memory.mode=dead", 'must be one of "live", "frozen"'),
        ("run.dir=", "run.dir is empty"),
        ("train.lr=0", "train.lr = 0.0: must be above 0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config(FinetuneConfig, SMALLEST, [override])


def test_settings_that_contradict_each_other_are_named() -> None:
    with pytest.raises(ConfigError, match=r"refresh_every_steps = 5: must be 0 with memory\.mode"):
        build_config(
            FinetuneConfig, SMALLEST, ["memory.mode=frozen", "memory.refresh_every_steps=5"]
        )
    with pytest.raises(
        ConfigError, match=r"task\.doc_stride = 128: must be below task\.max_length"
    ):
        build_config(
            FinetuneConfig, SMALLEST, ["task.kind=question_answering", "task.doc_stride=128"]
        )


def test_a_task_without_a_kind_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"task\.kind is missing"):
        build_config(FinetuneConfig, {"task": {"train": "a", "dev": "b"}, "model": {"path": "m"}})


def test_check_reads_everything_and_writes_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(home, "--out", str(tmp_path / "run"), "--check")) == 0
    told = capsys.readouterr().out
    assert "texts into 2 labels; rows: 32 train, 32 dev, 32 test" in told
    assert "everything fits" in told
    assert not (tmp_path / "run").exists()


def test_the_command_trains_prints_a_table_and_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words(home, "--out", str(run))) == 0
    table = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"2 seeds, mean ± deviation +test +test, memory unplugged +dev", table[0])
    assert re.match(r"accuracy +[01]\.\d{4} ± 0\.\d{4} ", table[1])
    results = json.loads((run / "results.json").read_text())
    assert f"{results['summary']['test']['accuracy']['mean']:.4f}" in table[1]
    assert load_finetune_config(run / "finetune.toml").run.dir == str(run)

    assert main(words(home, "--out", str(run))) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main(words(home, "--out", str(run), "--resume")) == 0
    again = capsys.readouterr()
    assert again.out.splitlines() == table
    assert "seed 4 is finished" in again.err
    assert "epoch" not in again.err


def test_only_the_models_path_changes_for_the_baseline(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(home, "--out", str(tmp_path / "run"), model="bert")) == 0
    told = capsys.readouterr()
    assert "is bert, which reads no memory: [memory] is not used" in told.err
    assert "unplugged" not in told.out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.dev=none.jsonl", "task.dev = 'none.jsonl': there is no such file"),
        ("task.text=txt", "there is no column 'txt'; the columns are text, label"),
        ("model.path=none", "model.path = 'none': holds no config.json"),
        ("memory.store=none", "no memory store at none"),
        ("task.dev={home}/train.jsonl", "holds the same rows as task.train"),
        ("task.test={home}/copy.jsonl", "/copy.jsonl': holds the same rows as task.train"),
        ("memory.top_k=99", "memory.top_k = 99: must be at most 8"),
        ("task.labels=x", "task.labels: unknown key; did you mean task.label?"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    message: str,
) -> None:
    (home / "copy.jsonl").write_bytes((home / "train.jsonl").read_bytes())
    setting = setting.format(home=home)
    assert main(words(home, "--set", setting, "--out", str(tmp_path / "run"))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_two_processes_never_share_a_directory(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_lock(tmp_path / "run"):
        assert main(words(home, "--out", str(tmp_path / "run"))) == 1
    assert "is in use by process" in capsys.readouterr().err


def test_the_table_of_one_seed_has_no_deviation() -> None:
    found = {"f1": {"mean": 0.5, "std": None, "seeds": 1}}
    printed = results_table({"summary": {"dev": found}, "seeds": [{}]})
    assert printed.splitlines() == ["one seed     dev", "f1        0.5000"]
