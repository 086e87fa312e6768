"""The format of ``metrics.jsonl``: JSON lines that survive being cut off."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read a metrics file, in its order; a half-written last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is damaged; the message names it.
    """
    lines: list[dict[str, Any]] = []
    raw = Path(path).read_bytes().split(b"\n")
    last = max((number for number, text in enumerate(raw) if text.strip(b"\0 \r")), default=-1)
    for number, text in enumerate(raw):
        if not text.strip(b"\0 \r"):
            continue
        line = parse_line(text)
        if line is not None:
            lines.append(line)
        elif number != last:
            raise ValueError(
                f"{path}, line {number + 1} is damaged: {text[:60]!r}; remove that line to go on"
            )
    return lines


def parse_line(text: bytes) -> dict[str, Any] | None:
    """The line as a dict, or None when it is not a whole line of metrics."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if isinstance(line, dict) and isinstance(line.get("kind"), str):
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            return line
    return None


def drop_half_line(path: Path) -> None:
    """Cut what follows the last whole line; a whole line that lacks its newline gets it."""
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        if not tail:
            return
        if parse_line(tail) is not None:
            file.write(b"\n")
        else:
            log.warning("dropped a half-written last line of %s (%d bytes)", path, len(tail))
            file.truncate(end)


def encode_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The lines as the file holds them, each with its newline."""
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def last_time(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training up to the last of these lines; 0 when there is none."""
    times = (line.get("time_s") for line in lines)
    return max((float(t) for t in times if isinstance(t, int | float)), default=0.0)


def plain_value(value: object, name: str, non_finite: dict[str, str]) -> Any:
    """The value in JSON's types; a number that is not finite becomes None and is noted."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {str(k): plain_value(v, f"{name}.{k}", non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(v, f"{name}.{i}", non_finite) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return plain_value(item(), name, non_finite)
    raise TypeError(
        f"metric {name!r} is {type(value).__name__}; allowed: number, string, boolean, None, "
        "a 0-dimensional tensor, or mappings and sequences of these"
    )
