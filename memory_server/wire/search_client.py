"""A searcher's sockets: one connection per shard, in lanes that a thread has to itself for a call.

A thread that searches borrows a lane and polls its sockets itself, because handing every message to
a common thread and back would cost two more changes of thread per call. A lost connection is never
mended in silence: it is reported, since its server may have moved.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

MAX_REPLY_BYTES = 1 << 30
CONNECT_TIMEOUT_MS = 3000
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000
SOCKETS_AT_MOST = 16_384
NEVER = -1

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_WATCHED = _LOST | zmq.EVENT_HANDSHAKE_SUCCEEDED


@dataclass(frozen=True)
class Event:
    """What happened at one address: a message, or the loss of the connection.

    `refused`: it was never established.
    """

    address: str
    kind: Literal["message", "lost"]
    frames: tuple[bytes, ...] = ()
    refused: bool = False


class Connection:
    """A socket to one server, and the socket that tells of its state."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self.address = address
        self.established = False
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 0),
            (zmq.RECONNECT_IVL, NEVER),
            (zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.MAXMSGSIZE, MAX_REPLY_BYTES),
            (zmq.IPV6, "[" in address),
        ):
            self.socket.setsockopt(option, value)
        self.monitor = self.socket.get_monitor_socket(_WATCHED)
        self.socket.connect(address)

    def is_lost(self) -> bool:
        """Read what the monitor tells; True once, when the connection is gone."""
        while True:
            try:
                told = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return False
            if told["event"] & _LOST:
                return True
            self.established = True

    def receive(self) -> tuple[bytes, ...] | None:
        """A message that has arrived, or None."""
        try:
            return tuple(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()  # otherwise whenever it is collected, and the context waits for that
        self.socket.close()


class Lane:
    """Connections for one thread at a time."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._context = context
        self._connections: dict[str, Connection] = {}
        self._poller = zmq.Poller()
        self._of_socket: dict[zmq.Socket[bytes], Connection] = {}

    def send(self, address: str, frames: list[bytes]) -> None:
        """Send to an address, after connecting to it if need be. Never blocks.

        What cannot be sent is reported by `poll` as a loss of the connection.
        """
        connection = self._connections.get(address)
        if connection is None:
            connection = Connection(self._context, address)
            self._connections[address] = connection
            for watched in (connection.socket, connection.monitor):
                self._of_socket[watched] = connection
                self._poller.register(watched, zmq.POLLIN)
        with contextlib.suppress(zmq.Again):  # the connection was just lost, which poll reports
            connection.socket.send_multipart(frames, zmq.NOBLOCK)

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for something to happen, and say what; an address's messages before its loss."""
        if not self._connections:  # ZeroMQ's poll returns at once from nothing
            time.sleep(max(0.0, timeout_s))
            return []
        ready = self._poller.poll(max(0, -int(-timeout_s * 1000 // 1)))
        events: list[Event] = []
        lost: dict[str, Connection] = {}
        for watched, _ in ready:
            connection = self._of_socket[watched]
            if watched is connection.monitor:
                if connection.is_lost():
                    lost[connection.address] = connection
                continue
            # One message: if there are more, the next call finds the socket ready again.
            if (frames := connection.receive()) is not None:
                events.append(Event(connection.address, "message", frames))
        for address, connection in lost.items():
            while (frames := connection.receive()) is not None:
                events.append(Event(address, "message", frames))
            self.drop(address)
            events.append(Event(address, "lost", refused=not connection.established))
        return events

    def drop(self, address: str) -> None:
        """Close the connection, if there is one."""
        connection = self._connections.pop(address, None)
        if connection is None:
            return
        for watched in (connection.socket, connection.monitor):
            del self._of_socket[watched]
            self._poller.unregister(watched)
        connection.close()

    def keep_only(self, addresses: Collection[str]) -> None:
        """Close connections to servers that have moved or gone."""
        for address in [a for a in self._connections if a not in addresses]:
            self.drop(address)

    def close(self) -> None:
        self.keep_only(())


class Lanes:
    """The lanes of a process: as many as threads ever searched at once."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_AT_MOST)
        self._lock = threading.Lock()
        self._idle: list[Lane] = []
        self._borrowed = 0
        self._closed = False

    @contextlib.contextmanager
    def borrow(self, current: Callable[[], Collection[str]]) -> Iterator[Lane]:
        """A lane for the calling thread; `current` are the addresses worth staying connected to.

        Raises:
            RuntimeError: the lanes were closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the connections were closed")
            lane = self._idle.pop() if self._idle else Lane(self._context)
            self._borrowed += 1
        try:
            yield lane
        finally:
            lane.keep_only(current())
            self._take_back(lane)

    def _take_back(self, lane: Lane) -> None:
        with self._lock:
            self._borrowed -= 1
            self._idle.append(lane)
            last = self._closed and not self._borrowed
        if last:
            self._end()

    def close(self) -> None:
        """Close all connections; those of a running call when it ends. A second call is nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = not self._borrowed
        if idle:
            self._end()

    def _end(self) -> None:
        for lane in self._idle:
            lane.close()
        self._context.destroy(linger=0)
