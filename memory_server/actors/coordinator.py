"""The memory's coordinator: a named actor that keeps the book of epochs and makes it come true.

It holds no keys and answers no searches. Every change is on disk before a shard hears of it, and
what shards hear is always the whole state that the book wants (`orders`). So it may be killed
at any moment: the one that starts in its place reads the book and goes on.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from memory_server.actors.book import KeptBook
from memory_server.actors.calls import Replicas
from memory_server.actors.coming_up import ComingUp
from memory_server.actors.names import Layout, PackedWeights, pack_weights
from memory_server.actors.orders import Orders
from memory_server.actors.report import memory_stats
from memory_server.actors.server_book import ServerBook
from memory_server.actors.staging import Stager
from memory_server.actors.state import StateDirectory
from memory_server.api import MemoryInfo, StageStatus
from memory_server.errors import LiveEpochChanged, UnknownEpoch
from memory_server.stats import MemoryStats
from memory_server.store.store import Store

log = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 3.0
MIND_EVERY_S = 0.5
ABANDONED_S = 600.0  # a client that waits for an epoch asks many times a second


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What a client is given. `key_width`: None before the first epoch is live."""

    layout: Layout
    secret: bytes = field(repr=False)
    key_width: int | None


class Coordinator:
    """The body of the coordinator's actor. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        """Read the book. An actor whose constructor raises is never restarted, so a failure
        here is told to whoever calls, and it is tried again."""
        self._layout = layout
        self._live_since: float | None = None
        self._asked: dict[int, float] = {}
        self._up = ComingUp(self._begin, f"the coordinator of memory {layout.name!r}")

    def _begin(self) -> None:
        layout = self._layout
        state = StateDirectory(layout.state_dir)
        self._secret = state.secret()
        self._store = store = Store.open(layout.store_path)
        self._book = KeptBook(state, booked=self._booked)  # last: it holds the directory
        self._replicas = Replicas(layout)
        self._stager = Stager(self._book, self._replicas, store, layout.tables_pay_from)
        threading.Thread(target=self._mind, name="minder", daemon=True).start()

    def ping(self) -> int:
        """The process id. Raises what keeps it from working."""
        self._check()
        return os.getpid()

    def attach(self) -> Attachment:
        """What a client needs to search without the coordinator."""
        self._check()
        with self._book.read() as server:
            book = server.epochs
            receipts = {} if book.live is None else book.receipts[book.live]
        width = next(iter(receipts.values())).key_width if receipts else None
        return Attachment(layout=self._layout, secret=self._secret, key_width=width)

    def join(self, shard: int, replica: int) -> Orders:
        """What a shard that starts must hold."""
        self._check()
        orders = self._book.joined(f"{shard}-{replica}")
        self._replicas.joined((shard, replica), orders.revision)
        return orders

    def weights(self, weights_id: int) -> PackedWeights:
        """For a shard on a node that cannot read the state directory."""
        self._check()
        return pack_weights(self._book.state.load_weights(weights_id))

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
        return self._stager.stage(request, encoder_step, weights, content_version)

    def staging(self, epoch: int) -> StageStatus:
        """Ask the shards how far they are; seal the epoch here when all have sealed it."""
        self._check()
        self._asked[epoch] = time.monotonic()
        return self._stager.staging(epoch)

    def held(self) -> list[StageStatus]:
        """Every epoch that is held or coming, failed ones too until they are released."""
        self._check()
        statuses = []
        for epoch in sorted(self._book.copied().epochs.plans):
            with contextlib.suppress(UnknownEpoch):  # released meanwhile
                statuses.append(self._stager.staging(epoch))
        return statuses

    def activate(
        self, epoch: int, expected_live: int | None, wait_s: float, request: str
    ) -> tuple[bool, int]:
        """Switch every shard to a sealed epoch.

        Args:
            request: the caller's token. A call that is repeated with it, after a switch, says again
                what became live; it does not undo what others made live since.

        Returns:
            (True, the live epoch); or (False, an epoch that was staged instead, because what this
            one follows has changed): once that one is sealed, call again with the same arguments.

        Raises:
            ShardLost: the switch is booked, but of some shard no replica has followed yet.
        """
        self._check()
        live = self._book.copied().switches.get(request)
        if live is None:
            live, instead = self._switch(epoch, expected_live, request)
            if live is None:
                return False, instead
            self._live_since = time.monotonic()
        self._replicas.wait_until_followed(self._book.orders(), wait_s, patient=True)
        return True, live

    def _switch(
        self, epoch: int, expected_live: int | None, request: str
    ) -> tuple[int | None, int]:
        """(the live epoch, or None if another one is to be sealed first; that other one)"""
        for number in {epoch, _successor(self._book.copied(), epoch)}:
            self.staging(number)
        try:
            with self._book.change("activate") as server:
                book = server.epochs
                target = _successor(server, epoch)
                if target != book.live:
                    book.check_live(expected_live)
                if target != epoch and target not in book.receipts:
                    return None, target
                rebased = book.rebase(target)
                if rebased is None:
                    book.activate(target)
                    server.remember_switch(request, target)
                    if target != epoch:
                        del server.successors[epoch]
                        book.release(epoch, time.monotonic())
                else:
                    if target != epoch:
                        book.release(target, time.monotonic())
                    server.successors[epoch] = rebased.epoch
        except LiveEpochChanged:
            # The caller decides anew, so what was staged for this switch is of no use.
            with self._book.change("refused") as server:
                server.drop_successor(epoch)
            self._replicas.tell(self._book.orders())
            raise
        if rebased is None:
            return target, target
        self._stager.began(rebased.epoch)
        self._asked[rebased.epoch] = time.monotonic()
        self._replicas.tell(self._book.orders())
        return None, rebased.epoch

    def release(self, epoch: int, wait_s: float) -> None:
        """Forget an epoch that is not live, once no reader has it pinned; with it goes what was
        staged instead of it."""
        self._check()
        with self._book.change("release") as server:
            gone = server.epochs.release(epoch, time.monotonic())
            server.epochs.forget_left(time.monotonic())
        if gone:
            self._replicas.wait_until_followed(self._book.orders(), wait_s, patient=False)
        self._replicas.tell(self._book.orders())

    def pin(self, request: str, epoch: int | None, lease_s: float) -> tuple[int, int]:
        """(the pin, its epoch); a call that is repeated with its token gets the same pin."""
        self._check()
        with self._book.change("pin") as server:
            pin = server.pin(request, epoch, lease_s, time.monotonic())
        return pin.id, pin.epoch

    def renew(self, pin: int) -> None:
        """Begin a pin's lease anew."""
        self._check()
        self._book.renew(pin)

    def unpin(self, pin: int) -> None:
        """Let go of a pin; one that ended is ignored."""
        self._check()
        with self._book.change("unpin") as server:
            server.epochs.unpin(pin)
            server.epochs.forget_left(time.monotonic())
        self._replicas.tell(self._book.orders())

    def info(self, domains: Collection[str] = ()) -> MemoryInfo:
        """Describe the live epoch; bytes are of one replica of each shard.

        Args:
            domains: entries are those of these; none named: all.

        Raises:
            UnknownDomain: the live content has not all of them.
        """
        self._check()
        with self._book.read() as server:
            book = server.epochs
            if book.live is None:
                raise UnknownEpoch("the memory is starting: no epoch is live yet")
            receipts = list(book.receipts[book.live].values())
            plan = book.plans[book.live]
        meta = self._layout.meta
        entries = sum(receipt.live_rows for receipt in receipts)
        if domains:
            refs = self._store.manifest(plan.content_version).of_domains(domains)
            entries = sum(ref.live for ref in refs)
        return MemoryInfo(
            entries=entries,
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

    def check_domains(self, content_version: str, domains: Collection[str]) -> None:
        """Raises UnknownDomain: a version has not all of them. UnknownVersion, StoreDamaged."""
        self._check()
        self._store.manifest(content_version).of_domains(domains)

    def stats(self) -> MemoryStats:
        """Ask every replica; one that does not answer is "silent"."""
        self._check()
        reports = self._replicas.ask("report", timeout_s=REPORT_TIMEOUT_S)
        staging = {status.epoch: status for status in self.held()}
        now = time.monotonic()
        return memory_stats(
            self._layout,
            self._book.copied(),
            reports,
            staging,
            now=now,
            live_s=None if self._live_since is None else now - self._live_since,
        )

    def _booked(self, what: str) -> None:
        """A change is in the book and no shard knows of it. Here a test's coordinator dies."""

    def _mind(self) -> None:
        """Settle what nobody asks about, end leases, and tell whoever missed the newest orders."""
        while True:
            try:
                self._mind_once()
            except Exception as error:  # whatever happens, the minder goes on
                log.warning("minding %s: %s: %s", self._layout.name, type(error).__name__, error)
            time.sleep(MIND_EVERY_S)

    def _mind_once(self) -> None:
        server = self._book.copied()
        for epoch in server.epochs.unsettled():
            with contextlib.suppress(UnknownEpoch):
                self._stager.look(epoch)
        self._drop_abandoned(server.successors)
        if server.epochs.forget_left(time.monotonic()):
            with self._book.change("leases") as server:
                server.epochs.forget_left(time.monotonic())
        self._replicas.tell(self._book.orders())

    def _drop_abandoned(self, successors: Mapping[int, int]) -> None:
        """Release what was staged for switches that nobody asks about any more."""
        now = time.monotonic()
        self._asked = {new: self._asked.get(new, now) for new in successors.values()}
        silent = [e for e, new in successors.items() if now - self._asked[new] > ABANDONED_S]
        if silent:
            with self._book.change("abandoned") as server:
                for epoch in silent:
                    server.drop_successor(epoch)

    def _check(self) -> None:
        self._up.check()


def _successor(server: ServerBook, epoch: int) -> int:
    """What was staged instead of this epoch, if it still can become live."""
    other = server.successors.get(epoch, epoch)
    return epoch if other in server.epochs.failures else other
