"""What every `Memory` does, asked of LocalMemory and of RayMemory with two shards."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from memory_server.actors.client import RayMemory
from memory_server.api import Memory
from memory_server.errors import (
    EpochInUse,
    EpochNotSealed,
    LiveEpochChanged,
    MemoryClosed,
    NotEnoughMemory,
    RefreshFailed,
    StoreDamaged,
    StoreNotFound,
    UnknownEntry,
    UnknownEpoch,
    UnknownVersion,
)
from memory_server.index.base import IndexSettings
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from memory_server.switch import show_content
from tests.ray_fixture import local_ray
from tests.toy_memory import (
    ENTRY_TOKENS,
    KEY_WIDTH,
    PAD,
    ToyEncoder,
    ToyEntry,
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
    write_toy_segment,
)

WAIT_S = 60.0
Start = Callable[..., Memory]
numbers = itertools.count()


@pytest.fixture(
    scope="module", params=["local", pytest.param("ray", marks=pytest.mark.integration)]
)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "local":
        yield "local"
        return
    with local_ray():
        yield "ray"


@pytest.fixture(scope="module")
def start(kind: str) -> Iterator[Start]:
    """Start memories of the kind under test, and close them at the end."""
    started: list[Memory] = []

    def begin(store: Store | Path, **options: object) -> Memory:
        settings = {"encoder": toy_factory, "weights": toy_weights(1), **options}
        path = store.path if isinstance(store, Store) else store
        memory: Memory
        if kind == "local":
            memory = LocalMemory(path, **settings)
        else:
            name = f"contract-{next(numbers)}"
            memory = RayMemory.start(path, shards=2, name=name, cpus_per_shard=0.5, **settings)
        started.append(memory)
        return memory

    yield begin
    for memory in started:
        memory.close()


@dataclass(frozen=True)
class Shared:
    """One memory for many tests, because actors are slow to start."""

    memory: Memory
    store: Store
    first_version: str


@pytest.fixture(scope="module")
def shared(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    store = toy_store(tmp_path_factory.mktemp("contract") / "store", *ENTRIES)
    return Shared(start(store), store, store.head())


@pytest.fixture
def memory(shared: Shared) -> Memory:
    """The shared memory, live with the first entries and the first weights at encoder step 7."""
    refresh(
        shared.memory,
        encoder_step=7,
        weights=toy_weights(1),
        content_version=shared.first_version,
    )
    return shared.memory


ENTRIES = [toy_entries(range(0, 30)), toy_entries(range(100, 141))]
ALL: list[ToyEntry] = [*ENTRIES[0], *ENTRIES[1]]


def refresh(memory: Memory, **what: object) -> int:
    epoch = memory.stage(**what)
    memory.wait_sealed(epoch, WAIT_S)
    return memory.activate(epoch)


def live_entries(store: Store, version: str) -> list[ToyEntry]:
    """Every entry of a version, read from its files."""
    found = []
    for ref in store.manifest(version).segments:
        segment = store.segment(ref)
        for row in np.delete(np.arange(segment.rows), store.deleted_rows(ref)):
            tokens = tuple(int(token) for token in segment.tokens[row])
            found.append(ToyEntry(int(segment.ids[row]), int(segment.doc_ids[row]), tokens, ""))
    return found


def test_search_info_and_entries(memory: Memory, shared: Shared) -> None:
    assert isinstance(memory, Memory)
    info = memory.info()
    assert (info.entries, info.key_width, info.entry_tokens) == (71, KEY_WIDTH, ENTRY_TOKENS)
    assert (info.encoder_step, info.pad_token_id, info.index) == (7, PAD, "flat")
    assert info.tokenizer_fingerprint == "toy"
    assert info.content_version == shared.first_version
    assert info.bytes["keys"] == 71 * KEY_WIDTH * 4

    queries = toy_queries(9)
    found = memory.search(queries, 6)
    assert found.ids.tolist() == expected_ids(ALL, toy_weights(1), queries, 6)
    assert (found.epoch, found.encoder_step, found.missing_shards) == (info.epoch, 7, ())
    assert found.ids.dtype == found.tokens.dtype == found.doc_ids.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    by_id = {entry.id: entry for entry in ALL}
    for b, j in itertools.product(range(9), range(6)):
        entry = by_id[int(found.ids[b, j])]
        assert tuple(found.tokens[b, j].tolist()) == entry.tokens
        assert int(found.doc_ids[b, j]) == entry.doc_id
    keys = ToyEncoder(toy_weights(1))(found.tokens.flatten(0, 1)).view(9, 6, KEY_WIDTH)
    assert torch.equal(found.scores, torch.einsum("bq,bkq->bk", queries, keys))

    first, second = memory.entries([110, 4])
    assert (first.id, second.id) == (110, 4)
    assert (second.text, second.title, second.source) == ("text 4 of 0", "title 4", "toy")
    assert second.tokens == by_id[4].tokens
    with pytest.raises(UnknownEntry, match="55"):
        memory.entries([4, 55])


def test_exclusion_and_pads(memory: Memory) -> None:
    queries, exclude = toy_queries(4), [0, 34, -1, 2]
    found = memory.search(queries, 75, exclude_doc_ids=torch.tensor(exclude))
    assert found.ids.tolist() == expected_ids(ALL, toy_weights(1), queries, 75, exclude)
    pads = found.ids == -1
    assert pads.sum(1).tolist() == [7, 7, 4, 7]
    assert bool((found.scores[pads] == float("-inf")).all())
    assert bool((found.tokens[pads] == PAD).all())
    assert bool((found.doc_ids[pads] == -1).all())
    assert memory.search(torch.empty(0, KEY_WIDTH), 3).ids.shape == (0, 3)


def test_refresh_of_the_weights(memory: Memory) -> None:
    queries = toy_queries(5)
    old = memory.info().epoch
    new = memory.stage(encoder_step=20, weights=toy_weights(2))
    memory.wait_sealed(new, WAIT_S)
    assert memory.staging(new).state == "sealed"
    assert memory.staging(new).done == memory.staging(new).total == 71
    before = memory.search(queries, 4)
    assert (before.epoch, before.encoder_step) == (old, 7)
    assert before.ids.tolist() == expected_ids(ALL, toy_weights(1), queries, 4)
    early = memory.search(queries, 4, epoch=new)
    assert (early.epoch, early.encoder_step) == (new, 20)
    assert early.ids.tolist() == expected_ids(ALL, toy_weights(2), queries, 4)
    memory.activate(new)
    assert memory.search(queries, 4).epoch == new
    assert memory.search(queries, 4, epoch=old).ids.tolist() == before.ids.tolist()
    with pytest.raises(EpochInUse, match="answers searches"):
        memory.release(new)
    memory.release(old)
    with pytest.raises(UnknownEpoch, match=str(old)):
        memory.search(queries, 4, epoch=old)
    with pytest.raises(UnknownEpoch):
        memory.activate(old)
    assert memory.search(queries, 4).epoch == memory.info().epoch == new


def test_an_edit_an_addition_and_a_rollback(memory: Memory, shared: Shared) -> None:
    store = shared.store
    edited = ToyEntry(id=4, doc_id=900, tokens=(49,) * ENTRY_TOKENS, text="new")
    added = toy_entries(range(500, 520))
    version = store.commit(
        add_segments=[write_toy_segment(store, "edit", [edited, *added])],
        remove_ids=[4, 100, 140],
        message="edit",
    )
    refresh(memory, encoder_step=0, content_version=version)
    now = [e for e in ALL if e.id not in (4, 100, 140)] + [edited, *added]
    queries = toy_queries(6)
    found = memory.search(queries, 89)
    assert found.ids.tolist() == expected_ids(now, toy_weights(1), queries, 89)
    assert memory.info().content_version == version
    assert memory.info().entries == len(now)
    assert memory.entries([4])[0].text == "new"
    with pytest.raises(UnknownEntry):
        memory.entries([100])
    refresh(memory, encoder_step=0, content_version=shared.first_version)
    again = memory.search(queries, 71)
    assert again.ids.tolist() == expected_ids(ALL, toy_weights(1), queries, 71)
    assert memory.entries([4])[0].text == "text 4 of 0"


def test_a_failed_refresh_leaves_the_old_epoch_and_says_why(memory: Memory) -> None:
    queries, old = toy_queries(3), memory.info().epoch
    broken = toy_weights(3)
    broken["table"][ALL[40].tokens[0]] = float("nan")
    failed = memory.stage(encoder_step=5, weights=broken)
    with pytest.raises(RefreshFailed, match="NaN or infinity for entry"):
        memory.wait_sealed(failed, WAIT_S)
    assert memory.staging(failed).state == "failed"
    with pytest.raises(RefreshFailed, match=f"epoch {old} goes on"):
        memory.activate(failed)
    narrow = memory.stage(encoder_step=5, weights=toy_weights(3, width=3))
    with pytest.raises(RefreshFailed, match=f"width 3.*width {KEY_WIDTH}"):
        memory.wait_sealed(narrow, WAIT_S)
    assert memory.search(queries, 2).epoch == old
    memory.release(failed)
    with pytest.raises(UnknownEpoch):
        memory.staging(failed)
    # "The newest weights" are those of the newest epoch that did not fail.
    good = refresh(memory, encoder_step=6)
    assert memory.search(queries, 2).epoch == good
    expected = expected_ids(ALL, toy_weights(1), queries, 2)
    assert memory.search(queries, 2).ids.tolist() == expected


def test_staging_does_not_block_and_can_be_cancelled(memory: Memory) -> None:
    old = memory.info().epoch
    slow = {**toy_weights(2), "slow": torch.tensor(1.0)}
    new = memory.stage(encoder_step=1, weights=slow)
    status = memory.staging(new)
    assert (status.state, status.error) == ("encoding", None)
    assert status.done <= status.total
    with pytest.raises(EpochNotSealed, match="wait_sealed"):
        memory.activate(new)
    with pytest.raises(EpochNotSealed):
        memory.search(toy_queries(1), 1, epoch=new)
    with pytest.raises(TimeoutError, match=f"epoch {new}"):
        memory.wait_sealed(new, 0.01)
    assert memory.search(toy_queries(2), 3).epoch == old
    memory.release(new)
    newer = refresh(memory, encoder_step=2, weights=toy_weights(4))
    assert newer > new
    queries = toy_queries(2)
    expected = expected_ids(ALL, toy_weights(4), queries, 3)
    assert memory.search(queries, 3).ids.tolist() == expected


def test_an_edit_and_a_refresh_that_overlap_both_count(memory: Memory, shared: Shared) -> None:
    added = toy_entries(range(700, 710))
    version = shared.store.commit(
        add_segments=[write_toy_segment(shared.store, "overlap", added)],
        remove_ids=[1],
        parent=shared.store.head(),
        message="during a refresh",
    )
    refreshed = memory.stage(encoder_step=30, weights=toy_weights(5))
    edited = memory.stage(encoder_step=7, content_version=version)
    memory.wait_sealed(edited, WAIT_S)
    assert memory.activate(edited) == edited
    content = {entry.id: entry for entry in memory.entries([4, 700])}
    assert set(content) == {4, 700}
    memory.wait_sealed(refreshed, WAIT_S)
    live = memory.activate(refreshed)
    assert live not in (refreshed, edited)
    info = memory.info()
    assert (info.epoch, info.content_version, info.encoder_step) == (live, version, 30)
    with pytest.raises(UnknownEpoch):
        memory.staging(refreshed)
    queries = toy_queries(4)
    found = memory.search(queries, 200)
    now = live_entries(shared.store, version)
    assert (
        found.ids[0].tolist()[: len(now)]
        == expected_ids(now, toy_weights(5), queries, 200)[0][: len(now)]
    )
    memory.release(edited)


def test_weights_that_wait_give_way_to_newer_ones(memory: Memory) -> None:
    slow = {**toy_weights(2), "slow": torch.tensor(0.4)}
    running = memory.stage(encoder_step=40, weights=slow)
    waiting = memory.stage(encoder_step=41, weights=toy_weights(3))
    newest = memory.stage(encoder_step=42, weights=toy_weights(4))
    with pytest.raises(RefreshFailed, match=f"superseded by epoch {newest}"):
        memory.wait_sealed(waiting, WAIT_S)
    memory.wait_sealed(newest, WAIT_S)
    memory.wait_sealed(running, WAIT_S)
    memory.activate(newest)
    assert memory.search(toy_queries(1), 1).encoder_step == 42
    for epoch in (running, waiting):
        memory.release(epoch)


def test_an_edit_does_not_wait_for_a_refresh(memory: Memory, shared: Shared) -> None:
    slow = {**toy_weights(2), "slow": torch.tensor(5.0)}
    refreshing = memory.stage(encoder_step=50, weights=slow)
    version = shared.store.commit(remove_ids=[2], parent=shared.store.head(), message="one fewer")
    began = time.monotonic()
    live = show_content(memory, version)
    assert memory.staging(refreshing).state == "encoding"
    assert time.monotonic() - began < 5.0
    with pytest.raises(UnknownEntry):
        memory.entries([2])
    assert memory.info().epoch == live
    memory.release(refreshing)


def test_a_pinned_epoch_outlives_its_release(memory: Memory) -> None:
    queries = toy_queries(3)
    old = memory.info().epoch
    before = memory.search(queries, 4)
    pin = memory.pin(lease_s=WAIT_S)
    assert pin.epoch == old
    new = refresh(memory, encoder_step=60, weights=toy_weights(6))
    memory.release(old)
    assert memory.search(queries, 4, epoch=old).ids.tolist() == before.ids.tolist()
    pin.renew()
    pin.close()
    pin.close()
    with pytest.raises(UnknownEpoch):
        memory.search(queries, 4, epoch=old)
    with memory.pin(new, lease_s=0.05) as short:
        time.sleep(0.1)
        with pytest.raises(UnknownEpoch, match="lease has ended"):
            short.renew()
    with pytest.raises(ValueError, match="lease_s"):
        memory.pin(lease_s=0.0)
    with pytest.raises(UnknownEpoch):
        memory.pin(12345)


def test_of_two_who_switch_at_once_one_is_told(memory: Memory) -> None:
    seen = memory.info().epoch
    mine = memory.stage(encoder_step=70, weights=toy_weights(2))
    memory.wait_sealed(mine, WAIT_S)
    theirs = refresh(memory, encoder_step=71, weights=toy_weights(3))
    with pytest.raises(LiveEpochChanged, match=f"epoch {theirs} is live, not {seen}"):
        memory.activate(mine, expected_live=seen)
    assert memory.search(toy_queries(1), 1).epoch == theirs
    assert memory.activate(mine, expected_live=theirs) == mine


def test_a_switch_that_came_too_late_leaves_nothing_behind(memory: Memory, shared: Shared) -> None:
    """What was staged to bring a refresh up to date with an edit goes with the refresh."""
    seen = memory.info().epoch
    slow = {**toy_weights(8), "slow": torch.tensor(0.01)}
    refreshed = memory.stage(encoder_step=75, weights=slow)
    memory.wait_sealed(refreshed, WAIT_S)
    version = shared.store.commit(remove_ids=[3], parent=shared.store.head(), message="meanwhile")
    edited = show_content(memory, version)
    with pytest.raises(LiveEpochChanged):
        memory.activate(refreshed, expected_live=seen)
    assert memory.info().epoch == edited
    live = memory.activate(refreshed, expected_live=edited)
    assert memory.info().epoch == live
    memory.release(edited)
    for epoch in range(edited, live):
        with pytest.raises(UnknownEpoch):
            memory.search(toy_queries(1), 1, epoch=epoch)


def test_progress_is_visible(memory: Memory) -> None:
    epoch = memory.stage(encoder_step=80, weights={**toy_weights(2), "slow": torch.tensor(0.2)})
    memory.wait_sealed(epoch, WAIT_S)
    status = memory.staging(epoch)
    assert (status.done, status.total) == (71, 71)
    assert status.seconds > 0
    memory.release(epoch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_keys_give_the_same_answers(start: Start, tmp_path: Path, dtype: str) -> None:
    store = toy_store(tmp_path / "s", *ENTRIES)
    memory = start(store, index=IndexSettings(key_dtype=dtype))
    queries = toy_queries(5)
    assert memory.search(queries, 6).ids.tolist() == expected_ids(ALL, toy_weights(1), queries, 6)
    memory.close()


def test_what_would_not_fit_is_refused_and_the_live_epoch_goes_on(
    start: Start, tmp_path: Path
) -> None:
    entries = 18_000  # each of two shards has a block that an edit shares
    store = toy_store(tmp_path / "s", toy_entries(range(entries)))
    room = entries * 66  # 57 bytes an entry for an epoch, 32 of them the key's
    with pytest.raises(RefreshFailed, match="MiB are free"):
        start(store, memory_limit_bytes=1000)
    memory = start(store, memory_limit_bytes=room)
    before = memory.search(toy_queries(2), 3)
    with pytest.raises(NotEnoughMemory, match="nothing was begun"):
        memory.stage(encoder_step=9, weights=toy_weights(2))
    after = memory.search(toy_queries(2), 3)
    assert (after.epoch, after.ids.tolist()) == (before.epoch, before.ids.tolist())
    # An edit needs little and is let in.
    version = store.commit(remove_ids=[5], message="fewer")
    show_content(memory, version)
    memory.close()


def test_bad_requests_are_refused(memory: Memory) -> None:
    queries = toy_queries(2)
    for k in (0, -1, 1025, 2.0, True):
        with pytest.raises(ValueError, match="1 to 1024"):
            memory.search(queries, k)
    with pytest.raises(ValueError, match=f"width 9.*width {KEY_WIDTH}"):
        memory.search(torch.zeros(2, 9), 1)
    with pytest.raises(ValueError, match="shape"):
        memory.search(queries[0], 1)
    with pytest.raises(ValueError, match="floating point"):
        memory.search(queries.long(), 1)
    for bad in (float("nan"), float("inf")):
        spoilt = queries.clone()
        spoilt[1, 3] = bad
        with pytest.raises(ValueError, match="query 1"):
            memory.search(spoilt, 1)
    with pytest.raises(ValueError, match="exclude_doc_ids"):
        memory.search(queries, 1, exclude_doc_ids=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="exclude_doc_ids"):
        memory.search(queries, 1, exclude_doc_ids=torch.tensor([1.0, 2.0]))
    with pytest.raises(UnknownEpoch, match="99"):
        memory.search(queries, 1, epoch=99)
    with pytest.raises(UnknownVersion, match="nope"):
        memory.stage(encoder_step=1, content_version="nope")
    with pytest.raises(ValueError, match="encoder_step"):
        memory.stage(encoder_step=-1)
    assert memory.search(queries.requires_grad_(), 1).ids.shape == (2, 1)


def test_a_store_that_cannot_serve_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="nowhere"):
        start(tmp_path / "nowhere")
    store = toy_store(tmp_path / "store", *ENTRIES)
    with pytest.raises(UnknownVersion):
        start(store, content_version="0123456789abcdef")
    with pytest.raises(ValueError, match="allowed: flat"):
        start(store, index="FLAT5")
    ref = store.manifest().segments[1]
    damaged = store.segment_path(ref)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1  # same size, same footer: only the checksum can tell
    damaged.write_bytes(data)
    with pytest.raises(RefreshFailed, match=ref.file):
        start(store)
    damaged.write_bytes(data[:-9])
    with pytest.raises(StoreDamaged, match=ref.file):
        start(store)


def test_an_empty_memory_answers_with_pads(memory: Memory, shared: Shared) -> None:
    store = shared.store
    live = [
        entry_id
        for ref in store.manifest().segments
        for entry_id in np.delete(store.segment(ref).ids, store.deleted_rows(ref)).tolist()
    ]
    version = store.commit(remove_ids=live, message="nothing is left")
    refresh(memory, encoder_step=0, content_version=version)
    assert memory.info().entries == 0
    assert memory.search(toy_queries(2), 3).ids.tolist() == [[-1] * 3] * 2


def test_close_ends_it(memory: Memory) -> None:
    memory.close()
    memory.close()
    for call in (
        lambda: memory.search(toy_queries(1), 1),
        lambda: memory.stage(encoder_step=1),
        memory.info,
    ):
        with pytest.raises(MemoryClosed):
            call()
