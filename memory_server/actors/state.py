"""What a memory's coordinator keeps on disk, so that nothing is lost when every process is.

STATE/book.json              the epochs, which one is live, who holds what: the truth
STATE/secret                 proves who belongs to this memory; only its owner may read it
STATE/weights/<id>.safetensors   as long as an epoch needs them
STATE/lock                   held by the one coordinator that may write here
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from memory_server.errors import MemoryServerError, StateDamaged, StateNotFound
from memory_server.shard.epochs import EpochBook, EpochPlan, Pin, Receipt
from memory_server.store.files import Files

BOOK_FORMAT = "pluglm-memory-server-1"
SECRET_BYTES = 32
REQUESTS_KEPT = 64
LOCK_PAUSE_S = 0.05
DYING_S = 5.0  # Ray forgets an actor's name before its process has ended


@dataclass
class ServerBook:
    """The book of epochs and what else a coordinator must know again after a restart.

    Attributes:
        revision: grows with every change, so that shards can tell old orders from new ones.
        requests: the newest calls that staged an epoch, by their token, so that a call which is
            repeated after a restart does not stage another one.
        successors: epochs that were staged again on what is live now, and their successors.
        leases: seconds of each pin; after a restart every lease begins anew.
        joins: how often each replica, "shard-replica", came up.
    """

    epochs: EpochBook = field(default_factory=EpochBook)
    revision: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    successors: dict[int, int] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    joins: dict[str, int] = field(default_factory=dict)

    def remember_request(self, token: str, epoch: int) -> None:
        self.requests[token] = epoch
        for old in list(self.requests)[:-REQUESTS_KEPT]:
            del self.requests[old]

    def tidy(self) -> None:
        """Drop what belongs to pins and epochs that are gone."""
        plans = self.epochs.plans
        self.leases = {pin: s for pin, s in self.leases.items() if pin in self.epochs.pins}
        self.successors = {
            old: new for old, new in self.successors.items() if old in plans and new in plans
        }

    def weights_needed(self) -> set[int]:
        """Ids of the weights that some epoch may still be encoded with."""
        plans = self.epochs.plans.items()
        return {plan.weights_id for epoch, plan in plans if epoch not in self.epochs.failures}


class StateDirectory:
    """A state directory; the files in it appear whole or not at all."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._files = Files()
        self._weights = self.path / "weights"

    def exists(self) -> bool:
        return (self.path / "book.json").exists()

    def create(self, book: ServerBook) -> bytes:
        """Begin anew: no weights, this book, a new secret, which is returned.

        Raises:
            OSError: the directory cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._weights)
        self._weights.mkdir()
        secret = secrets.token_bytes(SECRET_BYTES)
        _write_private(self.path / "secret", secret.hex().encode())
        self.save(book)
        return secret

    def secret(self) -> bytes:
        """Raises StateNotFound, StateDamaged."""
        try:
            return bytes.fromhex((self.path / "secret").read_text(encoding="ascii"))
        except FileNotFoundError as error:
            raise StateNotFound(_no_state(self.path)) from error
        except ValueError as error:
            raise StateDamaged(f"{self.path / 'secret'} is damaged: {error}") from error

    def save(self, book: ServerBook) -> None:
        """Returns when the book is on disk."""
        data = json.dumps(_plain(book), indent=1) + "\n"
        self._files.publish_bytes(self.path / "book.json", data.encode())

    def load(self, *, now: float) -> ServerBook:
        """The book; pins' leases begin at `now`. Raises StateNotFound, StateDamaged."""
        try:
            raw = json.loads((self.path / "book.json").read_bytes())
            if raw.pop("format") != BOOK_FORMAT:
                raise ValueError(f"it is not a {BOOK_FORMAT}")
            return _parsed(raw, now)
        except FileNotFoundError as error:
            raise StateNotFound(_no_state(self.path)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateDamaged(
                f"{self.path / 'book.json'} is damaged: {error!r}; remove {self.path} and start "
                "the memory with weights"
            ) from error

    def weights_file(self, weights_id: int) -> Path:
        return self._weights / f"{weights_id}.safetensors"

    def save_weights(self, weights_id: int, weights: Mapping[str, Tensor]) -> None:
        """Returns when they are on disk."""
        data = safetensors.torch.save(dict(weights))

        def write(handle: BinaryIO) -> None:
            handle.write(data)

        self._files.publish(self.weights_file(weights_id), write)

    def load_weights(self, weights_id: int) -> dict[str, Tensor]:
        """Raises StateNotFound, StateDamaged."""
        file = self.weights_file(weights_id)
        try:
            return safetensors.torch.load_file(file)
        except FileNotFoundError as error:
            raise StateNotFound(f"{file} is missing; stage the weights again") from error
        except SafetensorError as error:
            raise StateDamaged(f"{file} is damaged: {error}; stage the weights again") from error

    def keep_weights(self, needed: Collection[int]) -> None:
        """Remove the files of all other weights."""
        kept = {self.weights_file(weights_id).name for weights_id in needed}
        for file in self._weights.iterdir():
            if file.name not in kept:
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory, and what is above it if that is empty and was made for servers.

        Raises:
            MemoryServerError: a coordinator still writes there.
        """
        if not self.path.exists():
            return
        with self.locked(), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)
        if self.path.parent.name == "servers":
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; a dead holder's lock is free, and one that is dying is waited for.

        Raises:
            MemoryServerError: a memory runs on it already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + DYING_S
        with (self.path / "lock").open("ab") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() < deadline:
                        time.sleep(LOCK_PAUSE_S)
                        continue
                    raise MemoryServerError(
                        f"another memory that runs already keeps its state in {self.path}; attach "
                        "to it, shut it down, or choose another name or state_dir"
                    ) from error
            yield


def _no_state(path: Path) -> str:
    return f"{path} holds no memory's state; start the memory with weights"


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def _plain(server: ServerBook) -> dict[str, Any]:
    book = server.epochs
    return {
        "format": BOOK_FORMAT,
        "revision": server.revision,
        "live": book.live,
        "last_epoch": book.last_epoch,
        "last_weights": book.last_weights,
        "last_pin": book.last_pin,
        "plans": [asdict(plan) for plan in book.plans.values()],
        "receipts": [asdict(r) for held in book.receipts.values() for r in held.values()],
        "failures": {str(epoch): reason for epoch, reason in book.failures.items()},
        "leaving": sorted(book.leaving),
        "pins": [
            {"id": pin.id, "epoch": pin.epoch, "lease_s": server.leases[pin.id]}
            for pin in book.pins.values()
        ],
        "requests": server.requests,
        "successors": {str(epoch): other for epoch, other in server.successors.items()},
        "joins": server.joins,
    }


def _parsed(raw: Mapping[str, Any], now: float) -> ServerBook:
    receipts: dict[int, dict[int, Receipt]] = {}
    for each in raw["receipts"]:
        receipt = Receipt(**each)
        receipts.setdefault(receipt.epoch, {})[receipt.shard] = receipt
    plans = [EpochPlan(**each) for each in raw["plans"]]
    leases = {pin["id"]: float(pin["lease_s"]) for pin in raw["pins"]}
    return ServerBook(
        epochs=EpochBook(
            plans={plan.epoch: plan for plan in plans},
            receipts=receipts,
            failures={int(epoch): reason for epoch, reason in raw["failures"].items()},
            pins={
                pin["id"]: Pin(id=pin["id"], epoch=pin["epoch"], deadline=now + leases[pin["id"]])
                for pin in raw["pins"]
            },
            leaving=set(raw["leaving"]),
            live=raw["live"],
            last_epoch=raw["last_epoch"],
            last_weights=raw["last_weights"],
            last_pin=raw["last_pin"],
        ),
        revision=raw["revision"],
        requests=dict(raw["requests"]),
        successors={int(epoch): other for epoch, other in raw["successors"].items()},
        leases=leases,
        joins=dict(raw["joins"]),
    )
