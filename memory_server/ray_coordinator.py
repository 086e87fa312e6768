"""The memory's coordinator: a named actor that numbers epochs and remembers what each was made
from.

It holds no keys and answers no searches. A shard that restarts asks it what to build; an epoch is
activated only when all shards have sealed it.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from memory_server.api import MemoryInfo, StageStatus
from memory_server.epochs import EpochBook, EpochPlan
from memory_server.errors import MemoryServerError, ShardLost, UnknownEpoch
from memory_server.held_epoch import ShardStatus
from memory_server.ray_names import NAMESPACE, PackedWeights, shard_name
from memory_server.segments import SegmentMeta
from memory_server.store import Store

STATUS_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a client must know to search."""

    name: str
    shards: int
    index: str
    meta: SegmentMeta
    store_path: str


class Coordinator:
    """The body of the coordinator's actor. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._store = Store.open(layout.store_path)
        self._book = EpochBook()
        self._weights: dict[int, Any] = {}
        self._began: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._lock = threading.Lock()

    def layout(self) -> Layout:
        return self._layout

    def join(self) -> tuple[list[tuple[EpochPlan, list[Any], bool]], int | None]:
        """What a shard must build as it starts: (plan, weights, sealed), and the live epoch."""
        with self._lock:
            live = self._book.live
            plans = [p for e, p in self._book.plans.items() if e not in self._book.failures]
            plans.sort(key=lambda plan: (plan.epoch != live, plan.epoch))
            return [
                (plan, [self._weights[plan.weights_id]], plan.epoch in self._book.receipts)
                for plan in plans
            ], live

    def stage(
        self, encoder_step: int, weights: PackedWeights | None, content_version: str | None
    ) -> int:
        """Number an epoch and tell the shards; does not wait for them.

        The weights are put into the object store once, by this actor: what the trainer put there
        would go with the trainer, and a shard that restarts needs them.
        """
        if content_version is not None:
            self._store.manifest(content_version)
        reference = None if weights is None else ray.put(weights)
        with self._lock:
            plan = self._book.begin(
                encoder_step=encoder_step,
                new_weights=weights is not None,
                content_version=content_version,
            )
            if reference is not None:
                self._weights[plan.weights_id] = reference
            self._began[plan.epoch] = time.monotonic()
        for shard in range(self._layout.shards):
            self._send_stage(shard, plan)
        return plan.epoch

    def staging(self, epoch: int) -> StageStatus:
        """Ask the shards how far they are; seal the epoch here when all have sealed it."""
        with self._lock:
            self._book.plan(epoch)
            settled = epoch in self._book.receipts or epoch in self._book.failures
        if not settled:
            statuses, silent = self._shard_statuses(epoch)
            self._settle(epoch, statuses)
            if not self._is_settled(epoch):
                return StageStatus(
                    epoch=epoch,
                    state="encoding",
                    done=sum(status.done for status in statuses),
                    total=sum(status.total for status in statuses),
                    error=f"no answer yet from shard {silent}" if silent else None,
                    seconds=time.monotonic() - self._began[epoch],
                )
        with self._lock:
            self._book.plan(epoch)
            receipts = self._book.receipts.get(epoch, {})
            rows = sum(receipt.live_rows for receipt in receipts.values())
            return StageStatus(
                epoch=epoch,
                state="sealed" if receipts else "failed",
                done=rows,
                total=rows,
                error=self._book.failures.get(epoch),
                seconds=self._seconds.get(epoch, 0.0),
            )

    def activate(self, epoch: int, wait_s: float) -> None:
        """Switch every shard to a sealed epoch. The book, which a restart reads, comes first."""
        self.staging(epoch)
        with self._lock:
            self._book.activate(epoch)
        self._tell_all("activate", epoch, wait_s)

    def release(self, epoch: int, wait_s: float) -> None:
        """Forget an epoch that is not live, and its weights if no other epoch has them."""
        with self._lock:
            self._book.release(epoch)
            self._began.pop(epoch, None)
            self._seconds.pop(epoch, None)
            needed = {plan.weights_id for plan in self._book.plans.values()}
            self._weights = {w: ref for w, ref in self._weights.items() if w in needed}
        self._tell_all("release", epoch, wait_s)

    def info(self) -> MemoryInfo:
        """Describe the live epoch."""
        with self._lock:
            if self._book.live is None:
                raise UnknownEpoch("the memory is starting: no epoch is live yet")
            receipts = list(self._book.receipts[self._book.live].values())
            plan = self._book.plans[self._book.live]
        meta = self._layout.meta
        return MemoryInfo(
            entries=sum(receipt.live_rows for receipt in receipts),
            shards=self._layout.shards,
            key_width=receipts[0].key_width,
            entry_tokens=meta.entry_tokens,
            epoch=plan.epoch,
            encoder_step=plan.encoder_step,
            content_version=plan.content_version,
            tokenizer_fingerprint=meta.tokenizer_fingerprint,
            pad_token_id=meta.pad_token_id,
            bytes={
                part: sum(receipt.bytes[part] for receipt in receipts) for part in receipts[0].bytes
            },
            index=self._layout.index,
        )

    def _is_settled(self, epoch: int) -> bool:
        with self._lock:
            self._book.plan(epoch)
            return epoch in self._book.receipts or epoch in self._book.failures

    def _settle(self, epoch: int, statuses: list[ShardStatus]) -> None:
        """Record that all shards sealed the epoch, or that one of them cannot."""
        receipts = [status.receipt for status in statuses if status.receipt is not None]
        errors = [status.error for status in statuses if status.error is not None]
        with self._lock:
            if epoch not in self._book.plans or epoch in self._book.receipts:
                return
            if not errors and len({receipt.key_width for receipt in receipts}) > 1:
                errors = [f"shards made keys of widths {[r.key_width for r in receipts]}"]
            if errors:
                self._book.fail(epoch, "; ".join(errors))
            elif len(receipts) == self._layout.shards:
                self._book.seal(receipts)
            else:
                return
            self._seconds[epoch] = time.monotonic() - self._began[epoch]
        if errors:
            for shard in range(self._layout.shards):
                self._shard(shard).release.remote(epoch)

    def _shard_statuses(self, epoch: int) -> tuple[list[ShardStatus], list[int]]:
        """The shards' statuses, and who did not answer; one that missed the news is told."""
        pending = {
            shard: self._shard(shard).status.remote(epoch) for shard in range(self._layout.shards)
        }
        statuses, silent = [], []
        deadline = time.monotonic() + STATUS_TIMEOUT_S
        for shard, reference in pending.items():
            try:
                left_s = max(0.0, deadline - time.monotonic())
                statuses.append(ray.get(reference, timeout=left_s))
            except (RayActorError, GetTimeoutError):
                silent.append(shard)
            except RayTaskError as error:
                if not isinstance(error.cause, UnknownEpoch):
                    reason = f"shard {shard}: {error.cause}"
                    statuses.append(_failed(reason))
                    continue
                silent.append(shard)
                with self._lock:
                    plan = self._book.plan(epoch)
                self._send_stage(shard, plan)
        return statuses, silent

    def _send_stage(self, shard: int, plan: EpochPlan) -> None:
        with self._lock:
            weights = self._weights[plan.weights_id]
            held = list(self._book.plans)
        self._shard(shard).stage.remote(plan, [weights], held)

    def _tell_all(self, method: str, epoch: int, wait_s: float) -> None:
        """Have every shard do something; one that is restarting reads it from the book instead.

        Raises:
            ShardLost: a shard answered neither way in time.
        """
        deadline = time.monotonic() + wait_s
        waiting = set(range(self._layout.shards))
        while waiting:
            calls = {s: getattr(self._shard(s), method).remote(epoch) for s in sorted(waiting)}
            for shard, reference in calls.items():
                try:
                    ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
                    waiting.discard(shard)
                except RayTaskError as error:
                    raise _cause(error) from None
                except (RayActorError, GetTimeoutError):
                    if time.monotonic() >= deadline:
                        raise ShardLost(
                            f"shard {shard} of {self._layout.name} did not {method} epoch {epoch} "
                            f"within {wait_s:g} s; it will when it is back"
                        ) from None
            if waiting:
                time.sleep(RETRY_PAUSE_S)

    def _shard(self, shard: int) -> Any:
        name = shard_name(self._layout.name, shard)
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            raise ShardLost(f"actor {name} is gone for good; start the memory again") from None


def _failed(reason: str) -> ShardStatus:
    return ShardStatus(state="failed", done=0, total=0, error=reason, receipt=None, seconds=0.0)


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, MemoryServerError | ValueError) else error
