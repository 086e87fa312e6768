"""Whether what one rank writes is seen by the others: asked before hours are spent."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.distributed import broadcast_integers, first_failure, sum_over_ranks
from trainer.errors import TrainingError

# A network filesystem may remember for a minute that a file was not there.
PATIENCE_S = 75.0
_LOOK_EVERY_S = 0.1


@contextmanager
def driver_mark(directory: Path) -> Iterator[str]:
    """The name of a file by which ranks know the driver's directory; gone behind the block.

    Raises:
        TrainingError: it cannot be written.
    """
    mark = directory / f".driver-{secrets.token_hex(8)}"
    try:
        mark.touch()
    except OSError as error:
        raise TrainingError(
            f"run.dir = {directory}: it cannot be written to ({error.strerror})"
        ) from error
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def check_shared(
    directory: Path,
    device: torch.device,
    *,
    rank: int,
    ranks: int,
    driver: str = "",
    patience_s: float = PATIENCE_S,
) -> None:
    """Refuse a directory that is another one on another rank's node; collective, blocks.

    Args:
        directory: exists on rank 0.
        device: of the process group's tensors.
        driver: the driver's `driver_mark`, which rank 0 must see, too; empty: rank 0 is the driver.
        patience_s: how long a rank looks for what rank 0 has written.

    Raises:
        TrainingError: on every rank alike; names those that do not see it.
    """
    (token,) = broadcast_integers([secrets.randbits(62)], device)
    mark = directory / f".shared-{token:x}"
    refused = None
    try:
        if rank == 0:
            mark.touch()
            if driver and not _appears(directory / driver, patience_s):
                refused = (
                    f"run.dir = {directory}: rank 0 does not see what the driver writes there; it "
                    "must be one directory, on a filesystem that the driver's node and all "
                    "trainers' nodes mount at this path"
                )
    except OSError as error:
        refused = f"run.dir = {directory}: it cannot be written to ({error.strerror})"
    refused = first_failure(refused, device)
    if refused is not None:
        mark.unlink(missing_ok=True)
        raise TrainingError(refused)
    try:
        seen = torch.zeros(ranks, device=device)
        seen[rank] = float(_appears(mark, patience_s))
        missing = (sum_over_ranks(seen) == 0).nonzero().flatten().tolist()
    finally:
        if rank == 0:
            mark.unlink(missing_ok=True)
    if missing:
        verb = "do" if len(missing) > 1 else "does"
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        raise TrainingError(
            f"run.dir = {directory}: {who} of {ranks} {verb} not see what rank 0 writes there; it "
            "must be one directory, on a filesystem that all trainers' nodes mount at this path"
        )


def _appears(path: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True
