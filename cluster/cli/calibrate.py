"""`pluglm calibrate`: what this machine can do, measured, for `pluglm plan`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.text import pairs, size, table

if TYPE_CHECKING:
    from cluster.planning.constants import Constants, Figure


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU where there is one)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="about what repeating may take (default: 20); below 20 sizes are smaller, too",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of the CPU; fewer than there are cores where other work runs (default: torch's own)",
    )
    parser.add_argument("--ray", action="store_true", help="start Ray and measure its calls, too")


def _run(options: argparse.Namespace) -> int:
    if not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds {options.seconds}: give a number above 0")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise UsageError(f"--out {options.out}: there is no directory {options.out.parent}")
    import torch

    from cluster.planning.measure import calibrate

    constants = calibrate(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seconds=options.seconds,
        directory=Path.cwd(),
        with_ray=options.ray,
        threads=options.threads,
        say=lambda line: print(f"measuring {line}", file=sys.stderr, flush=True),
    )
    if options.out is not None:
        options.out.write_text(constants.to_json(), encoding="utf-8")
    if options.json:
        print(constants.to_json(), end="")
    else:
        print(describe_constants(constants))
    return 0


def describe_constants(constants: Constants) -> str:
    """The figures for a person."""
    keys, disk = constants.keys, constants.disk
    rows = [
        ("device", f"{constants.name}, {size(constants.device_bytes)}"),
        ("processor", f"{constants.cpu}, {constants.threads} threads"),
        ("measured", f"{constants.measured}, torch {constants.torch}"),
        ("copy on the device", _bytes_per_s(constants.device_copy)),
        ("copy on the host", _bytes_per_s(constants.host_copy)),
    ]
    if constants.copies is not None:
        copies = constants.copies
        rows += [
            ("to the GPU, pinned", _bytes_per_s(copies.to_device_pinned)),
            ("to the GPU, pageable", _bytes_per_s(copies.to_device_pageable)),
            ("from the GPU, pinned", _bytes_per_s(copies.to_host_pinned)),
            ("from the GPU, pageable", _bytes_per_s(copies.to_host_pageable)),
        ]
    for product in constants.products:
        rows += [
            (f"{product.dtype} products", _range(product.square, 1e-12, "TFLOP/s")),
            (f"{product.dtype} keys x queries", _range(product.skinny, 1e-12, "TFLOP/s")),
        ]
    rows += [
        ("a small operation", _range(constants.launch, 1e6, "µs")),
        ("the same, with its result", _range(constants.round_trip, 1e6, "µs")),
        (f"keys directly, H={keys.hidden}", _range(keys.direct, 1, "entries/s")),
        ("keys by tables", _range(keys.tabled, 1, "entries/s")),
        ("building the tables", _range(keys.build, 1e3, "ms")),
        (f"refresh of {keys.refresh_entries:,}", _range(keys.refresh, 1e3, "ms")),
        ("writing to disk", _bytes_per_s(disk.write)),
    ]
    if disk.read is not None:
        rows.append(("reading from disk", _bytes_per_s(disk.read)))
    if constants.ray is not None:
        rows += [
            ("a call through Ray", _range(constants.ray.call, 1e3, "ms")),
            ("an array through Ray", _bytes_per_s(constants.ray.transfer)),
        ]
    flat = [
        [
            search.key_dtype,
            f"{search.entries:,}",
            str(search.batch),
            _range(search.seconds, 1e3, "ms"),
            f"{search.bytes_per_s.median / 1e9:,.1f}",
        ]
        for search in constants.flat
    ]
    flat += [
        [
            f"{index.kind} ({index.factory})",
            f"{index.entries:,}",
            str(index.batch),
            _range(index.seconds, 1e3, "ms"),
            f"recall {index.recall:.2f}, built in {index.build.median:,.1f} s, "
            f"refilled in {index.refill.median:,.1f}",
        ]
        for index in constants.approximate
    ]
    head = ("search of keys", "entries", "batch", "time", "GB/s of keys")
    shown = [pairs(rows), table(head, flat, most=(30, 14, 6, 44, 46), right=(1, 2, 4))]
    shown += [f"not measured: {reason}" for reason in constants.left_out]
    return "\n\n".join(shown)


def _bytes_per_s(figure: Figure) -> str:
    return _range(figure, 1e-9, "GB/s")


def _range(figure: Figure, scale: float, unit: str) -> str:
    """The median, and the range in brackets."""
    low, middle, high = (_digits(scale * n) for n in (figure.low, figure.median, figure.high))
    return f"{middle} {unit} ({low} to {high})"


def _digits(number: float) -> str:
    """Three digits that count."""
    places = max(0, 2 - math.floor(math.log10(number)))
    return f"{number:,.{places}f}"


CALIBRATE = Command(
    name="calibrate",
    summary="measure what this machine can do",
    description="""\
Measure this machine's constants for `pluglm plan`: copies on the device, on the host and
between them, matrix products, small operations, keys of entries, a refresh, exact search
and the indexes of FAISS, the disk of the working directory, and with --ray Ray's calls.
Each is a median with its range. Takes less than a minute; nothing else should run.""",
    example="""\
pluglm calibrate --out machine.json
pluglm calibrate --device cpu --seconds 5 --json""",
    configure=_arguments,
    run=_run,
)
