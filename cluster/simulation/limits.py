"""What is too much to simulate: refused before any work, with what would be allowed.

The limits are those of memory (some 200 bytes per request that is drawn at once) and of patience.
"""

from __future__ import annotations

import math

from cluster.simulation.failures import Kind, kinds_of, victims
from cluster.simulation.scenario import HOUR_S, Scenario
from cluster.simulation.service import ServiceTimes

REQUESTS_AT_ONCE = 20_000_000  # about 4 GB
REQUESTS_AT_MOST = 500_000_000  # in all steps; 200,000 to 2,000,000 are drawn in a second
EVENTS_AT_MOST = 30_000_000  # some 100,000 are played in a second
REPLICAS_AT_MOST = 200_000  # that are played one by one
DEATHS_AT_MOST = 1_000_000  # of replicas and trainers in the long run
TRIES_AT_MOST = 1000  # of trainers, on average, to get from one checkpoint to the next


def refuse_too_many_requests(scenario: Scenario) -> None:
    """For both methods.

    Raises:
        BadScenario: too many in one search of all trainers, or in all steps.
    """
    at_once = scenario.shards * max(scenario.trainers, scenario.replicas)
    if at_once > REQUESTS_AT_ONCE:
        many = "trainers" if scenario.trainers >= scenario.replicas else "replicas"
        raise scenario.refused(
            f"{{shards}} times {{{many}}} make {at_once:,}; at most {REQUESTS_AT_ONCE:,} are "
            f"simulated: give fewer {{shards:name}} or {{{many}:name}}"
        )
    per_step = scenario.shards * scenario.trainers * scenario.searches_per_step
    if per_step * scenario.steps > REQUESTS_AT_MOST:
        fewer = "{steps:name}" if per_step <= REQUESTS_AT_MOST else "{searches_per_step:name}"
        raise scenario.refused(
            f"{{steps}} of {per_step:,} requests make {per_step * scenario.steps:,}; at most "
            f"{REQUESTS_AT_MOST:,} are simulated: give fewer {fewer}"
        )


def refuse_too_many_events(scenario: Scenario, events: int, service: ServiceTimes) -> None:
    """For the method `events`, in which failures strike within steps.

    Args:
        events: about how many the steps take.

    Raises:
        BadScenario: too many of them, too many replicas, or trainers that die so often that they
            never get from one checkpoint to the next.
    """
    if events > EVENTS_AT_MOST:
        raise scenario.refused(
            f"{{steps}} of {{trainers}} and {{shards}} take about {events:,} events; at most "
            f"{EVENTS_AT_MOST:,} are played: give fewer {{steps:name}}, or the method 'statistics'"
        )
    replicas = scenario.shards * scenario.replicas
    if replicas > REPLICAS_AT_MOST:
        raise scenario.refused(
            f"{{shards}} times {{replicas}} make {replicas:,}; at most {REPLICAS_AT_MOST:,} are "
            "played one by one: give fewer, or the method 'statistics'"
        )
    step_s = scenario.compute_s
    step_s = float(service.compute.mean()) if step_s is None else step_s
    steps = min(scenario.steps, scenario.checkpoint_every_steps)
    for kind in kinds_of(scenario):
        if kind.name.startswith("trainer") and kind.rate * steps * step_s > math.log(TRIES_AT_MOST):
            raise scenario.refused(
                f"{{{kind.option}}}: a {kind.name} dies every {1 / kind.rate:.3g} s, and {steps:,} "
                f"steps without a checkpoint take at least {steps * step_s:.3g} s, so they would "
                f"never be made; give at least {_hours_enough(kind, steps * step_s):.2g} h, fewer "
                "{checkpoint_every_steps:name}, or the method 'statistics'"
            )


def _hours_enough(kind: Kind, seconds: float) -> float:
    return kind.members * seconds / math.log(TRIES_AT_MOST) / HOUR_S * 1.1


def refuse_too_many_failures(scenario: Scenario) -> None:
    """For the long run.

    Raises:
        BadScenario: too much would fail in its hours.
    """
    deaths = {
        kind: kind.rate * scenario.hours * HOUR_S * _struck(scenario, kind)
        for kind in kinds_of(scenario)
    }
    if sum(deaths.values()) <= DEATHS_AT_MOST:
        return
    worst = max(deaths, key=lambda kind: deaths[kind])
    enough_h = scenario.hours * sum(deaths.values()) / DEATHS_AT_MOST
    enough_h *= worst.mtbf_s / HOUR_S / scenario.hours * 1.1
    raise scenario.refused(
        f"{{{worst.option}}} and {{hours}} mean about {sum(deaths.values()):,.0f} deaths of "
        f"replicas and trainers; at most {DEATHS_AT_MOST:,} are followed: give at least "
        f"{enough_h:.2g} h between failures, or fewer {{hours:name}}"
    )


def _struck(scenario: Scenario, kind: Kind) -> int:
    """How many die with one member of a kind."""
    return 1 if kind.name.startswith("trainer") else len(victims(scenario, kind.name, 0))
