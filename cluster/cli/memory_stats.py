"""`pluglm memory stats`: how a memory server is doing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.cli.command import Command
from cluster.cli.memory_options import add_address, add_json
from cluster.cli.text import pairs, size, table

if TYPE_CHECKING:
    from memory_server.stats import EpochStats, MemoryStats, ShardStats

_CLEAR = "\x1b[2J\x1b[H"


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the server")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="again and again, until Ctrl-C (default: every 2); with --json one object a line",
    )
    add_address(parser)
    add_json(parser)


def _stats(options: argparse.Namespace) -> int:
    import sys

    from cluster.cli.command import UsageError
    from cluster.memory_servers import attached

    if options.watch is not None and options.watch <= 0:
        raise UsageError(f"--watch {options.watch:g}: give more than 0 seconds")
    with attached(options.name, options.address) as memory:
        while True:
            stats = memory.stats()
            if options.json:
                indent = None if options.watch else 1
                print(json.dumps(stats.as_dict(), indent=indent), flush=True)
            else:
                clear = _CLEAR if options.watch and sys.stdout.isatty() else ""
                print(f"{clear}{describe_stats(stats)}", flush=True)
            if options.watch is None:
                return 0
            time.sleep(options.watch)


def describe_stats(stats: MemoryStats) -> str:
    """A memory's figures, for a person."""
    rows = [
        ("memory", f"{stats.name}, of {stats.store}"),
        ("entries", f"{stats.entries:,}, version {stats.content_version}"),
        ("index", f"{stats.index}, {stats.shards} shards, {stats.replicas} of each"),
        (
            "keys",
            f"of step {stats.encoder_step}, {stats.staleness_steps} steps behind the newest",
        ),
        (
            "queries",
            f"{stats.queries:,}"
            + (f", {stats.overloaded:,} refused as too many" if stats.overloaded else ""),
        ),
        (
            "bytes",
            ", ".join(f"{part} {size(count)}" for part, count in stats.bytes.items()) or "-",
        ),
        ("readers", f"{stats.pins:,} hold an epoch"),
    ]
    rows += [("epoch", _epoch(epoch)) for epoch in stats.epochs]
    head = (
        *("shard", "state", "epoch", "queries", "queue", "p50", "p95", "p99"),
        *("recall", "answers", "stale_share", "node"),
    )
    shards = table(
        head,
        [_shard(shard) for shard in stats.per_shard],
        most=(8, 12, 8, 12, 6, 9, 9, 9, 6, 13, 11, 24),
        right=(2, 3, 4, 5, 6, 7, 8, 10),
    )
    errors = [f"shard {s.shard}.{s.replica}: {s.error}" for s in stats.per_shard if s.error]
    return "\n".join([pairs(rows), "", shards, *_reasons(stats.per_shard), *errors])


def _epoch(epoch: EpochStats) -> str:
    words = [str(epoch.epoch), "live" if epoch.live else epoch.state]
    words.append(f"version {epoch.content_version}, step {epoch.encoder_step}")
    if epoch.state == "encoding":
        rest = "" if epoch.remaining_s is None else f", {epoch.remaining_s:.0f} s to go"
        words.append(f"{epoch.done:,} of {epoch.total:,} entries{rest}")
    if epoch.pins:
        words.append(f"{epoch.pins} readers")
    if epoch.error:
        words.append(epoch.error)
    return "; ".join(words)


def _shard(shard: ShardStats) -> list[str]:
    latency = shard.latency
    return [
        f"{shard.shard}.{shard.replica}",
        shard.state,
        "-" if shard.epoch is None else str(shard.epoch),
        f"{shard.queries:,}",
        f"{shard.queue:,}",
        *(
            "-" if value is None else f"{value:.1f} ms"
            for value in (latency.p50_ms, latency.p95_ms, latency.p99_ms)
        ),
        *_recall(shard),
        shard.node,
    ]


def _recall(shard: ShardStats) -> list[str]:
    """What the newest audit says: recall, how searches are answered, and what staleness cost."""
    audit = shard.recall
    if not audit:
        return ["-", "-", "-"]
    recall, stale = audit.get("recall"), audit.get("stale_share")
    return [
        "-" if recall is None else f"{recall:.3f}",
        "exactly" if audit.get("exact") else "approximately",
        "-" if stale is None else f"{stale:.3f}",
    ]


def _reasons(shards: Sequence[ShardStats]) -> list[str]:
    """Why searches are answered as they are, once for all shards of which it says the same."""
    of: dict[str, list[str]] = {}
    for shard in shards:
        reason, failures = shard.recall.get("reason"), shard.recall.get("failures")
        if reason:
            failed = f"; {failures} audits failed (its log says why)" if failures else ""
            of.setdefault(f"{reason}{failed}", []).append(f"{shard.shard}.{shard.replica}")
    return [f"answers of {', '.join(names)}: {reason}" for reason, names in of.items()]


STATS = Command(
    name="memory stats",
    summary="tell how a memory server is doing",
    description="""\
Tell how a memory server is doing: queries, latency (upper limits of a histogram's
buckets), waiting searches, epochs, staleness, bytes by part, and what its audit says:
recall, whether and why searches are answered exactly, and stale_share, the share of an
epoch's answers that the next one's keys gave, too.""",
    example="""\
pluglm memory stats wiki
pluglm memory stats wiki --watch 5
pluglm memory stats wiki --json""",
    configure=_stats_arguments,
    run=_stats,
)
