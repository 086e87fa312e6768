"""From the settings to the index of one epoch. FAISS is loaded only where it is asked for."""

from collections.abc import Callable
from importlib.util import find_spec

import torch

from memory_server.index.base import Index, IndexInput, IndexSettings, RecentQueries
from memory_server.index.flat_index import FlatIndex

FLAT = "flat"
ALLOWED = (
    'allowed: flat; "ivf" or "pq"; or a FAISS factory string such as "IVF4096,Flat" or "HNSW32"'
)


def check_index(
    settings: IndexSettings,
    *,
    key_width: int | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Refuse, before any work, an index that cannot be built.

    Args:
        key_width: of the memory's keys, where it is known already.
        device: of the shards.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    if settings.kind == FLAT:
        if settings.search:
            raise ValueError(
                f'search={settings.search!r} is for FAISS; index="flat" has no search parameters'
            )
        return
    if find_spec("faiss") is None:
        raise ValueError(
            f'index={settings.kind!r} needs FAISS: install the extra cpu or gpu, or take "flat"'
        )
    from memory_server.index.faiss_build import check_faiss

    try:
        check_faiss(settings, key_width=key_width, device=torch.device(device))
    except ValueError as error:
        raise ValueError(f"{error}; {ALLOWED}") from None


def expected_index_bytes(
    settings: IndexSettings, *, rows: int, width: int, with_room: bool = False
) -> int:
    """About what an approximate index will hold for one new block beside its keys.

    Args:
        with_room: count what is taken but not used, too: what must be free for it.
    """
    if settings.kind == FLAT:
        return 0
    from memory_server.index.faiss_build import faiss_bytes

    return faiss_bytes(settings, rows=rows, width=width, with_room=with_room)


def training_bytes(settings: IndexSettings, *, rows: int, width: int) -> int:
    """What training an approximate index on one new block takes meanwhile."""
    if settings.kind == FLAT:
        return 0
    from memory_server.index.faiss_build import faiss_training_bytes

    return faiss_training_bytes(settings, rows=rows, width=width)


def build_index(
    settings: IndexSettings,
    rows: IndexInput,
    *,
    previous: Index | None = None,
    recent_queries: RecentQueries | None = None,
    check: Callable[[], None] = lambda: None,
) -> Index:
    """Build the index of an epoch that is being staged.

    Args:
        previous: the index of the newest sealed epoch, whose trained parts may be used again.
        recent_queries: what was searched lately, to measure recall on before anyone searches it.
        check: called now and then; raises to give up, as when the epoch is not wanted any more.

    Raises:
        ValueError: FAISS cannot build it from these keys.
    """
    if settings.kind == FLAT:
        return FlatIndex(rows)
    from memory_server.index.approximate_index import ApproximateIndex
    from memory_server.index.faiss_build import build_approximate

    return build_approximate(
        settings,
        rows,
        previous=previous if isinstance(previous, ApproximateIndex) else None,
        recent=recent_queries,
        check=check,
    )
