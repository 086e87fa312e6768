"""One shard, free of Ray: its part of every held epoch, staged in the background, searched
meanwhile.

An epoch is immutable once sealed. A search takes a reference to it and is answered from it alone,
even if another is activated, or it is released, meanwhile; its keys go when the last reader has
gone.
"""

import logging
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from memory_server.api import Entry, KeyEncoderFactory, StageState
from memory_server.errors import (
    EpochNotSealed,
    MemoryClosed,
    MemoryServerError,
    RefreshFailed,
    ShardRestoring,
    UnknownEpoch,
)
from memory_server.index.base import Index, IndexSettings
from memory_server.index.recall_audit import Audit, QueryLog
from memory_server.keys.making import Cancelled
from memory_server.priority import give_way
from memory_server.replies import ShardReply
from memory_server.requests import checked_ids, checked_request
from memory_server.shard.content import taken
from memory_server.shard.epoch_builder import EpochBuilder, LoadWeights
from memory_server.shard.epochs import EpochPlan
from memory_server.shard.free_memory import StageCost
from memory_server.shard.held_epoch import HeldEpoch, SealedEpoch, ShardStatus

log = logging.getLogger(__name__)


class Shard:
    """Rows `shard` of `shards` of a store, searchable by epoch. Thread-safe."""

    def __init__(
        self,
        store_path: Path | str,
        *,
        shards: int,
        shard: int,
        encoder: KeyEncoderFactory,
        device: str = "cpu",
        index: IndexSettings | str = "flat",
        scratch: Path | None = None,
        memory_limit_bytes: int | None = None,
        domains: Collection[str] = (),
    ) -> None:
        """Open the store; hold no epoch yet.

        Args:
            scratch: a directory of this node, in which its shards share the encoder's tables.
            memory_limit_bytes: keys of all held epochs together take no more; None: what is free.
            domains: of every epoch's content, only the entries of these; none named: all.

        Raises:
            ValueError: bad index settings. The store's errors.
        """
        self._settings = IndexSettings(kind=index) if isinstance(index, str) else index
        self.shard = shard
        self._device = torch.device(device)
        self.queries = QueryLog()
        self._builder = EpochBuilder(
            store_path,
            shards=shards,
            shard=shard,
            encoder=encoder,
            device=self._device,
            settings=self._settings,
            scratch=scratch,
            memory_limit_bytes=memory_limit_bytes,
            queries=self.queries,
            domains=domains,
        )
        self._lock = threading.Lock()
        self._epochs: dict[int, HeldEpoch] = {}
        self._live: int | None = None
        self._closed = False
        # An edit is small and must not wait until a refresh has encoded everything.
        self._refreshes = ThreadPoolExecutor(
            1, thread_name_prefix=f"refresh-shard-{shard}", initializer=give_way
        )
        self._edits = ThreadPoolExecutor(
            1, thread_name_prefix=f"edit-shard-{shard}", initializer=give_way
        )
        self.audit = Audit(self._audited, self.queries, self._settings, device=self._device)

    def stage(self, plan: EpochPlan, load_weights: LoadWeights, *, restoring: bool = False) -> None:
        """Begin an epoch in the background; one that is held is left alone.

        Epochs of new weights are staged one after the other. One whose weights have sealed an epoch
        here already, an edit, does not wait for them.

        Args:
            load_weights: called, in the background, only if no held epoch has this `weights_id`.
            restoring: it was sealed before a restart, so searches wait for it instead of failing.
        """
        epoch = HeldEpoch(plan=plan, began=time.monotonic(), restoring=restoring)
        with self._lock:
            self._check_open()
            if plan.epoch in self._epochs:
                return
            self._epochs[plan.epoch] = epoch
        is_edit = any(e.weights_id == plan.weights_id for e in self._sealed_epochs())
        (self._edits if is_edit else self._refreshes).submit(self._stage, epoch, load_weights)

    def stage_cost(self, plan: EpochPlan) -> StageCost:
        """What staging the plan would add here, and what may be taken.

        Raises:
            UnknownVersion, StoreDamaged: the content cannot be read.
        """
        return self._builder.stage_cost(plan, self._sealed_epochs())

    def status(self, epoch: int) -> ShardStatus:
        """Say how far an epoch is. Raises UnknownEpoch."""
        held = self._held(epoch)
        finished = held.finished.is_set()
        state: StageState = "encoding"
        if finished:
            state = "failed" if held.sealed is None else "sealed"
        return ShardStatus(
            state=state,
            done=held.done,
            total=held.total,
            error=held.error,
            receipt=held.sealed.receipt if finished and held.sealed else None,
            seconds=held.seconds if held.seconds is not None else time.monotonic() - held.began,
            remaining_s=0.0 if finished else held.remaining_s(time.monotonic()),
        )

    def activate(self, epoch: int) -> None:
        """Answer from this epoch when a search names none.

        Whether every shard has sealed it is for the caller to know. A shard that is building it
        again after a restart lets searches wait for it.
        """
        self._held(epoch)
        with self._lock:
            self._live = epoch

    def held_epochs(self) -> list[int]:
        """The numbers of the epochs that this shard holds, staged ones too."""
        with self._lock:
            return sorted(self._epochs)

    def newest_step(self) -> int | None:
        """The newest encoder step of the epochs that are held or being staged."""
        with self._lock:
            return max((held.plan.encoder_step for held in self._epochs.values()), default=None)

    def release(self, epoch: int) -> None:
        """Drop an epoch and, if it is being staged, stop that. Unknown epochs are ignored."""
        with self._lock:
            dropped = self._epochs.pop(epoch, None)
            if dropped is not None:
                dropped.cancelled.set()
            needed = {epoch.plan.weights_id for epoch in self._epochs.values()}
        self._builder.forget_except(needed)

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        exact: bool = False,
        domains: Collection[str] = (),
    ) -> ShardReply:
        """The shard's k best.

        Args:
            wait_s: how long to wait for an epoch that is being built again.
            domains: only of these, exactly; none named: of all that the shard holds.

        Raises:
            ValueError: the request is bad. UnknownEpoch, EpochNotSealed, RefreshFailed: no such
                epoch. UnknownDomain: its content has not all of `domains`.
        """
        sealed = self._sealed(epoch, wait_s)
        queries_BQ, excluded = checked_request(
            queries_BQ, k, exclude_doc_ids, sealed.receipt.key_width
        )
        # Search is in full precision, whatever the caller trains in.
        with torch.autocast(self._device.type, enabled=False):
            there_BQ = queries_BQ.to(self._device)
            excluded_B = None if excluded is None else excluded.to(self._device)
            if domains:
                hits = sealed.domain_indexes.search(
                    sealed.content, sealed.rows, domains, there_BQ, k, excluded_B, exact=exact
                )
            else:
                hits = sealed.index.search(there_BQ, k, excluded_B, exact=exact)
        if not domains:  # what an approximate index will be asked again
            self.queries.add(queries_BQ, k, excluded)
        rows = hits.rows.cpu().numpy()
        content = sealed.content
        pads = rows < 0
        return ShardReply(
            shard=self.shard,
            ids=taken(content.ids, rows, pads),
            scores=hits.scores.cpu().numpy(),
            doc_ids=taken(content.doc_ids, rows, pads),
            tokens=content.tokens(rows),
            epoch=sealed.receipt.epoch,
            encoder_step=sealed.receipt.encoder_step,
            exact=hits.exact,
        )

    def entries(
        self,
        ids: Sequence[int],
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        domains: Collection[str] = (),
    ) -> list[Entry]:
        """The live entries that this shard holds, of those asked; of `domains` alone, if named."""
        return self._sealed(epoch, wait_s).content.find(checked_ids(ids), domains)

    def close(self) -> None:
        """Stop staging and drop every epoch."""
        with self._lock:
            self._closed = True
            for epoch in self._epochs.values():
                epoch.cancelled.set()
            self._epochs.clear()
        self.audit.close()
        for lane in (self._refreshes, self._edits):
            lane.shutdown(wait=True, cancel_futures=True)
        self._builder.close()

    def _stage(self, epoch: HeldEpoch, load_weights: LoadWeights) -> None:
        """Runs on the staging thread. Whatever goes wrong becomes the epoch's reason."""
        plan = epoch.plan
        try:
            sealed = self._build(epoch, load_weights)
            with self._lock:
                if epoch.cancelled.is_set():
                    raise Cancelled
                epoch.sealed = sealed
        except Cancelled:
            epoch.error = "it was released before it was sealed"
        except Exception as error:  # a refresh must never take the live epoch down with it
            expected = isinstance(error, MemoryServerError | ValueError)
            epoch.error = f"shard {self.shard}: {type(error).__name__}: {error}"
            log.warning("epoch %d not staged: %s", plan.epoch, epoch.error, exc_info=not expected)
        epoch.seconds = time.monotonic() - epoch.began
        epoch.finished.set()

    def _build(self, epoch: HeldEpoch, load_weights: LoadWeights) -> SealedEpoch:
        if epoch.cancelled.is_set():
            raise Cancelled

        def begin(rows: int) -> None:
            epoch.total, epoch.encoding_since = rows, time.monotonic()

        def advance(rows: int) -> None:
            epoch.done += rows
            if epoch.cancelled.is_set():
                raise Cancelled

        return self._builder.build(
            epoch.plan,
            load_weights,
            sealed=self._sealed_epochs(),
            begin=begin,
            advance=advance,
            audit=self.audit,
        )

    def _sealed_epochs(self) -> list[SealedEpoch]:
        """The sealed epochs that are held, the newest first."""
        held = sorted(self._epochs.copy().items(), reverse=True)
        return [epoch.sealed for _, epoch in held if epoch.sealed is not None]

    def _audited(self) -> Index | None:
        """What the audit measures: the live epoch's index."""
        with self._lock:
            held = None if self._live is None else self._epochs.get(self._live)
        return None if held is None or held.sealed is None else held.sealed.index

    def _held(self, epoch: int | None) -> HeldEpoch:
        with self._lock:
            self._check_open()
            number = self._live if epoch is None else epoch
            if number is None:
                raise EpochNotSealed("no epoch is live yet; stage one, wait_sealed and activate it")
            if number not in self._epochs:
                held = ", ".join(str(e) for e in sorted(self._epochs)) or "none"
                raise UnknownEpoch(
                    f"shard {self.shard} does not hold epoch {number}; it holds {held}"
                )
            return self._epochs[number]

    def _sealed(self, epoch: int | None, wait_s: float) -> SealedEpoch:
        held = self._held(epoch)
        if held.restoring:
            held.finished.wait(wait_s)
        number = held.plan.epoch
        if held.sealed is not None:
            return held.sealed
        if held.finished.is_set():
            raise RefreshFailed(f"epoch {number} could not be staged: {held.error}")
        if held.restoring:
            raise ShardRestoring(
                f"shard {self.shard} restarted and is building epoch {number} again "
                f"({held.done} of {held.total} entries)"
            )
        raise EpochNotSealed(
            f"epoch {number} is not sealed on shard {self.shard} yet "
            f"({held.done} of {held.total} entries); call wait_sealed({number}, ...) first"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise MemoryClosed("this memory was closed; start or attach to another one")
