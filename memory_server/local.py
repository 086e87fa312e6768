"""The memory in this process: for tests, notebooks and one device."""

import contextlib
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor

from memory_server.api import Entry, KeyEncoderFactory, MemoryInfo, Retrieved, StageStatus
from memory_server.errors import MemoryClosed, RefreshFailed, UnknownEpoch
from memory_server.index.base import IndexSettings
from memory_server.index.recall_audit import AuditReport
from memory_server.keys.key_sources import tables_pay_from
from memory_server.keys.stored_vectors import StoredVectors
from memory_server.replies import merge_replies
from memory_server.shard.epochs import EpochBook, Pin
from memory_server.shard.free_memory import check_fits
from memory_server.shard.shard import Shard
from memory_server.store.store import Store
from memory_server.waiting import in_order, wait_until_sealed

INITIAL_TIMEOUT_S = 24 * 3600.0


class LocalPin:
    """A hold on an epoch of a `LocalMemory`; see `api.EpochPin`."""

    def __init__(self, memory: "LocalMemory", pin: Pin, lease_s: float) -> None:
        self._memory, self._pin, self._lease_s = memory, pin, lease_s

    @property
    def epoch(self) -> int:
        return self._pin.epoch

    def renew(self) -> None:
        self._memory.renew(self._pin, self._lease_s)

    def close(self) -> None:
        self._memory.unpin(self._pin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LocalMemory:
    """A `Memory` of one shard in this process."""

    def __init__(
        self,
        store: Store | Path | str,
        *,
        encoder: KeyEncoderFactory | None = None,
        weights: Mapping[str, Tensor] | None = None,
        vectors: StoredVectors | Path | str | None = None,
        encoder_step: int = 0,
        content_version: str | None = None,
        domains: Collection[str] = (),
        device: str = "cpu",
        index: IndexSettings | str = "flat",
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Encode the store's entries and answer; blocks until the first epoch is live.

        Args:
            encoder, weights: what makes the keys.
            vectors: instead of both, keys that were made before; replies then carry the keys, and
                the values that are stored with them. Other content can be staged as far as all its
                entries have vectors.
            content_version: by default the store's head.
            domains: only their entries are here, in every epoch; none named: all that are plugged.
            index: how keys are held and searched; a string is an `IndexSettings.kind`.
            memory_limit_bytes: keys of all held epochs take no more; by default what is free.

        Raises:
            ValueError: neither or both of encoder with weights, and vectors.
            StoreNotFound, StoreDamaged, UnknownVersion, UnknownDomain; RefreshFailed: the first
            epoch failed, says why.
        """
        self._vectors = _opened(vectors)
        given = (encoder is not None, weights is not None)
        if given != (self._vectors is None,) * 2:
            raise ValueError(
                "give what makes the keys (encoder and weights) or stored keys (vectors), not "
                f"{'a part of the first' if self._vectors is None else 'both'}"
            )
        stored = self._vectors
        if encoder is None or weights is None:
            assert stored is not None
            encoder, weights = (lambda _: stored), {}
        location = store.location if isinstance(store, Store) else str(store)
        self._index = IndexSettings(kind=index) if isinstance(index, str) else index
        self._shard = Shard(
            location,
            shards=1,
            shard=0,
            encoder=encoder,
            device=device,
            index=self._index,
            memory_limit_bytes=memory_limit_bytes,
            domains=domains,
        )
        self._domains = tuple(domains)
        self._store = Store.open(location)
        self._tables_pay_from = tables_pay_from(
            encoder,
            entry_tokens=self._store.meta.entry_tokens,
            rescoring=self._index.key_dtype != "float32",
        )
        self._book = EpochBook()
        self._lock = threading.Lock()
        self._closed = False
        try:
            version = self._store.head() if content_version is None else content_version
            self._store.manifest(version).of_domains(self._domains)
            first = self.stage(encoder_step=encoder_step, weights=weights, content_version=version)
            self.wait_sealed(first, INITIAL_TIMEOUT_S)
            self.activate(first)
        except BaseException:
            self.close()
            raise

    def info(self) -> MemoryInfo:
        """See `Memory.info`."""
        with self._lock:
            self._check_open()
            assert self._book.live is not None
            receipt = self._book.receipts[self._book.live][0]
        meta = self._store.meta
        return MemoryInfo(
            entries=receipt.live_rows,
            shards=1,
            key_width=receipt.key_width,
            entry_tokens=meta.entry_tokens,
            epoch=receipt.epoch,
            encoder_step=receipt.encoder_step,
            content_version=receipt.content_version,
            tokenizer_fingerprint=meta.tokenizer_fingerprint,
            pad_token_id=meta.pad_token_id,
            bytes=dict(receipt.bytes),
            index=self._index.describe(),
        )

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        *,
        exclude_doc_ids: Tensor | None = None,
        epoch: int | None = None,
        exact: bool = False,
    ) -> Retrieved:
        """See `Memory.search`."""
        reply = self._shard.search(queries_BQ, k, exclude_doc_ids, epoch=epoch, exact=exact)
        merged = merge_replies([reply], k, device=queries_BQ.device)
        if self._vectors is None:
            return merged
        keys, values = self._vectors.keys(merged.ids), self._vectors.values(merged.ids)
        return replace(merged, keys=keys, values=values)

    def stage(
        self,
        *,
        encoder_step: int,
        weights: Mapping[str, Tensor] | None = None,
        content_version: str | None = None,
    ) -> int:
        """See `Memory.stage`. The weights are copied, so that training may go on changing them.

        Raises:
            ValueError: weights for a memory of stored vectors, whose keys nothing makes anew.
        """
        if self._vectors is not None and weights:
            raise ValueError(
                f"this memory's keys are stored in {self._vectors.path}, so weights cannot change "
                "them; stage content alone, or make a memory with encoder and weights"
            )
        if content_version is not None:
            self._store.manifest(content_version).of_domains(self._domains)
        copied = None if weights is None else {k: v.detach().clone() for k, v in weights.items()}
        for unsettled in self._unsettled():
            with contextlib.suppress(UnknownEpoch):  # another thread's, which it is still checking
                self.staging(unsettled)  # what has sealed meanwhile is not waiting any more
        with self._lock:
            self._check_open()
            plan = self._book.begin(
                encoder_step=encoder_step,
                new_weights=weights is not None,
                content_version=content_version,
                tabled=weights is not None and self._tabled(content_version),
            )
        try:
            # Not under the lock: new segments are read against their checksums here.
            cost = self._shard.stage_cost(plan)
            check_fits(cost.own + cost.tables, cost.free, what=f"staging epoch {plan.epoch}")
        except BaseException:
            with self._lock:
                self._book.fail(plan.epoch, "it was refused")
                self._book.release(plan.epoch, time.monotonic())
            raise
        with self._lock:
            self._check_open()
            for dropped in self._book.supersede(plan):
                self._shard.release(dropped)
            self._shard.stage(plan, lambda: _given(copied))
        return plan.epoch

    def staging(self, epoch: int) -> StageStatus:
        """See `Memory.staging`."""
        with self._lock:
            self._check_open()
            self._book.plan(epoch)
            if epoch in self._book.failures:
                return _failed(epoch, self._book.failures[epoch])
            status = self._shard.status(epoch)
            if status.receipt is not None and epoch not in self._book.receipts:
                self._book.seal([status.receipt])
            if status.error is not None:
                self._book.fail(epoch, status.error)
        return StageStatus(
            epoch=epoch,
            state=status.state,
            done=status.done,
            total=status.total,
            error=status.error,
            seconds=status.seconds,
            remaining_s=status.remaining_s,
        )

    def wait_sealed(self, epoch: int, timeout_s: float) -> None:
        """See `Memory.wait_sealed`."""
        wait_until_sealed(self.staging, epoch, timeout_s)

    def activate(self, epoch: int, *, expected_live: int | None = None) -> int:
        """See `Memory.activate`."""
        current = epoch
        try:
            while True:
                self.staging(current)
                with self._lock:
                    self._book.check_live(expected_live)
                    rebased = self._book.rebase(current)
                    if rebased is None:
                        self._book.activate(current)
                        self._shard.activate(current)
                        break
                    # Its weights are those of a held epoch, so none are loaded.
                    self._shard.stage(rebased, lambda: _given(None))
                previous, current = current, rebased.epoch
                if previous != epoch:
                    self.release(previous)
                self.wait_sealed(current, INITIAL_TIMEOUT_S)
        except BaseException:
            # The caller knows only the epoch that it named, and keeps it.
            if current != epoch:
                self.release(current)
            raise
        if current != epoch:
            self.release(epoch)
        return current

    def pin(self, epoch: int | None = None, *, lease_s: float = 60.0) -> LocalPin:
        """See `Memory.pin`."""
        with self._lock:
            self._check_open()
            return LocalPin(self, self._book.pin(epoch, lease_s, time.monotonic()), lease_s)

    def release(self, epoch: int) -> None:
        """See `Memory.release`."""
        with self._lock:
            self._check_open()
            self._forget_left()
            if self._book.release(epoch, time.monotonic()):
                self._shard.release(epoch)

    def renew(self, pin: Pin, lease_s: float) -> None:
        """Begin a pin's lease anew; see `LocalPin`."""
        with self._lock:
            self._check_open()
            self._book.renew(pin.id, lease_s, time.monotonic())

    def unpin(self, pin: Pin) -> None:
        """End a pin; see `LocalPin`."""
        with self._lock:
            self._book.unpin(pin.id)
            self._forget_left()

    def audit(self) -> AuditReport:
        """Measure the live epoch's recall on recent queries, which decides whether an approximate
        index may answer (`IndexSettings.min_recall`). Blocks; a thread does so every
        `audit_every_s` seconds without being asked."""
        self._check_open()
        return self._shard.audit.run_once()

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """See `Memory.entries`."""
        return in_order(ids, self._shard.entries(ids))

    def close(self) -> None:
        """See `Memory.close`."""
        with self._lock:
            self._closed = True
        self._shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tabled(self, content_version: str | None) -> bool:
        version = content_version or self._book.basis().content_version
        pay_from = self._tables_pay_from
        refs = self._store.manifest(version).of_domains(self._domains)
        return pay_from is not None and sum(ref.live for ref in refs) >= pay_from

    def _unsettled(self) -> list[int]:
        with self._lock:
            return self._book.unsettled()

    def _forget_left(self) -> None:
        for epoch in self._book.forget_left(time.monotonic()):
            self._shard.release(epoch)

    def _check_open(self) -> None:
        if self._closed:
            raise MemoryClosed("this memory was closed; make another one")


def _given(weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if weights is None:
        raise RefreshFailed(
            "the weights that made the newest epoch are not held any more; give weights"
        )
    return weights


def _opened(vectors: StoredVectors | Path | str | None) -> StoredVectors | None:
    if vectors is None or isinstance(vectors, StoredVectors):
        return vectors
    return StoredVectors.open(vectors)


def _failed(epoch: int, reason: str) -> StageStatus:
    return StageStatus(epoch=epoch, state="failed", done=0, total=0, error=reason, seconds=0.0)
