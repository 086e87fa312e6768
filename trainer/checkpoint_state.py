"""What a checkpoint is of, and whether it is undamaged: its `state.json`.

`state.json` ties together what belongs together (training state, data cursor, memory epoch,
settings) and names every other file with its size and checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError
from trainer.tensor_files import CHECKSUM, FileRecord, file_record

FORMAT = "pluglm-checkpoint-2"
_OLD_FORMATS = ("pluglm-checkpoint-1",)
STATE = "state.json"
_ADVICE = "remove this checkpoint to resume from the one before"


class OldCheckpointFormat(CheckpointError):
    """A checkpoint of an earlier version: whole, but not to be read here."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps done.
        cursor: place in the data; it counts sequences of the whole job, so any number of trainers
            goes on from it.
        trainers, zero_stage: of the run that wrote it; a resumed run may have others.
        content_version: content of the memory epoch that was live.
        encoder_step: the step whose weights made its keys (they are in the checkpoint).
        published_step: the step from which the next refresh is counted. Weights that were on their
            way into the memory are lost with the run, so it is that of the live keys.
        engine: the engine's counters and its loss scale, as `TrainingEngine.counters` tells them;
            empty in a state that was not read from a checkpoint.
        corpus_fingerprint: of the corpus that is trained on; empty: unknown.
        settings: the run's settings as nested plain values, so that a resumed run can tell what
            changed; empty in a state that was not read from a checkpoint.
    """

    step: int
    cursor: Cursor
    trainers: int
    zero_stage: int
    content_version: str
    encoder_step: int
    published_step: int
    engine: dict[str, Any] = field(default_factory=dict)
    corpus_fingerprint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def state_text(state: CheckpointState, files: Mapping[str, FileRecord]) -> str:
    """`state.json` of a checkpoint that consists of these files."""
    values: dict[str, Any] = {
        **asdict(state),
        "cursor": state.cursor.to_json(),
        "format": FORMAT,
        "files": {name: record.to_json() for name, record in sorted(files.items())},
    }
    return json.dumps({**values, CHECKSUM: _digest(values)}, indent=1)


def read_state(checkpoint: Path) -> CheckpointState:
    """Read `state.json`, and see that every file has its size; their content is not read.

    Raises:
        CheckpointError: something is missing, damaged or of another format; the file is named.
    """
    state, files = _read(checkpoint)
    for name, record in files.items():
        found = _size(checkpoint / name)
        if found != record.size:
            raise CheckpointError(f"{_wrong_size(checkpoint / name, found, record)}; {_ADVICE}")
    return state


def read_verified(checkpoint: Path) -> CheckpointState:
    """As `read_state`, and every file's content is read and compared with its checksum.

    Raises:
        CheckpointError: as `read_state`.
    """
    state = read_state(checkpoint)
    found = damages(checkpoint)
    if found:
        raise CheckpointError(f"{found[0]}; {_ADVICE}")
    return state


def damages(checkpoint: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each; reads all of it.

    Raises:
        CheckpointError: `state.json` itself cannot be read.
    """
    _, files = _read(checkpoint)
    found = []
    for name, record in files.items():
        path = checkpoint / name
        size = _size(path)
        if size != record.size:
            found.append(_wrong_size(path, size, record))
            continue
        try:
            checksum = file_record(path).checksum
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
            continue
        if checksum != record.checksum:
            found.append(
                f"{path} is damaged: its checksum is {checksum}, but {record.checksum} was written"
            )
    return found


def checkpoint_bytes(checkpoint: Path) -> int:
    """Bytes of all files that it names; CheckpointError: `state.json` cannot be read."""
    return sum(record.size for record in _read(checkpoint)[1].values())


def _read(checkpoint: Path) -> tuple[CheckpointState, dict[str, FileRecord]]:
    path = checkpoint / STATE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        form = raw["format"]
        if form in _OLD_FORMATS:
            raise OldCheckpointFormat(
                f"{checkpoint} has the format {form} of an earlier version, which this one "
                f"({FORMAT}) does not read: finish that run with the version that began it, or "
                "start another run with run.dir=DIR"
            )
        if form != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        digest = raw.pop(CHECKSUM)
        if digest != _digest(raw):
            raise ValueError("its checksum does not match what it says")
        del raw["format"]
        files = {name: FileRecord.from_json(v) for name, v in raw.pop("files").items()}
        state = CheckpointState(**{**raw, "cursor": Cursor.from_json(raw["cursor"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_ADVICE}") from error
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names a file outside of its checkpoint: {name}")
    return state, files


def _digest(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(canonical.encode()).hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _wrong_size(path: Path, found: int | None, record: FileRecord) -> str:
    there = "missing" if found is None else f"{found} bytes"
    return f"{path} is {there}, but {record.size} bytes were written"
