"""The book of epochs: which exist, what each is made of, which one answers, who reads which.

No tensors, no I/O, no clock: times are given. An epoch is a pair of content and weights. Whoever
stages one gives either or both; the part that is not given *follows* the live epoch, also if that
changes before the staged one is activated: an edit that goes live during a refresh is not undone
by it, nor a refresh by an edit.
"""

from dataclasses import dataclass, field, replace

from memory_server.errors import (
    EpochInUse,
    EpochNotSealed,
    LiveEpochChanged,
    RefreshFailed,
    UnknownEpoch,
)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What an epoch is made of. Epochs with equal `weights_id` were encoded by the same weights.

    Attributes:
        own_weights: they were given for this epoch; otherwise they follow the live epoch's.
        own_content: likewise.
        tabled: whether these weights make keys by tables. It is decided once, because the two ways
            differ in the last bits, and replicas must agree.
    """

    epoch: int
    content_version: str
    encoder_step: int
    weights_id: int
    own_weights: bool = True
    own_content: bool = True
    tabled: bool = False


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a shard vouches for when it seals its part of an epoch.

    Attributes:
        rows, live_rows: rows held, and those that are not removed.
        key_checksum: of all keys; `layout` says of which blocks, in what order. Shards with equal
            layouts and weights must have equal checksums.
        encoded_rows: rows that had to be encoded; the others kept their keys.
        bytes: by part.
    """

    epoch: int
    shard: int
    encoder_step: int
    content_version: str
    rows: int
    live_rows: int
    key_width: int
    key_checksum: int
    layout: int
    encoded_rows: int
    bytes: dict[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A reader's hold on an epoch until `deadline`, in seconds of the book's clock."""

    id: int
    epoch: int
    deadline: float


@dataclass
class EpochBook:
    """Numbers epochs, and allows only steps that keep the memory consistent."""

    plans: dict[int, EpochPlan] = field(default_factory=dict)
    receipts: dict[int, dict[int, Receipt]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    pins: dict[int, Pin] = field(default_factory=dict)
    leaving: set[int] = field(default_factory=set)  # released while readers had them pinned
    live: int | None = None
    last_epoch: int = 0
    last_weights: int = 0
    last_pin: int = 0

    def newest(self) -> EpochPlan:
        """The newest epoch that did not fail."""
        usable = [epoch for epoch in self.plans if epoch not in self.failures]
        if not usable:
            raise EpochNotSealed(
                "no epoch is live, and none is coming: stage one with weights and a content version"
            )
        return self.plans[max(usable)]

    def basis(self) -> EpochPlan:
        """The epoch that unspecified weights or content are taken from: live, else the newest."""
        return self.newest() if self.live is None else self.plans[self.live]

    def begin(
        self,
        *,
        encoder_step: int,
        new_weights: bool,
        content_version: str | None,
        tabled: bool = False,
    ) -> EpochPlan:
        """Number a new epoch. Without new weights, or a version, it takes the basis's.

        Args:
            tabled: of new weights; others keep what was decided for them.
        """
        if encoder_step < 0:
            raise ValueError(f"encoder_step={encoder_step} must not be negative")
        own_content = content_version is not None
        if content_version is None:
            content_version = self.basis().content_version
        if new_weights:
            self.last_weights += 1
            weights_id = self.last_weights
        else:
            weights_id, tabled = self.basis().weights_id, self.basis().tabled
        return self._add(
            EpochPlan(
                epoch=0,
                content_version=content_version,
                encoder_step=encoder_step,
                weights_id=weights_id,
                own_weights=new_weights,
                own_content=own_content,
                tabled=tabled,
            )
        )

    def plan(self, epoch: int) -> EpochPlan:
        if epoch not in self.plans:
            held = ", ".join(str(e) for e in sorted(self.plans)) or "none"
            raise UnknownEpoch(f"the memory does not hold epoch {epoch}; it holds {held}")
        return self.plans[epoch]

    def unsettled(self) -> list[int]:
        """Epochs that are neither sealed nor failed, the oldest first."""
        return [e for e in sorted(self.plans) if e not in self.receipts and e not in self.failures]

    def superseded(self, newer: EpochPlan) -> list[int]:
        """Refreshes that wait behind another one and that newer weights make pointless."""
        if not newer.own_weights:
            return []
        waiting = [e for e in self.unsettled() if self.plans[e].own_weights and e != newer.epoch]
        return waiting[1:]

    def supersede(self, newer: EpochPlan) -> list[int]:
        """Fail the epochs that `superseded` names; returns them, for the shards to be told."""
        dropped = self.superseded(newer)
        for epoch in dropped:
            self.fail(epoch, f"it was superseded by epoch {newer.epoch}, which has newer weights")
        return dropped

    def seal(self, receipts: list[Receipt]) -> None:
        """Record that every shard sealed the epoch."""
        self.receipts[receipts[0].epoch] = {receipt.shard: receipt for receipt in receipts}

    def fail(self, epoch: int, reason: str) -> None:
        """Record why the epoch can never be sealed; it stays known until it is released."""
        if epoch in self.plans and epoch not in self.receipts:
            self.failures.setdefault(epoch, reason)

    def check_sealed(self, epoch: int) -> None:
        self.plan(epoch)
        if epoch in self.failures:
            raise RefreshFailed(self.failure_message(epoch))
        if epoch not in self.receipts:
            raise EpochNotSealed(
                f"epoch {epoch} is not sealed on every shard yet; call wait_sealed({epoch}, ...) "
                "first"
            )

    def check_live(self, expected: int | None) -> None:
        """Raise LiveEpochChanged if another epoch than the expected one is live."""
        if expected is not None and expected != self.live:
            raise LiveEpochChanged(
                f"epoch {self.live} is live, not {expected}: someone else switched the memory; "
                "look at what is live and decide again"
            )

    def rebase(self, epoch: int) -> EpochPlan | None:
        """What must be staged instead of a sealed epoch whose followed part has moved on.

        Returns:
            A new plan with this epoch's own part and the live epoch's other part; None when the
            epoch can be activated as it is.
        """
        self.check_sealed(epoch)
        plan = self.plans[epoch]
        if self.live is None:
            return None
        live = self.plans[self.live]
        content = plan.content_version if plan.own_content else live.content_version
        made_by = plan if plan.own_weights else live
        weights = made_by.weights_id
        if (content, weights) == (plan.content_version, plan.weights_id):
            return None
        return self._add(
            replace(
                plan,
                content_version=content,
                weights_id=weights,
                encoder_step=made_by.encoder_step,
                tabled=made_by.tabled,
            )
        )

    def activate(self, epoch: int) -> None:
        """Make a sealed epoch the live one."""
        self.check_sealed(epoch)
        self.leaving.discard(epoch)
        self.live = epoch

    def release(self, epoch: int, now: float = 0.0) -> bool:
        """Forget an epoch that is not live; later, if a reader has it pinned.

        Returns:
            Whether it is forgotten, so that shards may drop it.
        """
        self.plan(epoch)
        if epoch == self.live:
            raise EpochInUse(
                f"epoch {epoch} answers searches and cannot be released; activate another one first"
            )
        sealed_or_coming = [e for e in self.plans if e not in self.failures]
        if sealed_or_coming == [epoch]:
            raise EpochInUse(f"epoch {epoch} is the only one; close the memory instead")
        self._end_leases(now)
        if any(pin.epoch == epoch for pin in self.pins.values()):
            self.leaving.add(epoch)
            return False
        self._forget(epoch)
        return True

    def pin(self, epoch: int | None, lease_s: float, now: float) -> Pin:
        """Hold a sealed epoch, by default the live one, for a reader.

        Raises:
            ValueError: lease_s is not positive. UnknownEpoch, EpochNotSealed, RefreshFailed.
        """
        if not lease_s > 0:
            raise ValueError(f"lease_s={lease_s} must be greater than 0")
        if epoch is None:
            if self.live is None:
                raise EpochNotSealed("no epoch is live yet; stage one, wait_sealed and activate it")
            epoch = self.live
        self.check_sealed(epoch)
        self.last_pin += 1
        self.pins[self.last_pin] = Pin(id=self.last_pin, epoch=epoch, deadline=now + lease_s)
        return self.pins[self.last_pin]

    def renew(self, pin: int, lease_s: float, now: float) -> None:
        """Begin the lease anew.

        Raises:
            UnknownEpoch: it ended, so the epoch may be gone.
        """
        self._end_leases(now)
        if pin not in self.pins:
            raise UnknownEpoch("this pin's lease has ended, so its epoch may be gone; pin again")
        self.pins[pin] = replace(self.pins[pin], deadline=now + lease_s)

    def unpin(self, pin: int) -> None:
        """Let go. A pin that ended is ignored."""
        self.pins.pop(pin, None)

    def forget_left(self, now: float) -> list[int]:
        """Forget released epochs that no reader holds any more; returns them, for the shards."""
        self._end_leases(now)
        held = {pin.epoch for pin in self.pins.values()}
        gone = sorted(self.leaving - held)
        for epoch in gone:
            self._forget(epoch)
        return gone

    def failure_message(self, epoch: int) -> str:
        kept = f"epoch {self.live} goes on answering" if self.live is not None else "none is live"
        return f"epoch {epoch} could not be staged: {self.failures[epoch]} ({kept})"

    def _add(self, plan: EpochPlan) -> EpochPlan:
        self.last_epoch += 1
        self.plans[self.last_epoch] = replace(plan, epoch=self.last_epoch)
        return self.plans[self.last_epoch]

    def _end_leases(self, now: float) -> None:
        self.pins = {i: pin for i, pin in self.pins.items() if pin.deadline > now}

    def _forget(self, epoch: int) -> None:
        del self.plans[epoch]
        self.receipts.pop(epoch, None)
        self.failures.pop(epoch, None)
        self.leaving.discard(epoch)
        self.pins = {i: pin for i, pin in self.pins.items() if pin.epoch != epoch}
