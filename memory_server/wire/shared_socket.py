"""A ROUTER socket that several threads may use in turn, so that the searching one need not wait.

ZeroMQ's sockets belong to one thread at a time. Here a lock makes it one: whoever sends also takes
what has arrived, and waiting is done beside the lock, on the descriptor that ZeroMQ signals. Thus
an idle shard's searching thread receives, searches and sends itself; handing each message to a
thread of the socket's own and back costs more than carrying it.
"""

import contextlib
import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

import zmq

log = logging.getLogger(__name__)

RECEIVE_AT_ONCE = 64  # messages, before replies get their turn
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000

Frames = list[bytes]


class SharedSocket:
    """Bound to a free port of one host. Thread-safe but for `close`."""

    def __init__(
        self, host: str, *, max_message_bytes: int, handle: Callable[[Frames], None]
    ) -> None:
        """Bind. `handle` is called with each message, by whichever thread found it.

        Raises:
            OSError: the host cannot be bound.
        """
        self._handle = handle
        self._lock = threading.Lock()
        self._outgoing: deque[Frames] = deque()
        self._handling = threading.local()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.MAXMSGSIZE, max_message_bytes),
                (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
                (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
                (zmq.IPV6, ":" in host),
            ):
                self._socket.setsockopt(option, value)
            shown = f"[{host}]" if ":" in host else host
            port = self._socket.bind_to_random_port(f"tcp://{shown}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(f"cannot serve searches on host {host!r}: {error}") from error
        self.endpoint = f"tcp://{shown}:{port}"
        self._more = True  # perhaps something arrived, though the descriptor says nothing
        descriptor = self._socket.getsockopt(zmq.FD)
        assert isinstance(descriptor, int)
        self._descriptor = descriptor
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until something arrives, or `wake` is called, and handle what arrived.

        For one thread only: of two, the one that `wake` was not meant for could take the sign.
        """
        if not self._more:
            self._poll(timeout_s, self._descriptor, self._wake_receiver.fileno())
            with contextlib.suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        self._pump()

    def stand_in(self, timeout_s: float) -> None:
        """The same for any other thread, which `wake` leaves alone."""
        if not self._more:
            self._poll(timeout_s, self._descriptor)
        self._pump()

    def wake(self) -> None:
        """End the `wait` of another thread, or the next one."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._wake_sender.send(b"\0")

    @staticmethod
    def _poll(timeout_s: float | None, *descriptors: int) -> None:
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        poller.poll(None if timeout_s is None else max(0.0, 1000 * timeout_s))

    def send(self, frames: Frames) -> None:
        """Send at once; from within `handle`, when that returns. Never blocks."""
        self._outgoing.append(frames)
        if not getattr(self._handling, "now", False):
            self._pump()

    def close(self) -> None:
        """Free the port. No other thread may use the socket any more."""
        self._context.destroy(linger=0)
        self._wake_receiver.close()
        self._wake_sender.close()

    def _pump(self) -> None:
        """Send what is to be sent and handle what arrived.

        The descriptor tells of changes only, and using the socket may swallow the signal: so each
        use goes on until nothing is left, or `_more` says that there may be.
        """
        while True:
            with self._lock:
                arrived = self._exchange()
            self._handling.now = True
            try:
                for frames in arrived:
                    try:
                        self._handle(frames)
                    except Exception:  # whatever one sender does, the others are served
                        log.exception("a message to %s could not be handled", self.endpoint)
            finally:
                self._handling.now = False
            if not self._outgoing:
                break
        if self._more:
            # Another thread may be waiting already, and the descriptor has told it nothing.
            self.wake()

    def _exchange(self) -> list[Frames]:
        while self._outgoing:
            # A reader that is gone or does not read: its reply is dropped, as it would drop it.
            self._socket.send_multipart(self._outgoing.popleft(), zmq.NOBLOCK)
        arrived: list[Frames] = []
        self._more = True
        while len(arrived) < RECEIVE_AT_ONCE:
            events = self._socket.getsockopt(zmq.EVENTS)
            assert isinstance(events, int)
            if not events & zmq.POLLIN:  # cheaper to see than zmq.Again is to catch
                self._more = False
                break
            arrived.append(self._socket.recv_multipart(zmq.NOBLOCK))
        return arrived
