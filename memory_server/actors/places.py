"""Which node gets which replica of which shard. Pure, apart from reading Ray's list of nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import ray

from memory_server.actors.names import Address

Placement = Literal["spread", "pack"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)
_ROUNDING = 1e-6  # Ray counts resources in ten-thousandths


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that lives, and what it has in all; others may use a part of it."""

    id: str
    resources: Mapping[str, float] = field(default_factory=dict)


def living_nodes() -> list[Node]:
    """The cluster's nodes, in an order that does not change."""
    found = [
        Node(id=node["NodeID"], resources=node["Resources"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.id)


def check_resources(nodes: Sequence[Node], actors: int, each: Mapping[str, float]) -> None:
    """Refuse at once what would wait for ever.

    Raises:
        ValueError: the cluster has not so much, or no node has what one actor needs.
    """
    options = {"CPU": "cpus_per_shard", "GPU": "gpus_per_shard"}
    for kind, wanted in each.items():
        option = options.get(kind, f"resources_per_shard[{kind!r}]")
        have = sum(node.resources.get(kind, 0.0) for node in nodes)
        largest = max((node.resources.get(kind, 0.0) for node in nodes), default=0.0)
        if actors * wanted > have + _ROUNDING:
            raise ValueError(
                f"{actors} actors (shards times replicas) with {option}={wanted:g} need "
                f"{actors * wanted:g} {kind}, but the Ray cluster has {have:g}; lower {option} or "
                "the number of shards"
            )
        if wanted > largest + _ROUNDING:
            raise ValueError(
                f"{option}={wanted:g}, but no node of the Ray cluster has more than {largest:g} "
                f"{kind}; lower it"
            )


def assign_nodes(
    nodes: Sequence[Node],
    *,
    shards: int,
    replicas: int,
    each: Mapping[str, float],
    placement: Placement,
) -> dict[Address, str]:
    """Give every replica a node.

    A shard's replicas get different nodes as long as there are enough that have room. Beyond that,
    "spread" takes the node with the fewest actors, so that the loss of one costs little and memory
    is shared out; "pack" the one with the most that still has room, so that others stay free.

    Args:
        nodes: at least one. each: what one actor reserves.

    Returns:
        The node's id for each (shard, replica). Where no node has room, that which has the least
        too little: its actor waits there for what others use.
    """
    left = {node.id: dict(node.resources) for node in nodes}
    count = {node.id: 0 for node in nodes}
    order = list(left)
    places: dict[Address, str] = {}
    for replica in range(replicas):
        for shard in range(shards):
            taken = {places[shard, other] for other in range(replica)}
            # Of equals, the node `replica` steps on: neighbours of many shards then share evenly.
            first = order.index(places[shard, 0]) + replica if replica else 0

            def rank(
                node: str, taken: set[str] = taken, first: int = first
            ) -> tuple[bool, bool, float, int, int]:
                lacking = _lacking(left[node], each)
                many = count[node] if placement == "spread" else -count[node]
                steps = (order.index(node) - first) % len(order)
                # Two replicas on one node are better than one that waits for room.
                return lacking > 0, node in taken, lacking, many, steps

            best = min(order, key=rank)
            places[shard, replica] = best
            count[best] += 1
            for kind, wanted in each.items():
                left[best][kind] = left[best].get(kind, 0.0) - wanted
    return places


def _lacking(have: Mapping[str, float], each: Mapping[str, float]) -> float:
    lacking = sum(max(0.0, wanted - have.get(kind, 0.0)) for kind, wanted in each.items())
    return 0.0 if lacking < _ROUNDING else lacking
