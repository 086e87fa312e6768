"""What a coordinator wants its shards to hold, and what it makes of their answers. Pure functions.

Orders say the whole state that is wanted, never a step: a shard that missed any number of them, or
gets them twice or late, ends where the newest ones want it to be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_server.actors.names import Address
from memory_server.shard.epochs import EpochBook, EpochPlan, Receipt
from memory_server.shard.held_epoch import ShardStatus


@dataclass(frozen=True, kw_only=True)
class Order:
    """An epoch to hold. `sealed`: every shard vouched for it, so searches may wait for it."""

    plan: EpochPlan
    sealed: bool


@dataclass(frozen=True, kw_only=True)
class Orders:
    """All epochs to hold, the live one first; any other is to be dropped."""

    revision: int
    epochs: tuple[Order, ...]
    live: int | None


def orders_of(book: EpochBook, revision: int) -> Orders:
    """What follows from the book for every shard."""
    wanted = [plan for epoch, plan in book.plans.items() if epoch not in book.failures]
    wanted.sort(key=lambda plan: (plan.epoch != book.live, plan.epoch))
    return Orders(
        revision=revision,
        epochs=tuple(Order(plan=plan, sealed=plan.epoch in book.receipts) for plan in wanted),
        live=book.live,
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Either the receipts of all shards, one for each, or why the epoch can never be sealed."""

    receipts: tuple[Receipt, ...] = ()
    failure: str | None = None


def judge(
    plan: EpochPlan,
    statuses: Mapping[Address, ShardStatus],
    addresses: Sequence[Address],
    *,
    entries: int,
) -> Verdict | None:
    """Decide about an epoch; None as long as some replica is still at work, or silent.

    Args:
        statuses: of the replicas that answered.
        addresses: all replicas.
        entries: live entries of the plan's content.
    """
    errors = [status.error for status in statuses.values() if status.error is not None]
    if errors:
        return Verdict(failure="; ".join(dict.fromkeys(errors)))
    receipts = {a: s.receipt for a, s in statuses.items() if s.receipt is not None}
    if any(address not in receipts for address in addresses):
        return None
    if disagreement := _disagreement(plan, receipts, entries):
        return Verdict(failure=disagreement)
    return Verdict(receipts=tuple(receipts[a] for a in addresses if a[1] == 0))


def _disagreement(plan: EpochPlan, receipts: Mapping[Address, Receipt], entries: int) -> str | None:
    widths = {receipt.key_width for receipt in receipts.values()}
    if len(widths) > 1:
        return f"shards made keys of widths {sorted(widths)}"
    made_of = {(r.encoder_step, r.content_version) for r in receipts.values()}
    if made_of != {(plan.encoder_step, plan.content_version)}:
        return f"shards made keys of (step, content) {sorted(made_of)}, not of what was staged"
    first = {address[0]: r for address, r in receipts.items() if address[1] == 0}
    held = sum(receipt.live_rows for receipt in first.values())
    if held != entries:
        return f"the shards hold {held} live entries together, the content has {entries}"
    for (shard, replica), receipt in receipts.items():
        other = first[shard]
        if (receipt.rows, receipt.live_rows) != (other.rows, other.live_rows):
            return (
                f"replica {replica} of shard {shard} holds {receipt.rows} rows, {receipt.live_rows}"
                f" of them live; replica 0 holds {other.rows}, {other.live_rows} of them live"
            )
        if receipt.layout == other.layout and receipt.key_checksum != other.key_checksum:
            return f"replicas 0 and {replica} of shard {shard} made different keys"
    return None


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a replica says before an epoch is staged.

    Attributes:
        place: what it shares its memory with: a node, a GPU, or itself if it has its own limit.
        bytes: what the epoch would add. free: what its place has left.
        tables: what it would add once for all that share memory; bytes of a GPU are not shared.
        pending: what epochs that are being staged will still add.
    """

    place: str
    bytes: int
    free: int
    tables: int = 0
    pending: int = 0


def shortage(needs: Mapping[Address, Need]) -> tuple[str, int, int] | None:
    """The first place where an epoch would not fit: (place, bytes needed, bytes free)."""
    for place in dict.fromkeys(need.place for need in needs.values()):
        here = [need for need in needs.values() if need.place == place]
        added = sum(need.bytes for need in here) + max(need.tables for need in here)
        needed = added + sum(need.pending for need in here)
        free = min(need.free for need in here)
        if added and needed > free:
            return place, needed, free
    return None


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """Of all replicas together. `remaining_s`: of the slowest, None if one cannot say."""

    done: int
    total: int
    remaining_s: float | None


def progress(statuses: Mapping[Address, ShardStatus]) -> StageProgress:
    """Sum up rows of one replica of each shard: of the one that is behind."""
    behind: dict[int, ShardStatus] = {}
    for (shard, _), status in statuses.items():
        other = behind.get(shard)
        if other is None or status.done < other.done:
            behind[shard] = status
    left = [s.remaining_s for s in statuses.values() if s.state == "encoding"]
    known = [seconds for seconds in left if seconds is not None]
    return StageProgress(
        done=sum(status.done for status in behind.values()),
        total=sum(status.total for status in behind.values()),
        remaining_s=max(known) if left and len(known) == len(left) else None,
    )
