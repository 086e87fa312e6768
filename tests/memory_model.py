"""A memory under random operations, and a plain dictionary that says what it must answer.

The dictionary knows every content version as {id: entry}, every epoch as (version, weights), and
works out each reply by sorting all scores. It shares no code with the memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from memory_server.api import EpochPin, Memory, Retrieved
from memory_server.errors import CoordinatorLost, DuplicateEntry, UnknownEntry, UnknownEpoch
from memory_server.store.store import Store
from memory_server.switch import show_content
from tests.toy_memory import (
    ENTRY_TOKENS,
    KEY_WIDTH,
    PAD,
    ToyEntry,
    toy_entries,
    toy_weights,
    write_toy_segment,
)

T = TypeVar("T")

WAIT_S = 120.0
DOMAINS = ("default", "blue", "green")
MOST_ENTRIES = 160


@dataclass(frozen=True)
class Known:
    """An entry as the dictionary has it."""

    entry: ToyEntry
    domain: str


Content = dict[int, Known]


@dataclass
class MemoryModel:
    """Carries out random operations on a memory and checks every reply."""

    store: Store
    memory: Memory
    restart: Callable[[int], Memory] | None
    kill: Callable[[random.Random], None] | None
    choose: random.Random
    first_weights: int
    contents: dict[str, Content] = field(default_factory=dict)
    epochs: dict[int, tuple[str, int]] = field(default_factory=dict)
    pins: list[EpochPin] = field(default_factory=list)
    released: set[int] = field(default_factory=set)
    live: int = 0
    next_id: int = 10_000
    next_weights: int = 100
    kill_weight: float = 0.1
    done: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        info = self.memory.info()
        self.live = info.epoch
        self.epochs = {info.epoch: (info.content_version, self.first_weights)}

    # --- what there is to do ----------------------------------------------------------------------

    def step(self) -> None:
        """One random operation."""
        operations: dict[Callable[[], None], float] = {
            self.search: 70,
            self.read: 4,
            self.add: 3,
            self.update: 3,
            self.remove: 3,
            self.swap: 1,
            self.plug_or_unplug: 1,
            self.roll_back: 0.5,
            self.refresh: 3,
            self.refresh_while_editing: 1,
            self.cancel: 1,
            self.pin: 1,
            self.unpin: 1,
            self.bad_request: 2,
        }
        if self.restart is not None:
            operations[self.restart_memory] = 0.1
        if self.kill is not None:
            operations[self.kill_something] = self.kill_weight
        (chosen,) = self.choose.choices(list(operations), weights=list(operations.values()))
        chosen()
        self.done[chosen.__name__] = self.done.get(chosen.__name__, 0) + 1

    def search(self) -> None:
        """Every reply is of one epoch, and just what that epoch holds."""
        readable = sorted(self.epochs)
        asked = self.choose.choice([None, None, *readable])
        version, weights = self.epochs[self.live if asked is None else asked]
        content = self.contents[version]
        batch, k = self.choose.randint(1, 4), self.choose.choice([1, 3, 5, 200])
        random_numbers = np.random.default_rng(self.choose.randint(0, 2**31))
        queries = random_numbers.integers(-3, 4, (batch, KEY_WIDTH)).astype(np.float32)
        documents = [-1, *(known.entry.doc_id for known in content.values())]
        excluded = None
        if self.choose.random() < 0.5:
            excluded = [self.choose.choice(documents) for _ in range(batch)]
        reply = self.memory.search(
            torch.from_numpy(queries),
            k,
            exclude_doc_ids=None if excluded is None else torch.tensor(excluded),
            epoch=asked,
            exact=self.choose.random() < 0.1,
        )
        assert reply.epoch == (self.live if asked is None else asked)
        assert reply.encoder_step == weights
        assert reply.missing_shards == ()
        self._check(reply, content, weights, queries, k, excluded)

    def read(self) -> None:
        content = self.contents[self.epochs[self.live][0]]
        some = self.choose.sample(sorted(content), k=min(3, len(content)))
        found = self._retried(lambda: self.memory.entries(some))
        assert [entry.text for entry in found] == [content[i].entry.text for i in some]
        gone = self.choose.randint(500_000, 600_000)
        with pytest.raises(UnknownEntry, match=str(gone)):
            self._retried(lambda: self.memory.entries([*some, gone]))
        info = self._retried(self.memory.info)
        assert (info.entries, info.epoch) == (len(content), self.live)

    def add(self) -> None:
        head = self.contents[self.store.head()]
        if len(head) > MOST_ENTRIES:
            return self.remove()
        domain = self.choose.choice(DOMAINS)
        new = self._new_entries(self.choose.randint(1, 4))
        version = self.store.commit(add_segments=[self._segment(new)], domain=domain, message="add")
        self._show(version, head | {e.id: Known(e, domain) for e in new})
        return None

    def update(self) -> None:
        """The same id with another text, and perhaps in another domain."""
        head = self.contents[self.store.head()]
        if not head:
            return
        changed = self.choose.sample(sorted(head), k=min(len(head), self.choose.randint(1, 3)))
        new = toy_entries(changed, seed=self.choose.randint(1, 10**6))
        domain = self.choose.choice(DOMAINS)
        version = self.store.commit(
            add_segments=[self._segment(new)], remove_ids=changed, domain=domain, message="update"
        )
        self._show(version, head | {e.id: Known(e, domain) for e in new})

    def remove(self) -> None:
        head = self.contents[self.store.head()]
        if not head:
            return
        if self.choose.random() < 0.5:
            gone = set(self.choose.sample(sorted(head), k=min(len(head), 3)))
            version = self.store.commit(remove_ids=sorted(gone), message="remove")
        else:
            document = self.choose.choice([known.entry.doc_id for known in head.values()])
            gone = {i for i, known in head.items() if known.entry.doc_id == document}
            version = self.store.commit(remove_doc_ids=[document], message="remove a document")
        self._show(version, {i: known for i, known in head.items() if i not in gone})

    def swap(self) -> None:
        """A whole domain for another one in one commit."""
        head = self.contents[self.store.head()]
        old, fresh = self.choose.sample(DOMAINS, 2)
        kept = {i: known for i, known in head.items() if known.domain not in (old, fresh)}
        if len(kept) == len(head):
            return
        new = self._new_entries(self.choose.randint(1, 20))
        gone = [d for d in (old, fresh) if any(known.domain == d for known in head.values())]
        version = self.store.commit(
            add_segments=[self._segment(new)], domain=fresh, remove_domains=gone, message="swap"
        )
        self._show(version, kept | {e.id: Known(e, fresh) for e in new})

    def plug_or_unplug(self) -> None:
        head = self.contents[self.store.head()]
        domain = self.choose.choice(DOMAINS)
        if not any(known.domain == domain for known in head.values()):
            return
        kept = {i: known for i, known in head.items() if known.domain != domain}
        self._show(self.store.unplug(domain), kept)
        if self.choose.random() < 0.5:
            self._show(self.store.plug(domain), dict(head))

    def roll_back(self) -> None:
        older = self.choose.choice(sorted(self.contents))
        if self.store.manifest(older).segments == self.store.manifest().segments:
            # Such as after a domain was unplugged and plugged in again.
            assert self.contents[older] == self.contents[self.store.head()]
            with pytest.raises(ValueError, match="nothing to roll back"):
                self.store.rollback(older)
        else:
            self._show(self.store.rollback(older), dict(self.contents[older]))

    def refresh(self) -> None:
        weights = self._new_weights()
        epoch = self._stage(weights)
        self._wait(epoch)
        self.epochs[epoch] = (self.epochs[self.live][0], weights)
        if self.choose.random() < 0.8:
            self._activate(epoch)

    def refresh_while_editing(self) -> None:
        """An edit goes live between a refresh's staging and its activation: both count."""
        weights = self._new_weights()
        epoch = self._stage(weights)
        self.choose.choice([self.add, self.update, self.remove])()
        self._wait(epoch)
        live = self._retried(lambda: self.memory.activate(epoch))
        self._went_live(live, self.epochs[self.live][0], weights)

    def cancel(self) -> None:
        epoch = self._stage(self._new_weights())
        self._retried(lambda: self.memory.release(epoch))
        self._is_forgotten(epoch)

    def pin(self) -> None:
        if len(self.pins) < 3:
            self.pins.append(self._retried(lambda: self.memory.pin(lease_s=3600.0)))

    def unpin(self) -> None:
        if self.pins:
            pin = self.pins.pop(self.choose.randrange(len(self.pins)))
            self._retried(pin.close)
            self._forget_released()

    def bad_request(self) -> None:
        """Refused, and nothing changed."""
        head = self.contents[self.store.head()]
        bad = self.choose.choice(["k", "nan", "epoch", "duplicate", "unknown"])
        queries = torch.ones(2, KEY_WIDTH)
        if bad == "k":
            with pytest.raises(ValueError, match="k="):
                self.memory.search(queries, 0)
        elif bad == "nan":
            queries[1, 2] = float("nan")
            with pytest.raises(ValueError, match="query 1"):
                self.memory.search(queries, 1)
        elif bad == "epoch":
            with pytest.raises(UnknownEpoch):
                self.memory.search(queries, 1, epoch=10**9)
        elif bad == "duplicate" and head:
            again = toy_entries([self.choose.choice(sorted(head))])
            with pytest.raises(DuplicateEntry):
                self.store.commit(add_segments=[self._segment(again)], message="twice")
        else:
            with pytest.raises(UnknownEntry):
                self.store.commit(remove_ids=[999_999], message="no such id")

    def restart_memory(self) -> None:
        """Everything of the memory's process is lost; the store is all that stays."""
        assert self.restart is not None
        self.pins.clear()
        self.released.clear()
        weights = self.epochs[self.live][1]
        self.memory = self.restart(weights)
        info = self.memory.info()
        self.live = info.epoch
        self.epochs = {info.epoch: (info.content_version, weights)}

    def kill_something(self) -> None:
        """A process of the memory dies; whatever is asked next is answered all the same, and what
        is pinned can be read as before."""
        assert self.kill is not None
        self.kill(self.choose)

    # --- how it is done ---------------------------------------------------------------------------

    def _check(
        self,
        reply: Retrieved,
        content: Content,
        weights: int,
        queries: npt.NDArray[np.float32],
        k: int,
        excluded: list[int] | None,
    ) -> None:
        table = toy_weights(weights)["table"].numpy()
        ids = np.array(sorted(content), dtype=np.int64)
        tokens = np.array([content[i].entry.tokens for i in ids], dtype=np.int64)
        tokens = tokens.reshape(len(ids), ENTRY_TOKENS)
        documents = np.array([content[i].entry.doc_id for i in ids], dtype=np.int64)
        scores = queries @ table[tokens].sum(1).T
        for b in range(len(queries)):
            left = np.ones(len(ids), dtype=bool)
            if excluded is not None:
                left = documents != excluded[b]
            best = np.lexsort((ids[left], -scores[b][left]))[:k]
            expected = ids[left][best].tolist()
            pads = k - len(expected)
            assert reply.ids[b].tolist() == expected + [-1] * pads
            assert reply.scores[b].tolist() == [
                *scores[b][left][best].tolist(),
                *[float("-inf")] * pads,
            ]
            assert reply.doc_ids[b].tolist() == [*documents[left][best].tolist(), *[-1] * pads]
            assert np.array_equal(reply.tokens[b, : len(expected)].numpy(), tokens[left][best])
            assert bool((reply.tokens[b, len(expected) :] == PAD).all())

    def _show(self, version: str, content: Content) -> None:
        """Make a version live; every later reply must reflect it."""
        self.contents[version] = content
        before = self.live
        weights = self.epochs[before][1]
        live = self._retried(lambda: show_content(self.memory, version))
        self._went_live(live, version, weights, released=before)

    def _activate(self, epoch: int) -> None:
        version, weights = self.epochs[epoch]
        live = self._retried(lambda: self.memory.activate(epoch))
        assert live == epoch
        self._went_live(live, version, weights)

    def _went_live(
        self, epoch: int, version: str, weights: int, *, released: int | None = None
    ) -> None:
        self.epochs[epoch] = (version, weights)
        self.live = epoch
        self.released.discard(epoch)
        if released is not None and released != epoch:
            self.released.add(released)
        for old in [e for e in self.epochs if e != epoch and e not in self.released]:
            if self.choose.random() < 0.5 or len(self.epochs) > 4:
                self._retried(lambda old=old: self.memory.release(old))  # type: ignore[misc]
                self.released.add(old)
        self._forget_released()

    def _forget_released(self) -> None:
        """A released epoch can be read for just as long as a reader holds it."""
        for epoch in sorted(self.released & set(self.epochs)):
            if all(pin.epoch != epoch for pin in self.pins):
                del self.epochs[epoch]
                self._is_forgotten(epoch)
        self.released &= set(self.epochs)

    def _is_forgotten(self, epoch: int) -> None:
        """Soon nobody answers from it: an actor that restarts hears of it a little later."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                self.memory.search(torch.zeros(1, KEY_WIDTH), 1, epoch=epoch)
            except UnknownEpoch:
                return
            time.sleep(0.05)
        raise AssertionError(f"epoch {epoch} was released, and still answers")

    def _stage(self, weights: int) -> int:
        made = toy_weights(weights)
        return self._retried(lambda: self.memory.stage(encoder_step=weights, weights=made))

    def _wait(self, epoch: int) -> None:
        self._retried(lambda: self.memory.wait_sealed(epoch, WAIT_S))

    def _retried(self, call: Callable[[], T]) -> T:
        """What changes a memory may meet a coordinator that restarts, and is simply asked again."""
        for _ in range(30):
            try:
                return call()
            except CoordinatorLost:
                time.sleep(0.5)
        return call()

    def _new_weights(self) -> int:
        self.next_weights += 1
        return self.next_weights

    def _new_entries(self, count: int) -> list[ToyEntry]:
        ids = range(self.next_id, self.next_id + count)
        self.next_id += count
        return toy_entries(ids, seed=self.choose.randint(0, 10**6))

    def _segment(self, entries: list[ToyEntry]) -> Path:
        return write_toy_segment(self.store, f"s{self.choose.getrandbits(60):x}", entries)
