"""A file of tensors is safetensors, is never whole in memory, and is known by its checksum."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.tensor_files import FileRecord, TensorSource, file_record, write_json, write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        f"{dtype} {shape}": torch.rand(shape).mul(2).to(dtype)
        for dtype in DTYPES
        for shape in ((), (3,), (2, 5), (0,), (4, 1, 3))
    }
    tensors["not contiguous"] = torch.arange(12.0).reshape(3, 4).t()
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, [TensorSource.of(name, tensor) for name, tensor in tensors.items()])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        assert all(reference() is None for reference in alive), "the one before is still there"
        tensor = torch.rand(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    sources = [
        TensorSource(name=str(i), shape=(1000,), dtype=torch.float32, read=read) for i in range(5)
    ]
    write_tensors(tmp_path / "tensors.safetensors", sources)
    assert len(alive) == 5


def test_the_record_is_that_of_the_file_as_it_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    written = write_tensors(path, [TensorSource.of("a", torch.arange(100.0))])
    assert file_record(path) == written
    assert FileRecord.from_json(written.to_json()) == written
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    assert file_record(path).checksum != written.checksum
    assert write_json(tmp_path / "x.json", {"b": [1]}) == file_record(tmp_path / "x.json")


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("only Linux has a disk that is always full")
    with pytest.raises(OSError, match="No space left"):
        write_tensors(full, [TensorSource.of("a", torch.rand(1000))])
