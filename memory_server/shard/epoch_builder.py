"""One shard's part of an epoch, built from what is held already and what must be encoded."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memory_server.api import KeyEncoderFactory, KeySource
from memory_server.index.base import Index, IndexInput, IndexSettings
from memory_server.index.factory import build_index, check_index
from memory_server.index.recall_audit import Audit, QueryLog, measure_stale_share
from memory_server.index.recall_gate import MIN_QUERIES
from memory_server.keys.key_blocks import KeyBlock
from memory_server.keys.key_sources import KeySources
from memory_server.keys.making import (
    bytes_to_come,
    encode,
    held_spans,
    layout_and_checksum,
    make_keys,
    staging_bytes,
)
from memory_server.shard.content import ShardContent
from memory_server.shard.epochs import EpochPlan, Receipt
from memory_server.shard.free_memory import StageCost, check_fits, free_bytes
from memory_server.shard.held_epoch import SealedEpoch
from memory_server.store.segments import Int64Array
from memory_server.store.store import Store

log = logging.getLogger(__name__)

LoadWeights = Callable[[], Mapping[str, Tensor]]


class EpochBuilder:
    """Builds epochs of rows `shard` of `shards` of a store. Thread-safe."""

    def __init__(
        self,
        store_path: Path | str,
        *,
        shards: int,
        shard: int,
        encoder: KeyEncoderFactory,
        device: torch.device,
        settings: IndexSettings,
        scratch: Path | None,
        memory_limit_bytes: int | None,
        queries: QueryLog,
        domains: Collection[str] = (),
    ) -> None:
        """Open the store; see `Shard` for the arguments."""
        check_index(settings, device=device)
        self._store = Store.open(store_path)
        self._shards, self._shard = shards, shard
        self._domains = tuple(domains)
        self._device, self._settings = device, settings
        self._sources = KeySources(
            encoder,
            device=device,
            scratch=scratch,
            entry_tokens=self._store.meta.entry_tokens,
        )
        self._limit = memory_limit_bytes
        self._queries = queries
        self._verified: set[str] = set()

    def build(
        self,
        plan: EpochPlan,
        load_weights: LoadWeights,
        *,
        sealed: Sequence[SealedEpoch],
        begin: Callable[[int], None],
        advance: Callable[[int], None],
        audit: Audit,
    ) -> SealedEpoch:
        """Load what is new of the content, encode it, and build the index. Blocks.

        Args:
            sealed: the epochs that are held, the newest first; what did not change is shared.
            begin: called with the rows to come; advance: with the rows done, and may raise.
            audit: is told what the live keys' staleness cost.

        Raises:
            NotEnoughMemory, ValueError, the store's errors, and what the encoder raises.
        """
        began = time.monotonic()
        source = next((e for e in sealed if e.weights_id == plan.weights_id), None)
        held = _blocks_of(plan.weights_id, sealed)
        content = self._content(plan.content_version, held, sealed)
        begin(content.rows)

        def encoder() -> KeySource:
            return self._sources.get(plan.weights_id, load_weights, tabled=plan.tabled)

        def fits(made: int, width: int) -> None:
            needed = bytes_to_come(content, held, self._settings, width, made=made)
            if self._limit is not None:  # which does not shrink by what was loaded just now
                needed += content.bytes_beside_tokens
            what = f"epoch {plan.epoch} on shard {self._shard}"
            check_fits(needed, self.free_bytes(sealed), what=what)

        # The epoch's own, for as long as a search may need it: nobody forgets it meanwhile.
        scoring = None if self._settings.key_dtype == "float32" else encoder()

        def exact_keys(rows: Int64Array) -> Tensor:
            assert scoring is not None
            return encode(scoring, content, rows, self._device)

        keys, encoded_rows = make_keys(
            content,
            held=held,
            source=None if source is None else (source.content, source.keys),
            encoder=encoder,
            dtype=self._settings.key_dtype,
            device=self._device,
            fits=fits,
            advance=advance,
        )
        if (width := _width(sealed)) not in (None, keys.width):
            raise ValueError(
                f"the encoder makes keys of width {keys.width}, but the memory's keys have width "
                f"{width}; both must come from the same model"
            )
        ids_N = torch.from_numpy(content.ids).to(self._device)
        recent = self._queries.recent()
        rows = IndexInput(
            keys=keys,
            ids_N=ids_N,
            doc_ids_N=torch.from_numpy(content.doc_ids).to(self._device),
            dead_rows=torch.from_numpy(content.dead_rows).to(self._device),
            exact_keys=None if scoring is None else exact_keys,
        )
        index = build_index(
            self._settings,
            rows,
            previous=sealed[0].index if sealed else None,
            recent_queries=recent,
            check=lambda: advance(0),
        )
        self._warn_of_small_blocks(index, content.rows)
        layout, checksum = layout_and_checksum(keys)
        receipt = Receipt(
            epoch=plan.epoch,
            shard=self._shard,
            encoder_step=plan.encoder_step,
            content_version=plan.content_version,
            rows=content.rows,
            live_rows=content.live_rows,
            key_width=keys.width,
            key_checksum=checksum,
            layout=layout,
            encoded_rows=encoded_rows,
            bytes={
                "keys": keys.nbytes,
                "ids": content.ids.nbytes + content.doc_ids.nbytes,
                "index": index.bytes,
                "tokens": content.token_bytes,
            },
            seconds=time.monotonic() - began,
        )
        if sealed and sealed[0].weights_id != plan.weights_id and recent is not None:
            old = torch.from_numpy(sealed[0].content.ids)
            few = recent.sample(MIN_QUERIES)
            share = measure_stale_share(
                (sealed[0].index, old), (index, ids_N), few, device=self._device
            )
            audit.note_stale_share(share)
        return SealedEpoch(
            weights_id=plan.weights_id,
            content=content,
            keys=keys,
            index=index,
            rows=rows,
            receipt=receipt,
        )

    def stage_cost(self, plan: EpochPlan, sealed: Sequence[SealedEpoch]) -> StageCost:
        """What building the plan would add, and what may be taken.

        Raises:
            UnknownVersion, StoreDamaged: the content cannot be read.
        """
        free, width = self.free_bytes(sealed), _width(sealed)
        if width is None:
            return StageCost(own=0, tables=0, free=free)
        held = _blocks_of(plan.weights_id, sealed)
        content = self._content(plan.content_version, held, sealed, verified=False)
        return StageCost(
            own=staging_bytes(content, held, self._settings, width),
            tables=self._sources.bytes_to_come(plan.weights_id) if plan.tabled else 0,
            free=free,
        )

    def free_bytes(self, sealed: Sequence[SealedEpoch]) -> int:
        """Bytes that may still be taken: what is free, or what is left of the limit."""
        if self._limit is None:
            return free_bytes(self._device)
        blocks = {id(b): b.codes.nbytes for e in sealed for b in e.keys.blocks}
        return max(0, self._limit - sum(blocks.values()))

    def forget_except(self, weights_ids: Collection[int]) -> None:
        """Drop the encoders of other weights."""
        self._sources.forget_except(weights_ids)

    def close(self) -> None:
        """Drop every encoder."""
        self._sources.close()

    def _warn_of_small_blocks(self, index: Index, rows: int) -> None:
        fast = getattr(index, "accelerated_rows", rows)
        if fast < rows / 2:
            log.warning(
                "%d of %d rows of shard %d are searched exactly whatever memory.index says: their "
                "parts of segments are too small for FAISS; join segments with `pluglm memory "
                "compact`, or use fewer shards",
                rows - fast,
                rows,
                self._shard,
            )

    def _content(
        self,
        version: str,
        held: Sequence[KeyBlock],
        sealed: Sequence[SealedEpoch],
        *,
        verified: bool = True,
    ) -> ShardContent:
        """The shard's rows; of a version already held, the same object.

        Unless `verified`, nothing is read but what the rows are counted by.

        Shards share the work of reading whole segments against their checksums: each checks every
        `shards`-th segment, and an epoch answers only when all shards have sealed it.
        """
        for other in sealed:
            if other.content.version == version:
                return other.content
        content = ShardContent(
            self._store,
            version,
            shards=self._shards,
            shard=self._shard,
            domains=self._domains,
            held=held_spans(held),
        )
        for ref in content.refs[self._shard :: self._shards]:
            if verified and ref.sha256 not in self._verified:
                self._store.verify_segment(ref)
                self._verified.add(ref.sha256)
        return content


def _blocks_of(weights_id: int, sealed: Sequence[SealedEpoch]) -> list[KeyBlock]:
    """Blocks of keys that these weights made, of all epochs held."""
    return list(
        {id(b): b for e in sealed if e.weights_id == weights_id for b in e.keys.blocks}.values()
    )


def _width(sealed: Sequence[SealedEpoch]) -> int | None:
    return sealed[0].keys.width if sealed else None
