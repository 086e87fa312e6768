"""A client's line to the coordinator: a call is repeated while the coordinator restarts."""

import time
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from memory_server.actors.calls import find_actor, original_error
from memory_server.actors.coordinator import Attachment
from memory_server.errors import CoordinatorLost, MemoryServerError, UnknownEpoch

MARGIN_S = 30.0  # for the coordinator itself, beyond what it waits for its shards
PAUSE_S = 0.1
DEFAULT_TIMEOUT_S = 60.0
# Done by a call whose answer was lost, they fail when they are repeated: then they were done.
_ONCE_ONLY = ("release",)


class Leader:
    """A memory's coordinator, found by name. Thread-safe."""

    def __init__(self, name: str, attachment: Attachment) -> None:
        self.name = name
        self.attachment = attachment

    @classmethod
    def find(cls, name: str, *, timeout_s: float) -> Self:
        """Raises CoordinatorLost: there is none of this name, or it does not answer in time."""
        if not ray.is_initialized():
            raise MemoryServerError("Ray is not running in this process; call ray.init() first")
        attachment: Attachment = _call(name, "attach", (), timeout_s)
        return cls(name, attachment)

    def call(self, method: str, *arguments: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """What the coordinator's method returns.

        Raises:
            CoordinatorLost: it did not answer in time, or is gone for good. What it raised.
        """
        return _call(self.name, method, arguments, timeout_s + MARGIN_S)


class RayPin:
    """A hold on an epoch of a `RayMemory`; see `api.EpochPin`."""

    def __init__(self, leader: Leader, pin: int, epoch: int) -> None:
        self._leader, self._pin, self._epoch = leader, pin, epoch
        self._closed = False

    @property
    def epoch(self) -> int:
        return self._epoch

    def renew(self) -> None:
        if self._closed:
            raise UnknownEpoch(f"this pin on epoch {self._epoch} was closed; pin again")
        self._leader.call("renew", self._pin)

    def close(self) -> None:
        if not self._closed:
            self._leader.call("unpin", self._pin)  # if it is lost, closing again lets go
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _call(name: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    repeated = False
    while True:
        try:
            actor = find_actor(name)
        except ValueError as error:
            raise CoordinatorLost(
                f"no memory named {name!r} answers in this Ray cluster; check the name, or start "
                "one"
            ) from error
        try:
            left_s = max(0.0, deadline - time.monotonic())
            return ray.get(getattr(actor, method).remote(*arguments), timeout=left_s)
        except RayTaskError as error:
            original = original_error(error)
            if repeated and method in _ONCE_ONLY and isinstance(original, UnknownEpoch):
                return None
            raise original from None
        except RayActorError as error:
            if time.monotonic() >= deadline:
                raise CoordinatorLost(_silent(name)) from error
        except GetTimeoutError as error:
            raise CoordinatorLost(_silent(name)) from error
        repeated = True
        time.sleep(PAUSE_S)


def _silent(name: str) -> str:
    return (
        f"the coordinator of memory {name!r} does not answer: searches may go on, but epochs "
        "cannot change; try again, or shut the memory down and start it again"
    )
