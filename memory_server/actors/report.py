"""From the book and the replicas' reports to `MemoryStats`. Pure functions."""

from collections.abc import Mapping
from dataclasses import replace

from memory_server.actors.names import Address, Layout
from memory_server.actors.server_book import ServerBook
from memory_server.api import StageStatus
from memory_server.stats import EpochStats, MemoryStats, ShardStats, total_bytes


def memory_stats(
    layout: Layout,
    server: ServerBook,
    reports: Mapping[Address, object],
    staging: Mapping[int, StageStatus],
    *,
    now: float,
    live_s: float | None,
) -> MemoryStats:
    """Put together what is known.

    Args:
        reports: a `ShardStats`, or the exception instead, of replicas that answered.
        staging: of every epoch.
        now: in the clock of the book's pins.
    """
    book = server.epochs
    shards = tuple(_shard(address, reports.get(address), server) for address in layout.addresses)
    live = None if book.live is None else book.plans[book.live]
    receipts = [] if live is None else list(book.receipts[live.epoch].values())
    newest = max((plan.encoder_step for plan in book.plans.values()), default=0)
    pins = [pin for pin in book.pins.values() if pin.deadline > now]
    return MemoryStats(
        name=layout.name,
        store=layout.store_path,
        epoch=book.live,
        encoder_step=None if live is None else live.encoder_step,
        content_version=None if live is None else live.content_version,
        entries=sum(receipt.live_rows for receipt in receipts),
        key_width=receipts[0].key_width if receipts else None,
        index=layout.index.describe(),
        shards=layout.shards,
        replicas=layout.replicas,
        newest_step=newest,
        staleness_steps=0 if live is None else newest - live.encoder_step,
        live_s=live_s,
        pins=len(pins),
        epochs=tuple(
            EpochStats(
                epoch=epoch,
                state=staging[epoch].state,
                live=epoch == book.live,
                content_version=plan.content_version,
                encoder_step=plan.encoder_step,
                done=staging[epoch].done,
                total=staging[epoch].total,
                remaining_s=staging[epoch].remaining_s,
                pins=sum(pin.epoch == epoch for pin in pins),
                leaving=epoch in book.leaving,
                error=book.failures.get(epoch),
            )
            for epoch, plan in sorted(book.plans.items())
            if epoch in staging
        ),
        queries=sum(shard.queries for shard in shards),
        overloaded=sum(shard.overloaded for shard in shards),
        bytes=total_bytes(shards),
        per_shard=shards,
    )


def _shard(address: Address, report: object, server: ServerBook) -> ShardStats:
    restarts = max(0, server.joins.get(f"{address[0]}-{address[1]}", 1) - 1)
    if isinstance(report, ShardStats):
        return replace(report, restarts=restarts)
    why = "it is dead or restarting" if report is None else str(report)
    return ShardStats(
        shard=address[0], replica=address[1], state="silent", error=why, restarts=restarts
    )
