"""A shard whose process may just have started again: it never denies what it vouched for."""

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from memory_server.api import Entry
from memory_server.errors import RefreshFailed, ShardRestoring, UnknownEpoch
from memory_server.replies import ShardReply
from memory_server.shard.shard import Shard


class RestoredShard:
    """A shard that may have restarted: until it holds again what it vouched for, it says so.

    Without it a search would be told that an epoch is unknown, which is not so.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard.shard
        self._inner = shard
        self._joined = threading.Event()
        self._vouched: frozenset[int] = frozenset()

    def joined(self, vouched: frozenset[int]) -> None:
        """The orders were read. `vouched`: epochs that all shards have sealed."""
        self._vouched = vouched
        self._joined.set()

    @property
    def is_joined(self) -> bool:
        return self._joined.is_set()

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        exact: bool = False,
        domains: Collection[str] = (),
    ) -> ShardReply:
        """See `Shard.search`. Raises ShardRestoring."""
        with self._restoring(epoch, wait_s):
            return self._inner.search(
                queries_BQ,
                k,
                exclude_doc_ids,
                epoch=epoch,
                wait_s=wait_s,
                exact=exact,
                domains=domains,
            )

    def entries(
        self,
        ids: Sequence[int],
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        domains: Collection[str] = (),
    ) -> list[Entry]:
        """See `Shard.entries`. Raises ShardRestoring."""
        with self._restoring(epoch, wait_s):
            return self._inner.entries(ids, epoch=epoch, wait_s=wait_s, domains=domains)

    @contextlib.contextmanager
    def _restoring(self, epoch: int | None, wait_s: float) -> Iterator[None]:
        if not self._joined.is_set() and not self._joined.wait(wait_s):
            raise ShardRestoring(f"shard {self.shard} starts and has not read its orders yet")
        try:
            yield
        except RefreshFailed as error:
            if epoch is None or epoch in self._vouched:
                raise ShardRestoring(f"shard {self.shard} cannot restore: {error}") from error
            raise
        except UnknownEpoch as error:
            if epoch is None or epoch in self._vouched:  # it failed, and is about to be tried again
                raise ShardRestoring(f"shard {self.shard} restores again: {error}") from error
            raise
