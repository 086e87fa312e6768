"""The memory's typed errors: what went wrong, so that a caller can act on the type.

Every message says what was given, what is allowed and what to do. All of them survive pickling,
because a shard in another process raises them too.
"""


class MemoryServerError(Exception):
    """Anything the memory refuses or cannot do, apart from a bad argument (`ValueError`)."""


class StoreError(MemoryServerError):
    """The durable files are not what they should be."""


class StoreNotFound(StoreError):
    """There is no store at the given path."""


class StoreDamaged(StoreError):
    """A file of the store is missing, truncated or altered; the message names the file."""


class StoreConflict(StoreError):
    """Another writer committed first; open the new head and try again."""


class UnknownVersion(StoreError):
    """The store has no such content version."""


class TokenizerMismatch(MemoryServerError):
    """Entries were tokenised by another tokenizer than the one expected."""


class DuplicateEntry(MemoryServerError):
    """An entry id would occur twice in one content version."""


class UnknownEntry(MemoryServerError):
    """No live entry has this id; `ids` are all of those that were asked for in vain."""

    ids: tuple[int, ...] = ()


class UnknownEpoch(MemoryServerError):
    """The memory does not hold this epoch: never staged, failed, or released."""


class EpochNotSealed(MemoryServerError):
    """The epoch exists but is not ready to answer on every shard."""


class EpochInUse(MemoryServerError):
    """The epoch answers searches, so it cannot be released."""


class LiveEpochChanged(MemoryServerError):
    """Another client switched the memory first; look at what is live and decide again."""


class RefreshFailed(MemoryServerError):
    """An epoch could not be staged; the live one goes on. The message carries the reason."""


class NotEnoughMemory(RefreshFailed):
    """An epoch would not fit beside the live one; says what it needs and what is free."""


class ShardLost(MemoryServerError):
    """A shard did not answer before the deadline; the message names it."""


class ShardRestoring(MemoryServerError):
    """A shard that restarted is still building its epochs again; ask once more in a moment."""


class CoordinatorLost(MemoryServerError):
    """The memory's coordinator does not answer, so epochs cannot be staged or switched."""


class MemoryClosed(MemoryServerError):
    """The memory was closed."""


class BadMessage(MemoryServerError):
    """Bytes that are not a message of the search protocol, or not one that is allowed."""


class Overloaded(MemoryServerError):
    """A shard's queue is full: ask again later, ask less at a time, or add replicas."""


class AccessRefused(MemoryServerError):
    """A search server refused the secret: it belongs to another memory, or to another start."""


class StoreFull(StoreError):
    """The disk has no room for a file of the store; nothing changed."""


class StoreReadOnly(StoreError):
    """The filesystem cannot create a file exclusively, so this store can only be read."""


class UnknownDomain(MemoryServerError):
    """No domain of this name is plugged, or no earlier version had it."""


class DomainPlugged(MemoryServerError):
    """The domain is plugged already; unplug it, or swap it, in the same commit."""


class StateNotFound(MemoryServerError):
    """A state directory holds no state of a memory server."""


class StateDamaged(MemoryServerError):
    """A file of a memory server's state is altered; the message names the file."""


class StateUnusable(MemoryServerError):
    """A memory server's state cannot be read or written: the disk is full, or forbids it."""
