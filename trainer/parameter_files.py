"""The training state in a checkpoint: parts of parameters by name, in files of their own.

Every rank writes what it holds to one safetensors file, without talking to the others.
`parameters.json` says which part of which parameter lies where, so that any number of ranks and
any ZeRO stage reads back exactly the elements that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.held_state import WEIGHT, HeldState, Part, dealt
from trainer.tensor_files import FileRecord, TensorSource, write_json, write_tensors

PARAMETERS = "parameters.json"
_BUFFERS = "buffers.safetensors"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a rank wrote.

    Attributes:
        files: by name, relative to the checkpoint.
        parameters: by name: {"shape": [...], "start": elements, "numel": elements}.
        moments: names of the optimizer's moments that were there.
    """

    files: dict[str, FileRecord]
    parameters: dict[str, dict[str, Any]]
    moments: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` is its inverse."""
        return {
            "files": {name: record.to_json() for name, record in self.files.items()},
            "parameters": self.parameters,
            "moments": self.moments,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Written:
        """Read it back; KeyError, TypeError or ValueError for anything else."""
        return cls(
            files={name: FileRecord.from_json(v) for name, v in values["files"].items()},
            parameters=dict(values["parameters"]),
            moments=list(values["moments"]),
        )


def state_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"state-{rank:05d}.safetensors"


def write_parts(directory: Path, held: HeldState, *, rank: int, ranks: int) -> Written:
    """Write a rank's part of the state, one tensor in memory at a time. Not collective.

    Raises:
        OSError: the disk refused.
    """
    moments = held.moments()
    parts = dealt(held.parts(), rank, ranks)
    sources = [
        TensorSource(
            name=_key(kind, part.name),
            shape=(part.numel,),
            dtype=torch.float32,
            read=partial(_wide, part, kind),
        )
        for part in parts
        for kind in (WEIGHT, *(moments if part.trainable else ()))
    ]
    record = write_tensors(directory / state_file(rank), sources)
    return Written(
        files={state_file(rank): record},
        parameters={
            part.name: {"shape": list(part.shape), "start": part.start, "numel": part.numel}
            for part in parts
        },
        moments=moments,
    )


def write_index(directory: Path, written: Sequence[Written]) -> FileRecord:
    """Write `parameters.json` from what the ranks, in their order, have written.

    Raises:
        CheckpointError: together they do not make every parameter whole.
    """
    parameters: dict[str, dict[str, Any]] = {}
    for rank, own in enumerate(written):
        for name, part in own.parameters.items():
            known = parameters.setdefault(name, {"shape": part["shape"], "parts": []})
            known["parts"].append([rank, part["start"], part["numel"]])
    for name, found in parameters.items():
        whole = torch.Size(found["shape"]).numel()
        total = sum(numel for _, _, numel in found["parts"])
        if total != whole:
            raise CheckpointError(f"the ranks wrote {total} of the {whole} elements of {name}")
    moments = sorted({name for own in written for name in own.moments})
    return write_json(directory / PARAMETERS, {"moments": moments, "parameters": parameters})


class ParameterReader:
    """Reads parts of parameters from a checkpoint, whoever wrote them. Close it."""

    def __init__(self, checkpoint: Path) -> None:
        """Read the index; CheckpointError: it cannot be read."""
        self._checkpoint = checkpoint
        try:
            index = json.loads((checkpoint / PARAMETERS).read_text(encoding="utf-8"))
            self.moments: list[str] = list(index["moments"])
            self._parameters: dict[str, Any] = dict(index["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(PARAMETERS, error) from error
        self._open: dict[int, Any] = {}
        self._closing = ExitStack()

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint of another model; CheckpointError names the first difference."""
        theirs = {name: tuple(found["shape"]) for name, found in self._parameters.items()}
        for name in sorted(shapes.keys() | theirs.keys()):
            ours, saved = shapes.get(name), theirs.get(name)
            if ours != saved:
                raise CheckpointError(
                    f"{self._checkpoint} is of another model: its parameter {name} is "
                    f"{_shown(saved)}, and {_shown(ours)} in the model of this configuration; "
                    "resume with the [model] section that the run was started with"
                )

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """The elements start..start+numel of a flattened parameter's state, float32.

        Raises:
            CheckpointError: a file cannot be read, or not all of them are there.
        """
        values = torch.empty(numel)
        filled = 0
        for rank, place, length in self._parameters[name]["parts"]:
            low, high = max(start, place), min(start + numel, place + length)
            if low < high:
                found = self._slice(rank, _key(kind, name), low - place, high - place)
                values[low - start : high - start] = found
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self._checkpoint} holds {filled} of {numel} elements of {name}; remove this "
                "checkpoint to resume from the one before"
            )
        return values

    def close(self) -> None:
        """Close the files."""
        self._closing.close()
        self._open.clear()

    def _slice(self, rank: int, key: str, start: int, stop: int) -> Tensor:
        try:
            if rank not in self._open:
                file = safe_open(self._checkpoint / state_file(rank), framework="pt")
                self._open[rank] = self._closing.enter_context(file)
            found: Tensor = self._open[rank].get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise self._unreadable(state_file(rank), error) from error
        return found

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint / name} cannot be read ({error}); remove this checkpoint to resume "
            "from the one before"
        )


def read_parts(
    checkpoint: Path, held: HeldState, model_shapes: Mapping[str, tuple[int, ...]], *, step: int
) -> None:
    """Fill this rank's part of the state from a checkpoint. Not collective.

    Args:
        checkpoint: its directory.
        held: what is filled; its `spread` is to be called afterwards.
        model_shapes: of all parameters.
        step: optimizer steps that were applied.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    reader = ParameterReader(checkpoint)
    try:
        reader.check_shapes(model_shapes)
        if reader.moments:
            held.begin_moments(reader.moments, step)
        for part in held.parts():
            for kind in (WEIGHT, *(reader.moments if part.trainable else ())):
                part.write(kind, reader.read(kind, part.name, part.start, part.numel))
    finally:
        reader.close()


def write_buffers(directory: Path, model: nn.Module) -> dict[str, FileRecord]:
    """Write the model's buffers, such as BatchNorm's statistics; OSError: the disk refused."""
    sources = [TensorSource.of(name, buffer) for name, buffer in model.named_buffers()]
    return {_BUFFERS: write_tensors(directory / _BUFFERS, sources)}


def load_buffers(checkpoint: Path, model: nn.Module) -> None:
    """Set all buffers from a checkpoint, which DeepSpeed's own universal load leaves as they are.

    Raises:
        CheckpointError: the file cannot be read, or its buffers are not the model's.
    """
    path = checkpoint / _BUFFERS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    ours = dict(model.named_buffers())
    if saved.keys() != ours.keys():
        differing = ", ".join(sorted(saved.keys() ^ ours.keys()))
        raise CheckpointError(f"{path} is of another model; these buffers differ: {differing}")
    with torch.no_grad():
        for name, buffer in ours.items():
            buffer.copy_(saved[name])


def _wide(part: Part, kind: str) -> Tensor:
    return part.read(kind).float()


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
