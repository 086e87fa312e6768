"""What a simulation tells: the figures, as values for programs and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from cluster.simulation.failures import LongRun, long_run
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes
from cluster.simulation.trainers import Noted

Method = Literal["auto", "events", "statistics"]

# Of events, in all steps; some 100,000 are played in a second.
EVENTS_AT_MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The figures of one scenario.

    Attributes:
        step_ms: mean of a step; ideal_ms: mean of the same steps, had their searches taken no time.
        overhead: what the memory adds to a step, as a share of ideal_ms.
        search_p50_ms, search_p99_ms: of one trainer's search of all shards.
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
    overhead: float
    search_p50_ms: float
    search_p99_ms: float
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
        failures = ", ".join(f"{count} of a {kind}" for kind, count in run.failures.items())
        rows = [
            ("method", self.method),
            ("step", f"{self.step_ms:.2f} ms; without the memory {self.ideal_ms:.2f} ms"),
            ("overhead", f"{100 * self.overhead:.1f} %"),
            ("search", f"p50 {self.search_p50_ms:.2f} ms, p99 {self.search_p99_ms:.2f} ms"),
        ]
        if self.hedged is not None:
            rows.append(("asked twice", f"{100 * self.hedged:.2f} % of the requests"))
        if self.refresh_s is not None:
            told = f"{self.staleness_mean:.1f} steps, at most {self.staleness_most}"
            rows += [("keys' age", told), ("refresh", f"{self.refresh_s:.2f} s")]
        return [
            *rows,
            ("failures", f"{failures or 'none'} in {run.seconds / 3600:g} h"),
            (
                "goodput",
                f"{self.goodput:.3f} steps/s, {100 * self.goodput_share:.2f} % of those without "
                "failures and checkpoints",
            ),
            (
                "lost",
                f"{run.stopped_s:.0f} s waiting for shards, {run.restarting_s:.0f} s starting "
                f"trainers, {run.steps_again:,.0f} steps made again",
            ),
        ]


def simulate(scenario: Scenario, service: ServiceTimes, method: Method = "auto") -> Outcome:
    """Play a scenario's steps, then follow its long run at their speed.

    Args:
        method: "auto" plays single events where there are not too many of them.

    Raises:
        ValueError: the method cannot play this scenario; no such method.
    """
    from cluster.simulation.events import events_per_step, play
    from cluster.simulation.statistics import draw_steps

    if method not in ("auto", "events", "statistics"):
        raise ValueError(f"method={method!r}; allowed: 'auto', 'events', 'statistics'")
    if method == "auto":
        many = scenario.steps * events_per_step(scenario) > EVENTS_AT_MOST
        method = "statistics" if many and not scenario.shared_cores else "events"
    noted = (play if method == "events" else draw_steps)(scenario, service)
    # The speed without failures is what the long run needs, as it counts those itself.
    calm = play(without_failures(scenario), service) if noted.failures else noted
    step_s = float(np.mean(calm.step_s[scenario.warmup :]))
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
    kept = slice(scenario.warmup, None)
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
        overhead=step_s / ideal_s - 1 if ideal_s else float("inf"),
        search_p50_ms=1e3 * float(p50_s),
        search_p99_ms=1e3 * float(p99_s),
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


def scenarios_table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row per outcome: shards, replicas, trainers, overhead, latencies, goodput."""
    return [
        [
            str(each.scenario.shards),
            str(each.scenario.replicas),
            str(each.scenario.trainers),
            f"{100 * each.overhead:.1f} %",
            f"{each.search_p50_ms:.2f}",
            f"{each.search_p99_ms:.2f}",
            f"{100 * each.goodput_share:.2f} %",
        ]
        for each in outcomes
    ]
