"""A search server that asks a group of shards for a client, and sends back one merged reply.

With many shards a client's time goes into sending as many requests and merging as many replies.
Then about sqrt(shards) servers, drawn anew for each search, do that for a group each.
"""

import threading
from collections import OrderedDict

from memory_server.errors import ShardLost
from memory_server.replies import ShardReply, combine_replies
from memory_server.wire.fan_out import SearchFanout
from memory_server.wire.fan_out_tasks import Question
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.search_messages import unpack_hits, unpack_search

GROUPS_KEPT = 8  # a group's addresses change only when an actor restarts

Members = tuple[tuple[int, str], ...]


class Relay:
    """Asks groups of shards. Thread-safe."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._lock = threading.Lock()
        self._fanouts: OrderedDict[Members, SearchFanout] = OrderedDict()

    def ask(self, preamble: Preamble, body: bytes, members: Members) -> ShardReply:
        """The group's k best. Never partial, and never patient: the client can ask them itself.

        Args:
            body: of a search, passed on as it is, so that a relay changes no answer.
            members: (shard, address) of each.

        Raises:
            ShardLost: some shard did not answer. BadMessage: the body is not a search. Whatever a
                shard raised.
        """
        request = unpack_search(body)
        rows, k = len(request.queries), request.k
        question = Question(
            kind=Kind.SEARCH,
            body=body,
            decode=lambda reply, shard: unpack_hits(reply, shard, rows, k),
            method="search",
            arguments=lambda epoch, wait_s: {},
        )
        replies, missing = self._fanout(members).replies(
            question, preamble.epoch, max(0.001, preamble.timeout_s)
        )
        if missing:
            lost = [members[at][0] for at in missing]
            raise ShardLost(f"shards {lost} did not answer the relay")
        return combine_replies(replies, k)

    def close(self) -> None:
        with self._lock:
            fanouts = list(self._fanouts.values())
            self._fanouts.clear()
        for fanout in fanouts:
            fanout.close()

    def _fanout(self, members: Members) -> SearchFanout:
        addresses = [address for _, address in members]

        def resolve(shard: int, replica: int) -> str:
            return addresses[shard]

        with self._lock:
            fanout = self._fanouts.get(members)
            if fanout is None:
                fanout = SearchFanout(
                    [1] * len(members),
                    resolve_endpoint=resolve,
                    secret=self._secret,
                    name="relayed group",
                    policy="degrade",
                    fan_in=len(members) + 1,
                    shard_numbers=[shard for shard, _ in members],
                )
                self._fanouts[members] = fanout
            self._fanouts.move_to_end(members)
            dropped = (
                self._fanouts.popitem(last=False)[1] if len(self._fanouts) > GROUPS_KEPT else None
            )
        if dropped is not None:
            dropped.close()
        return fanout
