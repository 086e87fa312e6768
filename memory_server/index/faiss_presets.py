"""Which FAISS index a block of so many keys gets: a preset, or any factory string.

* `ivf`: many lists of similar keys as 8-bit codes, of which a few are scanned. The fastest, where
  queries look like the keys.
* `pq`: few lists of keys as 4-bit product codes, of which more are scanned. Small, trained in a
  second, filled in a few, and it minds less what queries look like.

How many lists are scanned is not part of it: what the searches' own queries need is measured
(search_effort.py), unless the user gave the search parameters.
"""

import math
import re
from dataclasses import dataclass

from memory_server.index.base import IndexSettings
from memory_server.index.search_effort import Effort

SMALLEST_BLOCK = 20_000  # rows; fewer are searched exactly in a few tenths of a millisecond
MAX_EXTRA_CANDIDATES = 2_000
EXTRA_CANDIDATES = 5  # beyond k, whatever is measured
CODE_COST, SHORT_CODE_COST, CANDIDATE_COST = 1.0, 1 / 20, 4.0  # measured at 128 numbers a key
# Beyond these shares of all lists exact search is about as fast.
MOST_LISTS, MOST_SHORT_CODE_LISTS = 1 / 32, 1 / 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one block is indexed.

    Attributes:
        factory: for faiss.index_factory.
        search: for faiss.ParameterSpace; where the effort is not measured, all there is.
        effort: how much is looked at before it is measured.
        lists: inverted lists that there are; 0: none, or they are not counted.
        short_codes: whether rows are scanned as 4-bit codes.
        most_lists: as many lists a measured effort may scan; 0: the search parameters stay as
            they are.
    """

    factory: str
    search: str
    effort: Effort
    lists: int = 0
    short_codes: bool = False
    most_lists: int = 0

    def candidates(self, k: int, effort: Effort) -> int:
        """Rows to propose for the k best; long answers need fewer for each of their entries."""
        extra = (effort.candidates_per_hit - 1) * k
        return k + min(extra, 16 * k + MAX_EXTRA_CANDIDATES) + EXTRA_CANDIDATES

    def cost(self, effort: Effort, *, rows: int, k: int) -> float:
        """What an effort takes, in 8-bit codes that are scanned; to compare efforts by."""
        scanned = rows * min(effort.lists or 0, self.lists) / max(1, self.lists)
        code = SHORT_CODE_COST if self.short_codes else CODE_COST
        return scanned * code + self.candidates(k, effort) * CANDIDATE_COST


def recipe_for(settings: IndexSettings, *, rows: int, width: int) -> Recipe:
    """The recipe of a block of `rows` keys of `width` numbers.

    A preset's size is rounded to a power of two, so that blocks of like sizes can hand their
    trained parts on.
    """
    if settings.kind == "ivf":
        # 8-bit lists take a quarter of the bytes of "Flat" lists, and are scanned no slower.
        factory = f"IVF{_power_of_two(4 * math.sqrt(rows))},SQ8"
        return _recipe(settings, factory, lists_at_first=8, candidates_per_hit=4)
    if settings.kind == "pq":
        lists = _power_of_two(math.sqrt(rows) / 4)
        factory = f"IVF{lists},PQ{_subvectors(width)}x4fs"
        return _recipe(settings, factory, lists_at_first=max(1, lists // 8), candidates_per_hit=100)
    lossless = settings.kind.endswith("Flat")
    return _recipe(
        settings, settings.kind, lists_at_first=1, candidates_per_hit=1 if lossless else 20
    )


def _recipe(
    settings: IndexSettings, factory: str, *, lists_at_first: int, candidates_per_hit: int
) -> Recipe:
    """Search parameters that the user gave are obeyed; else lists are scanned as measured."""
    lists = 0 if settings.search else inverted_lists(factory)
    short_codes = "x4fs" in factory
    share = MOST_SHORT_CODE_LISTS if short_codes else MOST_LISTS
    return Recipe(
        factory=factory,
        search=settings.search,
        effort=Effort(
            lists=min(lists_at_first, lists) if lists else None,
            candidates_per_hit=candidates_per_hit,
        ),
        lists=lists,
        short_codes=short_codes,
        most_lists=max(lists_at_first, math.ceil(lists * share)) if lists else 0,
    )


def inverted_lists(factory: str) -> int:
    """The inverted lists of a factory string, such as IVF4096 or IVF64k_HNSW32; 0: it has none."""
    found = re.search(r"(?:^|,)IVF(\d+)([kM]?)(?:[_(,]|$)", factory)
    if found is None:
        return 0
    return int(found[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found[2]]


def _power_of_two(number: float) -> int:
    return int(2 ** max(0, round(math.log2(max(number, 1)))))


def _subvectors(width: int) -> int:
    """Two numbers to a 4-bit code: a quarter of a byte per number."""
    return next((width // size for size in range(2, width) if width % size == 0), 1)
