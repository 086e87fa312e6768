"""Saved is only what is whole and worth going on from; else it is said what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from tests.multiprocess.ranks import run_ranks
from trainer.checkpoint import Written, committed_checkpoints, read_state
from trainer.data.cursor import Cursor
from trainer.engine import TrainingEngine
from trainer.errors import CheckpointError, TrainingError
from trainer.follower import MemoryFollower
from trainer.saving import CheckpointSaver
from trainer.settings import (
    CheckpointSettings,
    DataSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)
from trainer.tensor_files import file_record

CONFIG = {"optim": {"lr": 1e-3}, "run": {"dir": "somewhere"}}


@dataclass
class FakeEngine:
    """An engine that writes one file per rank, and whose training goes as the test says."""

    rank: int = 0
    weights_finite: bool = True
    disk_full: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def weights_are_finite(self) -> bool:
        return self.weights_finite

    def save(self, directory: Path) -> Written:
        if self.disk_full:
            raise OSError(28, "No space left on device")
        path = directory / f"state-{self.rank}.bin"
        path.write_text("weights")
        return Written(files={path.name: file_record(path)}, parameters={}, moments=[])

    def counters(self) -> dict[str, Any]:
        return {"global_steps": 6, "skipped_steps": 1, "loss_scale": {}}


class Harness:
    """A saver with everything around it."""

    def __init__(
        self, run_dir: Path, engine: FakeEngine, *, trainers: int = 1, published_step: int = 0
    ) -> None:
        self.recorded: list[tuple[str, int]] = []
        self.disk_full = False
        follower = SimpleNamespace(
            content_version="v3",
            encoder_step=4,
            published_step=published_step,
            live_weights={"w": torch.ones(2)},
        )
        self.saver = CheckpointSaver(
            run_dir,
            TrainSettings(
                data=DataSettings(corpus="none"),
                optim=OptimSettings(batch_size=8),
                runtime=RuntimeSettings(trainers=trainers),
                checkpoint=CheckpointSettings(keep=2),
            ),
            CONFIG,
            rank=engine.rank,
            engine=cast(TrainingEngine, engine),
            follower=cast(MemoryFollower, follower),
            record=self.record,
            saved_step=-1,
            patience_s=0.2,
        )

    def record(self, kind: str, step: int, **numbers: Any) -> None:
        if self.disk_full:
            raise OSError("No space left on device")
        self.recorded.append((kind, step))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    meeting: Path = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_state_says_what_a_resumed_run_needs(tmp_path: Path) -> None:
    """A refresh of step 5 is under way, but the checkpoint has the live keys, of step 4."""
    run = Harness(tmp_path, FakeEngine(), published_step=5)
    run.saver.save(6, Cursor(0, 48))
    state = read_state(committed_checkpoints(tmp_path)[-1])
    assert (state.step, state.cursor, state.content_version) == (6, Cursor(0, 48), "v3")
    assert (state.encoder_step, state.published_step) == (4, 4)
    assert state.settings == CONFIG
    assert state.engine == {"global_steps": 6, "skipped_steps": 1, "loss_scale": {}}
    assert run.saver.saved_step == 6
    assert run.recorded == [("checkpoint", 6)]


@pytest.mark.usefixtures("alone")
def test_what_diverged_does_not_become_the_newest_checkpoint(tmp_path: Path) -> None:
    Harness(tmp_path, FakeEngine()).saver.save(6, Cursor())
    with pytest.raises(TrainingError) as caught:
        Harness(tmp_path, FakeEngine(weights_finite=False)).saver.save(7, Cursor())
    said = "not finite at step 7: weights;"
    for part in (said, "diverged", "step-00000006 is untouched", "lower optim.lr", "--resume"):
        assert part in str(caught.value)
    assert [p.name for p in committed_checkpoints(tmp_path)] == ["step-00000006"]


@pytest.mark.usefixtures("alone")
def test_a_metrics_line_that_cannot_be_written_is_no_failed_checkpoint(tmp_path: Path) -> None:
    run = Harness(tmp_path, FakeEngine())
    run.disk_full = True
    with pytest.raises(OSError, match="No space left"):
        run.saver.save(6, Cursor())
    assert run.saver.saved_step == 6
    assert read_state(committed_checkpoints(tmp_path)[-1]).step == 6


@pytest.mark.usefixtures("alone")
def test_files_of_other_nodes_that_rank_0_does_not_see_are_asked_for(tmp_path: Path) -> None:
    """Two trainers, of which the second writes to a disk of its own."""
    with pytest.raises(CheckpointError) as caught:
        Harness(tmp_path, FakeEngine(), trainers=2).saver.save(6, Cursor())
    for part in ("step 6", "rank 1 has written part-00001", "run.dir", "all nodes share"):
        assert part in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _save_on(rank: int, home: Path) -> list[str]:
    """Rank 1's weights diverge; then each rank's disk is its own; then all is well."""
    told = []
    for directory, engine in (
        (home / "diverged", FakeEngine(rank, weights_finite=rank == 0)),
        (home / f"own-{rank}", FakeEngine(rank)),
        (home / "full", FakeEngine(rank, disk_full=rank == 1)),
        (home / "good", FakeEngine(rank)),
    ):
        directory.mkdir(exist_ok=True)
        try:
            Harness(directory, engine, trainers=2).saver.save(6, Cursor())
            told.append("saved")
        except TrainingError as error:
            told.append(str(error))
    return told


@pytest.mark.multiprocess
def test_all_ranks_agree_on_what_is_saved(tmp_path: Path) -> None:
    first, second = run_ranks(_save_on, 2, tmp_path)
    assert "not finite at step 6: weights" in first[0]
    assert first[0] == second[0]
    # Rank 0's directory is not where rank 1 looks.
    assert "rank 0 has made" in first[1]
    assert "all nodes share" in first[1]
    assert "by rank 1" in first[2]
    assert "No space left on device" in first[2]
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    assert first == second
    assert first[3] == "saved"
    assert [p.name for p in (tmp_path / "good" / "checkpoints").iterdir()] == ["step-00000006"]
