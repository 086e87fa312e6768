"""What is simulated: the cluster, the load, and what goes wrong. Checked when built."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from cluster.simulation.refusals import BadScenario
from memory_server.wire.fan_out import default_fan_in, groups_of

HedgeChoice = float | Literal["p95", "off"]

HOUR_S = 3600.0
KEY_WIDTH = 128  # of the keys whose searches were measured; others take other times

_AT_LEAST_ONE = (
    *("shards", "replicas", "trainers", "batch", "entries", "top_k", "entry_tokens"),
    *("searches_per_step", "steps", "queue_limit", "max_batch_rows", "relays_at_once"),
    *("checkpoint_every_steps", "shards_per_node", "trainers_per_node"),
)
_ZERO_OR_MORE = (
    *("latency_s", "gradient_bytes", "refresh_every_steps", "shared_cores", "seed"),
    *("checkpoint_s", "hours", "detection_s"),
    *("replica_mtbf_h", "memory_node_mtbf_h", "trainer_mtbf_h", "trainer_node_mtbf_h"),
    *("replica_restart_s", "restore_s_per_entry", "trainer_restart_s", "renew_s_per_entry"),
)
_ABOVE_ZERO = ("bandwidth_bytes_s", "deadline_s", "heartbeat_timeout_s")
_UP_TO_ONE = ("straggler_share", "compute_before", "jitter")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One cluster and its load. An MTBF of 0 means that such a thing never fails.

    Attributes:
        shards, replicas: of the memory; each replica has cores of its own.
        trainers: data-parallel; batch: queries of one search of one trainer.
        entries: of the whole memory; top_k, entry_tokens: they give a reply its size.
        searches_per_step: memory layers times micro-batches, one after the other.
        steps, warmup: simulated, and the first of them that are left out of the figures; warmup
            None: a tenth.
        compute_s: a trainer's step without its searches; None: as measured (`service`).
        compute_before: share of it that comes before the last search.
        jitter: standard deviation of the logarithm of a trainer's computing time; only where
            compute_s is given, and at most 1.
        deadline_s: how long a search may take in the real system; here it takes what it takes, and
            is told to be too late.
        fan_in, hedge, queue_limit, max_batch_rows, relays_at_once: as in the memory's own code;
            fan_in None: what it takes by itself.
        latency_s: one way between two machines; bandwidth_bytes_s: of a machine's network card. A
            message takes its time on it, but waits for no other: `cards_s` tells what that hides.
        gradient_bytes: what each trainer reduces per step.
        straggler_share: of the searches of a shard that are slowed by 1 + a Pareto-distributed
            number of this shape: 1.5 is a heavy tail, of infinite variance.
        refresh_every_steps: new keys in the background; 0: never.
        shared_cores: 0: every process has cores of its own; else all of them share so many, as on
            one machine.
        replica_mtbf_h ... trainer_node_mtbf_h: hours between failures of one replica's process, one
            node of shards, one trainer's process, one node of trainers.
        replica_restart_s: from its death until a replica serves, less restore_s_per_entry for each
            of its entries; detection_s: until the loss of a node is noticed.
        trainer_restart_s: from the death of a trainer until all train again, less
            renew_s_per_entry for each entry of a shard: its keys are made anew before.
        heartbeat_timeout_s: until a client notices that a node answers no more.
        checkpoint_s: how long training stands still for one.
        hours: of the run whose goodput is told.
    """

    shards: int = 4
    replicas: int = 1
    trainers: int = 4
    batch: int = 32
    entries: int = 1_000_000
    top_k: int = 5
    entry_tokens: int = 64
    searches_per_step: int = 1
    steps: int = 200
    warmup: int | None = None
    compute_s: float | None = None
    compute_before: float = 0.3
    jitter: float = 0.03
    fan_in: int | None = None
    hedge: HedgeChoice = "p95"
    deadline_s: float = 60.0
    queue_limit: int = 256
    max_batch_rows: int = 4096
    relays_at_once: int = 4
    latency_s: float = 50e-6
    bandwidth_bytes_s: float = 1.25e9
    gradient_bytes: float = 0.0
    straggler_share: float = 0.0
    straggler_shape: float = 1.5
    refresh_every_steps: int = 0
    shared_cores: int = 0
    replica_mtbf_h: float = 0.0
    memory_node_mtbf_h: float = 0.0
    trainer_mtbf_h: float = 0.0
    trainer_node_mtbf_h: float = 0.0
    shards_per_node: int = 8
    trainers_per_node: int = 8
    replica_restart_s: float = 5.2
    restore_s_per_entry: float = 3.54e-6
    detection_s: float = 14.0
    trainer_restart_s: float = 7.8
    renew_s_per_entry: float = 4.91e-6
    heartbeat_timeout_s: float = 6.0
    checkpoint_every_steps: int = 1000
    checkpoint_s: float = 0.0
    hours: float = 24.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise self.refused(f"{{{field.name}}}: give a finite number")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise self.refused(f"{{{name}}} must be at least 1")
        for name in _ZERO_OR_MORE:
            if getattr(self, name) < 0:
                raise self.refused(f"{{{name}}} must be 0 or more")
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise self.refused(f"{{{name}}} must be greater than 0")
        for name in _UP_TO_ONE:
            if not 0 <= getattr(self, name) <= 1:
                raise self.refused(f"{{{name}}} must be between 0 and 1")
        if self.straggler_shape <= 1:
            raise self.refused(
                "{straggler_shape} must be greater than 1: a slower tail has no mean"
            )
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise self.refused(
                "{warmup} leaves nothing of {steps} to measure, or is below 0; give a "
                "{warmup:name} from 0 to less than {steps:name}, or none: a tenth is left out"
            )
        if self.compute_s is not None and self.compute_s < 0:
            raise self.refused("{compute_s} must be 0 or more")
        if self.fan_in is not None and self.fan_in < 2:
            raise self.refused("{fan_in} must be at least 2")
        if self.entries < self.shards:
            raise self.refused(
                "{entries} leave some of {shards} empty; give at least as many {entries:name} as "
                "{shards:name}"
            )
        known = self.hedge in ("p95", "off") if isinstance(self.hedge, str) else self.hedge > 0
        if not known:
            raise self.refused("{hedge}; allowed: 'p95', 'off', or seconds above 0")

    def refused(self, text: str) -> BadScenario:
        """The error that says so; `{steps}` in the text stands for that field and its value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return BadScenario(text, values)

    @property
    def left_out(self) -> int:
        """Steps at the beginning that the figures leave out."""
        return self.steps // 10 if self.warmup is None else self.warmup

    @property
    def entries_per_shard(self) -> int:
        """Of the largest shard."""
        return math.ceil(self.entries / self.shards)

    @property
    def hedges(self) -> bool:
        """Whether a second replica is ever asked."""
        return self.hedge != "off" and self.replicas > 1

    @property
    def asked_directly(self) -> int:
        """With more shards than this, relays ask: `fan_in`, or what the memory takes by itself."""
        return default_fan_in(self.replicas) if self.fan_in is None else self.fan_in

    @property
    def relayed(self) -> bool:
        """Whether shards are asked by way of relays."""
        return self.shards > self.asked_directly

    @property
    def reply_bytes(self) -> float:
        """One shard's reply: ids, documents, scores, and tokens of two bytes."""
        return float(self.batch * self.top_k * (8 + 8 + 4 + 2 * self.entry_tokens))

    @property
    def wire_s(self) -> float:
        """How long a reply occupies a machine's network card."""
        return self.reply_bytes / self.bandwidth_bytes_s

    @property
    def request_wire_s(self) -> float:
        """The same for a request: half-precision numbers."""
        return 2 * KEY_WIDTH * self.batch / self.bandwidth_bytes_s

    @property
    def groups(self) -> int:
        """Replies that a trainer's search gets: one of each shard, or of each relay."""
        return len(groups_of(self.shards, self.asked_directly)) if self.relayed else self.shards

    @property
    def cards_s(self) -> float:
        """How long one search of all trainers keeps the busiest node's network card at work.

        Of a node of shards that sends its replies (and, as relays, merged ones), or of a node of
        several trainers that gets them (one trainer's come one after the other anyhow). All
        trainers' searches take at least so long, if they come together and there is one card for a
        node: the simulation does not let them wait for it.
        """
        by_relays = self.groups if self.relayed else 0
        shards = min(self.shards, self.shards_per_node) / self.replicas
        sent = self.trainers * shards * (1 + by_relays / self.shards)
        together = min(self.trainers, self.trainers_per_node)
        got = together * self.groups if together > 1 else 0
        return max(sent, got) * self.wire_s

    @property
    def replica_back_s(self) -> float:
        """From the death of a replica's process until it serves again."""
        return self.replica_restart_s + self.restore_s_per_entry * self.entries_per_shard

    @property
    def trainers_back_s(self) -> float:
        """From the death of a trainer's process until all train again."""
        return self.trainer_restart_s + self.renew_s_per_entry * self.entries_per_shard

    @property
    def all_reduce_s(self) -> float:
        """A ring's transfers, and the latency of a tree there and back."""
        if self.trainers == 1:
            return 0.0
        share = (self.trainers - 1) / self.trainers
        transfers = 2 * share * self.gradient_bytes / self.bandwidth_bytes_s
        return transfers + 2 * math.ceil(math.log2(self.trainers)) * self.latency_s
