"""A server on its socket: who may ask, what is refused, and that the others never notice."""

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from memory_server.errors import Overloaded
from memory_server.wire.frames import Kind, Preamble, proof_of_reply, proof_of_request
from memory_server.wire.messages import pack_group, unpack_error
from memory_server.wire.search_messages import SearchRequest, pack_search, unpack_hits
from memory_server.wire.search_server import SearchServer
from tests.memory_server.support_search import OTHER_SECRET, SECRET, EchoShard, numbered

ASK = Preamble(kind=Kind.SEARCH, shard=0, number=5, timeout_s=20.0, proof=proof_of_request(SECRET))


class Asker:
    """A bare socket, to send what no client would."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout_s: float = 20.0) -> tuple[Preamble, bytes] | None:
        if not self.socket.poll(int(1000 * timeout_s)):
            return None
        preamble, body = self.socket.recv_multipart()
        return Preamble.unpack(preamble), body

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def shard() -> EchoShard:
    return EchoShard()


@pytest.fixture
def server(shard: EchoShard) -> Iterator[SearchServer]:
    made = SearchServer(shard, secret=SECRET, queue_limit=3, max_request_bytes=10_000)
    yield made
    shard.gate.set()
    made.close()


@pytest.fixture
def asker(server: SearchServer) -> Iterator[Asker]:
    made = Asker(server.endpoint)
    yield made
    made.close()


def search_body(*numbers: int, k: int = 2) -> bytes:
    request = SearchRequest(
        queries=numbered(*numbers).numpy(), k=k, exclude_doc_ids=None, exact=False
    )
    return pack_search(request, "float16")


def answers_still(asker: Asker) -> bool:
    asker.send(ASK._replace(number=99).pack(), search_body(7))
    while (received := asker.receive()) is not None:
        preamble, body = received
        if preamble.number == 99:
            return preamble.kind is Kind.HITS and unpack_hits(body, 0, 1, 2).ids[0, 0] == 700
    return False


def test_a_search_is_answered_with_proof_and_counted(asker: Asker, server: SearchServer) -> None:
    asker.send(ASK.pack(), search_body(3, 4))
    received = asker.receive()
    assert received is not None
    preamble, body = received
    assert (preamble.kind, preamble.number, preamble.shard) == (Kind.HITS, 5, 0)
    assert preamble.proof == proof_of_reply(SECRET)
    assert unpack_hits(body, 0, 2, 2).ids.tolist() == [[300, 301], [400, 401]]
    stats = server.stats()
    assert (stats.requests, stats.queries, stats.searches, stats.refused) == (1, 2, 1, 0)
    assert sum(stats.latency_counts) == 1
    assert stats.bytes_in > len(search_body(3, 4))
    assert stats.bytes_out > len(body)
    assert stats.as_dict()["latency_buckets_s"][0] == 0.0005


@pytest.mark.parametrize(
    "changed",
    [{"proof": proof_of_request(OTHER_SECRET)}, {"proof": proof_of_reply(SECRET)}, {"shard": 1}],
    ids=["wrong secret", "a reply's proof", "another shard"],
)
def test_strangers_are_refused_without_a_reason(
    asker: Asker, server: SearchServer, shard: EchoShard, changed: dict[str, object]
) -> None:
    asker.send(ASK._replace(**changed).pack(), search_body(3))  # type: ignore[arg-type]
    received = asker.receive()
    assert received is not None
    preamble, body = received
    assert preamble.kind is Kind.REFUSED
    assert body == b""
    assert preamble.proof == bytes(32)
    assert server.stats().refused == 1
    assert shard.batches == []
    assert answers_still(asker)


def test_garbage_is_dropped_and_the_next_search_answered(
    asker: Asker, server: SearchServer
) -> None:
    for frames in (
        [b""], [b"x" * 300], [ASK.pack()], [b"", b"", b"", b"", b"", b""],
        [ASK.pack()[:-1], search_body(1)], [b"GET / HTTP/1.1", b""],
    ):  # fmt: skip
        asker.send(*frames)
    assert answers_still(asker)
    assert server.stats().refused == 6


@pytest.mark.parametrize("body", [b"", b"\xff" * 50, b"\x02\0\0\0{}", search_body(1)[:-1]])
def test_a_body_that_cannot_be_read_is_answered_with_an_error(asker: Asker, body: bytes) -> None:
    asker.send(ASK.pack(), body)
    received = asker.receive()
    assert received is not None
    assert received[0].kind is Kind.ERROR
    assert type(unpack_error(received[1])).__name__ == "BadMessage"
    assert answers_still(asker)


def test_a_message_of_no_request_and_a_relay_without_its_group_are_errors(asker: Asker) -> None:
    for frames in (
        [ASK._replace(kind=Kind.HITS).pack(), search_body(1)],
        [ASK._replace(kind=Kind.RELAY).pack(), search_body(1)],
        [ASK._replace(kind=Kind.RELAY).pack(), search_body(1), pack_group([])],
    ):
        asker.send(*frames)
        received = asker.receive()
        assert received is not None
        assert received[0].kind is Kind.ERROR


def test_what_is_too_large_ends_the_connection_of_its_sender_alone(
    asker: Asker, server: SearchServer
) -> None:
    other = Asker(server.endpoint)
    try:
        other.send(ASK.pack(), bytes(10_001))
        assert other.receive(0.3) is None
        assert answers_still(asker)
    finally:
        other.close()


def test_bytes_that_are_no_zeromq_at_all_do_no_harm(asker: Asker, server: SearchServer) -> None:
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    for sent in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<Q", 2**63) * 9, bytes(500)):
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(sent)
    assert answers_still(asker)


def test_a_full_queue_is_told_at_once_while_a_search_runs(
    asker: Asker, server: SearchServer, shard: EchoShard
) -> None:
    shard.gate.clear()
    asker.send(ASK.pack(), search_body(1))
    assert shard.asked.acquire(timeout=20)
    for number in (11, 12, 13, 14):
        asker.send(ASK._replace(number=number).pack(), search_body(number))
    received = asker.receive()
    assert received is not None
    assert received[0].number == 14
    error = unpack_error(received[1])
    assert isinstance(error, Overloaded)
    assert "3 searches wait, 3 may" in str(error)
    shard.gate.set()
    assert {r[0].number for r in (asker.receive() for _ in range(4)) if r} == {5, 11, 12, 13}
    stats = server.stats()
    assert (stats.overloaded, stats.queue_peak, stats.queue, stats.joined) == (1, 3, 0, 1)


def test_a_reply_above_the_limit_is_an_error(shard: EchoShard) -> None:
    server = SearchServer(shard, secret=SECRET, max_reply_bytes=2000)
    asker = Asker(server.endpoint)
    try:
        asker.send(ASK.pack(), search_body(1, k=1000))
        received = asker.receive()
        assert received is not None
        assert "2000 are allowed" in str(unpack_error(received[1]))
        assert answers_still(asker)
    finally:
        asker.close()
        server.close()


def test_a_server_listens_on_its_host_alone_and_frees_the_port(shard: EchoShard) -> None:
    server = SearchServer(shard, secret=SECRET)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    assert host == "127.0.0.1"
    with (
        pytest.raises(OSError, match="refused"),
        socket.create_connection(("127.0.0.2", int(port)), timeout=5),
    ):
        pass
    before = threading.active_count()
    server.close()
    server.close()
    assert threading.active_count() < before
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if again.connect_ex((host, int(port))) != 0:
                return
    pytest.fail("the port still answers")


def test_bad_settings_are_refused(shard: EchoShard) -> None:
    with pytest.raises(ValueError, match="queue_limit=0"):
        SearchServer(shard, secret=SECRET, queue_limit=0)
    with pytest.raises(ValueError, match="can be guessed"):
        SearchServer(shard, secret=b"")
    with pytest.raises(OSError, match="cannot serve searches"):
        SearchServer(shard, secret=SECRET, host="192.0.2.1")
