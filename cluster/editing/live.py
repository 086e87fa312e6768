"""Having a running memory answer from a commit, also when several tools edit at once."""

from __future__ import annotations

from memory_server.api import Memory
from memory_server.errors import MemoryServerError, TokenizerMismatch, UnknownVersion
from memory_server.store.store import Store
from memory_server.switch import show_content

SEAL_TIMEOUT_S = 24 * 3600.0


class NotYetLive(MemoryServerError):
    """The commit is made, but the server goes on answering from the version before."""


def check_same_memory(store: Store, memory: Memory) -> None:
    """Refuse a server that does not serve this store, before anything is committed to it.

    Raises:
        TokenizerMismatch, UnknownVersion: it serves another store.
    """
    info = memory.info()
    if info.tokenizer_fingerprint != store.meta.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"the server's memory was made with the tokenizer {info.tokenizer_fingerprint}, the "
            f"store {store.location} with {store.meta.tokenizer_fingerprint}; give the store that "
            "it serves"
        )
    try:
        store.manifest(info.content_version)
    except UnknownVersion as error:
        raise UnknownVersion(
            f"the server answers from version {info.content_version}, which the store "
            f"{store.location} does not have; give the store that it serves"
        ) from error


def show_version(
    store: Store,
    memory: Memory,
    version: str,
    *,
    exactly: bool = False,
    timeout_s: float = SEAL_TIMEOUT_S,
) -> int:
    """Have every later reply reflect a commit; blocks until it does, and returns the live epoch.

    Args:
        exactly: answer from this very version, also if a later one, which holds it, is live.
            Otherwise that is left as it is: another tool has shown its own commit meanwhile.

    Raises:
        NotYetLive: the server could not stage it; says why, and how to go on.
    """

    def is_shown(live: str) -> bool:
        return live == version if exactly else holds(store, live, version)

    try:
        return show_content(memory, version, timeout_s=timeout_s, is_newer=is_shown)
    except (MemoryServerError, TimeoutError) as error:
        raise NotYetLive(
            f"version {version} is committed, but the server does not answer from it yet "
            f"({' '.join(str(error).split()).rstrip('.')}); it goes on with the version before: "
            "put right what is said, then `pluglm memory show`, or roll back"
        ) from error


def holds(store: Store, version: str, commit: str) -> bool:
    """Whether a version is this commit, or comes after it."""
    if version == commit:
        return True
    # Mostly the version is the commit's parent, which is seen at once.
    if any(entry.version == version for entry in store.log(start=commit)):
        return False
    return any(entry.version == commit for entry in store.log(start=version))
