"""Shards and servers for the tests of the search path, without Ray."""

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memory_server.api import Entry
from memory_server.replies import ShardReply
from memory_server.shard.epochs import EpochPlan
from memory_server.shard.shard import Shard
from memory_server.store.store import Store
from memory_server.wire.fan_out import SearchFanout
from memory_server.wire.frames import Kind, Preamble, proof_of_reply
from memory_server.wire.search_messages import pack_hits, unpack_search
from memory_server.wire.search_server import SearchServer
from memory_server.wire.shared_socket import SharedSocket
from memory_server.wire.side_requests import ShardLike
from tests.toy_memory import toy_factory, toy_weights

SECRET = bytes(range(32))
OTHER_SECRET = bytes(32)


def sealed_shards(path: Path, shards: int) -> list[Shard]:
    """Shards of a toy store, epoch 1 live in all of them."""
    made = [
        Shard(path, shards=shards, shard=number, encoder=toy_factory) for number in range(shards)
    ]
    for shard in made:
        stage(shard, 1, Store.open(path).head())
        shard.activate(1)
    return made


def stage(shard: Shard, epoch: int, version: str) -> None:
    """Seal an epoch whose weights are the toy's of that number."""
    plan = EpochPlan(
        epoch=epoch, content_version=version, encoder_step=10 * epoch, weights_id=epoch
    )
    shard.stage(plan, lambda: toy_weights(epoch))
    while (status := shard.status(epoch)).state == "encoding":
        threading.Event().wait(0.002)
    assert status.state == "sealed", status.error


class EchoShard:
    """Answers with what it was asked, so that a mixed-up reply shows. May be held up.

    The ids of a query are its first number times 100, plus 0, 1, 2 ...; its documents are the one
    that is excluded.
    """

    def __init__(self, shard: int = 0, *, live: int = 1) -> None:
        self.shard = shard
        self.live = live
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Semaphore(0)
        self.batches: list[int] = []
        self.failing: list[Exception] = []

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        exact: bool = False,
        domains: Collection[str] = (),
    ) -> ShardReply:
        answered = self.live if epoch is None else epoch
        self.asked.release()
        assert self.gate.wait(20)
        if self.failing:
            raise self.failing.pop(0)
        if bool(queries_BQ.isnan().any()):
            raise ValueError("NaN")
        rows = len(queries_BQ)
        self.batches.append(rows)
        documents = torch.full((rows,), -1) if exclude_doc_ids is None else exclude_doc_ids
        first = queries_BQ[:, :1].round().to(torch.int64).numpy()
        ids = first * 100 + np.arange(k)
        return ShardReply(
            shard=self.shard,
            ids=ids,
            scores=-np.tile(np.arange(k, dtype=np.float32), (rows, 1)) - self.shard,
            doc_ids=np.repeat(documents.numpy()[:, None], k, axis=1),
            tokens=(ids[:, :, None] % 1000).astype(np.uint16).repeat(3, axis=2),
            epoch=answered,
            encoder_step=10 * answered,
            exact=exact,
        )

    def entries(
        self,
        ids: Sequence[int],
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        domains: Collection[str] = (),
    ) -> list[Entry]:
        return []


class DeafToRelays:
    """A server in whose process searches are answered, and what is to be relayed hangs."""

    def __init__(self, shard: EchoShard) -> None:
        self._shard = shard
        self._socket = SharedSocket("127.0.0.1", max_message_bytes=1 << 20, handle=self._handle)
        self.endpoint = self._socket.endpoint
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed.is_set():
            self._socket.wait(None)

    def _handle(self, frames: list[bytes]) -> None:
        asked = Preamble.unpack(frames[1])
        if asked.kind is not Kind.SEARCH:
            return
        request = unpack_search(frames[2])
        hits = self._shard.search(torch.from_numpy(request.queries), request.k, epoch=asked.epoch)
        answer = Preamble(Kind.HITS, self._shard.shard, asked.number, proof=proof_of_reply(SECRET))
        self._socket.send([frames[0], answer.pack(), pack_hits(hits)])

    def close(self) -> None:
        self._closed.set()
        self._socket.wake()
        self._thread.join()
        self._socket.close()


class Servers:
    """Search servers that can be stopped and started again, as a restarted actor's are."""

    def __init__(self) -> None:
        self.running: dict[tuple[int, int], SearchServer | DeafToRelays] = {}

    def start(
        self,
        shard: ShardLike,
        replica: int = 0,
        *,
        secret: bytes = SECRET,
        queue_limit: int = 256,
        max_request_bytes: int = 1 << 20,
    ) -> SearchServer:
        server = SearchServer(
            shard, secret=secret, queue_limit=queue_limit, max_request_bytes=max_request_bytes
        )
        self.running[shard.shard, replica] = server
        return server

    def stop(self, shard: int, replica: int = 0) -> None:
        self.running.pop((shard, replica)).close()

    def resolve(self, shard: int, replica: int) -> str:
        server = self.running.get((shard, replica))
        if server is None:
            raise ConnectionError("the actor is restarting")
        return server.endpoint


@contextlib.contextmanager
def served(*shards: ShardLike) -> Iterator[Servers]:
    """The first replica of each shard, served until the end."""
    servers = Servers()
    try:
        for shard in shards:
            servers.start(shard)
        yield servers
    finally:
        for server in servers.running.values():
            server.close()


@contextlib.contextmanager
def asking(servers: Servers, replicas: Sequence[int], **options: object) -> Iterator[SearchFanout]:
    fanout = SearchFanout(
        replicas,
        **{  # type: ignore[arg-type]
            "resolve_endpoint": servers.resolve,
            "secret": SECRET,
            "deadline_s": 20.0,
            **options,
        },
    )
    try:
        yield fanout
    finally:
        fanout.close()


def numbered(*numbers: int, width: int = 4) -> Tensor:
    """Queries that an `EchoShard` answers with these numbers."""
    queries = torch.zeros(len(numbers), width)
    queries[:, 0] = torch.tensor(numbers, dtype=torch.float32)
    return queries
