"""The encoders of a shard: by tables where that is cheaper, and tables shared by a node's shards.

On a CPU the tables are a file that all processes of the node map (table_files.py). On a GPU every
process has its own on its device, as processes do not share device memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memory_server.api import KeyEncoderFactory, KeySource, TabledFactory
from memory_server.keys.table_files import SharedTables, Unusable, shared_tables

log = logging.getLogger(__name__)

LoadWeights = Callable[[], Mapping[str, Tensor]]


@dataclass
class _Made:
    """What one set of weights has given so far; its lock is held while more is made."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    source: KeySource | None = None
    by_tables: bool = False  # or the factory has no tables: then `source` is all there will be
    shared: SharedTables | None = None
    forgotten: bool = False


class KeySources:
    """Gives the encoder of any weights, and keeps it until they are forgotten. Thread-safe.

    Weights are independent of each other: who wants an encoder that exists does not wait for the
    tables of other weights.
    """

    def __init__(
        self,
        factory: KeyEncoderFactory,
        *,
        device: torch.device,
        scratch: Path | None,
        entry_tokens: int | None = None,
    ) -> None:
        """Make nothing yet.

        Args:
            factory: makes encoders; tables are used if it is a `TabledFactory`.
            device: of the keys.
            scratch: a directory of this node in which its processes share tables; None: they do
                not.
            entry_tokens: of the longest entry; None: as many as the model has positions, which may
                be a multiple of what is needed.
        """
        self._factory = factory
        self._device = device
        self._scratch = scratch if device.type == "cpu" else None
        self._entry_tokens = entry_tokens
        self._lock = threading.Lock()
        self._made: dict[int, _Made] = {}

    def get(self, weights_id: int, load_weights: LoadWeights, *, tabled: bool) -> KeySource:
        """The encoder of these weights. Blocks while tables are built, by this process or another.

        Args:
            load_weights: called if an encoder must be made.
            tabled: by tables, if the factory has any: see `tables_pay_from`.

        Raises:
            ValueError: the weights do not fit. Whatever `load_weights` raises.
        """
        with self._lock:
            made = self._made.setdefault(weights_id, _Made())
        with made.lock:
            wanted = (
                tabled and not made.by_tables and _has_tables(self._factory, self._entry_tokens)
            )
            if made.source is None or wanted:
                self._make(made, load_weights, by_tables=wanted)
            source = made.source
        assert source is not None
        if made.forgotten:  # meanwhile; what this caller got stays mapped
            with made.lock:
                _close(made)
        return source

    def bytes_to_come(self, weights_id: int) -> int:
        """What the tables of these weights will take, unless they are made already."""
        with self._lock:
            made = self._made.get(weights_id)
        if (made is not None and made.by_tables) or not isinstance(self._factory, TabledFactory):
            return 0
        return self._factory.tables_bytes(self._entry_tokens)

    def forget_except(self, weights_ids: Collection[int]) -> None:
        """Drop what other weights made; of a node's processes the last one removes the file."""
        with self._lock:
            gone = [self._made.pop(i) for i in list(self._made) if i not in weights_ids]
        for made in gone:
            made.forgotten = True
            # Whoever is making something now closes it afterwards: this one need not wait.
            if made.lock.acquire(blocking=False):
                try:
                    _close(made)
                finally:
                    made.lock.release()

    def close(self) -> None:
        """Forget all weights."""
        self.forget_except(())

    def _make(self, made: _Made, load_weights: LoadWeights, *, by_tables: bool) -> None:
        weights = load_weights()
        factory = self._factory
        if not by_tables or not isinstance(factory, TabledFactory):
            made.source = factory(weights)
            return
        made.shared = self._shared(factory, weights)
        if made.shared is not None:
            tables: Mapping[str, Tensor] | None = made.shared.tensors
        else:
            tables = factory.tables(weights, self._device, entry_tokens=self._entry_tokens)
        if tables is None:
            raise ValueError("the encoder has no tables, but says from where on they pay")
        made.source = factory.from_tables(tables)
        made.by_tables = True

    def _shared(self, factory: TabledFactory, weights: Mapping[str, Tensor]) -> SharedTables | None:
        if self._scratch is None:
            return None

        def build() -> Mapping[str, Tensor]:
            tables = factory.tables(weights, self._device, entry_tokens=self._entry_tokens)
            if tables is None:
                raise ValueError("the encoder has no tables, but says from where on they pay")
            return tables

        digest = factory.tables_digest(weights, entry_tokens=self._entry_tokens)
        try:
            return shared_tables(self._scratch, digest, build)
        except Unusable as error:
            log.warning(
                "this process keeps key tables of its own, as they cannot be shared in %s: %s",
                self._scratch,
                error,
            )
            return None


def _close(made: _Made) -> None:
    if made.shared is not None:
        made.shared.close()


def tables_pay_from(
    factory: KeyEncoderFactory, *, entry_tokens: int, rescoring: bool
) -> int | None:
    """The entries of a memory from which its keys are made by tables; None: never.

    It is decided once for all shards and replicas, because keys that are made directly differ in
    their last bits.

    Args:
        rescoring: keys will be made again and again, so that tables pay in any case.
    """
    if not _has_tables(factory, entry_tokens):
        return None
    assert isinstance(factory, TabledFactory)
    return 0 if rescoring else factory.tables_pay_from(entry_tokens)


def _has_tables(factory: KeyEncoderFactory, entry_tokens: int | None) -> bool:
    return isinstance(factory, TabledFactory) and factory.tables_pay_from(entry_tokens) is not None
