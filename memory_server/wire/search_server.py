"""A shard's own socket: searches arrive beside Ray, wait in a bounded queue, and are joined.

Ray starts, places and restarts the actor in which this runs; it is too slow to carry every search.
One thread receives, searches and replies; another receives in its place while a search takes long.
Entries and relayed searches have threads of their own, so that neither delays a search. See
`wire.py` for what travels, and `shared_socket.py` for how threads share the socket.
"""

import hmac
import threading
import time
from concurrent.futures import Future

from memory_server.errors import BadMessage, MemoryServerError, Overloaded
from memory_server.replies import ShardReply
from memory_server.wire.frames import MAX_FRAMES, Kind, Preamble, proof_of_reply, proof_of_request
from memory_server.wire.joined_requests import Waiting
from memory_server.wire.messages import pack_error
from memory_server.wire.search_messages import SearchRequest, pack_hits, unpack_search
from memory_server.wire.search_queue import SearchQueue
from memory_server.wire.search_stats import Counters, Latencies, ServerStats
from memory_server.wire.shared_socket import SharedSocket
from memory_server.wire.side_requests import ShardLike, SideRequests

MAX_REQUEST_BYTES = 64 << 20
MAX_REPLY_BYTES = 1 << 30
STAND_IN_AFTER_S = 0.005


class SearchServer:
    """Serves one shard on a socket, from its own threads, until it is closed."""

    def __init__(
        self,
        shard: ShardLike,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        queue_limit: int = 256,
        max_batch_rows: int = 4096,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        """Bind a free port of `host` and begin to answer.

        The shard need not hold an epoch yet: its errors travel as its answers do.

        Args:
            secret: 16 to 64 bytes that every searcher of this memory knows. It proves who asks; it
                does not encrypt, so the network between nodes must be one that Ray may use, too.
            host: the one address that is listened on.
            queue_limit: searches that may wait, and as many requests for entries, before others
                are turned away with `Overloaded`.
            max_batch_rows: queries that are joined into one search; one request may have more.

        Raises:
            ValueError: an argument is out of range. OSError: the host cannot be bound.
        """
        for name, value in (
            ("queue_limit", queue_limit),
            ("max_batch_rows", max_batch_rows),
            ("max_request_bytes", max_request_bytes),
            ("max_reply_bytes", max_reply_bytes),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._shard = shard
        self._expected, self._proof = proof_of_request(secret), proof_of_reply(secret)
        self._queue_limit = queue_limit
        self._max_reply_bytes = max_reply_bytes
        self._counters, self._latencies = Counters(), Latencies()
        self._closed = threading.Event()
        self._searching = threading.Event()
        self._socket = SharedSocket(host, max_message_bytes=max_request_bytes, handle=self._receive)
        self.endpoint = self._socket.endpoint
        self._beside = SideRequests(
            shard,
            secret=secret,
            limit=queue_limit,
            counters=self._counters,
            reply=self._reply,
            fail=self._answer_error,
        )
        self._queue = SearchQueue(
            shard,
            limit=queue_limit,
            max_rows=max_batch_rows,
            answer=self._answer,
            idle=self._socket.wait,
            wake=self._socket.wake,
        )
        self._thread = threading.Thread(
            target=self._stand_in, name=f"receive-shard-{shard.shard}", daemon=True
        )
        self._thread.start()
        self._queue.start()

    def ask(
        self, request: SearchRequest, *, epoch: int | None, wait_s: float, timeout_s: float
    ) -> ShardReply:
        """A search of someone who cannot reach the socket: in the same queue, and joined. Blocks.

        Raises:
            Overloaded: the queue is full. TimeoutError. What the shard raised.
        """
        now = time.monotonic()
        future: Future[ShardReply] = Future()
        preamble = Preamble(Kind.SEARCH, self._shard.shard, 0, epoch, timeout_s, wait_s)
        try:
            self._enqueue(b"", preamble, request, now, future)
        except Overloaded:
            self._counters.add(overloaded=1)
            raise
        return future.result(timeout=timeout_s)

    def stats(self) -> ServerStats:
        """What was counted so far."""
        values = self._counters.values()
        counts, sum_s = self._latencies.values()
        queue = self._queue.counts()
        return ServerStats(
            shard=self._shard.shard,
            latency_counts=counts,
            latency_sum_s=sum_s,
            queue_limit=self._queue_limit,
            searches=queue.searches,
            joined=queue.joined,
            queue=queue.length,
            queue_peak=queue.peak,
            **{
                name: values.get(name, 0)
                for name in (
                    "requests", "queries", "entries", "relayed", "refused", "overloaded",
                    "expired", "failed", "bytes_in", "bytes_out",
                )
            },
        )  # fmt: skip

    def close(self) -> None:
        """Stop answering and free the port. Searches that wait are dropped with the connection."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._searching.set()
        self._queue.close()
        self._thread.join()
        self._beside.close()
        self._socket.close()

    def _stand_in(self) -> None:
        """Receive while a search takes long, so that a full queue is told soon."""
        while not self._closed.is_set():
            self._searching.wait()
            self._searching.clear()
            if self._closed.wait(STAND_IN_AFTER_S):
                return
            since = self._queue.busy_since
            if since is not None or self._queue.counts().length:
                self._searching.set()
            if since is not None and time.monotonic() - since >= STAND_IN_AFTER_S:
                self._socket.stand_in(STAND_IN_AFTER_S)

    def _receive(self, frames: list[bytes]) -> None:
        arrived = time.monotonic()
        self._counters.add(bytes_in=sum(map(len, frames)))
        try:
            if not 3 <= len(frames) <= MAX_FRAMES + 1:
                raise BadMessage(f"{len(frames)} frames are no request")
            preamble = Preamble.unpack(frames[1])
        except BadMessage:
            self._counters.add(refused=1)
            return
        sender, body = frames[0], frames[2]
        known = hmac.compare_digest(preamble.proof, self._expected)
        if not known or preamble.shard != self._shard.shard:
            self._counters.add(refused=1)
            # Without this server's proof and without a reason: it may be anyone.
            refused = Preamble(kind=Kind.REFUSED, shard=0, number=preamble.number)
            self._send(sender, refused, b"")
            return
        try:
            if preamble.kind is Kind.SEARCH:
                self._receive_search(sender, preamble, body, arrived)
            elif preamble.kind is Kind.ENTRIES:
                self._beside.read(sender, preamble, body, arrived)
            elif preamble.kind is Kind.RELAY and len(frames) == MAX_FRAMES + 1:
                self._beside.relay(sender, preamble, body, frames[3], arrived)
            else:
                raise BadMessage(f"{preamble.kind.name} is no request that this server takes")
        except (MemoryServerError, ValueError) as error:
            self._answer_error(sender, preamble, error)

    def _receive_search(
        self, sender: bytes, preamble: Preamble, body: bytes, arrived: float
    ) -> None:
        self._enqueue(sender, preamble, unpack_search(body), arrived)

    def _enqueue(
        self,
        sender: bytes,
        preamble: Preamble,
        request: SearchRequest,
        arrived: float,
        future: "Future[ShardReply] | None" = None,
    ) -> None:
        """Raises Overloaded."""
        self._counters.add(requests=1, queries=len(request.queries))
        self._searching.set()
        self._queue.put(
            Waiting(
                sender=sender,
                preamble=preamble,
                request=request,
                arrived=arrived,
                deadline=arrived + preamble.timeout_s,
                patient_until=arrived + min(preamble.wait_s, preamble.timeout_s),
                future=future,
            )
        )

    def _answer(self, waiting: Waiting, answer: ShardReply | Exception) -> None:
        """Called by the searching thread."""
        if isinstance(answer, Exception):
            self._answer_error(waiting.sender, waiting.preamble, answer, waiting.future)
            return
        if waiting.future is not None:
            self._latencies.record(time.monotonic() - waiting.arrived)
            waiting.future.set_result(answer)
            return
        body = pack_hits(answer)
        self._latencies.record(time.monotonic() - waiting.arrived)
        self._reply(waiting.sender, waiting.preamble, Kind.HITS, body)

    def _answer_error(
        self,
        sender: bytes,
        preamble: Preamble,
        error: Exception,
        future: "Future[ShardReply] | None" = None,
    ) -> None:
        kind = {Overloaded: "overloaded", TimeoutError: "expired"}.get(type(error), "failed")
        self._counters.add(**{kind: 1})
        if future is not None:
            future.set_exception(error)
            return
        self._reply(sender, preamble, Kind.ERROR, pack_error(error))

    def _reply(self, sender: bytes, asked: Preamble, kind: Kind, body: bytes) -> None:
        if len(body) > self._max_reply_bytes:
            kind, body = (
                Kind.ERROR,
                pack_error(
                    ValueError(
                        f"the reply has {len(body)} bytes, {self._max_reply_bytes} are allowed; "
                        "ask for fewer queries at a time, or a smaller k"
                    )
                ),
            )
        answer = Preamble(
            kind=kind, shard=self._shard.shard, number=asked.number, proof=self._proof
        )
        self._send(sender, answer, body)

    def _send(self, sender: bytes, preamble: Preamble, body: bytes) -> None:
        frames = [sender, preamble.pack(), body]
        self._counters.add(bytes_out=sum(map(len, frames)))
        self._socket.send(frames)
