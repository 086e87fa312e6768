"""FAISS over the keys of one block, as it is searched; its parts are handed on to later epochs.

What it finds are candidates; who asks scores them by their exact keys.
"""

import threading
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.index.coarse_lists import CoarseLists
from memory_server.index.faiss_kinds import (
    has_plain_lists,
    index_bytes,
    search_parameters,
    torch_threads,
)

COARSE_QUERIES = 4  # of one search, from which on torch finds their lists
BY_QUERIES = 3  # FAISS's parallel_mode in which threads share a search's queries
ROWS_PER_QUERY = 1 << 12  # looked at where there are no lists, for the number of threads
SHORT_CODES = 4  # of 4 bits are scanned in the time of one
GPU_CANDIDATES = 2048  # FAISS selects no more on a GPU
ERROR_FLOOR = 0.01  # of the keys' variance: what is below does no harm, however it grows


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """An index without rows: coarse quantizer and codebooks, which later epochs can take over.

    Attributes:
        errors: quantisation errors over the keys' variance when it was trained, by measure.
    """

    factory: str
    template: Any
    errors: dict[str, float]

    def drift(self, errors: dict[str, float]) -> float:
        """How many times as large the errors have become; at least about 1 for like keys."""
        ratios = [
            (now + ERROR_FLOOR) / (self.errors[name] + ERROR_FLOOR)
            for name, now in errors.items()
            if name in self.errors
        ]
        return max(ratios, default=1.0)


@dataclass(frozen=True, kw_only=True)
class Filled:
    """An index that holds its rows, the same without rows, the list of each row, and its errors."""

    index: Any
    template: Any
    lists_n: npt.NDArray[np.int32] | None
    errors: dict[str, float]


class FaissBlock:
    """FAISS over exactly the rows of one block. Immutable; searches may run side by side."""

    def __init__(
        self,
        filled: Filled,
        parts: TrainedParts,
        *,
        device: torch.device,
        drift: float,
        anew: bool,
    ) -> None:
        """Take an index that holds its rows; on a GPU it is copied there."""
        self.parts = parts
        self.lists_n = filled.lists_n
        self.rows = int(filled.index.ntotal)
        self.drift = drift
        self.trained_anew = anew
        self.bytes = index_bytes(filled.index) + index_bytes(parts.template)
        self.bytes += 0 if filled.lists_n is None else filled.lists_n.nbytes
        self._turn = threading.Lock() if device.type == "cuda" else None
        self._index = filled.index
        if self._turn is not None:
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, filled.index)
        ivf = faiss.try_extract_index_ivf(filled.index)
        self._list_count = 0 if ivf is None else int(ivf.nlist)
        self._codes_per_list = 0.0
        if ivf is not None:
            short = SHORT_CODES if isinstance(ivf, faiss.IndexIVFFastScan) else 1
            self._codes_per_list = self.rows / self._list_count / short
            self._scanned_lists = min(int(ivf.nprobe), self._list_count)
        self._lists: CoarseLists | None = None
        if self._turn is None and has_plain_lists(self._index):
            self._lists = CoarseLists(_held_centroids(self._index))
            self._index.parallel_mode = BY_QUERIES
        self.most_candidates = self.rows if self._turn is None else min(self.rows, GPU_CANDIDATES)
        self.takes_selection = self._turn is None and self._try_selection()

    def selection(self, allowed_n: Tensor) -> Any:
        """What `search` takes to find only some rows; bool [rows]."""
        bits = np.packbits(allowed_n.cpu().numpy(), bitorder="little")
        return faiss.IDSelectorBitmap(bits)

    def search(
        self, queries_BQ: Tensor, count: int, selection: Any = None, lists: int | None = None
    ) -> Tensor:
        """Rows of the block that may be among the best, best first; int64 [B, count], -1 pads.

        Args:
            lists: inverted lists to scan, where there are any; None: as the recipe says.
        """
        count = min(count, self.rows)
        queries = np.ascontiguousarray(queries_BQ.cpu().numpy(), dtype=np.float32)
        with self._turn or torch_threads(self._codes(len(queries), lists)):
            # FAISS's GPU resources serve one at a time.
            if self._lists is not None and len(queries) >= COARSE_QUERIES:
                rows = self._search_lists(
                    queries, count, search_parameters(self._index, selection, lists)
                )
            elif selection is not None or lists is not None:
                parameters = search_parameters(self._index, selection, lists)
                _, rows = self._index.search(queries, count, params=parameters)
            else:  # not all of FAISS's kinds take parameters
                _, rows = self._index.search(queries, count)
        return torch.from_numpy(rows).to(queries_BQ.device)

    def _search_lists(
        self, queries: npt.NDArray[np.float32], count: int, parameters: Any
    ) -> npt.NDArray[np.int64]:
        """As FAISS's own search, but torch is quicker with products of a few queries."""
        assert self._lists is not None
        near_Bp, scores_Bp = self._lists.nearest(torch.from_numpy(queries), parameters.nprobe)
        scores = np.empty((len(queries), count), dtype=np.float32)
        rows = np.empty((len(queries), count), dtype=np.int64)
        given = (near_Bp.numpy(), scores_Bp.numpy(), scores, rows)
        near, near_scores, out_scores, out_rows = map(faiss.swig_ptr, given)
        # FAISS's wrapper takes no parameters of one search; what it wraps does.
        self._index.search_preassigned_c(
            len(queries),
            faiss.swig_ptr(queries),
            count,
            near,
            near_scores,
            out_scores,
            out_rows,
            False,
            parameters,
        )
        return rows

    def _codes(self, queries: int, lists: int | None) -> float:
        """About how many codes of 8 bits a number a search scans."""
        if not self._list_count:
            return float(queries * min(self.rows, ROWS_PER_QUERY))
        return queries * min(lists or self._scanned_lists, self._list_count) * self._codes_per_list

    def _try_selection(self) -> bool:
        everything = self.selection(torch.ones(self.rows, dtype=torch.bool))
        try:
            self.search(torch.zeros(1, self._index.d), 1, everything)
        except (RuntimeError, TypeError):
            return False
        return True


def _held_centroids(index: Any) -> Tensor:
    """A view of FAISS's own, float32 [L, Q]."""
    held = faiss.downcast_index(index.quantizer).get_xb()
    return torch.from_numpy(faiss.rev_swig_ptr(held, index.nlist * index.d)).view(
        index.nlist, index.d
    )
