"""The audit: what it measures, when an approximate index may answer, and that it harms nobody."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from memory_server.index import recall_audit
from memory_server.index.approximate_index import ApproximateIndex
from memory_server.index.base import Hits, IndexSettings
from memory_server.index.factory import build_index
from memory_server.index.faiss_presets import SMALLEST_BLOCK
from memory_server.index.flat_index import FlatIndex
from memory_server.index.recall_audit import (
    LOGGED_PER_SEARCH,
    Audit,
    QueryLog,
    measure_stale_share,
    recall_at_k,
    stale_share,
)
from memory_server.index.recall_gate import MIN_QUERIES, RecallGate
from tests.keys_in_blocks import block_of, clustered_keys, near, recent, rows_of

CPU = torch.device("cpu")
KEYS = clustered_keys(SMALLEST_BLOCK, 16)
NEVER = IndexSettings(kind="IVF32,Flat", search="nprobe=1", min_recall=0.8, audit_every_s=3600)


def strange_queries(count: int) -> torch.Tensor:
    return 5 * torch.randn(count, 16, generator=torch.Generator().manual_seed(2))


def fill(log: QueryLog, queries: torch.Tensor, k: int = 5) -> None:
    for few in queries.split(LOGGED_PER_SEARCH):
        log.add(few, k, None)


@pytest.fixture(scope="module")
def index():
    return build_index(NEVER, rows_of([(block_of(KEYS), 0, len(KEYS))]))


def test_recall_and_stale_share_are_shares_of_what_is_there():
    true = torch.tensor([[3, 1, 7], [4, 9, -1]])
    assert recall_at_k(true.flip(1), true) == 1.0
    assert recall_at_k(torch.tensor([[7, 8, 3], [-1, -1, 9]]), true) == pytest.approx(3 / 5)
    assert recall_at_k(torch.tensor([[4, 9, 2], [3, 1, 7]]), true) == 0.0
    nothing = torch.full((2, 3), -1)
    assert recall_at_k(nothing, true) == 0.0
    assert recall_at_k(nothing, nothing) == 1.0
    old, new = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 3, 9, 8]])
    assert stale_share(old, new) == 0.5


def test_the_log_keeps_the_newest_of_every_search_and_no_more():
    log = QueryLog(capacity=20)
    assert log.recent() is None
    for value in range(10):
        log.add(torch.full((100, 4), float(value)), 3 + value, torch.full((100,), value))
    kept = log.recent()
    assert kept is not None
    assert kept.count == 20
    assert kept.k == 12
    assert set(kept.queries_nQ[:, 0].tolist()) == {7.0, 8.0, 9.0}
    assert torch.equal(kept.queries_nQ[:, 0].long(), kept.exclude_doc_ids_n)
    spread = QueryLog()
    spread.add(torch.arange(80.0).unsqueeze(1), 1, None)
    few = spread.recent()
    assert few is not None
    assert few.queries_nQ.flatten().tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert few.exclude_doc_ids_n.tolist() == [-1] * 8
    kept.queries_nQ.zero_()
    assert log.recent().queries_nQ.any()  # a copy was given


def test_the_log_takes_searches_from_many_threads():
    log = QueryLog(capacity=64)

    def search(value: float) -> None:
        for _ in range(200):
            log.add(torch.full((4, 8), value), 5, torch.full((4,), int(value)))

    threads = [threading.Thread(target=search, args=(float(v),)) for v in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = log.recent()
    assert kept is not None
    assert kept.count == 64
    assert torch.equal(kept.queries_nQ[:, 0].long(), kept.exclude_doc_ids_n)
    assert bool((kept.queries_nQ == kept.queries_nQ[:, :1]).all())


def test_the_gate_needs_enough_queries_and_counts_its_changes():
    gate = RecallGate(0.9)
    assert not gate.state.open
    assert not gate.judge(1.0, MIN_QUERIES - 1).open
    assert gate.judge(0.9, MIN_QUERIES).open
    assert "0.9" in gate.state.reason
    assert not gate.judge(0.89, MIN_QUERIES).open
    assert gate.changes == 2
    assert not gate.shut("too small").open
    assert gate.changes == 2


def test_an_audit_closes_and_opens_the_gate_as_the_queries_change(index):
    log = QueryLog(capacity=64)
    audit = Audit(lambda: index, log, NEVER, device=CPU)
    try:
        assert audit.run_once().recall is None
        fill(log, near(KEYS, 40))
        report = audit.run_once()
        assert report.exact
        assert report.recall is None
        assert "40 of 64" in report.reason
        fill(log, near(KEYS, 64))
        report = audit.run_once()
        assert not report.exact
        assert report.recall >= 0.8
        assert (report.k, report.queries) == (5, 64)
        assert not index.search(near(KEYS, 2), 5, None).exact
        fill(log, strange_queries(64))
        report = audit.run_once()
        assert report.exact
        assert report.recall < 0.8
        assert index.search(near(KEYS, 2), 5, None).exact
        assert "below 0.8" in audit.report.reason
        fill(log, near(KEYS, 64))
        assert not audit.run_once().exact
        audit.note_stale_share(0.25)
        assert audit.report.stale_share == 0.25
        assert audit.report.recall >= 0.8
    finally:
        audit.close()


def test_recall_counts_the_documents_that_the_searches_excluded():
    docs = torch.arange(len(KEYS)) // 4
    index = build_index(NEVER, rows_of([(block_of(KEYS), 0, len(KEYS))], docs=docs))
    assert isinstance(index, ApproximateIndex)
    asked = []

    class Spy:
        gate = index.gate

        def search(self, queries, k, excluded, *, exact=False):
            raise AssertionError("the audit measures as with a closed and as with an open gate")

        def search_every_key(self, queries, k, excluded):
            asked.append(excluded.tolist())
            return index.search_every_key(queries, k, excluded)

        def search_approximately(self, queries, k, excluded):
            asked.append(excluded.tolist())
            return index.search_approximately(queries, k, excluded)

        def tune(self, recent, rest=None):
            return index.tune(recent, rest)

        def describe(self):
            return index.describe()

        bytes = 0

    log = QueryLog(capacity=64)
    for few in near(KEYS, 64).split(8):
        log.add(few, 5, torch.arange(8) + 3)
    audit = Audit(Spy, log, NEVER, device=CPU)
    audit.run_once()
    audit.close()
    assert [doc for few in asked for doc in few] == list(range(3, 11)) * 16


def test_who_asks_for_an_audit_does_not_wait_for_one_that_rests(index, monkeypatch):
    monkeypatch.setattr(recall_audit, "DUTY", 1e-9)
    log = QueryLog(capacity=64)
    fill(log, near(KEYS, 64))
    settings = replace(NEVER, audit_every_s=0.01)
    audit = Audit(lambda: index, log, settings, device=CPU)
    while not audit.measures:
        time.sleep(0.001)
    report = audit.run_once()
    assert report.recall >= 0.8
    audit.close()


def test_a_flat_index_is_not_measured():
    def refuse(*_, **__):
        raise AssertionError("searched")

    flat = FlatIndex(rows_of([(block_of(KEYS), 0, len(KEYS))]))
    flat.search = refuse
    log = QueryLog()
    fill(log, near(KEYS, 64))
    audit = Audit(lambda: flat, log, IndexSettings(audit_every_s=3600), device=CPU)
    report = audit.run_once()
    audit.close()
    assert (report.recall, report.exact) == (1.0, True)


class Broken:
    """An index of reduced keys that fails."""

    bytes = 0

    def search(self, *_, **__) -> Hits:
        raise RuntimeError("no such key")


def test_a_failing_audit_is_counted_and_goes_on(caplog):
    log = QueryLog()
    fill(log, near(KEYS, 64))
    often = IndexSettings(key_dtype="int8", audit_every_s=0.01)
    audit = Audit(Broken, log, often, device=CPU)
    deadline = time.monotonic() + 30
    while audit.report.failures < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    audit.close()
    assert audit.report.failures >= 3
    assert "no such key" in caplog.text


def test_closing_does_not_wait_for_the_audit_under_way():
    log, began = QueryLog(), threading.Event()
    fill(log, near(KEYS, 64))

    class Slow:
        bytes = 0
        searches = 0

        def search(self, queries, k, excluded, *, exact=False):
            Slow.searches += 1
            began.set()
            time.sleep(0.2)  # then the audit rests four times as long
            return Hits(rows=torch.zeros(len(queries), k).long(), scores=torch.zeros(1))

    audit = Audit(Slow, log, IndexSettings(key_dtype="int8", audit_every_s=0.01), device=CPU)
    assert began.wait(30)
    audit.close()
    assert Slow.searches < 16
    assert audit.report.failures == 0


def test_stale_share_tells_how_much_of_the_old_answers_is_left():
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(500) * 2
    keys = torch.randn(500, 8, generator=generator)
    queries = recent(keys[:64], k=4)
    old = FlatIndex(rows_of([(block_of(keys), 0, 500)], ids=ids))
    order = torch.randperm(500, generator=generator)
    same = FlatIndex(rows_of([(block_of(keys[order]), 0, 500)], ids=ids[order]))
    assert measure_stale_share((old, ids), (same, ids[order]), queries, device=CPU) == 1.0
    other = FlatIndex(rows_of([(block_of(keys[order]), 0, 500)], ids=ids))
    assert measure_stale_share((old, ids), (other, ids), queries, device=CPU) < 0.1
