"""What a node does beside its device: the disk of the working directory, and calls through Ray."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.planning.constants import Disk, Figure, RayFigures
from cluster.planning.timing import Clock

_PIECE = 1 << 23
_TRANSFER = 1 << 26


def disk(clock: Clock, directory: Path, bytes_: int) -> tuple[Disk, str]:
    """Write a file with an fsync, have the page cache forget it, and read it back.

    Returns:
        (the rates; why reading was not measured, or "")

    Raises:
        OSError: the directory cannot be written.
    """
    piece = os.urandom(min(_PIECE, bytes_))
    pieces = max(1, bytes_ // len(piece))
    whole = pieces * len(piece)
    with tempfile.TemporaryDirectory(prefix=".pluglm-calibrate-", dir=directory) as name:
        path = Path(name) / "file"

        def write() -> float:
            began = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(pieces):
                    file.write(piece)
                os.fsync(file.fileno())
            return time.perf_counter() - began

        written = clock.repeated(write).inverse(whole)
        if sys.platform != "linux":
            why = "reading the disk: this system cannot be told to forget what it has cached"
            return Disk(write=written, read=None), why

        def read() -> float:
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                room = bytearray(len(piece))
                began = time.perf_counter()
                while file.readinto(room):
                    pass
                return time.perf_counter() - began

        return Disk(write=written, read=clock.repeated(read).inverse(whole)), ""


def ray_figures(clock: Clock) -> RayFigures:
    """Start Ray on this machine alone, call an actor, and hand it a large array.

    Raises:
        ValueError: Ray is not installed. LaunchError: it cannot be started.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs Ray: install it, or leave --ray out") from error
    import numpy as np

    from cluster.config import ClusterConfig
    from cluster.ray_session import ray_session

    class Counter:
        def count(self, array: object) -> int:
            return len(array) if hasattr(array, "__len__") else 0

    with ray_session(ClusterConfig(object_store_mib=512), cpus=1):
        actor: Any = ray.remote(num_cpus=0)(Counter).remote()
        array = np.ones(_TRANSFER, dtype=np.uint8)
        call: Figure = clock.wall(lambda: ray.get(actor.count.remote(b"")))
        # Into the object store and out of it: what a reply that large takes.
        transfer = clock.wall(lambda: ray.get(actor.count.remote(ray.put(array))))
        ray.kill(actor)
    return RayFigures(call=call, transfer=transfer.inverse(_TRANSFER))
