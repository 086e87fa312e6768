"""`pluglm pretrain` from its first line to its last: a whole run, and one that everything happens
to."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from cluster.cli import main
from cluster.config import load_config
from model import PlugLMForMaskedLM
from tests.integration.support_pretrain import (
    Ended,
    Run,
    checkpoint_names,
    make_corpus,
    pretraining,
    read_lines,
    write_config,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 120
LONG = ["memory.refresh=sync", f"optim.steps={STEPS}", "checkpoint.every_steps=10"]
# Refreshes and checkpoints fall on different steps, so that a checkpoint lies between refreshes.
LONG += ["memory.refresh_every_steps=7", "model.dropout=0.1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def corpus(home: Path) -> Path:
    return make_corpus(home)


@dataclass(frozen=True)
class WholeRun:
    """A run that nothing happened to."""

    ended: Ended
    config: Path
    words: list[str]

    @property
    def run_dir(self) -> Path:
        return self.config.with_suffix("")


@pytest.fixture(scope="module")
def whole(home: Path, corpus: Path) -> WholeRun:
    """Twelve steps with refreshes in the background, as by default."""
    config = write_config(home, corpus, name="whole")
    words = ["evaluate.every_steps=6", "logging.wandb=offline"]
    with pretraining(config, *words) as run:
        return WholeRun(ended=run.end(), config=config, words=words)


@pytest.fixture(scope="module")
def reference(home: Path, corpus: Path) -> list[dict[str, Any]]:
    """The training lines of an uninterrupted run with refreshes that training waits for."""
    config = write_config(home, corpus, name="reference")
    with pretraining(config, *LONG) as run:
        assert run.end().code == 0, run.said()
    return read_lines(config.with_suffix(""), "train")


@dataclass(frozen=True)
class Phase:
    """One start of the run that is interrupted again and again."""

    ended: Ended
    before: list[str]
    after: list[str]


class Story:
    """The same run as `reference`, but a fault ends every phase, and the next phase resumes.

    Each phase is played once, after those before it, when a test first asks for it.
    """

    def __init__(self, config: Path) -> None:
        self.config, self.run_dir = config, config.with_suffix("")
        self._played: dict[str, Phase] = {}

    def phase(self, name: str) -> Phase:
        """How a phase ended."""
        faults = [self.full_disk, self.dead_trainer, self.sigterm, self.dead_command]
        for fault in [*faults, self.dead_shard]:
            if name in self._played:
                break
            if fault.__name__ not in self._played:
                self._played[fault.__name__] = self._play(fault)
        return self._played[name]

    def _play(self, fault: Callable[[Run], None]) -> Phase:
        before = checkpoint_names(self.run_dir)
        with pretraining(self.config, *LONG, *(["--resume"] if before else [])) as run:
            fault(run)
            ended = run.end()
        return Phase(ended=ended, before=before, after=checkpoint_names(self.run_dir))

    def full_disk(self, run: Run) -> None:
        run.wait_for_checkpoint_after(0)
        for trainer in run.actors("TrainerHost"):
            # Metrics still fit; the weights do not. Python ignores SIGXFSZ: writes fail.
            resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))

    def dead_trainer(self, run: Run) -> None:
        run.wait_for_step(self._last_step() + 5)
        run.trainer(rank_0=False).kill()

    def sigterm(self, run: Run) -> None:
        run.wait_for_step(self._last_step() + 2)
        run.send(signal.SIGTERM)

    def dead_command(self, run: Run) -> None:
        run.wait_for_checkpoint_after(self._last_step())
        run.send(signal.SIGKILL)

    def dead_shard(self, run: Run) -> None:
        run.wait_for_step(self._last_step() + 2)
        run.actors("ShardHost")[0].kill()

    def _last_step(self) -> int:
        names = [name for name in checkpoint_names(self.run_dir) if not name.startswith(".")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.fixture(scope="module")
def story(home: Path, corpus: Path) -> Story:
    return Story(write_config(home, corpus, name="faults"))


def test_a_whole_run_ends_well_and_leaves_no_process(whole: WholeRun) -> None:
    assert whole.ended.code == 0, whole.ended.stderr
    assert whole.ended.left_over == []
    said = whole.ended.stderr.splitlines()
    assert any("masked-LM loss with the memory" in line for line in said)
    assert said[-2:] == [
        f"model: {whole.run_dir / 'model'}",
        f"report: {whole.run_dir / 'report.html'}",
    ]
    # Every line is ours: nothing of Ray's or DeepSpeed's chatter reaches a person.
    assert len(said) <= 9, whole.ended.stderr


def test_metrics_of_a_whole_run(whole: WholeRun) -> None:
    train = read_lines(whole.run_dir, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    # Twelve steps with a refresh every four: no key is older than two refreshes.
    assert all(0 <= line["staleness_steps"] <= 12 for line in train)
    for name in ("loss", "mlm_loss", "retrieval_loss", "grad_norm", "sequences_per_s"):
        assert all(line[name] > 0 for line in train), name
    assert all(line["memory_bytes"] > 0 and line["retrieval_ms"] > 0 for line in train)
    refreshes = read_lines(whole.run_dir, "refresh")
    assert refreshes[-1]["encoder_step"] == 12
    epochs = [line["epoch"] for line in refreshes]
    assert epochs == sorted(set(epochs))
    assert all(line["mode"] == "async" for line in refreshes)
    assert [line["step"] for line in read_lines(whole.run_dir, "checkpoint")] == [5, 10, 12]
    assert [line["step"] for line in read_lines(whole.run_dir, "eval")] == [6, 12]


def test_files_of_a_whole_run(whole: WholeRun) -> None:
    assert checkpoint_names(whole.run_dir) == ["step-00000010", "step-00000012"]
    assert load_config(whole.run_dir / "config.toml") == load_config(whole.config, whole.words)
    evaluation = json.loads((whole.run_dir / "evaluation.json").read_text())
    assert [case["name"] for case in evaluation["cases"]] == [
        "own entry in the memory",
        "own document left out",
    ]
    for case in evaluation["cases"]:
        assert set(case["conditions"]) == {"right", "shuffled", "none"}
        for means in case["conditions"].values():
            assert means["loss"] > 0
            assert means["masks"] == evaluation["masks"] > 0
    assert len(json.loads((whole.run_dir / "samples.json").read_text())) == 2
    page = (whole.run_dir / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page


def test_the_model_loads_with_transformers(whole: WholeRun) -> None:
    model = AutoModelForMaskedLM.from_pretrained(whole.run_dir / "model")
    assert isinstance(model, PlugLMForMaskedLM)
    tokenizer = AutoTokenizer.from_pretrained(whole.run_dir / "model")
    inputs = tokenizer("Ada met Boris in [MASK] 7.", return_tensors="pt")
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert logits.shape[-1] == len(tokenizer)


def test_wandb_offline_writes_its_own_files(whole: WholeRun) -> None:
    (folder,) = (whole.run_dir / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    assert record.stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ["already holds a run", "--resume", "run.dir"]),
        (["--resume", "optim.batch_size=4"], ["optim.batch_size = 4", "optim.batch_size=8"]),
        (["--resume", "optim.steps=11"], ["optim.steps = 11", "optim.steps=12"]),
    ],
)
def test_a_run_that_is_there_is_not_mixed_with_another(
    whole: WholeRun, capsys: pytest.CaptureFixture[str], words: list[str], says: list[str]
) -> None:
    before = (whole.run_dir / "config.toml").read_text()
    assert main(["pretrain", str(whole.config), *words]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in says), line
    assert (whole.run_dir / "config.toml").read_text() == before


def test_a_damaged_checkpoint_is_passed_over_by_other_trainers_under_another_stage(
    whole: WholeRun, tmp_path: Path
) -> None:
    """One trainer, ZeRO-3 and one shard go on where two, ZeRO-2 and two shards stopped."""
    copy = tmp_path / "run"
    shutil.copytree(whole.run_dir / "checkpoints", copy / "checkpoints")
    shutil.copy(whole.run_dir / "metrics.jsonl", copy)
    damaged = copy / "checkpoints" / "step-00000012" / "state-00001.safetensors"
    os.truncate(damaged, damaged.stat().st_size // 2)
    words = [f"run.dir={copy}", "runtime.trainers=1", "runtime.zero_stage=3", "memory.shards=1"]
    with pretraining(whole.config, *words, "--resume") as run:
        ended = run.end()
    assert ended.code == 0, ended.stderr
    said = ended.stderr
    assert f"step-00000012 is damaged and passed over: {damaged} is" in said
    assert "going on from the one before, step-00000010: 2 steps are done again" in said
    assert "saved by 2 trainers (ZeRO-2), going on with 1 (ZeRO-3)" in said
    assert [line["step"] for line in read_lines(copy, "train")] == list(range(1, 13))
    events = [line["message"] for line in read_lines(copy, "event")]
    assert any("step-00000012 is damaged" in event for event in events)
    assert main(["checkpoint", "verify", str(copy)]) == 0
    assert checkpoint_names(copy) == ["step-00000010", "step-00000012"]


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_checkpoint_before(
    story: Story,
) -> None:
    phase = story.phase("full_disk")
    assert phase.ended.code == 1
    line = phase.ended.error_line
    for part in ("the checkpoint of step", "could not be written", "is untouched", "--resume"):
        assert part in line, line
    assert phase.ended.left_over == []
    committed = [name for name in phase.after if not name.startswith(".")]
    assert committed
    assert committed[-1] in line


def test_a_trainer_that_is_killed_ends_the_run_with_one_line(story: Story) -> None:
    phase = story.phase("dead_trainer")
    assert phase.ended.code == 1
    line = phase.ended.error_line
    assert "the process of trainer 1 died" in line
    assert f"go on from {phase.after[-1]} with --resume" in line
    assert phase.ended.left_over == []
    assert phase.after[-1] >= phase.before[-1]


def test_sigterm_writes_a_checkpoint_of_the_last_step(story: Story) -> None:
    phase = story.phase("sigterm")
    assert phase.ended.code == 143, phase.ended.stderr
    assert phase.ended.left_over == []
    assert phase.after[-1] > phase.before[-1]
    last = phase.ended.stderr.splitlines()[-1]
    assert f"stopped at step {int(phase.after[-1].removeprefix('step-'))};" in last
    assert "--resume" in last


def test_killing_the_command_ends_what_it_started(story: Story) -> None:
    phase = story.phase("dead_command")
    assert phase.ended.code == -signal.SIGKILL
    assert phase.ended.left_over == []


def test_training_goes_on_when_a_shard_is_killed(story: Story) -> None:
    phase = story.phase("dead_shard")
    assert phase.ended.code == 0, phase.ended.stderr
    assert phase.ended.left_over == []
    assert phase.after[-1] == f"step-{STEPS:08d}"


def test_after_all_that_every_step_equals_the_uninterrupted_runs(
    home: Path, story: Story, reference: list[dict[str, Any]]
) -> None:
    assert story.phase("dead_shard").ended.code == 0
    resumed = read_lines(home / "faults", "train")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))
    for ours, theirs in zip(resumed, reference, strict=True):
        # The step of the keys that were searched, and all that follows from data and weights.
        assert ours["staleness_steps"] == theirs["staleness_steps"], ours["step"]
        for name in ("loss", "mlm_loss", "retrieval_loss", "mlm_accuracy", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-6), (name, ours["step"])


def ray_starts(run: Run) -> bool:
    return (run.run_dir / "config.toml").exists()


def shards_start(run: Run) -> bool:
    return bool(run.actors("ShardHost"))


@pytest.mark.parametrize(
    ("number", "to_group", "moment"),
    [(signal.SIGINT, True, ray_starts), (signal.SIGTERM, False, shards_start)],
)
def test_a_signal_before_the_first_step_ends_cleanly(
    tmp_path: Path, corpus: Path, number: signal.Signals, to_group: bool, moment: Any
) -> None:
    with pretraining(write_config(tmp_path, corpus)) as run:
        run.wait_until(lambda: moment(run), what=moment.__name__)
        if to_group:  # as a terminal does for Ctrl-C
            os.killpg(run.process.pid, number)
        else:
            run.send(number)
        ended = run.end()
    assert ended.code == 128 + number, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("interrupted"), ended.stderr
    assert ended.left_over == []
    assert checkpoint_names(run.run_dir) == []
