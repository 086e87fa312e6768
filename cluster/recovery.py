"""What may befall a run that it goes on from by itself, and when it has befallen it too often."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass

from memory_server.errors import CoordinatorLost, ShardLost
from trainer.errors import TrainingError
from trainer.job import Recovery
from trainer.settings import ConfigError, TrainSettings

# Where the ranks were to meet, someone else listens by now: they meet elsewhere next time.
_MACHINE_WORDS = ("EADDRINUSE", "CUDA error:")
# Of torch, by name: the first needs a release of torch that has it. Memory that runs out on a GPU
# is none of them: it would again.
_MACHINE_ERRORS = {"AcceleratorError", "DistError"}
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH)
# How gloo and NCCL say that a peer is gone, where torch has no class of its own for it.
_LOST_PEER = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")


class TrainerDied(Exception):
    """A trainer's process ended without saying why."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            f"the process of trainer {rank} died (killed, out of memory, or its node was lost)"
        )


class TrainersStalled(Exception):
    """No trainer has made a step for too long."""

    def __init__(self, seconds: float, silent: list[int]) -> None:
        who = ", ".join(map(str, silent))
        more = f"; trainer {who} does not answer" if silent else "; all trainers answer"
        super().__init__(f"no step was made for {seconds:.0f} s{more}")


def may_be_repeated(failure: Exception) -> bool:
    """Whether trainers that start again from the last checkpoint may get past it.

    What a trainer itself refuses would befall it again: settings, data, weights that are not
    finite, a disk that is full.
    """
    if isinstance(failure, TrainerDied | TrainersStalled | ShardLost | CoordinatorLost):
        return True
    if isinstance(failure, TrainingError | ConfigError):
        return False
    return is_lost_peer(failure) or _is_of_the_machine(failure)


def _is_of_the_machine(failure: Exception) -> bool:
    """A GPU, the network or a network filesystem: other processes, or the same again, may work."""
    if isinstance(failure, OSError):
        return failure.errno in _PASSING
    names = {kind.__name__ for kind in type(failure).__mro__}
    return bool(names & _MACHINE_ERRORS) or any(word in str(failure) for word in _MACHINE_WORDS)


def is_lost_peer(failure: Exception) -> bool:
    """Whether a collective says that another rank is gone: that rank knows more."""
    text = str(failure)
    return isinstance(failure, RuntimeError) and any(word in text for word in _LOST_PEER)


def first_line(failure: Exception) -> str:
    """What it says, in one line."""
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__


@dataclass(frozen=True)
class Fault:
    """What ended an attempt.

    Attributes:
        failure: what was raised. step: the last one that is known to be done.
        began: when it was noticed, of `time.time`.
    """

    failure: Exception
    step: int
    began: float

    @classmethod
    def now(cls, failure: Exception, step: int) -> Fault:
        return cls(failure=failure, step=step, began=time.time())

    def recovery(self, *, restarts: int, step: int) -> Recovery:
        """What the trainers are told that go on from a step."""
        return Recovery(
            reason=first_line(self.failure),
            restarts=restarts,
            failed_step=max(self.step, step),
            began=self.began,
        )


class Restarts:
    """Counts restarts; those that bring no new checkpoint are limited."""

    def __init__(self, limit: int, *, saved_step: int) -> None:
        """`saved_step`: of the newest checkpoint when training begins; -1: none."""
        self._limit, self._saved_step = limit, saved_step
        self._in_vain = 0
        self.count = 0

    def allow(self, *, saved_step: int) -> bool:
        """Whether to start again after a fault; `saved_step` of the newest checkpoint now."""
        if saved_step > self._saved_step:
            self._in_vain = 0
        self._saved_step = saved_step
        self._in_vain += 1
        self.count += 1
        return self._in_vain <= self._limit


def smaller_gangs(settings: TrainSettings, at_least: int) -> list[int]:
    """Numbers of trainers below the wished one that the batch can be cut for, largest first."""
    batch, micro = settings.optim.batch_size, settings.runtime.micro_batch_size
    return [
        trainers
        for trainers in range(settings.runtime.trainers - 1, max(at_least, 1) - 1, -1)
        if batch % trainers == 0 and (not micro or batch // trainers % micro == 0)
    ]
