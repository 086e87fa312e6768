"""The memory's coordinator: a named actor that keeps the book of epochs and makes it come true.

It holds no keys and answers no searches. Every change is on disk before a shard hears of it, and
what shards hear is always the whole state that the book wants (`ray_orders`). So it may be killed
at any moment: the one that starts in its place reads the book and goes on.
"""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from memory_server.api import MemoryInfo, StageStatus
from memory_server.epochs import EpochPlan
from memory_server.errors import MemoryServerError, NotEnoughMemory, UnknownEpoch
from memory_server.held_epoch import ShardStatus
from memory_server.ray_calls import Replicas
from memory_server.ray_names import Address, Layout, PackedWeights, pack_weights, unpack_weights
from memory_server.ray_orders import Need, Orders, judge, orders_of, progress, shortage
from memory_server.ray_state import ServerBook, StateDirectory
from memory_server.stats import EpochStats, MemoryStats, ShardStats, total_bytes
from memory_server.store import Store

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 5.0
COST_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 3.0
MIND_EVERY_S = 0.5
LOCK_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What a client is given. `key_width`: None before the first epoch is live."""

    layout: Layout
    secret: bytes = field(repr=False)
    key_width: int | None


class Coordinator:
    """The body of the coordinator's actor. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        """Read the book. An actor whose constructor raises is never restarted, so a failure here is
        kept and told to whoever calls."""
        self._layout = layout
        self._lock = threading.Lock()
        self._staging = threading.Lock()  # one call that stages at a time
        self._replicas = Replicas(layout)
        self._began: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._live_since: float | None = None
        self._broken: MemoryServerError | None = None
        try:
            self._store = Store.open(layout.store_path)
            self._state = StateDirectory(layout.state_dir)
            self._hold = contextlib.ExitStack()
            self._wait_for_state()
            self._secret = self._state.secret()
            self._server = self._state.load(now=time.monotonic())
        except MemoryServerError as error:
            self._broken = error
            return
        threading.Thread(target=self._mind, name="minder", daemon=True).start()

    def attach(self) -> Attachment:
        """What a client needs to search without the coordinator."""
        self._check()
        with self._lock:
            book = self._server.epochs
            receipts = book.receipts.get(book.live or 0, {})
        width = next(iter(receipts.values())).key_width if receipts else None
        return Attachment(layout=self._layout, secret=self._secret, key_width=width)

    def join(self, shard: int, replica: int) -> Orders:
        """What a shard that starts must hold."""
        self._check()
        with self._lock:
            name = f"{shard}-{replica}"
            self._server.joins[name] = self._server.joins.get(name, 0) + 1
            self._state.save(self._server)
            orders = self._orders()
        self._replicas.joined((shard, replica), orders.revision)
        return orders

    def weights(self, weights_id: int) -> PackedWeights:
        """For a shard on a node that cannot read the state directory."""
        self._check()
        return pack_weights(self._state.load_weights(weights_id))

    def stage(
        self,
        request: str,
        encoder_step: int,
        weights: PackedWeights | None,
        content_version: str | None,
    ) -> int:
        """Number an epoch and tell the shards; does not wait until they are done.

        Args:
            request: the caller's token; a call that is repeated with it stages nothing more.
        """
        self._check()
        if content_version is not None:
            self._store.manifest(content_version)
        with self._staging:
            with self._lock:
                if request in self._server.requests:
                    return self._server.requests[request]
                waiting = self._server.epochs.unsettled()
            for epoch in waiting:
                self._look(epoch)  # what has sealed meanwhile does not wait any more
            probe = copy.deepcopy(self._server.epochs)
            plan = probe.begin(
                encoder_step=encoder_step,
                new_weights=weights is not None,
                content_version=content_version,
            )
            probe.supersede(plan)
            self._check_fits(plan, probe.unsettled())
            if weights is not None:
                self._state.save_weights(plan.weights_id, unpack_weights(weights))
            with self._change("stage") as server:
                plan = server.epochs.begin(
                    encoder_step=encoder_step,
                    new_weights=weights is not None,
                    content_version=content_version,
                )
                server.epochs.supersede(plan)
                server.remember_request(request, plan.epoch)
            self._began[plan.epoch] = time.monotonic()
        self._tell()
        return plan.epoch

    def staging(self, epoch: int) -> StageStatus:
        """Ask the shards how far they are; seal the epoch here when all have sealed it."""
        self._check()
        return self._status(epoch, self._look(epoch))

    def activate(self, epoch: int, expected_live: int | None, wait_s: float) -> tuple[bool, int]:
        """Switch every shard to a sealed epoch. A call that is repeated does no harm.

        Returns:
            (True, the live epoch); or (False, an epoch that was staged instead, because what this
            one follows has changed): once that one is sealed, call again with the same argument.
        """
        self._check()
        for number in self._with_successor(epoch):
            self.staging(number)
        with self._change("activate") as server:
            book = server.epochs
            target = self._successor(server, epoch)
            if target != book.live:
                book.check_live(expected_live)
            if target != epoch and target not in book.receipts:
                return False, target
            rebased = book.rebase(target)
            if rebased is None:
                book.activate(target)
                if target != epoch:
                    del server.successors[epoch]
                    book.release(epoch, time.monotonic())
            else:
                server.successors[epoch] = rebased.epoch
                if target != epoch:
                    book.release(target, time.monotonic())
        if rebased is not None:
            self._began[rebased.epoch] = time.monotonic()
            self._tell()
            return False, rebased.epoch
        self._live_since = time.monotonic()
        self._replicas.wait_until_followed(self._orders_now(), wait_s, patient=True)
        return True, target

    def release(self, epoch: int, wait_s: float) -> None:
        """Forget an epoch that is not live, once no reader has it pinned."""
        self._check()
        with self._change("release") as server:
            gone = server.epochs.release(epoch, time.monotonic())
            server.epochs.forget_left(time.monotonic())
        if gone:
            self._replicas.wait_until_followed(self._orders_now(), wait_s, patient=False)
        self._tell()

    def pin(self, epoch: int | None, lease_s: float) -> tuple[int, int]:
        """(the pin, its epoch)"""
        self._check()
        with self._change("pin") as server:
            pin = server.epochs.pin(epoch, lease_s, time.monotonic())
            server.leases[pin.id] = lease_s
        return pin.id, pin.epoch

    def renew(self, pin: int) -> None:
        """Begin a pin's lease anew. Not written down: after a restart every lease begins anew."""
        self._check()
        with self._lock:
            self._server.epochs.renew(pin, self._server.leases.get(pin, 0.0), time.monotonic())

    def unpin(self, pin: int) -> None:
        """Let go of a pin; one that ended is ignored."""
        self._check()
        with self._change("unpin") as server:
            server.epochs.unpin(pin)
            server.epochs.forget_left(time.monotonic())
        self._tell()

    def info(self) -> MemoryInfo:
        """Describe the live epoch; bytes are of one replica of each shard."""
        self._check()
        with self._lock:
            book = self._server.epochs
            if book.live is None:
                raise UnknownEpoch("the memory is starting: no epoch is live yet")
            receipts = list(book.receipts[book.live].values())
            plan = book.plans[book.live]
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
            index=self._layout.index.describe(),
        )

    def held(self) -> list[StageStatus]:
        """Every epoch that is held or coming, failed ones too until they are released."""
        self._check()
        with self._lock:
            numbers = sorted(self._server.epochs.plans)
        return [self.staging(number) for number in numbers]

    def stats(self) -> MemoryStats:
        """Ask every replica; one that does not answer is "silent"."""
        self._check()
        answers = self._replicas.ask("report", timeout_s=REPORT_TIMEOUT_S)
        statuses = {status.epoch: status for status in self.held()}
        with self._lock:
            server = copy.deepcopy(self._server)
        book, now = server.epochs, time.monotonic()
        shards = tuple(
            _with_restarts(address, answers.get(address), server)
            for address in self._layout.addresses
        )
        live = None if book.live is None else book.plans[book.live]
        receipts = list(book.receipts.get(book.live or 0, {}).values())
        newest = max((plan.encoder_step for plan in book.plans.values()), default=0)
        pins = [pin for pin in book.pins.values() if pin.deadline > now]
        return MemoryStats(
            name=self._layout.name,
            store=self._layout.store_path,
            epoch=book.live,
            encoder_step=None if live is None else live.encoder_step,
            content_version=None if live is None else live.content_version,
            entries=sum(receipt.live_rows for receipt in receipts),
            key_width=receipts[0].key_width if receipts else None,
            index=self._layout.index.describe(),
            shards=self._layout.shards,
            replicas=self._layout.replicas,
            newest_step=newest,
            staleness_steps=0 if live is None else newest - live.encoder_step,
            live_s=None if self._live_since is None else now - self._live_since,
            pins=len(pins),
            epochs=tuple(
                EpochStats(
                    epoch=epoch,
                    state=statuses[epoch].state,
                    live=epoch == book.live,
                    content_version=plan.content_version,
                    encoder_step=plan.encoder_step,
                    done=statuses[epoch].done,
                    total=statuses[epoch].total,
                    remaining_s=statuses[epoch].remaining_s,
                    pins=sum(pin.epoch == epoch for pin in pins),
                    leaving=epoch in book.leaving,
                    error=book.failures.get(epoch),
                )
                for epoch, plan in sorted(book.plans.items())
                if epoch in statuses
            ),
            queries=sum(shard.queries for shard in shards),
            overloaded=sum(shard.overloaded for shard in shards),
            bytes=total_bytes(shards),
            per_shard=shards,
        )

    def _booked(self, what: str) -> None:
        """A change is in the book and no shard knows of it. Here a test's coordinator dies."""

    @contextlib.contextmanager
    def _change(self, what: str) -> Iterator[ServerBook]:
        """Change the book on disk, then in memory; nothing is changed if either step fails."""
        with self._lock:
            draft = copy.deepcopy(self._server)
            yield draft
            if draft == self._server:
                return
            draft.revision += 1
            pins = draft.epochs.pins
            draft.leases = {pin: s for pin, s in draft.leases.items() if pin in pins}
            draft.successors = {
                epoch: other
                for epoch, other in draft.successors.items()
                if epoch in draft.epochs.plans and other in draft.epochs.plans
            }
            self._state.save(draft)
            self._server = draft
            self._state.keep_weights(draft.weights_needed())
            kept = draft.epochs.plans
            for times in (self._began, self._seconds):
                for epoch in [e for e in times if e not in kept]:
                    del times[epoch]
        self._booked(what)

    def _orders(self) -> Orders:
        return orders_of(self._server.epochs, self._server.revision)

    def _orders_now(self) -> Orders:
        with self._lock:
            return self._orders()

    def _tell(self) -> None:
        self._replicas.tell(self._orders_now())

    def _successor(self, server: ServerBook, epoch: int) -> int:
        """What was staged instead of this epoch, if it still can become live."""
        other = server.successors.get(epoch, epoch)
        return epoch if other in server.epochs.failures else other

    def _with_successor(self, epoch: int) -> list[int]:
        with self._lock:
            return list(dict.fromkeys([epoch, self._successor(self._server, epoch)]))

    def _look(self, epoch: int) -> dict[Address, ShardStatus]:
        """Ask all replicas about an epoch that is not settled, and settle it if that is due."""
        with self._lock:
            plan = self._server.epochs.plan(epoch)
            if epoch not in self._server.epochs.unsettled():
                return {}
        answers = self._replicas.ask("status", epoch, timeout_s=STATUS_TIMEOUT_S)
        if any(isinstance(answer, UnknownEpoch) for answer in answers.values()):
            self._tell()  # it missed the news
        statuses = {a: s for a, s in answers.items() if isinstance(s, ShardStatus)}
        for (shard, _), answer in answers.items():
            if isinstance(answer, MemoryServerError) and not isinstance(answer, UnknownEpoch):
                statuses[shard, -1] = _failed(f"shard {shard}: {answer}")
        entries = self._store.manifest(plan.content_version).entries
        verdict = judge(plan, statuses, self._layout.addresses, entries=entries)
        if verdict is None:
            return statuses
        with self._change("settle") as server:
            if epoch not in server.epochs.unsettled():
                return {}
            if verdict.failure is None:
                server.epochs.seal(list(verdict.receipts))
            else:
                server.epochs.fail(epoch, verdict.failure)
            began = self._began.get(epoch)
            self._seconds[epoch] = 0.0 if began is None else time.monotonic() - began
        self._tell()
        return {}

    def _status(self, epoch: int, statuses: dict[Address, ShardStatus]) -> StageStatus:
        with self._lock:
            book = self._server.epochs
            book.plan(epoch)
            receipts = book.receipts.get(epoch, {})
            failure = book.failures.get(epoch)
            began = self._began.get(epoch, time.monotonic())
            settled_s = self._seconds.get(epoch, 0.0)
        if receipts or failure is not None:
            rows = sum(receipt.live_rows for receipt in receipts.values())
            return StageStatus(
                epoch=epoch,
                state="sealed" if receipts else "failed",
                done=rows,
                total=rows,
                error=failure,
                seconds=settled_s,
                remaining_s=0.0 if receipts else None,
            )
        silent = [address for address in self._layout.addresses if address not in statuses]
        names = ", ".join(str(shard) for shard in dict.fromkeys(shard for shard, _ in silent))
        reached = progress(statuses)
        return StageStatus(
            epoch=epoch,
            state="encoding",
            done=reached.done,
            total=reached.total,
            error=f"no answer yet from shard {names}" if silent else None,
            seconds=time.monotonic() - began,
            remaining_s=None if silent else reached.remaining_s,
        )

    def _check_fits(self, plan: EpochPlan, pending: list[int]) -> None:
        """Refuse an epoch that would not fit beside what is held and what is coming.

        Raises:
            NotEnoughMemory; or what keeps a shard from reading the content.
        """
        others = [epoch for epoch in pending if epoch != plan.epoch]
        answers = self._replicas.ask("need", plan, others, timeout_s=COST_TIMEOUT_S)
        for answer in answers.values():
            if isinstance(answer, MemoryServerError):
                raise answer
        found = shortage({a: need for a, need in answers.items() if isinstance(need, Need)})
        if found is not None:
            place, needed, free = found
            raise NotEnoughMemory(
                f"an epoch of content {plan.content_version} needs {needed} bytes on {place} "
                f"beside what it holds, and {free} are free there; nothing was begun: spread the "
                "shards over more nodes, take a smaller key_dtype, or release an epoch"
            )

    def _mind(self) -> None:
        """Settle what nobody asks about, end leases, and tell whoever missed the newest orders."""
        while True:
            try:
                with self._lock:
                    waiting = self._server.epochs.unsettled()
                    left = copy.deepcopy(self._server.epochs).forget_left(time.monotonic())
                for epoch in waiting:
                    self._look(epoch)
                if left:
                    with self._change("leases") as server:
                        server.epochs.forget_left(time.monotonic())
                self._tell()
            except Exception as error:  # whatever happens, the minder goes on
                log.warning("minding %s: %s: %s", self._layout.name, type(error).__name__, error)
            time.sleep(MIND_EVERY_S)

    def _wait_for_state(self) -> None:
        """The coordinator before this one may still be dying: only one may write the book."""
        while True:
            try:
                self._hold.enter_context(self._state.locked())
                return
            except MemoryServerError:
                time.sleep(LOCK_PAUSE_S)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken


def _failed(reason: str) -> ShardStatus:
    return ShardStatus(state="failed", done=0, total=0, error=reason, receipt=None, seconds=0.0)


def _with_restarts(address: Address, answer: object, server: ServerBook) -> ShardStats:
    restarts = max(0, server.joins.get(f"{address[0]}-{address[1]}", 1) - 1)
    if isinstance(answer, ShardStats):
        return ShardStats(**{**answer.__dict__, "restarts": restarts})
    why = "it is dead or restarting" if answer is None else str(answer)
    return ShardStats(
        shard=address[0], replica=address[1], state="silent", error=why, restarts=restarts
    )
