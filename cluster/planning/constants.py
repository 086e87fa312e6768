"""What a machine can do, as measured by `pluglm calibrate`: written and read as JSON.

Every figure is a median with its range. A figure that a machine has not (copies to a GPU, where
there is none) is None, and the JSON says null.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = "pluglm-calibration-1"
Part = TypeVar("Part", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Several measurements of one quantity: their median, the lowest, the highest, how many."""

    median: float
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high < math.inf or self.count < 1:
            raise ValueError(
                f"low {self.low}, median {self.median}, high {self.high} of {self.count}: must be "
                "finite, above 0 and in this order"
            )

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one measurement."""
        ordered = sorted(values)
        half = len(ordered) // 2
        middle = (ordered[half] + ordered[~half]) / 2
        return cls(median=middle, low=ordered[0], high=ordered[-1], count=len(ordered))

    def inverse(self, amount: float) -> Figure:
        """From seconds to what is done per second, if each measurement did this amount."""
        return Figure(
            median=amount / self.median,
            low=amount / self.high,
            high=amount / self.low,
            count=self.count,
        )


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Bytes per second between host and GPU, from and to pinned and pageable memory."""

    to_device_pinned: Figure
    to_device_pageable: Figure
    to_host_pinned: Figure
    to_host_pageable: Figure


@dataclass(frozen=True, kw_only=True)
class Products:
    """Matrix products in one number format, in floating-point operations per second.

    Attributes:
        square: of two square matrices.
        skinny: of keys [n, 128] with a batch of queries [B, 128], as a search multiplies them.
    """

    dtype: str
    square: Figure
    skinny: Figure


@dataclass(frozen=True, kw_only=True)
class FlatSearch:
    """One exact search through `FlatIndex`: its seconds, and the bytes of keys per second."""

    entries: int
    width: int
    batch: int
    key_dtype: str
    seconds: Figure
    bytes_per_s: Figure


@dataclass(frozen=True, kw_only=True)
class ApproximateIndex:
    """A FAISS index over one block of keys: to build it anew, and one search of a batch.

    Attributes:
        build, refill: seconds to train and fill it, and to fill it anew with the parts and lists
            of an index that was there, as a refresh does; how much a search looks at is measured
            in both.
        recall: of its answers to queries that no entry was meant for, which are the hardest.
        index_bytes: beside the keys.
    """

    kind: str
    factory: str
    entries: int
    width: int
    batch: int
    recall: float
    index_bytes: int
    build: Figure
    refill: Figure
    seconds: Figure


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Encoding entries of `tokens` tokens into keys.

    Attributes:
        hidden, tokens, width, vocabulary: sizes of the encoder.
        direct: entries per second through the module.
        build: seconds to build the tables.
        tabled: entries per second through the tables.
        refresh_entries, refresh: entries of a memory that was refreshed as a whole, and its
            seconds from staging to being sealed, by tables, their building included.
        small_refresh_entries, small_refresh: the same of a memory of fewer entries.
    """

    hidden: int
    tokens: int
    width: int
    vocabulary: int
    direct: Figure
    build: Figure
    tabled: Figure
    refresh_entries: int
    refresh: Figure
    small_refresh_entries: int
    small_refresh: Figure


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes per second of one large file in the working directory; read None: cannot be told."""

    write: Figure
    read: Figure | None


@dataclass(frozen=True, kw_only=True)
class RayFigures:
    """Seconds of a call to an actor of this node and back, and bytes per second into one."""

    call: Figure
    transfer: Figure


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Of one device of one machine.

    Attributes:
        device: "cpu" or "cuda". name: of the GPU or of the processor.
        threads: that torch computes with on the CPU.
        device_bytes, host_bytes: of memory in all; the same for a CPU.
        device_copy, host_copy: bytes read and written per second by a large copy.
        launch: seconds of one small operation among many, which on a GPU is its launch.
        round_trip: seconds of one small operation until its result is here.
    """

    device: str
    name: str
    cpu: str
    threads: int
    torch: str
    measured: str
    device_bytes: int
    host_bytes: int
    device_copy: Figure
    host_copy: Figure
    copies: Copies | None
    products: tuple[Products, ...]
    launch: Figure
    round_trip: Figure
    flat: tuple[FlatSearch, ...]
    approximate: tuple[ApproximateIndex, ...]
    keys: Keys
    disk: Disk
    ray: RayFigures | None
    left_out: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f'device {self.device!r}; allowed: "cpu", "cuda"')
        if not self.products or not self.flat:
            raise ValueError("products and flat must each have at least one measurement")

    def to_json(self) -> str:
        """As text; `read` gives an equal one."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file that `pluglm calibrate --out` wrote.

        Raises:
            ValueError: it is no such file; names what does not fit. OSError: it cannot be read.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; write it anew with `pluglm calibrate --out {path}`"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From what `to_json` gave.

        Raises:
            ValueError: it is none of it; names the first key that does not fit.
        """
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            given = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"its format is {given!r}, not {FORMAT!r}")
        return _built(cls, {k: v for k, v in tree.items() if k != "format"}, "")


def _built(kind: type[Part], tree: Mapping[str, Any], where: str) -> Part:
    """A dataclass out of plain values, each checked against its declared type."""
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    unknown = [name for name in tree if name not in known]
    if unknown:
        raise ValueError(f"{where}{unknown[0]}: unknown key; known are {', '.join(known)}")
    values = {}
    for item in fields(kind):
        if item.name not in tree:
            if item.default is MISSING:
                raise ValueError(f"{where}{item.name} is missing")
            continue
        values[item.name] = _value(hints[item.name], tree[item.name], f"{where}{item.name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where.rstrip('.') or 'the file'}: {error}") from error


def _value(hint: Any, given: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if given is None:
            return None
        (hint,) = [arg for arg in get_args(hint) if arg is not type(None)]
    if get_origin(hint) is tuple:
        if not isinstance(given, list):
            raise ValueError(f"{where} = {given!r}: must be a list")
        inner = get_args(hint)[0]
        return tuple(_value(inner, each, f"{where}[{i}]") for i, each in enumerate(given))
    if is_dataclass(hint):
        if not isinstance(given, dict):
            raise ValueError(f"{where} = {given!r}: must be an object with keys")
        return _built(hint, given, f"{where}.")  # type: ignore[arg-type]
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(given, allowed) or isinstance(given, bool):
        words = {int: "a whole number", float: "a number", str: "a string"}
        raise ValueError(f"{where} = {given!r}: must be {words[hint]}")
    if hint is int and given < 1:
        raise ValueError(f"{where} = {given}: must be at least 1")
    return float(given) if hint is float else given
