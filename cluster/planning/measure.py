"""All measurements of `pluglm calibrate`, one after the other, within a time."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from cluster.planning.constants import ApproximateIndex, Constants, FlatSearch
from cluster.planning.measure_device import (
    copies,
    copy_rate,
    dtypes_of,
    products,
    small_operations,
)
from cluster.planning.measure_host import disk, ray_figures
from cluster.planning.measure_memory import (
    EncodedWorld,
    approximate_search,
    flat_search,
    key_rates,
    make_world,
)
from cluster.planning.timing import Clock
from memory_server.keys.key_codes import KeyDtype

MEASUREMENTS = 40  # about so many share the time
FULL_SECONDS = 20.0  # from which on sizes are whole
DEFAULT_SECONDS = 20.0
MIB = 1 << 20
FLAT_DTYPES: tuple[KeyDtype, ...] = ("float32", "bfloat16", "int8")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each measurement works on."""

    copied: int
    side: int
    product_rows: int
    product_batch: int
    entries: tuple[int, int]
    batches: tuple[int, ...]
    direct: int
    hidden: int
    tokens: int
    vocabulary: int
    width: int
    approximate: int
    disk: int

    @classmethod
    def of(cls, device: torch.device, *, seconds: float, free: int) -> Sizes:
        """For a device with so many free bytes; smaller than usual if there is little time."""
        share = min(1.0, seconds / FULL_SECONDS)
        gpu = device.type == "cuda"

        def rows(most: int, bytes_each: int) -> int:
            # A power of two, of which four fit beside each other.
            fitting = min(most * share, free / 4 / bytes_each)
            return int(2 ** max(8, math.floor(math.log2(fitting))))

        entries = rows(1 << 21 if gpu else 1 << 18, 1024)
        side = rows(1 << 13 if gpu else 1 << 10, 1 << 16)
        return cls(
            copied=rows(1 << 30 if gpu else 1 << 28, 1),
            side=side,
            product_rows=rows(1 << 19 if gpu else 1 << 16, 4096),
            product_batch=512 if gpu else 64,
            entries=(max(256, entries // 8), entries),
            batches=(1, 512) if gpu else (1, 64),
            direct=rows(1 << 14 if gpu else 1 << 10, 1 << 18),
            hidden=128 if share < 1 else 768 if gpu else 256,
            tokens=64,
            vocabulary=30_522 if share == 1 else 2_000,
            width=128,
            approximate=min(entries, 1 << 17),
            disk=rows(1 << 28, 1),
        )


def calibrate(
    device: str,
    *,
    seconds: float = DEFAULT_SECONDS,
    directory: Path,
    with_ray: bool = False,
    threads: int | None = None,
    processor_time: bool = False,
    say: Say = lambda line: None,
) -> Constants:
    """Measure this machine; blocks.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        seconds: about what repeating takes in all; setting up comes on top. Below 20, sizes and
            the encoder are smaller, too.
        directory: whose disk is measured; a store is written there meanwhile.
        with_ray: start Ray, too.
        threads: that torch computes with on the CPU; None: as it is set up. Where other work runs
            beside, fewer than there are cores: threads that wait for each other are slow then.
        processor_time: see `Clock`; of a CPU with one thread.
        say: told what is measured next.

    Raises:
        ValueError: there is no such device, or no Ray where it is asked for.
    """
    where = _checked(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measured(where, seconds, directory, with_ray, processor_time, say)
    finally:
        torch.set_num_threads(before)


def _measured(
    where: torch.device,
    seconds: float,
    directory: Path,
    with_ray: bool,
    processor_time: bool,
    say: Say,
) -> Constants:
    free = _free(where)
    sizes = Sizes.of(where, seconds=seconds, free=min(free, psutil.virtual_memory().available))
    each = seconds / MEASUREMENTS
    clock = Clock(device=where, seconds_each=each, processor_time=processor_time)
    host = Clock(device=torch.device("cpu"), seconds_each=clock.seconds_each)
    left_out: list[str] = []
    with torch.no_grad():
        say("copies, matrix products, small operations")
        device_copy = copy_rate(clock, where, sizes.copied)
        host_copy = (
            device_copy
            if where.type == "cpu"
            else copy_rate(host, host.device, min(sizes.copied, 256 * MIB))
        )
        between = copies(clock, min(sizes.copied, 256 * MIB)) if where.type == "cuda" else None
        measured_products = tuple(
            products(
                clock,
                dtype,
                side=sizes.side,
                rows=sizes.product_rows,
                batch=sizes.product_batch,
            )
            for dtype in dtypes_of(where)
        )
        launch, round_trip = small_operations(clock)
        say(f"keys of {sizes.entries[1]:,} entries, directly, by tables, and a refresh")
        world = make_world(
            where,
            entries=sizes.entries[1],
            hidden=sizes.hidden,
            tokens=sizes.tokens,
            width=sizes.width,
            vocabulary=sizes.vocabulary,
        )
        keys = key_rates(clock, world, directory, direct=sizes.direct, tabled=sizes.entries[1])
        encoded = EncodedWorld(world, where)
        flat = _flat(clock, encoded, sizes, say)
        approximate = _approximate(clock, encoded, sizes, left_out, say)
    say(f"the disk of {directory}")
    rates, why = disk(host, directory, sizes.disk)
    left_out += [why] if why else []
    if with_ray:
        say("calls through Ray, which is started")
    ray = ray_figures(host) if with_ray else None
    return Constants(
        device=where.type,
        name=device_name(where),
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        device_bytes=_total(where),
        host_bytes=int(psutil.virtual_memory().total),
        device_copy=device_copy,
        host_copy=host_copy,
        copies=between,
        products=measured_products,
        launch=launch,
        round_trip=round_trip,
        flat=flat,
        approximate=approximate,
        keys=keys,
        disk=rates,
        ray=ray,
        left_out=tuple(left_out),
    )


def _flat(clock: Clock, world: EncodedWorld, sizes: Sizes, say: Say) -> tuple[FlatSearch, ...]:
    found: list[FlatSearch] = []
    for dtype in FLAT_DTYPES:
        for entries in sizes.entries:
            say(f"exact search of {entries:,} keys held as {dtype}")
            batches = list(sizes.batches)
            found += flat_search(clock, world, entries=entries, batches=batches, key_dtype=dtype)
    return tuple(found)


def _approximate(
    clock: Clock, world: EncodedWorld, sizes: Sizes, left_out: list[str], say: Say
) -> tuple[ApproximateIndex, ...]:
    found: list[ApproximateIndex] = []
    for kind in ("ivf", "pq"):
        for entries in (sizes.approximate // 4, sizes.approximate):
            say(f"the index {kind} of {entries:,} keys")
            batch = sizes.batches[-1]
            index = approximate_search(clock, world, kind=kind, entries=entries, batch=batch)
            if isinstance(index, str):
                left_out.append(index)
                break
            found.append(index)
    return tuple(found)


def _checked(device: str) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device {device!r}; allowed: "cpu", "cuda" or "cuda:N"') from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f'device {device!r}; allowed: "cpu", "cuda" or "cuda:N"')
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}, but torch sees {torch.cuda.device_count()} GPUs here; "
            "take --device cpu"
        )
    return where


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor, as Linux tells, elsewhere as Python does."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"
