"""Making a content version the one that answers, with the keys' weights as they are."""

from memory_server.api import Memory

SEAL_TIMEOUT_S = 600.0


def show_content(memory: Memory, version: str, *, timeout_s: float = SEAL_TIMEOUT_S) -> None:
    """Stage, seal and activate a content version, and release the one before; blocks.

    When this returns every search that names no epoch reflects the version. Entries that did not
    change keep their keys.

    Raises:
        RefreshFailed: it could not be staged; the old one goes on serving. UnknownVersion: the
            store has none of this name. TimeoutError: not sealed in time; it is released.
    """
    live = memory.info()
    epoch = memory.stage(encoder_step=live.encoder_step, content_version=version)
    try:
        memory.wait_sealed(epoch, timeout_s)
    except BaseException:
        memory.release(epoch)
        raise
    memory.activate(epoch)
    memory.release(live.epoch)
