"""Rank 0's memory, searched by the other ranks over a loopback socket."""

from __future__ import annotations

import io
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from memory_server.local import LocalMemory

_KEY = b"of one test"
_PATIENCE_S = 120.0


def serve(memory: LocalMemory, address_file: Path) -> None:
    """Answer other processes from threads of this one, for as long as it lives."""
    listener = Listener(("127.0.0.1", 0), authkey=_KEY)
    draft = address_file.with_suffix(".tmp")
    draft.write_text(str(listener.address[1]))  # type: ignore[index]
    draft.rename(address_file)

    def accept() -> None:
        while True:
            connection = listener.accept()
            threading.Thread(target=_answer, args=(memory, connection), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _answer(memory: LocalMemory, connection: Connection) -> None:
    while True:
        try:
            name, args, options = _unpacked(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_packed(getattr(memory, name)(*args, **options)))


class OtherRanksMemory:
    """What a rank other than 0 needs of a memory."""

    def __init__(self, address_file: Path) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not address_file.exists():
            assert time.monotonic() < deadline, "rank 0 has opened no memory"
            time.sleep(0.05)
        port = int(address_file.read_text())
        self._connection = Client(("127.0.0.1", port), authkey=_KEY)

    def info(self) -> Any:
        return self._call("info")

    def search(self, *args: Any, **options: Any) -> Any:
        return self._call("search", *args, **options)

    def close(self) -> None:
        self._connection.close()

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        self._connection.send_bytes(_packed((name, args, options)))
        return _unpacked(self._connection.recv_bytes())


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
