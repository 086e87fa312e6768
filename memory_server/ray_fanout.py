"""Ask every shard the same thing at once, and decide what a shard that does not answer means."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from memory_server.api import LostShardPolicy
from memory_server.errors import MemoryServerError, ShardLost, ShardRestoring
from memory_server.ray_names import NAMESPACE, shard_name

RETRY_PAUSE_S = 0.05


def ask_shards(
    memory: str,
    shards: Sequence[Any],
    method: str,
    arguments: Callable[[float], tuple[Any, ...]],
    *,
    policy: LostShardPolicy,
    deadline_s: float,
) -> tuple[list[Any], tuple[int, ...]]:
    """Call `method` on all shards.

    Args:
        arguments: given the seconds that a shard may wait for an epoch that it is building again.
        policy: "wait": until `deadline_s`; "degrade": go on without shards that are lost or silent.

    Returns:
        (replies in the order of their shards, the shards that are missing)

    Raises:
        ShardLost: names the shards. Whatever a shard raised: bad request, unknown epoch.
    """
    deadline = time.monotonic() + deadline_s
    replies: dict[int, Any] = {}
    missing: dict[int, str] = {}

    def ask(shard: int) -> Any:
        left_s = max(0.0, deadline - time.monotonic())
        wait_s = left_s if policy == "wait" else 0.0
        return getattr(shards[shard], method).remote(*arguments(wait_s))

    pending = {ask(shard): shard for shard in range(len(shards))}
    while pending:
        left_s = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=left_s)
        if not ready:
            missing |= dict.fromkeys(pending.values(), f"did not answer within {deadline_s:g} s")
            break
        shard = pending.pop(ready[0])
        try:
            replies[shard] = ray.get(ready[0])
            continue
        except RayTaskError as error:
            if not isinstance(error.cause, ShardRestoring):
                _let_finish(list(pending))
                raise original_error(error) from None
            reason = str(error.cause)
        except RayActorError as error:
            if _is_gone(memory, shard):
                reason = "its actor is gone for good (the memory was closed, or could not restart)"
                missing[shard] = reason
                continue
            reason = f"its actor is restarting ({type(error).__name__})"
        if policy == "degrade" or time.monotonic() >= deadline:
            missing[shard] = reason
            continue
        time.sleep(RETRY_PAUSE_S)
        pending[ask(shard)] = shard
    if missing and (policy == "wait" or not replies):
        raise ShardLost(_lost_message(memory, missing, policy, deadline_s))
    return [replies[shard] for shard in sorted(replies)], tuple(sorted(missing))


def _let_finish(references: list[Any]) -> None:
    """Take the other shards' replies to a refused request, which Ray would report as unhandled."""
    if not references:
        return
    ready, _ = ray.wait(references, num_returns=len(references), timeout=1.0)
    for reference in ready:
        with contextlib.suppress(RayError):
            ray.get(reference)


def original_error(error: RayTaskError) -> Exception:
    """The error that was raised in the actor, without Ray's envelope, if it is one of ours."""
    cause = error.cause
    if isinstance(cause, MemoryServerError | ValueError | TimeoutError):
        return cause
    return error


def _is_gone(memory: str, shard: int) -> bool:
    """Whether the actor will never come back: Ray forgets its name only then."""
    try:
        ray.get_actor(shard_name(memory, shard), namespace=NAMESPACE)
    except ValueError:
        return True
    return False


def _lost_message(
    memory: str, missing: dict[int, str], policy: LostShardPolicy, deadline_s: float
) -> str:
    reasons = "; ".join(f"shard {shard}: {reason}" for shard, reason in sorted(missing.items()))
    hint = (
        f"raise deadline_s ({deadline_s:g} s) if it needs longer to come back, or use "
        "on_lost_shard='degrade' to go on without it"
        if policy == "wait"
        else "no shard answered"
    )
    return f"memory {memory!r} cannot answer: {reasons}; {hint}"
