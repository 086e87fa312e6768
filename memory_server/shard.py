"""One shard, free of Ray: its part of every held epoch, staged in the background, searched
meanwhile.

An epoch is immutable once sealed. A search takes a reference to it and is answered from it alone,
even if another is activated, or it is released, meanwhile; its keys go when the last reader has
gone.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from memory_server.api import Entry, KeyEncoderFactory, KeySource, StageState
from memory_server.content import ShardContent, taken
from memory_server.epochs import EpochPlan, Receipt
from memory_server.errors import (
    EpochNotSealed,
    MemoryClosed,
    MemoryServerError,
    RefreshFailed,
    ShardRestoring,
    UnknownEpoch,
)
from memory_server.flat_index import FlatIndex
from memory_server.held_epoch import HeldEpoch, SealedEpoch, ShardStatus
from memory_server.index import check_index_kind
from memory_server.keys import Cancelled, key_checksum, make_keys
from memory_server.replies import ShardReply
from memory_server.requests import checked_request
from memory_server.store import Store

log = logging.getLogger(__name__)

LoadWeights = Callable[[], Mapping[str, Tensor]]


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
        index: str = "flat",
    ) -> None:
        """Open the store; hold no epoch yet. Raises the store's errors."""
        check_index_kind(index)
        self.shard = shard
        self._shards = shards
        self._store = Store.open(store_path)
        self._make_encoder = encoder
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._epochs: dict[int, HeldEpoch] = {}
        self._encoders: dict[int, KeySource] = {}
        self._verified: set[str] = set()
        self._live: int | None = None
        self._closed = False
        self._stager = ThreadPoolExecutor(1, thread_name_prefix=f"stage-shard-{shard}")

    def stage(self, plan: EpochPlan, load_weights: LoadWeights, *, restoring: bool = False) -> None:
        """Begin an epoch in the background, one after the other; one that is held is left alone.

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
        self._stager.submit(self._stage, epoch, load_weights)

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

    def release(self, epoch: int) -> None:
        """Drop an epoch and, if it is being staged, stop that. Unknown epochs are ignored."""
        with self._lock:
            dropped = self._epochs.pop(epoch, None)
            if dropped is not None:
                dropped.cancelled.set()
            self._forget_encoders()

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
    ) -> ShardReply:
        """The shard's k best. `wait_s`: how long to wait for an epoch that is being built again.

        Raises:
            ValueError: the request is bad. UnknownEpoch, EpochNotSealed, RefreshFailed: no such
                epoch.
        """
        sealed = self._sealed(epoch, wait_s)
        queries_BQ, excluded = checked_request(
            queries_BQ, k, exclude_doc_ids, sealed.receipt.key_width
        )
        hits = sealed.index.search(
            queries_BQ.to(self._device),
            k,
            None if excluded is None else excluded.to(self._device),
        )
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
        )

    def entries(
        self, ids: Sequence[int], *, epoch: int | None = None, wait_s: float = 0.0
    ) -> list[Entry]:
        """The live entries that this shard holds, of those asked."""
        return self._sealed(epoch, wait_s).content.find(ids)

    def close(self) -> None:
        """Stop staging and drop every epoch."""
        with self._lock:
            self._closed = True
            for epoch in self._epochs.values():
                epoch.cancelled.set()
            self._epochs.clear()
            self._encoders.clear()
        self._stager.shutdown(wait=True, cancel_futures=True)

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
        plan = epoch.plan
        if epoch.cancelled.is_set():
            raise Cancelled
        content = self._content(plan.content_version)
        epoch.total = content.live_rows
        source = self._newest_sealed(plan.weights_id)

        def advance(rows: int) -> None:
            epoch.done += rows
            if epoch.cancelled.is_set():
                raise Cancelled

        keys_NQ, encoded_rows = make_keys(
            content,
            source=None if source is None else (source.content, source.keys),
            encoder=lambda: self._encoder(plan.weights_id, load_weights),
            device=self._device,
            advance=advance,
        )
        self._check_width(keys_NQ.shape[1])
        index = FlatIndex(
            keys_NQ=keys_NQ,
            ids_N=torch.from_numpy(content.ids).to(self._device),
            doc_ids_N=torch.from_numpy(content.doc_ids).to(self._device),
            dead_rows=torch.from_numpy(content.dead_rows).to(self._device),
        )
        receipt = Receipt(
            epoch=plan.epoch,
            shard=self.shard,
            encoder_step=plan.encoder_step,
            content_version=plan.content_version,
            rows=content.rows,
            live_rows=content.live_rows,
            key_width=keys_NQ.shape[1],
            key_checksum=key_checksum(keys_NQ),
            encoded_rows=encoded_rows,
            bytes={
                "keys": keys_NQ.nbytes,
                "ids": content.ids.nbytes + content.doc_ids.nbytes,
                "index": index.bytes,
                "tokens": content.token_bytes,
            },
            seconds=time.monotonic() - epoch.began,
        )
        return SealedEpoch(content=content, keys=keys_NQ, index=index, receipt=receipt)

    def _content(self, version: str) -> ShardContent:
        """The shard's rows; of a version already held, the same object.

        Shards share the work of reading whole segments against their checksums: each checks every
        `shards`-th segment, and an epoch answers only when all shards have sealed it.
        """
        for held in list(self._epochs.values()):
            if held.sealed is not None and held.sealed.content.version == version:
                return held.sealed.content
        content = ShardContent(self._store, version, shards=self._shards, shard=self.shard)
        for ref in content.refs[self.shard :: self._shards]:
            if ref.sha256 not in self._verified:
                self._store.verify_segment(ref)
                self._verified.add(ref.sha256)
        return content

    def _newest_sealed(self, weights_id: int) -> SealedEpoch | None:
        held = sorted(self._epochs.copy().items(), reverse=True)
        same = [e.sealed for _, e in held if e.sealed and e.plan.weights_id == weights_id]
        return same[0] if same else None

    def _encoder(self, weights_id: int, load_weights: LoadWeights) -> KeySource:
        """The encoder of these weights, kept for as long as an epoch that they made is held."""
        encoder = self._encoders.get(weights_id)
        if encoder is None:
            encoder = self._make_encoder(load_weights())
            with self._lock:
                self._encoders[weights_id] = encoder
                self._forget_encoders()
        return encoder

    def _forget_encoders(self) -> None:
        needed = {epoch.plan.weights_id for epoch in self._epochs.values()}
        for weights_id in [w for w in self._encoders if w not in needed]:
            del self._encoders[weights_id]

    def _check_width(self, width: int) -> None:
        for held in list(self._epochs.values()):
            if held.sealed is not None and held.sealed.receipt.key_width != width:
                raise ValueError(
                    f"the encoder makes keys of width {width}, but the memory's keys have width "
                    f"{held.sealed.receipt.key_width}; both must come from the same model"
                )

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
