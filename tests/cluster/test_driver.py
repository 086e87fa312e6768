"""The driver's decisions, with trainers and a memory that do what each test says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.driver as driver_module
from cluster.config import PretrainConfig, config_from_mapping
from cluster.driver import Driver, RunPlan
from cluster.errors import GraceOver, NoRoom, TrainersNotUp
from cluster.recovery import TrainerDied
from cluster.starting import Start
from cluster.stop import Stop
from memory_server.errors import RefreshFailed
from model import PlugLMConfig
from trainer.checkpoint_state import CheckpointState
from trainer.data.cursor import Cursor
from trainer.errors import TrainingError
from trainer.job import TrainJob, TrainOutcome

DONE = TrainOutcome(step=9, stopped=False, checkpoint=Path("step-00000009"))


def state_of(step: int) -> CheckpointState:
    return CheckpointState(
        step=step,
        cursor=Cursor(),
        trainers=4,
        zero_stage=2,
        content_version="v1",
        encoder_step=step,
        published_step=step,
    )


class World:
    """What happens, in turn; and what was done about it.

    Attributes:
        ends: how each gang's training ends: an error is raised, an outcome returned.
        room: how many trainers there is room for, whenever a gang is asked for.
        renewals: errors of the memory's next renewals.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.ends: list[Any] = []
        self.evaluations: list[Any] = []
        self.room: list[int] = []
        self.gangs_fail: list[Exception | None] = []
        self.renewals: list[Exception] = []
        self.jobs: list[TrainJob] = []
        self.said: list[str] = []
        self.renewed: list[int] = []
        self.saved = -1
        self._run_dir = tmp_path
        monkeypatch.setattr(driver_module, "trainer_gang", self._gang)
        monkeypatch.setattr(driver_module, "Watch", self._watch)
        monkeypatch.setattr(driver_module, "_RENEW_EVERY_S", 0.0)
        monkeypatch.setattr(driver_module, "read_key_weights", lambda path: {})
        monkeypatch.setattr(driver_module, "latest_checkpoint", self._latest)
        monkeypatch.setattr(driver_module, "find_start", self._find)

    def run(self, **recovery: Any) -> Any:
        config: PretrainConfig = config_from_mapping(
            {
                "data": {"corpus": "here"},
                "runtime": {"trainers": 4},
                "recovery": recovery,
            }
        )
        plan = RunPlan(
            config=config,
            source=SimpleNamespace(tokenizer=Path("t"), fingerprint=""),  # type: ignore[arg-type]
            task=None,  # type: ignore[arg-type]
            shape=PlugLMConfig(),
            first=Start(checkpoint=None, state=state_of(0), notes=("told once",)),
            weights={},
            run_dir=self._run_dir,
        )
        serving: Any = SimpleNamespace(
            memory=None, epoch=1, content_version="v1", renew=self._renew
        )
        driver = Driver(plan, serving, "cpu", stop=Stop(), tell=self.said.append)
        return driver.run(None)

    @contextmanager
    def _gang(self, runtime: Any, **options: Any) -> Iterator[Any]:
        if self.gangs_fail:
            failure = self.gangs_fail.pop(0)
            if failure is not None:
                raise failure
        if self.room and runtime.trainers > self.room[0]:
            raise NoRoom(f"no room within {options['timeout_s']:g} s")
        self.room = self.room[1:]
        yield SimpleNamespace(rendezvous="tcp://here:1")

    def _watch(self, gang: Any, job: TrainJob, *_: Any) -> Any:
        self.jobs.append(job)
        return SimpleNamespace(
            step=7,
            until_trained=lambda: self._end(self.ends),
            until_evaluated=lambda: self._end(self.evaluations) if self.evaluations else {},
        )

    @staticmethod
    def _end(ends: list[Any]) -> Any:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def _renew(self, start: Start, weights: Any) -> None:
        if self.renewals:
            raise self.renewals.pop(0)
        self.renewed.append(start.state.step)

    def _latest(self, run_dir: Path) -> Path | None:
        return None if self.saved < 0 else run_dir / f"step-{self.saved:08d}"

    def _find(self, config: Any, run_dir: Path, **_: Any) -> Start:
        return Start(checkpoint=self._latest(run_dir), state=state_of(self.saved), notes=("n",))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


def test_trainers_go_on_from_the_newest_checkpoint_with_its_keys(world: World) -> None:
    world.saved = 5
    world.ends = [TrainerDied(1), DONE]
    assert world.run().outcome == DONE
    first, second = world.jobs
    assert first.recovery is None
    assert second.recovery is not None
    assert (second.start.step, second.recovery.failed_step, second.recovery.restarts) == (5, 7, 1)
    assert second.resumes
    assert world.renewed == [5]
    assert "starting again from step-00000005: 2 steps are done again" in world.said[0]
    assert world.said[1] == "n"


def test_before_the_first_checkpoint_it_is_begun_anew(world: World) -> None:
    world.ends = [TrainerDied(0), DONE]
    world.run()
    second = world.jobs[1]
    assert second.checkpoint is None
    assert second.resumes, "the metrics of the first attempt are there"
    assert second.notes == (), "what was told is not told again"
    assert "from the beginning: 7 steps" in world.said[0]


def test_in_vain_means_no_new_checkpoint(world: World) -> None:
    world.saved = 5
    world.ends = [TrainerDied(1)] * 3
    with pytest.raises(TrainingError, match="failed after 2 restarts in vain: the process of"):
        world.run(max_restarts=2)
    world.ends = [TrainerDied(1)]
    with pytest.raises(TrainingError, match=r"failed: the process.*go on from step-00000005"):
        world.run(max_restarts=0)


def test_what_would_happen_again_ends_the_run(world: World) -> None:
    world.ends = [ValueError("a bug")]
    with pytest.raises(TrainingError, match="training failed: ValueError: a bug"):
        world.run()
    world.ends = [GraceOver(5.0)]
    with pytest.raises(GraceOver):
        world.run()
    assert world.renewed == []


def test_trainers_that_die_while_they_evaluate_are_started_to_evaluate_again(world: World) -> None:
    world.saved = 9
    world.ends = [DONE, DONE]
    world.evaluations = [TrainerDied(0), {"loss": 1.0}]
    assert world.run().evaluation == {"loss": 1.0}
    world.ends, world.evaluations = [DONE], [ValueError("x")]
    with pytest.raises(TrainingError, match="the evaluation failed"):
        world.run()


def test_fewer_trainers_go_on_where_that_is_allowed(world: World) -> None:
    world.saved, world.ends, world.room = 5, [TrainerDied(1), DONE], [4, 3]
    world.run(min_trainers=1)
    assert [job.settings.runtime.trainers for job in world.jobs] == [4, 2]
    assert "going on with 2 trainers: there is no room for 4" in world.said
    world.ends, world.room = [TrainerDied(1)], [4, 3]
    with pytest.raises(NoRoom, match="within 600 s"):
        world.run()


def test_trainers_that_do_not_come_up_again_are_tried_again(world: World) -> None:
    world.saved, world.ends = 5, [TrainerDied(1), DONE]
    world.gangs_fail = [None, TrainersNotUp("not up"), None]
    world.run()
    assert world.jobs[-1].recovery is not None
    assert world.jobs[-1].recovery.restarts == 2
    world.gangs_fail = [TrainersNotUp("not up")]
    with pytest.raises(TrainersNotUp):
        world.run()


def test_a_memory_that_comes_back_later_is_asked_again(world: World) -> None:
    world.saved, world.ends = 5, [TrainerDied(1), DONE]
    world.renewals = [RefreshFailed("shard 1 is gone"), RefreshFailed("still")]
    world.run()
    assert world.renewed == [5]
    assert sum("trying again" in line for line in world.said) == 2
    world.ends, world.renewals = [TrainerDied(1)], [RefreshFailed("for good")] * 1000
    with pytest.raises(TrainingError, match="could not be given the keys of step 5: for good"):
        world.run(wait_for_nodes_s=0.001)
