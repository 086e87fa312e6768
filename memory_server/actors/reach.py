"""How searches reach the shards' actors: by their own sockets, or by Ray where there is none."""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from memory_server.actors.calls import find_actor, original_error
from memory_server.actors.names import Layout, shard_name
from memory_server.api import LostShardPolicy
from memory_server.errors import ShardLost
from memory_server.wire.fan_out import SearchFanout

ENDPOINT_TIMEOUT_S = 10.0
LOOPBACK = ("127.", "::1")


def fanout_to(
    layout: Layout, secret: bytes, *, policy: LostShardPolicy, deadline_s: float
) -> SearchFanout:
    """A fan-out to all shards of a memory; it asks their actors where they are, and nobody else."""

    def resolve(shard: int, replica: int) -> str | None:
        actor = _actor(layout, shard, replica)
        endpoint, ip = _answer(actor.endpoint.remote(), ENDPOINT_TIMEOUT_S)
        mine: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        # A loopback is reached from its own machine alone.
        on_loopback = str(endpoint).removeprefix("tcp://").startswith(LOOPBACK)
        return None if on_loopback and ip != mine else str(endpoint)

    def by_actor(
        shard: int, replica: int, method: str, arguments: dict[str, Any], timeout_s: float
    ) -> Any:
        actor = _actor(layout, shard, replica)
        call = getattr(actor, method).remote({**arguments, "timeout_s": timeout_s})
        return _answer(call, timeout_s)

    return SearchFanout(
        [layout.replicas] * layout.shards,
        resolve_endpoint=resolve,
        secret=secret,
        name=layout.name,
        actor_call=by_actor,
        policy=policy,
        deadline_s=deadline_s,
        hedge_after=layout.hedge_after_s,
        fan_in=layout.fan_in,
        queries=layout.queries,
    )


def _actor(layout: Layout, shard: int, replica: int) -> Any:
    """Raises ShardLost: Ray will not start it any more."""
    try:
        return find_actor(shard_name(layout.name, shard, replica))
    except ValueError as error:
        raise ShardLost(
            "its actor is gone for good (the memory was closed, or could not restart)"
        ) from error


def _answer(reference: Any, timeout_s: float) -> Any:
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        raise original_error(error) from None
