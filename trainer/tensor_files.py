"""safetensors files that are written tensor by tensor, and the checksums of files.

The library's own writer takes all tensors of a file at once and makes their bytes first, which is
twice a rank's part of the training state. Here one tensor at a time is read and written.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

CHECKSUM = "xxh3_128"
_CHUNK_BYTES = 16 * 2**20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What was written to a file: its size in bytes and its xxh3_128 checksum in hexadecimal."""

    size: int
    checksum: str

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it; `from_json` is its inverse."""
        return {"bytes": self.size, CHECKSUM: self.checksum}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FileRecord:
        """Read it back; KeyError, TypeError or ValueError for anything else."""
        return cls(size=int(values["bytes"]), checksum=str(values[CHECKSUM]))


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor that is read when its turn comes.

    Attributes:
        name: in the file; unique there.
        shape, dtype: of what `read` returns, on any device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSource:
        """A tensor that is there already."""
        return cls(
            name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor.detach()
        )


def write_tensors(path: Path, tensors: Sequence[TensorSource]) -> FileRecord:
    """Write a safetensors file, one tensor in memory at a time, and have the disk keep it.

    Raises:
        OSError: the disk refused.
    """
    header: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        numel = torch.Size(tensor.shape).numel()
        start, end = end, end + numel * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    # The data begins aligned, so that it can be mapped.
    text += b" " * (-len(text) % 8)
    return _write(path, _parts(struct.pack("<Q", len(text)) + text, tensors))


def write_json(path: Path, values: Any) -> FileRecord:
    """Write a JSON file and have the disk keep it; OSError: the disk refused."""
    return _write(path, [json.dumps(values, indent=1).encode()])


def file_record(path: Path) -> FileRecord:
    """Read a whole file for its size and checksum; OSError: it cannot be read."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size=size, checksum=digest.hexdigest())


def _parts(head: bytes, tensors: Sequence[TensorSource]) -> Iterable[bytes | memoryview]:
    yield head
    for tensor in tensors:
        value = tensor.read().detach().to("cpu").contiguous()
        assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape), tensor.name
        if value.numel():
            yield value.reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            size += len(part)
            _write_all(file, part)
        os.fsync(file.fileno())
    return FileRecord(size=size, checksum=digest.hexdigest())


def _write_all(file: BinaryIO, part: bytes | memoryview) -> None:
    """An unbuffered file may take less than it is given, and then the disk is nearly full."""
    left = memoryview(part)
    while len(left):
        left = left[file.write(left) :]
