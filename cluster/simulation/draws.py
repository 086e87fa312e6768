"""What is drawn: a shard's searches with their stragglers, and the trainers' computing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes

AT_ONCE = 4096  # numbers drawn together, since one at a time costs more than an event


def factors(
    scenario: Scenario, service: ServiceTimes, random: np.random.Generator, size: int
) -> Floats:
    """How much longer than their mean single searches take: as measured, and stragglers."""
    drawn = service.spreads(random, size)
    if scenario.straggler_share:
        slow = random.random(size) < scenario.straggler_share
        drawn = drawn * (1 + slow * random.pareto(scenario.straggler_shape, size))
    return drawn


def search_draws(
    scenario: Scenario, service: ServiceTimes, random: np.random.Generator
) -> Callable[[int], float]:
    """A function from a number of queries to the seconds of one search of them."""
    means: dict[int, float] = {}
    waiting: list[float] = []

    def draw(rows: int) -> float:
        if rows not in means:
            mean = service.search_s(scenario.entries_per_shard, np.array([rows], float))
            means[rows] = float(mean[0])
        if not waiting:
            waiting.extend(factors(scenario, service, random, AT_ONCE).tolist())
        return means[rows] * waiting.pop()

    return draw


def compute_draws(
    scenario: Scenario, service: ServiceTimes, random: np.random.Generator
) -> Callable[[], Floats]:
    """A function to the computing seconds of every trainer in one step."""

    def draw() -> Floats:
        if scenario.compute_s is None:
            return random.choice(service.compute, scenario.trainers)
        if not scenario.jitter:
            return np.full(scenario.trainers, scenario.compute_s)
        sigma = scenario.jitter
        # Its mean is compute_s, whatever the jitter.
        return scenario.compute_s * random.lognormal(-(sigma**2) / 2, sigma, scenario.trainers)

    return draw
