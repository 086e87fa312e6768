"""What the benchmarks share: the machine's description, turns and medians, tables, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "ray", "deepspeed", "faiss-cpu", "transformers")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one quantity.

    Attributes:
        median, low, high: of all of them.
        count: how many.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up at least one value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("nothing was measured; ask for more repetitions or steps")
        return cls(
            median=statistics.median(values), low=min(values), high=max(values), count=len(values)
        )

    def shown(self, digits: int = 2) -> str:
        """The median, and the range in brackets where there are several."""
        if self.count == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def spread_of_ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratios of measurements taken in the same turn, which a busy machine distorts least."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turn_by_turn(
    calls: Mapping[str, Callable[[], T]], *, repeats: int, warmup: int = 1
) -> dict[str, list[T]]:
    """Call each in turn, several times over, so that all meet the same moods of the machine.

    Args:
        calls: by name; who comes first changes from turn to turn.
        repeats: turns whose results are kept; warmup: turns before them.

    Returns:
        What each call returned, by name, in the order of the turns.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            result = calls[name]()
            if turn >= 0:
                results[name].append(result)
    return results


def in_fresh_process(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a new process that ends afterwards; blocks.

    Raises:
        Whatever it raises; BrokenProcessPool: the process died.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args, **kwargs).result()


def peak_resident_bytes() -> int:
    """The most memory that this process ever held resident.

    Raises:
        OSError: the system does not tell (only Linux does, in /proc).
    """
    # Not getrusage: what it tells is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures depend on beside the program: hardware, versions, load, date."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": psutil.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(psutil.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe_machine(facts: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({facts['threads']} threads, "
        f"{facts['usable'] or 'all'} usable), {facts['ram_gib']} GiB, {facts['system']}, load "
        f"{facts['load']} at the start; Python {facts['python']}, {packages}; "
        f"commit {facts['commit']}, {facts['date']}"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headers), line(rule), *map(line, rows)])


def between_markers(text: str, new: str, begin: str, end: str) -> str:
    """The document with what is between its markers replaced.

    Raises:
        ValueError: it does not have each marker once, in that order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document must hold {begin} and then {end}, each once")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the script's docstring as its help, and --json."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures and the machine there, too"
    )
    return parser


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def begin() -> dict[str, Any]:
    """Describe the machine, before the load is the benchmark's own, and print it."""
    facts = machine()
    print(describe_machine(facts), flush=True)
    return facts


def finish(
    path: Path | None, facts: Mapping[str, Any], arguments: argparse.Namespace, figures: object
) -> None:
    """Write the figures where --json says; dataclasses, mappings and lists of plain values."""
    if path is None:
        return
    whole = {"machine": facts, "arguments": vars(arguments), "figures": figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, default=_plain) + "\n", encoding="utf-8")
    note(f"written: {path}")


def note(line: str) -> None:
    """Tell the person who waits; the figures alone go to standard output."""
    print(line, file=sys.stderr, flush=True)


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()
