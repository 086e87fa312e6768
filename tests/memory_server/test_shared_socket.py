"""A socket that several threads use in turn: nobody waits for what another has taken."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from memory_server.wire.shared_socket import RECEIVE_AT_ONCE, Frames, SharedSocket


class Deaf(SharedSocket):
    """Hears only `wake`, as one does whose sign of arrivals another thread has used up."""

    polling = threading.Event()

    @classmethod
    def _poll(cls, timeout_s: float | None, *descriptors: int) -> None:
        cls.polling.set()
        SharedSocket._poll(timeout_s, *descriptors[1:])


@contextmanager
def opened(
    received: list[Frames], kind: type[SharedSocket] = SharedSocket
) -> Iterator[SharedSocket]:
    shared = kind("127.0.0.1", max_message_bytes=1 << 20, handle=received.append)
    try:
        shared.wait(0.0)
        yield shared
    finally:
        shared.close()


def test_a_stand_in_never_takes_the_sign_meant_for_the_one_that_waits() -> None:
    with opened([]) as shared:
        shared.wake()
        shared.stand_in(0.0)
        waiter = threading.Thread(target=shared.wait, args=(None,), daemon=True)
        waiter.start()
        waiter.join(5)
        lost = waiter.is_alive()
        shared.wake()
        waiter.join()
        assert not lost


def test_what_one_thread_leaves_unread_another_reads_that_waits_already() -> None:
    received: list[Frames] = []
    count = 2 * RECEIVE_AT_ONCE + 1
    Deaf.polling.clear()
    closed = threading.Event()
    with opened(received, Deaf) as shared, zmq.Context() as context:

        def wait() -> None:
            while not closed.is_set():
                shared.wait(None)

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        assert Deaf.polling.wait(5)
        with context.socket(zmq.DEALER) as sender:
            sender.connect(shared.endpoint)
            for number in range(count):
                sender.send(b"%d" % number)
            for _ in range(500):
                if received:
                    break
                shared.stand_in(0.01)
            for _ in range(500):
                if len(received) == count:
                    break
                threading.Event().wait(0.01)
            closed.set()
            shared.wake()
            waiter.join()
        assert [int(frames[-1]) for frames in received] == list(range(count))
