"""What a coordinator must know again after a restart, and how it is written down as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memory_server.shard.epochs import EpochBook, EpochPlan, Pin, Receipt

BOOK_FORMAT = "pluglm-memory-server-1"
REQUESTS_KEPT = 64
FAILURES_KEPT = 32


@dataclass
class ServerBook:
    """The book of epochs and what else a coordinator must know again after a restart.

    Attributes:
        revision: grows with every change, so that shards can tell old orders from new ones.
        requests: the newest calls that staged an epoch, by their token, so that a call which is
            repeated after a restart does not stage another one.
        switches: likewise, the newest calls that made an epoch live, so that one which is repeated
            after its answer was lost is told so, and does not undo a later switch.
        pinned: likewise, the newest calls that pinned an epoch, and their pins: a repeated one
            gets the same pin, since nobody would let go of a second one.
        successors: epochs that were staged again on what is live now, and their successors.
        leases: seconds of each pin; after a restart every lease begins anew.
        joins: how often each replica, "shard-replica", came up.
    """

    epochs: EpochBook = field(default_factory=EpochBook)
    revision: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    switches: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    successors: dict[int, int] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    joins: dict[str, int] = field(default_factory=dict)

    def remember_request(self, token: str, epoch: int) -> None:
        _remember(self.requests, token, epoch)

    def remember_switch(self, token: str, epoch: int) -> None:
        _remember(self.switches, token, epoch)

    def pin(self, token: str, epoch: int | None, lease_s: float, now: float) -> Pin:
        """`EpochBook.pin`, once for a token."""
        known = self.epochs.pins.get(self.pinned.get(token, -1))
        if known is not None:
            return known
        pin = self.epochs.pin(epoch, lease_s, now)
        self.leases[pin.id] = lease_s
        _remember(self.pinned, token, pin.id)
        return pin

    def tidy(self) -> None:
        """Drop what belongs to pins and epochs that are gone, and all but the newest failures."""
        plans = self.epochs.plans
        for old in sorted(self.epochs.failures)[:-FAILURES_KEPT]:
            self.epochs.release(old)
        for old in list(self.successors):
            if old not in plans:  # nobody can ask for it any more
                self.drop_successor(old)
        self.leases = {pin: s for pin, s in self.leases.items() if pin in self.epochs.pins}
        self.successors = {
            old: new for old, new in self.successors.items() if old in plans and new in plans
        }

    def drop_successor(self, epoch: int) -> None:
        """Release what was staged instead of this epoch, unless it is live."""
        successor = self.successors.pop(epoch, None)
        if successor in self.epochs.plans and successor != self.epochs.live:
            self.epochs.release(successor)

    def weights_needed(self) -> set[int]:
        """Ids of the weights that some epoch may still be encoded with."""
        plans = self.epochs.plans.items()
        return {plan.weights_id for epoch, plan in plans if epoch not in self.epochs.failures}

    def versions_needed(self) -> set[str]:
        """Content versions of the epochs that are held or coming."""
        plans = self.epochs.plans.items()
        return {plan.content_version for epoch, plan in plans if epoch not in self.epochs.failures}


def _remember(calls: dict[str, int], token: str, epoch: int) -> None:
    calls[token] = epoch
    for old in list(calls)[:-REQUESTS_KEPT]:
        del calls[old]


def book_as_json(server: ServerBook) -> dict[str, Any]:
    """Plain values, that `book_from_json` reads."""
    book = server.epochs
    return {
        "format": BOOK_FORMAT,
        "revision": server.revision,
        "live": book.live,
        "last_epoch": book.last_epoch,
        "last_weights": book.last_weights,
        "last_pin": book.last_pin,
        "plans": [asdict(plan) for plan in book.plans.values()],
        "receipts": [asdict(r) for held in book.receipts.values() for r in held.values()],
        "failures": {str(epoch): reason for epoch, reason in book.failures.items()},
        "leaving": sorted(book.leaving),
        "pins": [
            {"id": pin.id, "epoch": pin.epoch, "lease_s": server.leases[pin.id]}
            for pin in book.pins.values()
        ],
        "requests": server.requests,
        "switches": server.switches,
        "pinned": server.pinned,
        "successors": {str(epoch): other for epoch, other in server.successors.items()},
        "joins": server.joins,
    }


def book_from_json(raw: Mapping[str, Any], now: float) -> ServerBook:
    """The book; pins' leases begin at `now`. Raises ValueError, KeyError, TypeError, ..."""
    if raw["format"] != BOOK_FORMAT:
        raise ValueError(f"it is not a {BOOK_FORMAT}")
    receipts: dict[int, dict[int, Receipt]] = {}
    for each in raw["receipts"]:
        receipt = Receipt(**each)
        receipts.setdefault(receipt.epoch, {})[receipt.shard] = receipt
    plans = [EpochPlan(**each) for each in raw["plans"]]
    leases = {pin["id"]: float(pin["lease_s"]) for pin in raw["pins"]}
    return ServerBook(
        epochs=EpochBook(
            plans={plan.epoch: plan for plan in plans},
            receipts=receipts,
            failures={int(epoch): reason for epoch, reason in raw["failures"].items()},
            pins={
                pin["id"]: Pin(id=pin["id"], epoch=pin["epoch"], deadline=now + leases[pin["id"]])
                for pin in raw["pins"]
            },
            leaving=set(raw["leaving"]),
            live=raw["live"],
            last_epoch=raw["last_epoch"],
            last_weights=raw["last_weights"],
            last_pin=raw["last_pin"],
        ),
        revision=raw["revision"],
        requests=dict(raw["requests"]),
        switches=dict(raw.get("switches", {})),
        pinned=dict(raw.get("pinned", {})),
        successors={int(epoch): other for epoch, other in raw["successors"].items()},
        leases=leases,
        joins=dict(raw["joins"]),
    )
