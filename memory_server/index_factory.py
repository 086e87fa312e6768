"""From the settings to the index of one epoch."""

from memory_server.flat_index import FlatIndex
from memory_server.index import Index, IndexInput, IndexSettings, RecentQueries


def check_index(settings: IndexSettings, *, key_width: int | None = None) -> None:
    """Refuse, before any work, an index that cannot be built.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    if settings.kind != "flat":
        raise ValueError(f"index={settings.kind!r} is not known; allowed: flat")


def build_index(
    settings: IndexSettings,
    rows: IndexInput,
    *,
    previous: Index | None = None,
    recent_queries: RecentQueries | None = None,
) -> Index:
    """Build the index of an epoch that is being staged.

    Args:
        previous: the index of the newest sealed epoch, whose trained parts may be used again.
        recent_queries: what was searched lately, to measure recall on before anyone searches it.
    """
    return FlatIndex(rows)
