"""Calls of the memory's actors: who answered, who is away for a while, who is gone for good."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from memory_server.actors.names import NAMESPACE, Address, Layout, shard_name
from memory_server.actors.orders import Orders
from memory_server.errors import MemoryServerError, ShardLost

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05
SIBLING_S = 10.0
END_TIMEOUT_S = 2.0


def original_error(error: RayTaskError) -> Exception:
    """The error that was raised in the actor, without Ray's envelope, if it is one of ours."""
    cause = error.cause
    if isinstance(cause, MemoryServerError | ValueError | TimeoutError):
        return cause
    return error


def find_actor(name: str) -> Any:
    """Raises ValueError when no actor of this name will ever answer."""
    return ray.get_actor(name, namespace=NAMESPACE)


def is_gone(name: str) -> bool:
    """Whether the actor will never come back: Ray forgets its name only then."""
    try:
        find_actor(name)
    except ValueError:
        return True
    return False


class NoAnswer(Exception):
    """An actor is there, but did not answer in time."""


class Replicas:
    """All shards' actors, as their coordinator sees them. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self._name = layout.name
        self._shards = layout.shards
        self.addresses = layout.addresses
        self._acted: dict[Address, int] = {}
        self._told: dict[Address, tuple[int, Any]] = {}

    def ask(
        self,
        method: str,
        *arguments: Any,
        timeout_s: float,
        addresses: Sequence[Address] | None = None,
    ) -> dict[Address, Any]:
        """What each answered, or the exception that it raised (NoAnswer: nothing in time).

        Those that are away, dead or restarting, are left out.
        """
        calls: dict[Any, Address] = {}
        for address in self.addresses if addresses is None else addresses:
            try:
                calls[getattr(self._actor(address), method).remote(*arguments)] = address
            except ShardLost:
                continue
        deadline = time.monotonic() + timeout_s
        answers: dict[Address, Any] = {}
        for reference, address in calls.items():
            try:
                left_s = max(0.0, deadline - time.monotonic())
                answers[address] = ray.get(reference, timeout=left_s)
            except GetTimeoutError:
                answers[address] = NoAnswer(f"no answer within {timeout_s:g} s")
            except RayActorError:
                continue
            except RayTaskError as error:
                answers[address] = original_error(error)
        return answers

    def joined(self, address: Address, revision: int) -> None:
        """A replica that started has read the book."""
        self._acted[address] = max(revision, self._acted.get(address, -1))

    def tell(self, orders: Orders) -> None:
        """Send the orders to whoever has not acted on them; does not wait."""
        self._collect()
        for address in self._behind(orders):
            if self._told.get(address, (-1, None))[0] >= orders.revision:
                continue  # it has them, and is still at it
            try:
                self._told[address] = orders.revision, self._actor(address).follow.remote(orders)
            except ShardLost:
                continue

    def wait_until_followed(self, orders: Orders, wait_s: float, *, patient: bool) -> None:
        """Send the orders until every replica that can answer has acted on them.

        One that lives but does not act is waited for `SIBLING_S`. If another replica of its shard
        has acted, it is then ended (`end`) where that matters, which is where `patient` is asked
        for: it would answer from the epoch that was live before. Started anew, it reads the orders
        before it answers.

        Args:
            patient: wait for a shard of which no replica answers, and return only when no process
                is left that follows older orders; otherwise who is away, or does not act, is left
                to it later.

        Raises:
            ShardLost: no replica of a shard acted in time, or one that lives could be neither
                reached nor ended. What all replicas of a shard raised.
        """
        deadline = time.monotonic() + wait_s
        asked = self._behind(orders)
        while asked:
            left_s = max(0.0, deadline - time.monotonic())
            answers = self.ask("follow", orders, timeout_s=min(left_s, SIBLING_S), addresses=asked)
            errors = {a: e for a, e in answers.items() if isinstance(e, Exception)}
            for address, answer in answers.items():
                if address not in errors:
                    self.joined(address, answer)
            asked = [a for a in self._behind(orders) if not self._followed(a[0], orders)]
            for address, error in errors.items():
                if address in asked and not isinstance(error, NoAnswer):
                    raise error
            overtaken = {a: error for a, error in errors.items() if a not in asked}
            if patient and overtaken:
                self._end_overtaken(overtaken, orders, deadline)
            if not asked or not (patient or errors):
                # A replica that is away reads the orders before it answers again.
                return
            if time.monotonic() >= deadline:
                raise ShardLost(_did_not_follow(self._name, asked[0][0], wait_s))
            time.sleep(RETRY_PAUSE_S)

    def end(self, address: Address) -> None:
        """End a replica's process, whatever it does; Ray starts another one in its place."""
        with contextlib.suppress(ShardLost):  # gone for good already
            ray.kill(self._actor(address), no_restart=False)

    def _end_overtaken(
        self, errors: Mapping[Address, Exception], orders: Orders, deadline: float
    ) -> None:
        """End replicas of which a sibling follows newer orders, and wait until they are ended."""
        left = list(errors)
        for address in left:
            log.warning(
                "replica %s of %s does not follow (%s), and is started again",
                address, self._name, errors[address],
            )  # fmt: skip
            self.end(address)
        while True:
            answers = self.ask("follow", orders, timeout_s=END_TIMEOUT_S, addresses=left)
            for address, answer in answers.items():
                if not isinstance(answer, Exception):
                    self.joined(address, answer)
            # One that is dead, or starts, is not among those that answered.
            left = [a for a in left if isinstance(answers.get(a), Exception)]
            if not left:
                return
            if time.monotonic() >= deadline:
                raise ShardLost(
                    f"replicas {left} of {self._name} neither follow nor could be ended: they may "
                    "answer from the epoch that was live before, as their replies say, until Ray "
                    "declares their node dead; look at these nodes"
                )
            time.sleep(RETRY_PAUSE_S)

    def _followed(self, shard: int, orders: Orders) -> bool:
        replicas = [address for address in self.addresses if address[0] == shard]
        return any(self._acted.get(address, -1) >= orders.revision for address in replicas)

    def _behind(self, orders: Orders) -> list[Address]:
        return [a for a in self.addresses if self._acted.get(a, -1) < orders.revision]

    def _collect(self) -> None:
        """Note who acted on what it was told earlier."""
        for address, (_, reference) in list(self._told.items()):
            ready, _ = ray.wait([reference], timeout=0)
            if not ready:
                continue
            self._told.pop(address, None)
            try:
                self.joined(address, ray.get(reference))
            except (RayActorError, RayTaskError):  # it is told again, or reads the book
                continue

    def _actor(self, address: Address) -> Any:
        name = shard_name(self._name, *address)
        try:
            return find_actor(name)
        except ValueError:
            raise ShardLost(f"actor {name} is gone for good; start the memory again") from None


def _did_not_follow(memory: str, shard: int, wait_s: float) -> str:
    return f"shard {shard} of {memory} did not follow within {wait_s:g} s; it will when it is back"
