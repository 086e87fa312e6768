"""Making a content version the one that answers, with the keys' weights as they are."""

import contextlib
from collections.abc import Callable

from memory_server.api import Memory
from memory_server.errors import LiveEpochChanged, UnknownEpoch

SEAL_TIMEOUT_S = 600.0


def show_content(
    memory: Memory,
    version: str,
    *,
    timeout_s: float = SEAL_TIMEOUT_S,
    is_newer: Callable[[str], bool] | None = None,
) -> int:
    """Stage, seal and activate a content version, and release the one before; blocks.

    When this returns every search that names no epoch reflects the version. Entries that did not
    change keep their keys. Several may do so at once: with `is_newer` none undoes what another
    has built upon it.

    Args:
        is_newer: tells of the live content whether it was made from `version`, so that showing
            `version` would undo it; then there is nothing to do.

    Returns:
        The epoch that is live now.

    Raises:
        RefreshFailed: it could not be staged; the old one goes on serving. UnknownVersion: the
            store has none of this name. TimeoutError: not sealed in time; it is released.
    """
    live = memory.info()
    if is_newer is not None and is_newer(live.content_version):
        return live.epoch
    epoch = memory.stage(encoder_step=live.encoder_step, content_version=version)
    try:
        memory.wait_sealed(epoch, timeout_s)
        while True:
            try:
                now = memory.activate(epoch, expected_live=live.epoch)
                break
            except LiveEpochChanged:
                live = memory.info()
                if is_newer is not None and is_newer(live.content_version):
                    memory.release(epoch)
                    return live.epoch
    except BaseException:
        _release(memory, epoch)
        raise
    _release(memory, live.epoch)
    return now


def _release(memory: Memory, epoch: int) -> None:
    with contextlib.suppress(UnknownEpoch):  # someone else released it already
        memory.release(epoch)
