"""The book of epochs: which exist, what each is made of, which one answers. No tensors, no I/O."""

from dataclasses import dataclass, field

from memory_server.errors import EpochInUse, EpochNotSealed, RefreshFailed, UnknownEpoch


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What an epoch is made of. Epochs with equal `weights_id` were encoded by the same weights."""

    epoch: int
    content_version: str
    encoder_step: int
    weights_id: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a shard vouches for when it seals its part of an epoch.

    Attributes:
        rows, live_rows: rows held, and those that are not removed.
        key_checksum: CRC-32 of the keys' bytes, row by row.
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
    encoded_rows: int
    bytes: dict[str, int]
    seconds: float


@dataclass
class EpochBook:
    """Numbers epochs, and allows only steps that keep the memory consistent."""

    plans: dict[int, EpochPlan] = field(default_factory=dict)
    receipts: dict[int, dict[int, Receipt]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    live: int | None = None
    _last_epoch: int = 0
    _last_weights: int = 0

    def newest(self) -> EpochPlan:
        """The newest epoch that did not fail."""
        return self.plans[max(epoch for epoch in self.plans if epoch not in self.failures)]

    def begin(
        self, *, encoder_step: int, new_weights: bool, content_version: str | None
    ) -> EpochPlan:
        """Number a new epoch. Without new weights, or a version, it takes the newest epoch's."""
        if encoder_step < 0:
            raise ValueError(f"encoder_step={encoder_step} must not be negative")
        if content_version is None:
            content_version = self.newest().content_version
        if new_weights:
            self._last_weights += 1
            weights_id = self._last_weights
        else:
            weights_id = self.newest().weights_id
        self._last_epoch += 1
        plan = EpochPlan(
            epoch=self._last_epoch,
            content_version=content_version,
            encoder_step=encoder_step,
            weights_id=weights_id,
        )
        self.plans[plan.epoch] = plan
        return plan

    def plan(self, epoch: int) -> EpochPlan:
        if epoch not in self.plans:
            held = ", ".join(str(e) for e in sorted(self.plans)) or "none"
            raise UnknownEpoch(f"the memory does not hold epoch {epoch}; it holds {held}")
        return self.plans[epoch]

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

    def activate(self, epoch: int) -> None:
        """Make a sealed epoch the live one."""
        self.check_sealed(epoch)
        self.live = epoch

    def release(self, epoch: int) -> EpochPlan:
        """Forget an epoch that is not live."""
        plan = self.plan(epoch)
        if epoch == self.live:
            raise EpochInUse(
                f"epoch {epoch} answers searches and cannot be released; activate another one first"
            )
        sealed_or_coming = [e for e in self.plans if e not in self.failures]
        if sealed_or_coming == [epoch]:
            raise EpochInUse(f"epoch {epoch} is the only one; close the memory instead")
        del self.plans[epoch]
        self.receipts.pop(epoch, None)
        self.failures.pop(epoch, None)
        return plan

    def failure_message(self, epoch: int) -> str:
        kept = f"epoch {self.live} goes on answering" if self.live is not None else "none is live"
        return f"epoch {epoch} could not be staged: {self.failures[epoch]} ({kept})"
