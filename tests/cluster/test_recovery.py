"""When a run starts its trainers again, and when it does not."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import DistStoreError

from cluster.config import ConfigError, PretrainConfig, config_from_mapping
from cluster.driver import explained
from cluster.errors import GraceOver, Interrupted, LaunchError, NoRoom
from cluster.recovery import (
    Fault,
    Restarts,
    TrainerDied,
    TrainersStalled,
    may_be_repeated,
    smaller_gangs,
)
from cluster.stop import REQUEUE, Stop, stop_on_signals
from cluster.trainer_actor import _distance_from_root
from memory_server.errors import NotEnoughMemory, ShardLost
from trainer.errors import CheckpointError, TrainingError


def config_of(**sections: dict[str, object]) -> PretrainConfig:
    return config_from_mapping({"data": {"corpus": "here"}, **sections})


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (TrainerDied(3), True),
        (TrainersStalled(99.0, [1]), True),
        (ShardLost("shard 1 was silent"), True),
        (RuntimeError("failed to listen on any local network address. name: EADDRINUSE"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 joined."), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TrainingError("not finite at step 3: weights"), False),
        (CheckpointError("ranks write to different disks"), False),
        (ConfigError("optim.lr"), False),
        (NotEnoughMemory("too much"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_would_happen_again_is_not_tried_again(failure: Exception, expected: bool) -> None:
    assert may_be_repeated(failure) is expected


def test_a_rank_that_knows_the_reason_comes_before_one_whose_peer_is_gone() -> None:
    gone = RuntimeError("[gloo] Connection closed by peer")
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert min([gone, memory, ValueError()], key=_distance_from_root) is memory
    assert min([gone, memory, TrainerDied(0)], key=_distance_from_root).args == (
        str(TrainerDied(0)),
    )
    assert min([gone, gone], key=_distance_from_root) is gone


def test_restarts_without_a_new_checkpoint_are_limited() -> None:
    restarts = Restarts(2, saved_step=-1)
    assert [restarts.allow(saved_step=s) for s in (-1, 10, 10, 20, 20, 20)] == [
        True, True, True, True, True, False,
    ]  # fmt: skip
    assert restarts.count == 6
    assert not Restarts(0, saved_step=5).allow(saved_step=5)
    assert not Restarts(0, saved_step=5).allow(saved_step=9)


def test_a_fault_says_what_it_cost() -> None:
    fault = Fault.now(TrainersStalled(12.3, [0, 2]), 37)
    recovery = fault.recovery(restarts=2, step=30)
    assert recovery.reason == "no step was made for 12 s; trainer 0, 2 does not answer"
    assert (recovery.failed_step, recovery.restarts) == (37, 2)
    # A checkpoint may be newer than the last step that the driver heard of.
    assert fault.recovery(restarts=2, step=40).failed_step == 40
    assert Fault.now(ValueError(), 1).recovery(restarts=1, step=0).reason == "ValueError"


@pytest.mark.parametrize(
    ("trainers", "micro", "at_least", "expected"),
    [(8, 0, 1, [6, 4, 3, 2, 1]), (8, 0, 3, [6, 4, 3]), (3, 8, 1, [1]), (1, 0, 1, [])],
)
def test_fewer_trainers_are_as_many_as_the_batch_can_be_cut_for(
    trainers: int, micro: int, at_least: int, expected: list[int]
) -> None:
    runtime = {"trainers": trainers, "micro_batch_size": micro}
    config = config_of(optim={"batch_size": 24}, runtime=runtime)
    assert smaller_gangs(config, at_least) == expected


def test_more_trainers_at_least_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recovery.min_trainers = 3: must be at most"):
        config_of(recovery={"min_trainers": 3}, runtime={"trainers": 2})


@pytest.mark.parametrize(
    ("trained", "says"),
    [(False, "training failed: ValueError: a; no checkpoint"), (True, "the evaluation failed")],
)
def test_a_failure_says_what_was_kept(tmp_path: Path, trained: bool, says: str) -> None:
    assert says in str(explained(ValueError("a\nb"), tmp_path, trained=trained))
    for known in (TrainingError("t"), NoRoom("n"), ConfigError("c"), LaunchError("l")):
        assert explained(known, tmp_path, trained=trained) is known


@pytest.mark.parametrize(
    ("requeue", "number", "code"),
    [
        (True, signal.SIGTERM, REQUEUE),
        (True, signal.SIGUSR1, REQUEUE),
        (True, signal.SIGINT, 130),
        (False, signal.SIGTERM, 143),
        (False, signal.SIGINT, 130),
    ],
)
def test_preemption_asks_to_be_queued_again(
    requeue: bool, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals(requeue=requeue) as stop:
        with pytest.raises(Interrupted) as raised:
            signal.raise_signal(number)
        assert raised.value.exit_code == code
        assert stop.exit_code() == code
    assert signal.getsignal(number) is before


def test_the_first_signal_in_training_only_asks() -> None:
    stop = Stop(requeue=True)
    stop.training = True
    handle: Callable[..., None] = stop._handle
    handle(signal.SIGUSR1, None)
    assert stop.event.is_set()
    assert stop.exit_code() == REQUEUE
    with pytest.raises(Interrupted):
        handle(signal.SIGTERM, None)


def test_a_checkpoint_that_comes_too_late_is_said() -> None:
    assert "recovery.grace_s = 5 s" in str(GraceOver(5.0))
