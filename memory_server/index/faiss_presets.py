"""Which FAISS index a block of so many keys gets: a preset, or any factory string.

* `ivf`: many lists of similar keys as 8-bit codes, of which a few are scanned. The fastest, where
  queries look like the keys.
* `pq`: few lists of keys as 4-bit product codes, of which an eighth is scanned. Small, trained in a
  second, filled in a few, and it minds less what queries look like: with all lists scanned
  (`nprobe` of a quarter of the square root of the rows), hardly at all.
"""

import math
from dataclasses import dataclass

from memory_server.index.base import IndexSettings

SMALLEST_BLOCK = 20_000  # rows; fewer are searched exactly in a few tenths of a millisecond
MAX_EXTRA_CANDIDATES = 2_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one block is indexed.

    Attributes:
        factory: for faiss.index_factory.
        search: for faiss.ParameterSpace.
        candidates_per_hit: how many rows are proposed, and scored by their exact keys, for each
            entry that is wanted.
    """

    factory: str
    search: str
    candidates_per_hit: int

    def candidates(self, k: int) -> int:
        """Rows to propose for the k best; long answers need fewer for each of their entries."""
        return k + min((self.candidates_per_hit - 1) * k, 16 * k + MAX_EXTRA_CANDIDATES) + 16


def recipe_for(settings: IndexSettings, *, rows: int, width: int) -> Recipe:
    """The recipe of a block of `rows` keys of `width` numbers.

    A preset's size is rounded to a power of two, so that blocks of like sizes can hand their
    trained parts on.
    """
    if settings.kind == "ivf":
        # 8-bit lists take a quarter of the bytes of "Flat" lists, and are scanned no slower.
        return Recipe(
            factory=f"IVF{_power_of_two(4 * math.sqrt(rows))},SQ8",
            search=settings.search or "nprobe=8",
            candidates_per_hit=4,
        )
    if settings.kind == "pq":
        lists = _power_of_two(math.sqrt(rows) / 4)
        return Recipe(
            factory=f"IVF{lists},PQ{_subvectors(width)}x4fs",
            search=settings.search or f"nprobe={max(1, lists // 8)}",
            candidates_per_hit=100,
        )
    lossless = settings.kind.endswith("Flat")
    return Recipe(
        factory=settings.kind, search=settings.search, candidates_per_hit=1 if lossless else 20
    )


def _power_of_two(number: float) -> int:
    return int(2 ** max(0, round(math.log2(max(number, 1)))))


def _subvectors(width: int) -> int:
    """Two numbers to a 4-bit code: a quarter of a byte per number."""
    return next((width // size for size in range(2, width) if width % size == 0), 1)
