"""Reading sequences from parts equals plain array indexing; bad folders are named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.sequences import SequenceDataset, SequencesDamaged

Writer = Callable[..., None]


@pytest.fixture
def corpus(tmp_path: Path, part_writer: Writer) -> tuple[Path, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 60_000, (23, 16))
    folder = tmp_path / "sequences"
    # An empty part in the middle must not shift what comes after it.
    for number, (begin, end) in enumerate([(0, 7), (7, 7), (7, 20), (20, 23)]):
        part_writer(folder / f"part-{number:05d}.arrow", tokens[begin:end], first_doc=100 + begin)
    return folder, tokens


def test_gather_equals_indexing(corpus: tuple[Path, np.ndarray]) -> None:
    folder, tokens = corpus
    dataset = SequenceDataset(folder)
    assert len(dataset) == 23
    assert dataset.sequence_length == 16
    indices = np.random.default_rng(1).integers(0, 23, 200)
    batch = dataset.gather(indices)
    np.testing.assert_array_equal(batch.input_ids, tokens[indices])
    np.testing.assert_array_equal(batch.doc_ids, 100 + indices)
    starts = np.array([0, 7, 20])
    ordinal = indices - starts[np.searchsorted(starts, indices, side="right") - 1]
    np.testing.assert_array_equal(batch.first_entry, ordinal)
    np.testing.assert_array_equal(batch.num_entries, 2)
    assert batch.input_ids.dtype == batch.doc_ids.dtype == np.int64
    assert batch.first_entry.dtype == batch.num_entries.dtype == np.int32


def test_an_empty_gather_and_wide_tokens(tmp_path: Path, part_writer: Writer) -> None:
    tokens = np.array([[100_000, 2], [3, 4]])
    part_writer(tmp_path / "part-00000.arrow", tokens, token_type=pa.int32())
    dataset = SequenceDataset(tmp_path)
    assert dataset.gather(np.array([], dtype=np.int64)).input_ids.shape == (0, 2)
    np.testing.assert_array_equal(dataset.gather(np.array([1, 0])).input_ids, tokens[[1, 0]])


def test_it_survives_pickling(corpus: tuple[Path, np.ndarray]) -> None:
    folder, tokens = corpus
    copy = pickle.loads(pickle.dumps(SequenceDataset(folder)))
    np.testing.assert_array_equal(copy.gather(np.array([22])).input_ids[0], tokens[22])


@pytest.mark.parametrize("index", [-1, 23])
def test_an_index_out_of_range_is_refused(corpus: tuple[Path, np.ndarray], index: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        SequenceDataset(corpus[0]).gather(np.array([0, index]))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SequenceDataset(tmp_path / "nowhere")


def test_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no part"):
        SequenceDataset(tmp_path)


def test_parts_without_rows_are_refused(tmp_path: Path, part_writer: Writer) -> None:
    part_writer(tmp_path / "part-00000.arrow", np.empty((0, 8), dtype=np.int64))
    with pytest.raises(ValueError, match="hold no sequences"):
        SequenceDataset(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -40])
def test_a_truncated_part_is_named(corpus: tuple[Path, np.ndarray], keep: int) -> None:
    path = corpus[0] / "part-00002.arrow"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SequencesDamaged, match=r"part-00002\.arrow"):
        SequenceDataset(corpus[0])


def test_a_part_that_is_not_arrow_is_named(corpus: tuple[Path, np.ndarray]) -> None:
    path = corpus[0] / "part-00001.arrow"
    path.write_bytes(b"x" * 4000)
    with pytest.raises(SequencesDamaged, match=r"part-00001\.arrow"):
        SequenceDataset(corpus[0])


def test_another_length_is_named(corpus: tuple[Path, np.ndarray], part_writer: Writer) -> None:
    part_writer(corpus[0] / "part-00009.arrow", np.zeros((2, 32), dtype=np.int64))
    with pytest.raises(SequencesDamaged, match=r"part-00009\.arrow holds sequences of 32 tokens"):
        SequenceDataset(corpus[0])


def test_several_record_batches_are_refused(tmp_path: Path, part_writer: Writer) -> None:
    part_writer(tmp_path / "part-00000.arrow", np.zeros((2, 8), dtype=np.int64), batches=3)
    with pytest.raises(SequencesDamaged, match="3 record batches"):
        SequenceDataset(tmp_path)


def fixed_list(type_: pa.DataType, values: list[int | None]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values, type=type_), 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"input_ids": pa.array([[1, 2]], type=pa.list_(pa.int32()))},
        {"input_ids": fixed_list(pa.int64(), [1, 2])},
        {"doc_id": pa.array([1], type=pa.int32())},
        {"first_entry": pa.array(["0"])},
        {"num_entries": None},
        {"doc_id": pa.array([None], type=pa.int64())},
    ],
)
def test_another_schema_is_refused(tmp_path: Path, changed: dict[str, pa.Array | None]) -> None:
    columns = {
        "input_ids": fixed_list(pa.uint16(), [1, 2]),
        "doc_id": pa.array([1], type=pa.int64()),
        "first_entry": pa.array([0], type=pa.int32()),
        "num_entries": pa.array([1], type=pa.int32()),
    }
    columns = {k: v for k, v in {**columns, **changed}.items() if v is not None}
    batch = pa.record_batch(columns)
    path = tmp_path / "part-00000.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(SequencesDamaged, match=r"part-00000\.arrow.*(needed are|nulls)"):
        SequenceDataset(tmp_path)
