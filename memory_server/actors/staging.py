"""The first of the two phases: an epoch is staged on every replica, and sealed when all vouch."""

import threading
import time

from memory_server.actors.book import KeptBook
from memory_server.actors.calls import NoAnswer, Replicas
from memory_server.actors.names import Address, PackedWeights, unpack_weights
from memory_server.actors.orders import Need, judge, progress, shortage
from memory_server.api import StageStatus
from memory_server.errors import MemoryServerError, NotEnoughMemory, RefreshFailed, UnknownEpoch
from memory_server.shard.epochs import EpochPlan
from memory_server.shard.held_epoch import ShardStatus
from memory_server.store.store import Store

STATUS_TIMEOUT_S = 5.0
NEED_TIMEOUT_S = 10.0
NEED_AGAIN_TIMEOUT_S = 20.0
PING_TIMEOUT_S = 2.0


class Stager:
    """Begins epochs, says how far they are, seals or drops them. Thread-safe."""

    def __init__(
        self, book: KeptBook, replicas: Replicas, store: Store, tables_pay_from: int | None
    ) -> None:
        self._tables_pay_from = tables_pay_from
        self._book, self._replicas, self._store = book, replicas, store
        self._one_at_a_time = threading.Lock()
        self._began: dict[int, float] = {}
        self._took_s: dict[int, float] = {}

    def stage(
        self,
        request: str,
        encoder_step: int,
        weights: PackedWeights | None,
        content_version: str | None,
    ) -> int:
        """Number an epoch and tell the shards; see `Coordinator.stage`."""
        if content_version is not None:
            self._store.manifest(content_version)
        with self._one_at_a_time:
            server = self._book.copied()
            if request in server.requests:
                return server.requests[request]
            for epoch in server.epochs.unsettled():
                self.look(epoch)  # what has sealed meanwhile does not wait any more
            probe = self._book.copied().epochs
            tabled = weights is not None and self._tabled(
                content_version or probe.basis().content_version
            )
            plan = probe.begin(
                encoder_step=encoder_step,
                new_weights=weights is not None,
                content_version=content_version,
                tabled=tabled,
            )
            probe.supersede(plan)
            self._check_fits(plan, probe.unsettled())
            if weights is not None:
                self._book.state.save_weights(plan.weights_id, unpack_weights(weights))
            with self._book.change("stage") as server:
                plan = server.epochs.begin(
                    encoder_step=encoder_step,
                    new_weights=weights is not None,
                    content_version=content_version,
                    tabled=tabled,
                )
                server.epochs.supersede(plan)
                server.remember_request(request, plan.epoch)
            self.began(plan.epoch)
        self._replicas.tell(self._book.orders())
        return plan.epoch

    def _tabled(self, version: str) -> bool:
        pay_from = self._tables_pay_from
        return pay_from is not None and self._store.manifest(version).entries >= pay_from

    def began(self, epoch: int) -> None:
        """Its time counts from now."""
        kept = self._book.copied().epochs.plans
        for times in (self._began, self._took_s):
            for other in [e for e in list(times) if e not in kept]:
                times.pop(other, None)
        self._began[epoch] = time.monotonic()

    def staging(self, epoch: int) -> StageStatus:
        """Ask the replicas how far they are, and settle the epoch if that is due."""
        statuses = self.look(epoch)
        with self._book.read() as server:
            book = server.epochs
            book.plan(epoch)
            receipts = book.receipts.get(epoch, {})
            failure = book.failures.get(epoch)
        if receipts or failure is not None:
            rows = sum(receipt.live_rows for receipt in receipts.values())
            return StageStatus(
                epoch=epoch,
                state="sealed" if receipts else "failed",
                done=rows,
                total=rows,
                error=failure,
                seconds=self._took_s.get(epoch, 0.0),
                remaining_s=0.0 if receipts else None,
            )
        silent = [address for address in self._replicas.addresses if address not in statuses]
        names = ", ".join(str(shard) for shard in dict.fromkeys(shard for shard, _ in silent))
        reached = progress(statuses)
        now = time.monotonic()
        return StageStatus(
            epoch=epoch,
            state="encoding",
            done=reached.done,
            total=reached.total,
            error=f"no answer yet from shard {names}" if silent else None,
            seconds=now - self._began.get(epoch, now),
            remaining_s=None if silent else reached.remaining_s,
        )

    def look(self, epoch: int) -> dict[Address, ShardStatus]:
        """Ask all replicas about an epoch that is not settled, and settle it if that is due.

        Returns:
            The statuses of those that answered, as long as it is not settled.
        """
        with self._book.read() as server:
            plan = server.epochs.plan(epoch)
            if epoch not in server.epochs.unsettled():
                return {}
        answers = self._replicas.ask("status", epoch, timeout_s=STATUS_TIMEOUT_S)
        if any(isinstance(answer, UnknownEpoch) for answer in answers.values()):
            self._replicas.tell(self._book.orders())  # it missed the news
        statuses: dict[Address, ShardStatus] = {}
        for address, answer in answers.items():
            if isinstance(answer, ShardStatus):
                statuses[address] = answer
            elif isinstance(answer, MemoryServerError) and not isinstance(answer, UnknownEpoch):
                statuses[address] = _failed(f"shard {address[0]}: {answer}")
        entries = self._store.manifest(plan.content_version).entries
        verdict = judge(plan, statuses, self._replicas.addresses, entries=entries)
        if verdict is None:
            return statuses
        with self._book.change("settle") as server:
            if epoch in server.epochs.unsettled():
                if verdict.failure is None:
                    server.epochs.seal(list(verdict.receipts))
                else:
                    server.epochs.fail(epoch, verdict.failure)
                now = time.monotonic()
                self._took_s[epoch] = now - self._began.get(epoch, now)
        self._replicas.tell(self._book.orders())
        return {}

    def _check_fits(self, plan: EpochPlan, pending: list[int]) -> None:
        """Refuse an epoch that would not fit beside what is held and what is coming.

        Raises:
            NotEnoughMemory; RefreshFailed: a replica that lives does not say; or what
            keeps a shard from reading the content.
        """
        others = [epoch for epoch in pending if epoch != plan.epoch]
        answers = self._replicas.ask("need", plan, others, timeout_s=NEED_TIMEOUT_S)
        # One that starts holds nothing yet and is judged when it stages; one that lives must say.
        silent = [address for address, answer in answers.items() if isinstance(answer, NoAnswer)]
        pings = self._replicas.ask("ping", timeout_s=PING_TIMEOUT_S, addresses=silent)
        alive = [address for address, answer in pings.items() if isinstance(answer, int)]
        answers |= self._replicas.ask(
            "need", plan, others, timeout_s=NEED_AGAIN_TIMEOUT_S, addresses=alive
        )
        for address in alive:
            if isinstance(answers[address], NoAnswer):
                raise RefreshFailed(
                    f"replica {address[1]} of shard {address[0]} lives but did not say within "
                    f"{NEED_TIMEOUT_S + NEED_AGAIN_TIMEOUT_S:g} s whether an epoch of content "
                    f"{plan.content_version} fits; nothing was begun: stage it again"
                )
        for answer in answers.values():
            if isinstance(answer, MemoryServerError):
                raise answer
        found = shortage({a: need for a, need in answers.items() if isinstance(need, Need)})
        if found is not None:
            place, needed, free = found
            raise NotEnoughMemory(
                f"an epoch of content {plan.content_version} needs {needed:,} bytes on {place} "
                f"beside what is held, and {free:,} are free there; nothing was begun: spread the "
                "shards over more nodes, take a smaller key_dtype, or release an epoch"
            )


def _failed(reason: str) -> ShardStatus:
    return ShardStatus(state="failed", done=0, total=0, error=reason, receipt=None, seconds=0.0)
