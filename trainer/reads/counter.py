"""Counting reads while training: each rank for itself, brought together when a line is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from memory_server.api import Memory
from trainer.distributed import gather_integers, max_over_ranks, sum_over_ranks
from trainer.reads.figures import distribution
from trainer.reads.files import Counted
from trainer.reads.present import look
from trainer.reads.sample import Limits, Reads, level_within, merged, sizes_by_level
from trainer.reads.totals import ReadTotals

# 24 bytes an entry, on rank 0: at most about 25 MiB for the run and 7 MiB for a window, however
# many entries and ranks there are.
OF_RUN = Limits(sample=1 << 20, most_read=1 << 14)
OF_WINDOW = Limits(sample=1 << 18, most_read=1 << 14)
_MOST_READ_AT_LEAST = 256
_WAITING = 1 << 16  # reads that stay on the device before they are counted


class ReadCounter:
    """One rank's counter. `gather`, and so `figures` and `counted`, are collective."""

    def __init__(
        self,
        memory: Memory,
        *,
        rank: int,
        ranks: int,
        device: torch.device,
        since_step: int = 0,
        counted: Counted | None = None,
        of_run: Limits = OF_RUN,
        of_window: Limits = OF_WINDOW,
    ) -> None:
        """Nothing was read yet, or what a checkpoint says (rank 0).

        Args:
            memory: that is read.
            rank: this trainer, of `ranks`. device: of the process group's tensors.
            since_step: steps that were done before counting begins.
            counted: to go on from.
            of_run, of_window: what is kept at most, for the run, and between two lines of metrics.
        """
        before = counted or Counted(total=Reads.none(), window=Reads.none(), since_step=since_step)
        self._memory, self._rank, self._device = memory, rank, device
        self._limits = of_window
        # What rank 0 receives is bounded, too, however many ranks there are.
        few = max(of_window.most_read // ranks, min(of_window.most_read, _MOST_READ_AT_LEAST))
        self._sent = Limits(sample=of_window.sample, most_read=few)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._number_waiting = 0
        self._own = Reads.none()
        self._window = before.window
        self._total = ReadTotals(of_run, before.total)
        self._since_step = before.since_step
        self._present = before.present

    def add(self, reads: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count what `reads_of` told; does not wait for the device, but once in a while."""
        for ids, shares in reads:
            self._waiting.append((ids, shares))
            self._number_waiting += len(ids)
        if self._number_waiting >= _WAITING:
            self._count()

    def figures(self, content_version: str) -> dict[str, float]:
        """What a line of metrics says, and a new window; collective.

        Args:
            content_version: of the epoch that answers.

        Returns:
            On rank 0 `memory_used_share`, of the memory's entries those that were ever read, and
            what `distribution` says of the reads since the last call, each with "memory_" before
            it; elsewhere nothing.
        """
        self.gather()
        if self._rank != 0:
            return {}
        if self._present is None or self._present.content_version != content_version:
            self._present = look(self._memory, content_version, self._total.whole())
        window, self._window = self._window, Reads.none()
        if self._present is None:
            return {}
        entries = self._present.entries
        used = min(max(self._total.distinct - self._present.gone, 0), entries)
        found = {"used_share": used / max(entries, 1), **distribution(window, entries)}
        return {f"memory_{name}": value for name, value in found.items()}

    def counted(self) -> Counted | None:
        """What a checkpoint keeps, on rank 0; collective."""
        self.gather()
        if self._rank != 0:
            return None
        return Counted(
            total=self._total.whole(),
            window=self._window,
            since_step=self._since_step,
            present=self._present,
        )

    def gather(self) -> None:
        """Bring all ranks' reads to rank 0; collective."""
        self._count()
        own, self._own = self._own, Reads.none()
        sizes = torch.from_numpy(sizes_by_level(own.ids)).to(self._device)
        level = int(max_over_ranks(torch.tensor(own.level, device=self._device)))
        # All ranks together send no more than one may keep.
        together = sum_over_ranks(sizes).cpu().numpy()
        level = level_within(together, self._limits.sample, at_least=level)
        received = gather_integers(_packed(merged([own], self._sent, level=level)), self._device)
        if self._rank == 0:
            new = merged([_unpacked(sent) for sent in received], self._limits)
            self._window = merged([self._window, new], self._limits)
            self._total.add(new)

    def _count(self) -> None:
        if not self._waiting:
            return
        ids = torch.cat([ids for ids, _ in self._waiting]).cpu().numpy()
        shares = torch.cat([shares for _, shares in self._waiting]).cpu().numpy()
        self._waiting, self._number_waiting = [], 0
        found = ids >= 0
        self._own = merged([self._own, Reads.of(ids[found], shares[found])], self._limits)


def _packed(reads: Reads) -> Tensor:
    head = [reads.level, reads.short, reads.all_times, reads.all_attended]
    parts = [np.array(head, dtype=np.int64), reads.ids, reads.times, reads.attended]
    return torch.from_numpy(np.concatenate(parts))


def _unpacked(sent: Tensor) -> Reads:
    level, short, all_times, all_attended = sent[:4].tolist()
    ids, times, attended = sent[4:].numpy().reshape(3, -1)
    return replace(
        Reads.none(),
        ids=ids,
        times=times,
        attended=attended,
        level=level,
        short=short,
        all_times=all_times,
        all_attended=all_attended,
    )
