"""A run's counted reads in its checkpoint: one safetensors file, written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.reads.present import Present
from trainer.reads.sample import Reads
from trainer.tensor_files import FileRecord, TensorSource, write_tensors

READS = "reads.safetensors"


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a checkpoint keeps.

    Attributes:
        total: reads since `since_step`. window: those since the last line of metrics.
        present: what the memory held, and which entries of `total` it did not hold any more; None:
            that was not asked yet.
    """

    total: Reads
    window: Reads
    since_step: int
    present: Present | None = None


def write_counted(directory: Path, counted: Counted) -> dict[str, FileRecord]:
    """Write them into a checkpoint's directory; OSError: the disk refused."""
    tensors = {
        **_tensors("total", counted.total),
        **_tensors("window", counted.window),
        "since_step": torch.tensor(counted.since_step),
    }
    if counted.present is not None:
        present = counted.present
        version = torch.tensor(list(present.content_version.encode()), dtype=torch.uint8)
        tensors["present.content_version"] = version
        tensors["present"] = torch.tensor([present.entries, present.gone])
    sources = [TensorSource.of(name, tensor) for name, tensor in tensors.items()]
    return {READS: write_tensors(directory / READS, sources)}


def read_counted(checkpoint: Path) -> Counted | None:
    """Read them back; None: reads were not counted when the checkpoint was written.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint / READS
    if not path.exists():
        return None
    try:
        found = load_file(path)
        present = None
        if "present" in found:
            entries, gone = found["present"].tolist()
            version = bytes(found["present.content_version"].tolist()).decode()
            present = Present(content_version=version, entries=entries, gone=gone)
        return Counted(
            total=_reads("total", found),
            window=_reads("window", found),
            since_step=int(found["since_step"]),
            present=present,
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _tensors(name: str, reads: Reads) -> dict[str, Tensor]:
    sums = [reads.level, reads.short, reads.all_times, reads.all_attended]
    return {
        f"{name}.ids": torch.from_numpy(reads.ids),
        f"{name}.times": torch.from_numpy(reads.times),
        f"{name}.attended": torch.from_numpy(reads.attended),
        f"{name}.sums": torch.tensor(sums),
    }


def _reads(name: str, found: Mapping[str, Tensor]) -> Reads:
    level, short, all_times, all_attended = found[f"{name}.sums"].tolist()
    return Reads(
        # Copied: a file that is mapped cannot be removed on every network filesystem.
        ids=found[f"{name}.ids"].numpy().copy(),
        times=found[f"{name}.times"].numpy().copy(),
        attended=found[f"{name}.attended"].numpy().copy(),
        level=level,
        short=short,
        all_times=all_times,
        all_attended=all_attended,
    )
