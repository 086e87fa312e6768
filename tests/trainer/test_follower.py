"""Following the memory: what is published when, and which epoch every rank searches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memory_server.api import Entry, MemoryInfo, Retrieved, StageState, StageStatus
from memory_server.errors import (
    CoordinatorLost,
    EpochInUse,
    EpochNotSealed,
    RefreshFailed,
    ShardLost,
)
from tests.multiprocess.ranks import run_ranks
from trainer import publisher
from trainer.engine import TrainingEngine
from trainer.errors import TrainingError
from trainer.follower import MemoryFollower, RefreshClock
from trainer.settings import MemorySettings

FIRST = 7


class FakePin:
    """Notes in the memory which epochs are held."""

    def __init__(self, memory: FakeMemory, epoch: int) -> None:
        self.memory, self.epoch = memory, epoch

    def renew(self) -> None:
        pass

    def close(self) -> None:
        self.memory.pinned.remove(self.epoch)

    def __enter__(self) -> FakePin:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class FakeMemory:
    """A memory whose epochs are sealed, or fail, when the test says so; it notes what is asked."""

    def __init__(self, *, seals_when_waited_for: bool = True) -> None:
        self.live = FIRST
        self.states: dict[int, StageState] = {FIRST: "sealed"}
        self.staged: dict[int, tuple[int, float, str | None]] = {}
        self.log: list[str] = []
        self.pinned: list[int] = []
        self.rebases = False
        self.step_of_keys = 0
        self.refuses: Exception | None = None
        self.unable: dict[str, int] = {}
        self.never_seals = False
        self.seals_when_waited_for = seals_when_waited_for

    def stage(
        self,
        *,
        encoder_step: int,
        weights: Mapping[str, Tensor] | None = None,
        content_version: str | None = None,
    ) -> int:
        if self.refuses is not None:
            raise self.refuses
        epoch = max(self.states) + 1 if self.states else FIRST
        assert weights is not None
        self.staged[epoch] = (encoder_step, float(weights["w"]), content_version)
        self.states[epoch] = "encoding"
        self.log.append(f"stage {epoch}")
        return epoch

    def staging(self, epoch: int) -> StageStatus:
        state = self.states[epoch]
        error = "a shard fell over" if state == "failed" else None
        return StageStatus(epoch=epoch, state=state, done=0, total=1, error=error, seconds=0.0)

    def wait_sealed(self, epoch: int, timeout_s: float) -> None:
        self.log.append(f"wait {epoch}")
        if self.never_seals:
            assert timeout_s <= 1, "whoever asks to stop waits this long"
            raise TimeoutError("not sealed yet")
        if not self.seals_when_waited_for:
            self.states[epoch] = "failed"
            raise RefreshFailed("a shard fell over")
        self.states[epoch] = "sealed"

    def activate(self, epoch: int) -> int:
        self.may("activate")
        if self.states[epoch] != "sealed":
            raise EpochNotSealed(str(epoch))
        self.log.append(f"activate {epoch}")
        if self.rebases:
            epoch = max(self.states) + 1
            self.states[epoch] = "sealed"
        self.live = epoch
        return epoch

    def pin(self, epoch: int | None = None, *, lease_s: float = 60.0) -> FakePin:
        pin = FakePin(self, self.live if epoch is None else epoch)
        self.pinned.append(pin.epoch)
        return pin

    def edit(self, *, encoder_step: int) -> int:
        """Someone else makes other content live, and releases what was."""
        self.live = max(self.states) + 1
        self.states[self.live] = "sealed"
        self.step_of_keys = encoder_step
        return self.live

    def release(self, epoch: int) -> None:
        self.may("release")
        if epoch == self.live:
            raise EpochInUse(str(epoch))
        # Numbers are never given twice, so a released epoch is kept in mind as failed.
        self.states[epoch] = "failed"
        self.log.append(f"release {epoch}")

    def may(self, what: str) -> None:
        """Fail as often as the test says."""
        if self.unable.get(what, 0) > 0:
            self.unable[what] -= 1
            raise ShardLost(f"shard 1 did not {what}")

    def info(self) -> MemoryInfo:
        return MemoryInfo(
            entries=1,
            shards=1,
            key_width=1,
            entry_tokens=1,
            epoch=self.live,
            encoder_step=self.step_of_keys,
            content_version="v0" if self.live == FIRST else f"v{self.live}",
            tokenizer_fingerprint="",
            pad_token_id=0,
            bytes={"keys": 12},
            index="flat",
        )

    def search(self, queries_BQ: Tensor, k: int, **_: object) -> Retrieved:
        raise AssertionError("a follower does not search")

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        raise AssertionError("a follower reads no entries")

    def close(self) -> None:
        raise AssertionError("a follower does not close the memory")


class Inline(Executor):
    """Whatever a thread would do is done at once, so that every test sees the same order."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*args, **named))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.publisher.ThreadPoolExecutor", Inline)


class Harness:
    """A follower with everything around it; weights are the number of the step."""

    def __init__(
        self,
        memory: FakeMemory,
        *,
        rank: int = 0,
        zero_stage: int = 0,
        published_step: int = 0,
        content: Callable[[int], str | None] = lambda step: None,
        **settings: Any,
    ) -> None:
        self.memory, self.step = memory, 0
        self.recorded: list[tuple[str, int, dict[str, Any]]] = []
        self.said: list[str] = []
        self.gathered = 0
        self.asks = 0
        self.stop_after_asks: int | None = None

        def key_weights() -> dict[str, Tensor]:
            self.gathered += 1
            return {"w": torch.tensor(float(self.step))}

        def stop_requested() -> bool:
            self.asks += 1
            return self.stop_after_asks is not None and self.asks > self.stop_after_asks

        def record(kind: str, step: int, **numbers: Any) -> None:
            self.recorded.append((kind, step, numbers))

        engine = SimpleNamespace(
            device=torch.device("cpu"),
            key_weights=key_weights,
            settings=SimpleNamespace(runtime=SimpleNamespace(zero_stage=zero_stage)),
        )
        self.follower = MemoryFollower(
            memory,
            cast(TrainingEngine, engine),
            MemorySettings(**settings),
            rank=rank,
            epoch=FIRST,
            encoder_step=0,
            published_step=published_step,
            live_content="v0",
            live_weights={"w": torch.tensor(-1.0)},
            content_version=content,
            stop_requested=stop_requested,
            record=record,
            say=self.said.append,
        )

    def at(self, step: int, *, stop: bool = False) -> bool:
        self.step = step
        if stop:
            self.stop_after_asks = 0
        return self.follower.boundary(step)

    def events(self) -> list[str]:
        return [numbers["message"] for kind, _, numbers in self.recorded if kind == "event"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    meeting: Path = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- the clock ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refresh", "step", "published", "due"),
    [
        ("async", 0, 0, False),
        ("async", 9, 0, False),
        ("async", 10, 0, True),
        ("async", 25, 0, True),
        ("async", 25, 20, False),
        ("sync", 10, 0, True),
        ("off", 1000, 0, False),
    ],
)
def test_when_weights_are_due(refresh: Any, step: int, published: int, due: bool) -> None:
    clock = RefreshClock(MemorySettings(refresh=refresh, refresh_every_steps=10))
    assert clock.due(step, published) is due


@pytest.mark.parametrize(
    ("bound", "step", "encoder_step", "stale"),
    [(0, 10**6, 0, False), (15, 14, 0, False), (15, 15, 0, True), (15, 25, 10, True)],
)
def test_when_keys_are_too_old(bound: int, step: int, encoder_step: int, stale: bool) -> None:
    clock = RefreshClock(MemorySettings(refresh_every_steps=10, max_staleness_steps=bound))
    assert clock.too_stale(step, encoder_step) is stale


# --- asynchronous ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_async_stages_in_the_background_and_switches_at_a_later_boundary() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=3)
    for step in range(3):
        assert run.at(step) is False
    assert memory.log == []
    run.at(3)
    assert memory.log == ["stage 8"]
    assert memory.staged[8] == (3, 3.0, None)
    assert run.follower.epoch == memory.live == FIRST
    run.at(4)
    assert run.follower.epoch == FIRST, "it is not sealed yet"
    memory.states[8] = "sealed"
    time.sleep(0.25)  # a memory is asked a few times a second, however short the steps are
    run.at(5)
    assert memory.log == ["stage 8", "activate 8", "release 7"]
    assert (run.follower.epoch, run.follower.encoder_step) == (8, 3)
    assert run.follower.published_step == 3
    assert run.follower.live_weights == {"w": torch.tensor(3.0)}


@pytest.mark.usefixtures("alone")
def test_training_does_not_wait_for_a_memory_that_takes_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither while it writes the weights down, nor while it is asked how far it is."""
    monkeypatch.setattr("trainer.publisher.ThreadPoolExecutor", ThreadPoolExecutor)
    memory, answers = FakeMemory(), threading.Event()
    stage, staging = memory.stage, memory.staging

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            assert answers.wait(20)
            return call(*args, **named)

        return called

    monkeypatch.setattr(memory, "stage", slow(stage))
    monkeypatch.setattr(memory, "staging", slow(staging))
    monkeypatch.setattr(memory, "info", slow(memory.info))
    run = Harness(memory, refresh="async", refresh_every_steps=3)
    for step in range(20):  # no boundary returns if one waits: nobody else sets the event
        run.at(step)
    assert memory.log == []
    answers.set()
    deadline = time.monotonic() + 20
    while run.follower.epoch == FIRST:
        assert time.monotonic() < deadline
        memory.states.update({8: "sealed"} if 8 in memory.states else {})
        time.sleep(0.01)
        run.at(20)
    assert (run.follower.epoch, run.follower.encoder_step) == (8, 3)
    run.follower.close()


@pytest.mark.usefixtures("alone")
def test_the_weights_of_a_checkpoint_are_those_of_the_live_keys() -> None:
    """Not those that were published last: a resumed run encodes the live epoch again."""
    run = Harness(FakeMemory(), refresh="async", refresh_every_steps=3)
    run.at(3)
    assert run.follower.live_weights == {"w": torch.tensor(-1.0)}
    assert (run.follower.encoder_step, run.follower.published_step) == (0, 3)


@pytest.mark.usefixtures("alone")
def test_only_one_epoch_is_staged_at_a_time() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2)
    for step in range(10):
        run.at(step)
    assert memory.log == ["stage 8"]
    memory.states[8] = "sealed"
    time.sleep(0.25)
    run.at(10)
    assert memory.log == ["stage 8", "activate 8", "release 7", "stage 9"]
    assert memory.staged[9][0] == 10


@pytest.mark.usefixtures("alone")
def test_a_switch_is_recorded_with_its_numbers() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2)
    run.at(2)
    memory.states[8] = "sealed"
    run.at(3)
    ((kind, step, numbers),) = run.recorded
    assert (kind, step) == ("refresh", 3)
    assert numbers["epoch"] == 8
    assert numbers["encoder_step"] == numbers["published_step"] == 2
    assert numbers["mode"] == "async"
    assert numbers["memory_bytes"] == {"keys": 12}
    assert 0 <= numbers["seconds_stood_still"] <= numbers["seconds_total"] + 1.0


@pytest.mark.usefixtures("alone")
def test_a_failed_refresh_leaves_the_old_epoch_and_is_tried_again_when_due() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=3)
    run.at(3)
    memory.states[8] = "failed"
    run.at(4)
    assert run.follower.epoch == memory.live == FIRST
    assert run.events() == [
        "refresh failed, epoch 7 goes on serving: a shard fell over",
    ]
    assert run.said == run.events()
    assert memory.log == ["stage 8", "release 8"]
    run.at(5)
    assert memory.log[-1] == "release 8"
    run.at(6)
    assert memory.log[-1] == "stage 9"
    memory.states[9] = "sealed"
    run.at(7)
    assert run.follower.epoch == 9


@pytest.mark.usefixtures("alone")
def test_a_memory_that_refuses_to_stage_does_not_end_the_training() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=3)
    memory.refuses = CoordinatorLost("the coordinator does not answer")
    run.at(3)
    run.at(4)
    assert run.events() == [
        "refresh failed, epoch 7 goes on serving: the coordinator does not answer"
    ]
    memory.refuses = None
    run.at(6)
    assert memory.log == ["stage 8"]


@pytest.mark.usefixtures("alone")
def test_three_failures_in_a_row_end_the_training() -> None:
    """Of any kind: an epoch that failed, a coordinator that is gone."""
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2)
    run.at(2)
    memory.states[8] = "failed"
    run.at(3)
    memory.refuses = CoordinatorLost("the coordinator does not answer")
    for step in (4, 5, 6):
        run.at(step)
    with pytest.raises(TrainingError) as caught:
        run.at(7)
    assert len(run.events()) == 3
    for part in ("3 refreshes in a row", "the coordinator does not answer", "--resume"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_a_refresh_that_succeeds_forgives_those_that_failed_before() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="sync", refresh_every_steps=1)
    for step in range(1, 10):
        memory.seals_when_waited_for = step % 3 == 0
        run.at(step)
    assert len(run.events()) == 6
    assert run.follower.encoder_step == 9


@pytest.mark.usefixtures("alone")
def test_an_old_epoch_that_cannot_be_released_is_told_and_no_more() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="sync", refresh_every_steps=2)
    memory.unable = {"release": 1}
    run.at(2)
    assert run.follower.epoch == memory.live == 8
    assert run.events() == ["epoch 7 of the memory is not released: shard 1 did not release"]
    assert run.said == run.events()
    assert [kind for kind, _, _ in run.recorded] == ["event", "refresh"]


@pytest.mark.usefixtures("alone")
def test_a_switch_is_tried_again_and_then_ends_the_training() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="sync", refresh_every_steps=2)
    memory.unable = {"activate": 2}
    run.at(2)
    assert memory.live == 8
    memory.unable = {"activate": 3}
    with pytest.raises(TrainingError, match=r"epoch 9 .* 3 attempts .* shard 1 did not activate"):
        run.at(4)


@pytest.mark.usefixtures("alone")
def test_a_refresh_that_was_lost_with_the_run_is_made_up_for_at_once() -> None:
    """A checkpoint names the step of the live keys as published; see `trainer.saving`."""
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=3, published_step=0)
    run.at(4)
    assert memory.log == ["stage 8"]
    run.at(5)
    assert memory.log == ["stage 8"]


@pytest.mark.usefixtures("alone")
def test_new_content_comes_along_with_a_refresh() -> None:
    memory = FakeMemory()
    run = Harness(
        memory, refresh="async", refresh_every_steps=2, content=lambda step: f"world {step // 2}"
    )
    run.at(2)
    assert memory.staged[8] == (2, 2.0, "world 1")
    assert run.follower.content_version == "v0", "what is live, not what is staged"
    memory.states[8] = "sealed"
    run.at(3)
    assert run.follower.content_version == "world 1"


# --- edits by others ------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_an_edit_by_others_is_followed_at_the_next_look_and_the_epoch_is_held() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="off")
    assert memory.pinned == [FIRST]
    run.at(1)
    edited = memory.edit(encoder_step=0)
    time.sleep(1.05)  # a memory is asked for this once a second
    run.at(2)
    assert (run.follower.epoch, run.follower.encoder_step) == (edited, 0)
    assert run.follower.content_version == f"v{edited}"
    assert memory.pinned == [edited]
    assert run.events() == [f"the memory was edited: content v{edited} from here on"]
    run.follower.close()
    assert memory.pinned == []


@pytest.mark.usefixtures("alone")
def test_keys_of_other_weights_are_not_followed() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="off")
    memory.edit(encoder_step=900)
    time.sleep(1.05)
    run.at(2)
    assert run.follower.epoch == FIRST
    assert memory.pinned == [FIRST]


@pytest.mark.usefixtures("alone")
def test_a_refresh_that_met_an_edit_is_searched_under_the_number_that_is_live() -> None:
    memory = FakeMemory()
    memory.rebases = True
    run = Harness(memory, refresh="sync", refresh_every_steps=2)
    run.at(2)
    assert memory.log == ["stage 8", "wait 8", "activate 8", "release 7"]
    assert (run.follower.epoch, run.follower.encoder_step) == (9, 2)
    assert memory.pinned == [9]
    assert run.follower.content_version == "v9", "a checkpoint names what is live"
    assert "the memory was edited: content v9 from here on" in run.events()


@pytest.mark.usefixtures("alone")
def test_what_is_staged_at_the_end_is_not_left_to_the_memory() -> None:
    """A server outlives the run, and its room is not this run's to take."""
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2)
    run.at(2)
    run.follower.close()
    assert memory.log == ["stage 8", "release 8"]


# --- synchronous, off, and the bound --------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_sync_has_the_new_epoch_live_before_the_next_step() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="sync", refresh_every_steps=2)
    seen = []
    for step in range(5):
        run.at(step)
        seen.append((run.follower.epoch, run.follower.encoder_step))
    assert seen == [(7, 0), (7, 0), (8, 2), (8, 2), (9, 4)]
    assert memory.log[:4] == ["stage 8", "wait 8", "activate 8", "release 7"]


@pytest.mark.usefixtures("alone")
def test_a_failed_sync_refresh_leaves_the_old_epoch_and_is_tried_again_when_due() -> None:
    memory = FakeMemory(seals_when_waited_for=False)
    run = Harness(memory, refresh="sync", refresh_every_steps=2)
    run.at(2)
    assert run.follower.epoch == memory.live == FIRST
    assert run.events() == ["refresh failed, epoch 7 goes on serving: a shard fell over"]
    memory.seals_when_waited_for = True
    run.at(3)
    assert run.follower.epoch == FIRST
    run.at(4)
    assert run.follower.epoch == 9


@pytest.mark.usefixtures("alone")
def test_off_never_publishes() -> None:
    run = Harness(FakeMemory(), refresh="off", refresh_every_steps=1)
    for step in range(20):
        run.at(step)
    assert run.memory.log == []
    assert run.gathered == 0


@pytest.mark.usefixtures("alone")
def test_training_waits_when_the_keys_may_not_get_older() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2, max_staleness_steps=5)
    for step in range(5):
        run.at(step)
    assert memory.log == ["stage 8"]
    run.at(5)
    assert memory.log[1:4] == ["wait 8", "activate 8", "release 7"]
    assert run.follower.encoder_step == 2


@pytest.mark.usefixtures("alone")
def test_keys_that_may_not_get_older_and_cannot_be_renewed_end_the_training() -> None:
    memory = FakeMemory(seals_when_waited_for=False)
    run = Harness(memory, refresh="async", refresh_every_steps=2, max_staleness_steps=5)
    for step in range(5):
        run.at(step)
    with pytest.raises(TrainingError) as caught:
        run.at(5)
    for part in ("5 steps old", "memory.max_staleness_steps = 5", "a shard fell over"):
        assert part in str(caught.value)
    assert memory.live == FIRST


@pytest.mark.usefixtures("alone")
@given(
    every=st.integers(1, 4),
    slack=st.integers(0, 4),
    resumed_at=st.integers(0, 3),
    failing=st.sets(st.integers(FIRST + 1, FIRST + 12), max_size=4),
)
def test_no_step_is_trained_with_keys_older_than_the_bound(
    every: int, slack: int, resumed_at: int, failing: set[int]
) -> None:
    """Epochs fail or are slow; when waiting does not help, training ends and says so."""
    memory = FakeMemory()
    bound = every + slack
    run = Harness(memory, refresh="async", refresh_every_steps=every, max_staleness_steps=bound)
    run.follower.published_step = resumed_at
    for step in range(resumed_at, 24):
        memory.seals_when_waited_for = max(memory.states) not in failing
        for epoch in failing & set(memory.states):
            if memory.states[epoch] == "encoding":
                memory.states[epoch] = "failed"
        try:
            run.at(step)
        except TrainingError:
            assert run.events()
            return
        assert step - run.follower.encoder_step < bound


@pytest.mark.usefixtures("alone")
def test_a_wish_to_stop_waits_for_nothing() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="sync", refresh_every_steps=2, max_staleness_steps=2)
    assert run.at(2, stop=True) is True
    assert memory.log == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_a_wish_to_stop_ends_the_wait_for_keys(refresh: str) -> None:
    """Whether it is waited for a refresh or, at the bound on staleness, for one under way."""
    memory = FakeMemory()
    run = Harness(memory, refresh=refresh, refresh_every_steps=2, max_staleness_steps=3)
    memory.never_seals = True
    if refresh == "async":
        assert run.at(2) is False
    run.stop_after_asks = run.asks + 5
    assert run.at(3) is True
    assert memory.log[-1] == "release 8"
    assert memory.log.count("wait 8") >= 2
    assert run.follower.epoch == memory.live == FIRST
    assert run.events() == []


@pytest.mark.usefixtures("alone")
def test_a_wish_to_stop_ends_the_wait_for_the_last_keys() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=2)
    memory.never_seals = True
    run.stop_after_asks = 3
    assert run.follower.finish(6) is True
    assert memory.log[-1] == "release 8"


@pytest.mark.usefixtures("alone")
def test_a_last_refresh_that_fails_says_what_is_kept() -> None:
    memory = FakeMemory(seals_when_waited_for=False)
    run = Harness(memory, refresh="async", refresh_every_steps=4)
    with pytest.raises(TrainingError) as caught:
        run.follower.finish(6)
    for part in ("a shard fell over", "model is exported", "step 6 is committed", "--resume"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_the_end_brings_the_keys_up_to_the_final_weights() -> None:
    memory = FakeMemory()
    run = Harness(memory, refresh="async", refresh_every_steps=4)
    run.at(4)
    run.step = 6
    assert run.follower.finish(6) is False
    assert memory.log == ["stage 8", "release 8", "stage 9", "wait 9", "activate 9", "release 7"]
    assert memory.staged[9][:2] == (6, 6.0)
    assert (run.follower.epoch, run.follower.encoder_step) == (9, 6)


# --- several ranks --------------------------------------------------------------------------------


def _two_modes(rank: int) -> dict[str, Any]:
    publisher.ThreadPoolExecutor = Inline  # type: ignore[misc, assignment]
    seen: dict[str, Any] = {}
    for mode in ("async", "sync"):
        memory = FakeMemory()
        run = Harness(memory, rank=rank, zero_stage=3, refresh=mode, refresh_every_steps=2)
        epochs, stops = [], []
        for step in range(7):
            if rank == 0 and step >= 4 and memory.states.get(8) == "encoding":
                memory.states[8] = "sealed"
                time.sleep(0.25)
            stops.append(run.at(step, stop=rank == 0 and step == 6))
            epochs.append((run.follower.epoch, run.follower.encoder_step))
        seen[mode] = {
            "epochs": epochs,
            "stops": stops,
            "log": memory.log,
            "gathered": run.gathered,
            "recorded": len(run.recorded),
        }
    # Rank 1's own wish to stop is no reason.
    run = Harness(FakeMemory(), rank=rank, refresh="off")
    seen["rank 1 alone"] = run.at(0, stop=rank == 1)
    failing = Harness(
        FakeMemory(seals_when_waited_for=False),
        rank=rank,
        refresh="sync",
        refresh_every_steps=2,
        max_staleness_steps=2,
    )
    try:
        failing.at(2)
    except TrainingError as error:
        seen["failed"] = str(error)
    return seen


@pytest.mark.multiprocess
def test_all_ranks_search_the_same_epoch_and_rank_0_alone_leads() -> None:
    first, second = run_ranks(_two_modes, 2)
    assert first["async"]["epochs"] == second["async"]["epochs"]
    assert first["async"]["epochs"][:4] == [(7, 0)] * 4
    assert first["async"]["epochs"][4] == (8, 2)
    assert first["sync"]["epochs"] == second["sync"]["epochs"]
    assert first["sync"]["epochs"] == [(7, 0)] * 2 + [(8, 2)] * 2 + [(9, 4)] * 3
    for mode in ("async", "sync"):
        assert first[mode]["stops"] == second[mode]["stops"] == [False] * 6 + [True]
        assert second[mode]["log"] == []
        assert second[mode]["recorded"] == 0
        # Under ZeRO-3 whole weights are gathered by all ranks together.
        assert first[mode]["gathered"] == second[mode]["gathered"] > 0
    assert first["rank 1 alone"] is second["rank 1 alone"] is False
    assert "a shard fell over" in first["failed"]
    assert "2 steps old" in second["failed"]
