"""Helpers that every client shares: waiting for a seal, and putting entries in the order asked."""

import time
from collections.abc import Callable, Sequence

from memory_server.api import Entry, StageStatus
from memory_server.errors import RefreshFailed, UnknownEntry

FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1


def wait_until_sealed(staging: Callable[[int], StageStatus], epoch: int, timeout_s: float) -> None:
    """Poll until the epoch is sealed.

    Raises:
        RefreshFailed: it failed; says why. TimeoutError: not sealed in time.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = FIRST_PAUSE_S
    while True:
        status = staging(epoch)
        if status.state == "sealed":
            return
        if status.state == "failed":
            raise RefreshFailed(f"epoch {epoch} could not be staged: {status.error}")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(
                f"epoch {epoch} is not sealed after {timeout_s:g} s ({status.done} of "
                f"{status.total} entries encoded); wait longer, or release it"
            )
        time.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)


def in_order(ids: Sequence[int], found: Sequence[Entry]) -> list[Entry]:
    """The entries in the order of `ids`.

    Raises:
        UnknownEntry: names the ids that were not found.
    """
    by_id = {entry.id: entry for entry in found}
    unknown = [int(entry_id) for entry_id in ids if int(entry_id) not in by_id]
    if unknown:
        error = UnknownEntry(
            f"{len(unknown)} of {len(ids)} ids are not live entries: "
            f"{', '.join(str(i) for i in unknown[:5])}{', …' if len(unknown) > 5 else ''}"
        )
        error.ids = tuple(unknown)
        raise error
    return [by_id[int(entry_id)] for entry_id in ids]
