"""Keeping account of searches that a memory with lost shards answered only in part."""

from __future__ import annotations

from collections.abc import Callable

from memory_server.api import Retrieved


class LostShards:
    """Counts such searches, and tells when they begin and end."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Start with a memory of which nothing is missing.

        Args:
            tell: receives a line when shards go missing, when other ones do, and when all are back.
        """
        self._tell = tell
        self._missing: tuple[int, ...] = ()
        self._since_they_went = self._since_taken = 0

    def note(self, found: Retrieved) -> None:
        """Look at a search's reply."""
        missing = found.missing_shards
        if missing and missing != self._missing:
            names = ", ".join(str(shard) for shard in missing)
            self._tell(
                f"shard {names} of the memory does not answer: searches go on without its entries "
                '(memory.on_lost_shard = "degrade")'
            )
        if self._missing and not missing:
            self._tell(
                "all shards of the memory answer again, after "
                f"{self._since_they_went} searches without"
            )
            self._since_they_went = 0
        self._missing = missing
        if missing:
            self._since_they_went += 1
            self._since_taken += 1

    def take(self) -> int:
        """Searches that were answered in part since the last call."""
        taken, self._since_taken = self._since_taken, 0
        return taken
