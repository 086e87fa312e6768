"""What the memory server does on a device: encoding entries, refreshing, searching.

Entries are invented, and the encoder has a new model's weights, so that nothing but sizes matters.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.planning.constants import ApproximateIndex, Figure, FlatSearch, Keys
from cluster.planning.timing import Clock
from memory_server.index.base import GatedIndex, IndexInput, IndexSettings, RecentQueries
from memory_server.index.factory import build_index, check_index
from memory_server.index.flat_index import FlatIndex
from memory_server.index.recall_gate import MIN_QUERIES
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes, KeyDtype
from memory_server.local import LocalMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM

TOP_K, TIMEOUT_S = 5, 3600.0
PUT_ROWS = 1 << 16


@dataclass(frozen=True)
class World:
    """An encoder of some size, on a device, and entries for it.

    Attributes:
        tokens_NS: uint16, as frequent as words are.
    """

    config: PlugLMConfig
    factory: KeyEncoderFactory
    weights: dict[str, Tensor]
    tokens_NS: npt.NDArray[np.uint16]


def make_world(
    device: torch.device, *, entries: int, hidden: int, tokens: int, width: int, vocabulary: int
) -> World:
    """Invent it."""
    torch.manual_seed(0)
    config = PlugLMConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        key_size=width,
        num_hidden_layers=1,
        num_memory_layers=1,
        num_attention_heads=1,
        intermediate_size=hidden,
        max_position_embeddings=tokens,
    )
    weights = PlugLMForMaskedLM(config).key_weights()
    random = np.random.default_rng(0)
    ranks = 1 + (vocabulary - 2) ** random.random((entries, tokens), dtype=np.float32)
    tokens_NS = np.minimum(ranks, vocabulary - 1).astype(np.uint16)
    factory = KeyEncoderFactory(config.to_dict(), device=str(device))
    return World(config, factory, weights, tokens_NS)


def key_rates(clock: Clock, world: World, directory: Path, *, direct: int, tabled: int) -> Keys:
    """Encode `direct` entries by the module and `tabled` by tables, and refresh a whole memory."""
    device, config = clock.device, world.config
    length = world.tokens_NS.shape[1]
    some = torch.from_numpy(world.tokens_NS[:direct].astype(np.int32)).to(device)
    many = torch.from_numpy(world.tokens_NS[:tabled].astype(np.int32)).to(device)
    by_module = clock.wall(partial(world.factory(world.weights), some))
    build = clock.wall(partial(world.factory.tables, world.weights, device, entry_tokens=length))
    tables = world.factory.tables(world.weights, device, entry_tokens=length)
    assert tables is not None
    by_tables = clock.wall(partial(world.factory.from_tables(tables), many))
    few = min(len(world.tokens_NS), max(256, len(world.tokens_NS) // 16))
    refreshes = [
        _refreshes(clock, replace(world, tokens_NS=world.tokens_NS[:entries]), directory)
        for entries in (few, len(world.tokens_NS))
    ]
    return Keys(
        hidden=config.hidden_size,
        tokens=length,
        width=config.key_size,
        vocabulary=config.vocab_size,
        direct=by_module.inverse(len(some)),
        build=build,
        tabled=by_tables.inverse(len(many)),
        refresh_entries=len(world.tokens_NS),
        refresh=refreshes[1],
        small_refresh_entries=few,
        small_refresh=refreshes[0],
    )


def _refreshes(clock: Clock, world: World, directory: Path) -> Figure:
    """Seconds of refreshes of a memory of all entries of the world."""
    device = str(clock.device)
    with tempfile.TemporaryDirectory(prefix=".pluglm-calibrate-", dir=directory) as name:
        store = invented_store(Path(name) / "store", world)
        with LocalMemory(
            store, encoder=world.factory, weights=world.weights, device=device
        ) as memory:
            return clock.repeated(partial(_refresh, clock, memory, world.weights))


def _refresh(clock: Clock, memory: LocalMemory, weights: dict[str, Tensor]) -> float:
    """Seconds of one, from staging to its seal; then it is live and the old one gone."""
    before, step = memory.info().epoch, memory.info().encoder_step + 1
    began = clock.now()
    epoch = memory.stage(encoder_step=step, weights=weights)
    memory.wait_sealed(epoch, TIMEOUT_S)
    spent = clock.now() - began
    if not clock.processor_time:  # the memory knows it without the pauses of who asks
        spent = memory.staging(epoch).seconds
    memory.activate(epoch)
    memory.release(before)
    return spent


def invented_store(path: Path, world: World) -> Store:
    """A store of all entries, four to a document, in one segment."""
    entries, length = world.tokens_NS.shape
    store = Store.create(
        path,
        tokenizer_fingerprint="none",
        entry_tokens=length,
        vocab_size=world.config.vocab_size,
        pad_token_id=0,
    )
    file, empty = store.incoming / "all.arrow", [""] * entries
    ids = np.arange(entries)
    write_segment(
        file,
        ids=ids,
        doc_ids=ids // 4,
        tokens_NS=world.tokens_NS,
        texts=empty,
        titles=empty,
        sources=empty,
        meta=store.meta,
    )
    store.commit(add_segments=[file], message="invented")
    return store


class EncodedWorld:
    """The keys of all entries on a device, and the tables that make them again."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.width = world.config.key_size
        self.device = device
        self._tokens_NS = world.tokens_NS
        tables = world.factory.tables(world.weights, device, entry_tokens=world.tokens_NS.shape[1])
        assert tables is not None
        self._encoder = world.factory.from_tables(tables)
        pieces = [
            self.exact_keys(np.arange(start, min(start + PUT_ROWS, len(world.tokens_NS))))
            for start in range(0, len(world.tokens_NS), PUT_ROWS)
        ]
        self._keys_NQ = torch.cat(pieces)

    def exact_keys(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Made anew from the tokens, as a shard does whose keys are held as codes."""
        tokens = self._tokens_NS.take(rows, axis=0).astype(np.int32)
        return self._encoder(torch.from_numpy(tokens).to(self.device))

    def rows(self, entries: int, key_dtype: KeyDtype) -> IndexInput:
        """The first entries in one block, as a shard holds them."""
        keys_NQ = self._keys_NQ[:entries]
        codes = KeyCodes.empty(entries, self.width, key_dtype, self.device)
        for start in range(0, entries, PUT_ROWS):
            codes.put(start, keys_NQ[start : start + PUT_ROWS])
        block = KeyBlock(
            codes=codes,
            largest_norm=float(torch.linalg.vector_norm(keys_NQ, dim=1).max()),
            checksum=0,
            origin=("invented", 0, entries),
        )
        ids = torch.arange(entries, device=self.device)
        return IndexInput(
            keys=BlockedKeys([(block, 0, entries)], self.width, self.device),
            ids_N=ids,
            doc_ids_N=ids // 4,
            dead_rows=torch.empty(0, dtype=torch.int64, device=self.device),
            exact_keys=None if key_dtype == "float32" else self.exact_keys,
        )

    def queries(self, batch: int, seed: int = 1) -> Tensor:
        """In no particular direction."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.width, generator=generator).to(self.device)


def flat_search(
    clock: Clock, world: EncodedWorld, *, entries: int, batches: list[int], key_dtype: KeyDtype
) -> list[FlatSearch]:
    """Search the first entries exactly, a batch of queries at a time."""
    rows = world.rows(entries, key_dtype)
    index = FlatIndex(rows)
    found = []
    for batch in batches:
        spent = clock.wall(partial(index.search, world.queries(batch), TOP_K, None))
        found.append(
            FlatSearch(
                entries=entries,
                width=world.width,
                batch=batch,
                key_dtype=key_dtype,
                seconds=spent,
                bytes_per_s=spent.inverse(rows.keys.nbytes),
            )
        )
    return found


def approximate_search(
    clock: Clock, world: EncodedWorld, *, kind: str, entries: int, batch: int
) -> ApproximateIndex | str:
    """Build a FAISS index anew, once, and search it; or why it cannot be built here.

    How much a search looks at is measured while it is built, on queries like those of the search.
    """
    settings = IndexSettings(kind=kind, min_recall=0.0)
    try:
        check_index(settings, key_width=world.width, device=clock.device)
    except ValueError as error:
        return f"the index {kind}: {error}"
    from memory_server.index.faiss_presets import SMALLEST_BLOCK, recipe_for

    if entries < SMALLEST_BLOCK:
        return f"the index {kind}: {entries:,} entries are too few for FAISS; give more --seconds"
    recent = RecentQueries(
        queries_nQ=world.queries(2 * MIN_QUERIES, seed=2).cpu(),
        exclude_doc_ids_n=torch.full((2 * MIN_QUERIES,), -1, dtype=torch.int64),
        k=TOP_K,
    )
    spent, index = [], None
    for _ in range(2):
        rows = world.rows(entries, "float32")
        began = clock.now()
        index = build_index(settings, rows, previous=index, recent_queries=recent)
        clock.synchronize()
        spent.append(clock.now() - began)
    assert isinstance(index, GatedIndex)
    if not index.gate.state.open:
        return f"the index {kind}: it answers exactly ({index.gate.state.reason})"
    recall = index.gate.state.recall or 0.0
    queries = world.queries(batch)
    return ApproximateIndex(
        kind=kind,
        factory=recipe_for(settings, rows=entries, width=world.width).factory,
        entries=entries,
        width=world.width,
        batch=batch,
        recall=recall,
        index_bytes=index.bytes,
        build=Figure.of(spent[:1]),
        refill=Figure.of(spent[1:]),
        seconds=clock.wall(partial(index.search, queries, TOP_K, None)),
    )
