"""What a checkpoint's pickle asks for, found by reading its instructions: none of them is run."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A checkpoint's pickle holds names and shapes: a few MB at most. The numbers lie outside it.
_MOST_BYTES = 64 * 2**20
# torch.save's old format: a magic number, a version, the machine, the object, the storages' names.
_MOST_PICKLES = 5
_LONGEST_NAME = 80
# Of these modules, tensors and plain containers are made.
_TENSOR_MODULES = frozenset(
    {"torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "collections"}
)
_PLAIN = frozenset(
    {"_codecs.encode", *(f"builtins.{n}" for n in ("set", "frozenset", "bytearray", "complex"))}
)


@dataclass(frozen=True, kw_only=True)
class PickleContent:
    """What a file's pickles are.

    Attributes:
        whole: there is at least one, and it is complete.
        foreign: what is asked for beside tensors and containers, such as "posix.system".
    """

    whole: bool
    foreign: tuple[str, ...]


def inspect_pickles(path: Path) -> PickleContent:
    """Look into a file of `torch.save`, old or new, or a bare pickle; anything else has none."""
    try:
        data = _pickle_bytes(path)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError):
        data = b""  # a damaged archive has no pickle that could be looked into
    stream = io.BytesIO(data)
    names: list[str] = []
    complete = 0
    while complete < _MOST_PICKLES and stream.tell() < len(data):
        start = stream.tell()
        found: list[str] = []
        ended = True
        try:
            for name in _globals(stream):
                found.append(name)  # one by one: what comes before an error counts
        except (ValueError, IndexError, OverflowError, struct.error):
            ended = False
        # Any text can look like an instruction or two. A pickle is one that is complete, or has
        # the header that all but the oldest begin with.
        if ended or _has_header(data, start):
            names += found
        if not ended:
            break
        complete += 1
    foreign = dict.fromkeys(_shown(name) for name in names if not _is_plain(name))
    return PickleContent(whole=complete > 0, foreign=tuple(foreign))


def _pickle_bytes(path: Path) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.rsplit("/", 1)[-1] == "data.pkl":
                    with archive.open(name) as member:
                        return member.read(_MOST_BYTES)
        return b""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    return b"" if data.startswith(b"PK") else data  # an archive that is cut off


def _has_header(data: bytes, start: int) -> bool:
    return data[start : start + 1] == b"\x80" and data[start + 1 : start + 2] <= b"\x05"


def _globals(stream: io.BytesIO) -> Iterator[str]:
    """Dotted names that one pickle asks for. Raises ValueError where it is no pickle any more."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    top = "?"  # what a name is shown as that the pickle takes from elsewhere
    for opcode, given, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield _today(*str(given).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(["?", "?", *strings[-2:]][-2:])
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = top
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(given or 0)] = top
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(int(given or 0), "?")
            strings.append(top)
        elif isinstance(given, str) and opcode.name not in ("GLOBAL", "INST"):
            top = given
            strings.append(top)
        else:
            top = "?"


def _today(module: str, name: str = "?") -> str:
    """A name as Python 3 has it: older protocols are written with those of Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _shown(name: str) -> str:
    """The name without what would steer a terminal, and of bearable length."""
    clean = "".join(character if character.isprintable() else "?" for character in name)
    return clean if len(clean) <= _LONGEST_NAME else f"{clean[: _LONGEST_NAME - 1]}…"


def _is_plain(name: str) -> bool:
    return name in _PLAIN or name.rpartition(".")[0] in _TENSOR_MODULES
