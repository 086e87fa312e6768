"""How a shard follows its coordinator's orders, and keeps trying to restore what it vouched for."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from memory_server.actors.orders import Orders
from memory_server.actors.restored import RestoredShard
from memory_server.errors import UnknownEpoch
from memory_server.shard.epochs import EpochPlan
from memory_server.shard.shard import Shard

AGAIN_AFTER_S = 1.0
AGAIN_AT_MOST_S = 60.0


class Follower:
    """Keeps a shard as the newest orders want it. Thread-safe."""

    def __init__(
        self,
        shard: Shard,
        restored: RestoredShard,
        load_weights: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self._shard, self._restored, self._load = shard, restored, load_weights
        self._following = threading.Lock()
        self._orders: Orders | None = None
        self._again: dict[int, tuple[float, float]] = {}  # when to stage it again, and the pause

    @property
    def orders(self) -> Orders | None:
        """Those that are followed now."""
        return self._orders

    def follow(self, orders: Orders) -> int:
        """Stage, drop and switch as the orders say; older ones than were followed are ignored.

        Returns:
            The revision that is followed now. Staging goes on in the background.
        """
        with self._following:
            if self._orders is not None and orders.revision < self._orders.revision:
                return self._orders.revision
            wanted = {order.plan.epoch for order in orders.epochs}
            if orders.live is not None and orders.live in self._shard.held_epochs():
                self._shard.activate(orders.live)
            for epoch in self._shard.held_epochs():
                if epoch not in wanted:
                    self._shard.release(epoch)
            for order in orders.epochs:
                if order.sealed:
                    self._drop_failed(order.plan.epoch)
                self._stage(order.plan, restoring=order.sealed)
            if orders.live is not None:
                self._shard.activate(orders.live)
            self._restored.joined(
                frozenset(order.plan.epoch for order in orders.epochs if order.sealed)
            )
            self._orders = orders
            return orders.revision

    def restore_again(self, now: float) -> None:
        """Stage again what all shards vouched for and this one could not restore: the reason, a
        full disk, a file that was away, may be gone. The pauses between two tries grow.

        Args:
            now: seconds, of any clock that never goes back.
        """
        with self._following:
            vouched = [o.plan for o in self._orders.epochs if o.sealed] if self._orders else []
            failed = [plan for plan in vouched if self._has_failed(plan.epoch)]
            coming = {p.epoch for p in vouched if not self._has_sealed(p.epoch)}
            self._again = {e: due for e, due in self._again.items() if e in coming}
            for plan in failed:
                due, pause = self._again.setdefault(
                    plan.epoch, (now + AGAIN_AFTER_S, AGAIN_AFTER_S)
                )
                if now >= due:
                    pause = min(2 * pause, AGAIN_AT_MOST_S)
                    self._again[plan.epoch] = now + pause, pause
                    self._drop_failed(plan.epoch)
                    self._stage(plan, restoring=True)

    def _stage(self, plan: EpochPlan, *, restoring: bool) -> None:
        self._shard.stage(plan, partial(self._load, plan.weights_id), restoring=restoring)

    def _drop_failed(self, epoch: int) -> None:
        if self._has_failed(epoch):
            self._shard.release(epoch)

    def _has_failed(self, epoch: int) -> bool:
        with contextlib.suppress(UnknownEpoch):
            return self._shard.status(epoch).state == "failed"
        return False

    def _has_sealed(self, epoch: int) -> bool:
        with contextlib.suppress(UnknownEpoch):
            return self._shard.status(epoch).state == "sealed"
        return False
