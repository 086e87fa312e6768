"""Sequences in Parquet and on other filesystems: the same ones, fetched when they are wanted."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memory_server.store.store import Store
from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import CorpusInfo, load_corpus_info
from trainer.corpus.remote import corpus_memory, local_corpus
from trainer.data.part_cache import CacheError, PartCache
from trainer.data.sequences import SequenceDataset, SequencesDamaged

URL, ROOT = "memory://somewhere/corpus", "/somewhere/corpus"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusInfo:
    """A corpus of several files."""
    return build_corpus(
        [write_json_lines(tmp_path / "a.jsonl", make_rows(60, seed=4))],
        tmp_path / "corpus",
        tokenizer="train:300",
        sequence_length=24,
        entry_tokens=16,
        heldout_fraction=0.2,
        documents_per_chunk=10,
        rows_per_file=20,
        workers=1,
    )


@pytest.fixture
def far(corpus: CorpusInfo) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for path in corpus.path.rglob("*"):
        if path.is_file():
            filesystem.put_file(str(path), f"{ROOT}/{path.relative_to(corpus.path)}")
    yield URL
    filesystem.rm("/somewhere", recursive=True)


def parts_in(cache: Path) -> list[Path]:
    return sorted((cache / "parts").glob("*.arrow"))


def assert_same(one: SequenceDataset, other: SequenceDataset) -> None:
    rows = np.random.default_rng(0).permutation(len(one))
    left, right = one.gather(rows), other.gather(rows)
    for name in ("input_ids", "doc_ids", "first_entry", "num_entries"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def to_parquet(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.glob("part-*.arrow"):
        table = pa.ipc.open_file(path).read_all()
        lists = table.column("input_ids").cast(pa.list_(pa.uint16()))
        table = table.set_column(0, "input_ids", lists)
        pq.write_table(table, target / f"{path.stem}.parquet", row_group_size=7)


def test_parquet_parts_are_decoded_when_they_are_wanted(
    corpus: CorpusInfo, tmp_path: Path, cache: Path
) -> None:
    to_parquet(corpus.sequences_path, tmp_path / "parquet")
    arrow, parquet = SequenceDataset(corpus.sequences_path), SequenceDataset(tmp_path / "parquet")
    assert parquet.rows == arrow.rows
    assert len(arrow.rows) > 2
    assert len(parts_in(cache)) == 1  # the first one tells the length
    assert_same(arrow, parquet)
    assert len(parts_in(cache)) == len(arrow.rows)


def test_a_parquet_part_written_anew_is_decoded_anew(corpus: CorpusInfo, tmp_path: Path) -> None:
    to_parquet(corpus.sequences_path, tmp_path / "parquet")
    SequenceDataset(tmp_path / "parquet").gather(np.array([0]))
    path = tmp_path / "parquet/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "doc_id", pa.array([77] * len(table))), path)
    assert SequenceDataset(tmp_path / "parquet").gather(np.array([0])).doc_ids == [77]


def test_a_damaged_parquet_part_is_named(corpus: CorpusInfo, tmp_path: Path) -> None:
    to_parquet(corpus.sequences_path, tmp_path / "parquet")
    path = tmp_path / "parquet" / "part-00001.parquet"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SequencesDamaged, match=r"part-00001\.parquet"):
        SequenceDataset(tmp_path / "parquet")


def test_ragged_parquet_is_refused(tmp_path: Path) -> None:
    ids = pa.array([[1, 2, 3], [1, 2]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids, "doc_id": [1, 2]}), tmp_path / "part-0.parquet")
    with pytest.raises(CacheError, match=r"part-0\.parquet.*rows of \['2', '3'\] tokens"):
        SequenceDataset(tmp_path)


def test_a_corpus_elsewhere_is_fetched_part_by_part(
    corpus: CorpusInfo, far: str, cache: Path
) -> None:
    info = load_corpus_info(local_corpus(far))
    assert info.sequences == corpus.sequences
    assert info.tokenizer_fingerprint == corpus.tokenizer_fingerprint
    dataset = SequenceDataset(info.sequences_path)
    assert dataset.rows == SequenceDataset(corpus.sequences_path).rows
    assert parts_in(cache) == []  # nothing was fetched to open it
    dataset.gather(np.arange(3))
    assert len(parts_in(cache)) == 1
    assert_same(SequenceDataset(corpus.sequences_path), dataset)
    assert Store.open(corpus_memory(far)).head() == Store.open(corpus.memory_path).head()
    assert local_corpus(far) == info.path  # and it is not fetched again


def test_the_cache_keeps_what_was_used_last(corpus: CorpusInfo, far: str, cache: Path) -> None:
    sizes = [path.stat().st_size for path in corpus.sequences_path.glob("*.arrow")]
    info = load_corpus_info(local_corpus(far))
    room = 2.5 * max(sizes)
    dataset = SequenceDataset(info.sequences_path, cache_gib=room / 2**30)
    whole = dataset.gather(np.arange(len(dataset)))
    kept = parts_in(cache)
    assert 1 <= len(kept) < len(sizes)
    assert sum(path.stat().st_size for path in kept) <= room
    mapped = [part for part in dataset._parts if part is not None]
    assert all(part.local.exists() for part in mapped), "a mapped file keeps its disk space"
    # What went is fetched again.
    again = dataset.gather(np.arange(len(dataset)))
    np.testing.assert_array_equal(whole.input_ids, again.input_ids)


def test_a_part_that_is_gone_is_named(far: str) -> None:
    dataset = SequenceDataset(load_corpus_info(local_corpus(far)).sequences_path)
    fsspec.filesystem("memory").rm(f"{ROOT}/sequences/part-00001.arrow")
    dataset.gather(np.array([0]))
    with pytest.raises(CacheError, match=r"sequences/part-00001\.arrow cannot be brought"):
        dataset.gather(np.arange(len(dataset)))


def test_a_part_of_another_corpus_is_noticed(
    far: str, part_writer: Callable[..., None], tmp_path: Path
) -> None:
    dataset = SequenceDataset(load_corpus_info(local_corpus(far)).sequences_path)
    part_writer(tmp_path / "other.arrow", np.zeros((3, 24), dtype=np.int64))
    fsspec.filesystem("memory").put_file(
        str(tmp_path / "other.arrow"), f"{ROOT}/sequences/part-00001.arrow"
    )
    with pytest.raises(SequencesDamaged, match="holds 3 sequences, but"):
        dataset.gather(np.arange(len(dataset)))


@pytest.mark.parametrize("url", ["memory://nowhere/x", "nosuchscheme://bucket/x"])
def test_an_address_without_a_corpus_is_refused(url: str) -> None:
    with pytest.raises(CorpusError, match="cannot be read") as told:
        local_corpus(url)
    assert url in str(told.value)


def test_what_was_half_fetched_is_not_used(corpus: CorpusInfo, far: str, cache: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    counts = filesystem.cat_file(f"{ROOT}/token_counts.npy")
    filesystem.rm(f"{ROOT}/token_counts.npy")
    with pytest.raises(CorpusError):
        local_corpus(far)
    assert [p for p in (cache / "corpora").iterdir() if p.is_dir()] == []
    filesystem.pipe_file(f"{ROOT}/token_counts.npy", counts)
    assert load_corpus_info(local_corpus(far)).sequences == corpus.sequences


def test_a_cache_that_cannot_be_written_is_named(far: str, cache: Path) -> None:
    cache.mkdir()
    (cache / "parts").write_text("a file")
    part = f"{far}/sequences/part-00000.arrow"
    with (
        pytest.raises(CacheError, match="PLUGLM_CACHE_DIR"),
        PartCache.of_this_machine().held(part),
    ):
        pass


def test_what_is_held_stays_in_a_cache_that_is_too_small(far: str, cache: Path) -> None:
    parts = [f"{far}/sequences/part-{number:05d}.arrow" for number in range(2)]
    small = PartCache(cache, most_bytes=1)
    with small.held(parts[0]) as first, small.held(parts[1]) as second:
        assert first.exists()
        assert second.exists()
    with small.held(parts[1]):
        assert second.exists()
        assert not first.exists()


def _read_all(folder: str, cache_dir: str, seed: int) -> int:
    """Reads sequences here and there with room for one part; returns how many."""
    os.environ["PLUGLM_CACHE_DIR"] = cache_dir
    dataset = SequenceDataset(Path(folder), cache_gib=1e-9)
    random = np.random.default_rng(seed)
    for _ in range(60):
        dataset.gather(random.integers(0, len(dataset), 4))
    return 240


def test_processes_share_a_cache_that_is_too_small(corpus: CorpusInfo, tmp_path: Path) -> None:
    """One takes out what another has just brought, and neither notices more than the time."""
    to_parquet(corpus.sequences_path, tmp_path / "parquet")
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        asked = [(str(tmp_path / "parquet"), str(tmp_path / "shared"), seed) for seed in range(3)]
        assert pool.starmap(_read_all, asked) == [240] * 3
