"""Finding ids in columns of ids: int64, in any order but mostly ascending."""

import numpy as np

from memory_server.store.segments import Int64Array


def rows_with(ids_N: Int64Array, wanted_M: Int64Array) -> Int64Array:
    """The rows whose id is wanted, ascending.

    Args:
        ids_N: in any order, repeats allowed. Ascending ones are searched instead of scanned, so
            that finding a thousand of ten million takes no longer than one look at their order.
        wanted_M: ascending, unique.
    """
    if not len(ids_N) or not len(wanted_M):
        return np.empty(0, dtype=np.int64)
    if bool(np.all(ids_N[1:] >= ids_N[:-1])):
        first = np.searchsorted(ids_N, wanted_M, side="left")
        last = np.searchsorted(ids_N, wanted_M, side="right")
        counts = last - first
        # Each run [first, last), laid end to end.
        starts = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return (starts + np.arange(counts.sum())).astype(np.int64)
    inside = np.flatnonzero((ids_N >= wanted_M[0]) & (ids_N <= wanted_M[-1]))
    near = ids_N[inside]
    position = np.minimum(np.searchsorted(wanted_M, near), len(wanted_M) - 1)
    found: Int64Array = inside[wanted_M[position] == near]
    return found


def shared_ids(a_N: Int64Array, b_M: Int64Array) -> Int64Array:
    """The ids that are in both, ascending and unique; each is unique in itself."""
    few, many = (a_N, b_M) if len(a_N) <= len(b_M) else (b_M, a_N)
    return np.sort(many[rows_with(many, np.sort(few))])
