"""The memory as one micro-batch asks it: pinned to the step's epoch, at once or in the background.

Searches that are begun run in threads of their own; what the step still waits for is all that
counts as time for retrieval.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from memory_server.api import Memory, Retrieved


class MemoryLookup:
    """What a model takes as `lookup` for one micro-batch."""

    # A loss that is not finite comes of it, so the step will be left out, on all ranks together.
    takes_any_query = True

    def __init__(
        self,
        memory: Memory,
        *,
        k: int,
        epoch: int,
        exclude_doc_ids: Tensor | None,
        pool: ThreadPoolExecutor,
        waiting: Callable[[], AbstractContextManager[object]],
        note: Callable[[Retrieved], None],
    ) -> None:
        """Ask nothing yet.

        Args:
            exclude_doc_ids: int64 [B], one for each sequence of the micro-batch, -1 for none.
            pool: in which searches that are begun run.
            waiting: a context around every wait for the memory.
            note: is shown every answer.
        """
        self._memory, self._k, self._epoch = memory, k, epoch
        # On the host: a search in the background must not wait for what the device does meanwhile.
        self._exclude = None if exclude_doc_ids is None else exclude_doc_ids.cpu()
        self._pool = pool
        self._waiting, self._note = waiting, note
        self._row = 0

    def __call__(self, queries_BQ: Tensor) -> Retrieved:
        """Search for the whole micro-batch. Raises what `Memory.search` raises."""
        with self._waiting():
            found = self._search(queries_BQ.nan_to_num(0.0, 0.0, 0.0), self._exclude)
        self._note(found)
        return found

    def start(self, queries_bQ: Tensor) -> Callable[[], Retrieved]:
        """Begin a search for the next sequences of the micro-batch, in their order.

        Returns:
            What waits for the answer; it raises what `Memory.search` raises.
        """
        exclude_b = self._exclude_next(len(queries_bQ))
        ready = _on_host(queries_bQ.nan_to_num(0.0, 0.0, 0.0))
        future = self._pool.submit(lambda: self._search(ready(), exclude_b))

        def wait() -> Retrieved:
            with self._waiting():
                found = future.result()
            self._note(found)
            return found

        return wait

    def _search(self, queries_BQ: Tensor, exclude_B: Tensor | None) -> Retrieved:
        return self._memory.search(
            queries_BQ, self._k, exclude_doc_ids=exclude_B, epoch=self._epoch
        )

    def _exclude_next(self, count: int) -> Tensor | None:
        if self._exclude is None:
            return None
        rows = self._exclude[self._row : self._row + count]
        # The next memory layer begins with the first sequence again.
        self._row = (self._row + count) % len(self._exclude)
        return rows


def _on_host(queries_bQ: Tensor) -> Callable[[], Tensor]:
    """Copy to the host without waiting; what is returned waits for the copy alone.

    A plain copy in the search's thread would wait for all that the device has been given since.
    """
    if queries_bQ.device.type != "cuda":
        return lambda: queries_bQ
    host = torch.empty(queries_bQ.shape, dtype=queries_bQ.dtype, pin_memory=True)
    host.copy_(queries_bQ, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def ready() -> Tensor:
        copied.synchronize()
        return host

    return ready
