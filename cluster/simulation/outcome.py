"""What a simulation tells: the figures, as values for programs and as a table for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from cluster.simulation.failures import LongRun, long_run
from cluster.simulation.limits import (
    refuse_too_many_events,
    refuse_too_many_failures,
    refuse_too_many_requests,
)
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes
from cluster.simulation.trainers import Noted

Method = Literal["auto", "events", "statistics"]

CARDS_MATTER = 0.2  # of a search's p50
# Of events, in all steps: with more of them "auto" draws whole steps.
EVENTS_IF_AUTO = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The figures of one scenario.

    Attributes:
        step_ms: mean of a step; ideal_ms: mean of the same steps, had their searches taken no time.
        overhead: what the memory adds to a step, as a share of ideal_ms; None: that is 0.
        search_p50_ms, search_p99_ms: of one trainer's search of all shards.
        late: share of the searches that took longer than the deadline, so that in the real system
            they fail and the trainers start again.
        cards_ms: one search of all trainers at the busiest node's network card, which the other
            figures do not wait for.
        staleness: steps that the keys were behind the weights: mean and most.
        refresh_s: mean from publishing weights to the switch; None: there was no refresh.
        goodput: useful steps per second of the long run, its failures and checkpoints counted;
            goodput_share: of the steps that it would have made without them.
        hedged, overloaded: shares of the requests; None: not counted by the method.
        long_run: the hours with failures.
    """

    scenario: Scenario
    method: str
    step_ms: float
    ideal_ms: float
    overhead: float | None
    search_p50_ms: float
    search_p99_ms: float
    late: float
    cards_ms: float
    staleness_mean: float
    staleness_most: int
    refresh_s: float | None
    goodput: float
    goodput_share: float
    hedged: float | None
    relays_failed: int | None
    restarts: int
    long_run: LongRun

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a person."""
        run = self.long_run
        failures = ", ".join(f"{count:,} of a {kind}" for kind, count in run.failures.items())
        rows = [
            ("method", self.method),
            ("step", f"{shown(self.step_ms)} ms; without the memory {shown(self.ideal_ms)} ms"),
            (
                "overhead",
                "no share: without the memory a step takes no time"
                if self.overhead is None
                else f"{shown(100 * self.overhead)} %",
            ),
            ("search", f"p50 {shown(self.search_p50_ms)} ms, p99 {shown(self.search_p99_ms)} ms"),
            ("deadline", self._deadline()),
        ]
        if not self.scenario.shared_cores:
            rows.append(("network cards", self._cards()))
        if self.hedged is not None:
            rows.append(("asked twice", f"{shown(100 * self.hedged)} % of the requests"))
        if self.refresh_s is not None:
            told = f"{self.staleness_mean:.1f} steps, at most {self.staleness_most}"
            rows += [("keys' age", told), ("refresh", f"{shown(self.refresh_s)} s")]
        elif self.scenario.refresh_every_steps:
            rows.append(
                ("refresh", f"none finished in {self.scenario.steps:,} steps; simulate more steps")
            )
        rows += [
            ("failures", f"{failures or 'none'} in {run.seconds / 3600:g} h"),
            (
                "goodput",
                f"{self.goodput:.3g} steps/s, {100 * self.goodput_share:.2f} % of those without "
                "failures and checkpoints",
            ),
            (
                "lost",
                f"{run.stopped_s:,.0f} s waiting for shards, {run.restarting_s:,.0f} s starting "
                f"trainers, {run.steps_again:,.0f} steps made again",
            ),
        ]
        if self._back_too_late:
            rows.append(
                (
                    "not counted",
                    f"a lost replica is back after {shown(self._back_s)} s, later than the "
                    f"deadline of {self.scenario.deadline_s:g} s: a shard that has no other fails "
                    "searches, and the trainers start again",
                )
            )
        return rows

    def _deadline(self) -> str:
        limit = f"{self.scenario.deadline_s:g} s"
        if not self.late:
            return f"no search took longer than {limit}"
        share = 100 * self.late
        return (
            f"{'under 0.01' if share < 0.01 else shown(share)} % of the searches took longer than "
            f"{limit}: SUCH A SYSTEM WOULD FAIL: they raise an error then, and the trainers start "
            "again; the other figures are of one that waits"
        )

    def _cards(self) -> str:
        told = f"{shown(self.cards_ms)} ms of a search of all trainers at the busiest node"
        if self.cards_ms > CARDS_MATTER * self.search_p50_ms:
            return f"{told}: the simulation does not wait for it, so searches take longer than told"
        return f"{told}; not waited for, and small beside a search"

    @property
    def _back_s(self) -> float:
        """Of a replica, at the latest."""
        node_s = self.scenario.detection_s if self.scenario.memory_node_mtbf_h else 0.0
        return self.scenario.replica_back_s + node_s

    @property
    def _back_too_late(self) -> bool:
        fails = self.scenario.replica_mtbf_h or self.scenario.memory_node_mtbf_h
        return bool(fails) and self._back_s > self.scenario.deadline_s


def shown(number: float) -> str:
    """Three significant digits and at most two decimals, with commas between thousands."""
    if not number:
        return "0"
    decimals = min(2, 2 - math.floor(math.log10(abs(number))))
    return f"{round(number, decimals):,.{max(0, decimals)}f}"


def simulate(scenario: Scenario, service: ServiceTimes, method: Method = "auto") -> Outcome:
    """Play a scenario's steps, then follow its long run at their speed.

    Args:
        method: "auto" plays single events where there are not too many of them.

    Raises:
        BadScenario: the method cannot play this scenario, or it is too much; told before any work.
        ValueError: no such method.
    """
    from cluster.simulation.events import events_per_step, play
    from cluster.simulation.statistics import draw_steps

    if method not in ("auto", "events", "statistics"):
        raise ValueError(f"method={method!r}; allowed: 'auto', 'events', 'statistics'")
    refuse_too_many_requests(scenario)
    refuse_too_many_failures(scenario)
    events = scenario.steps * events_per_step(scenario)
    if method == "auto":
        many = events > EVENTS_IF_AUTO
        method = "statistics" if many and not scenario.shared_cores else "events"
    if method == "events":
        refuse_too_many_events(scenario, events, service)
    noted = (play if method == "events" else draw_steps)(scenario, service)
    # The speed without failures is what the long run needs, as it counts those itself.
    calm = play(without_failures(scenario), service) if noted.failures else noted
    step_s = float(np.mean(calm.step_s[scenario.left_out :]))
    random = np.random.default_rng([scenario.seed, 1])
    run = long_run(scenario, step_s, random)
    return summed_up(scenario, method, noted, run)


def without_failures(scenario: Scenario) -> Scenario:
    """The same cluster, in which nothing fails."""
    return replace(
        scenario,
        replica_mtbf_h=0.0,
        memory_node_mtbf_h=0.0,
        trainer_mtbf_h=0.0,
        trainer_node_mtbf_h=0.0,
    )


def summed_up(scenario: Scenario, method: str, noted: Noted, run: LongRun) -> Outcome:
    """The figures of what was noted."""
    kept = slice(scenario.left_out, None)
    step_s, ideal_s = float(np.mean(noted.step_s[kept])), float(np.mean(noted.ideal_s[kept]))
    searches: Floats = np.concatenate(noted.search_s[kept])
    p50_s, p99_s = np.quantile(searches, [0.5, 0.99])
    counts = noted.counts
    counted = method == "events"
    return Outcome(
        scenario=scenario,
        method=method,
        step_ms=1e3 * step_s,
        ideal_ms=1e3 * ideal_s,
        overhead=step_s / ideal_s - 1 if ideal_s else None,
        search_p50_ms=1e3 * float(p50_s),
        search_p99_ms=1e3 * float(p99_s),
        late=float(np.mean(searches > scenario.deadline_s)),
        cards_ms=1e3 * scenario.cards_s,
        staleness_mean=float(np.mean(noted.staleness[kept])),
        staleness_most=max(noted.staleness[kept]),
        refresh_s=float(np.mean(noted.refreshes)) if noted.refreshes else None,
        goodput=run.useful_steps / run.seconds if run.seconds else 1 / step_s,
        goodput_share=run.share,
        hedged=counts.hedged / max(1, counts.asked) if counted else None,
        relays_failed=counts.relays_failed if counted else None,
        restarts=noted.restarts,
        long_run=run,
    )
