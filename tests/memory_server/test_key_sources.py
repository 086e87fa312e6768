"""Which encoder a shard gets, and tables that the processes of a node share."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_server.api import TabledFactory
from memory_server.keys import table_files
from memory_server.keys.key_sources import KeySources, tables_pay_from

CPU = torch.device("cpu")
PAY_FROM, TABLES_BYTES, WIDTH = 100, 4096, 4
spawning = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class ToyFactory:
    """Keys are rows of the one weight; a line in `journal` per thing made. Picklable.

    `block_s`: how long building takes.
    """

    journal: Path
    block_s: float = 0.0
    has_tables: bool = True

    def __call__(self, weights: Mapping[str, Tensor]) -> Any:
        self._note("direct")
        return lambda tokens_nS: weights["rows"][tokens_nS[:, 0]]

    def tables(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        *,
        entry_tokens: int | None = None,
    ) -> Mapping[str, Tensor] | None:
        self._note("tables")
        time.sleep(self.block_s)
        return {"rows": weights["rows"].clone(), "longest": torch.tensor(entry_tokens or 0)}

    def from_tables(self, tables: Mapping[str, Tensor]) -> Any:
        return lambda tokens_nS: tables["rows"][tokens_nS[:, 0].long()]

    def tables_digest(
        self, weights: Mapping[str, Tensor], *, entry_tokens: int | None = None
    ) -> str:
        return f"{int(weights['rows'][0, 0]):x}"

    def tables_bytes(self, entry_tokens: int | None = None) -> int:
        return TABLES_BYTES

    def tables_pay_from(self, entry_tokens: int | None = None) -> int | None:
        return PAY_FROM if self.has_tables else None

    def _note(self, what: str) -> None:
        with self.journal.open("a") as file:
            file.write(f"{what}\n")

    def made(self) -> list[str]:
        return self.journal.read_text().split() if self.journal.exists() else []


def weights_of(number: int, rows: int = 50) -> dict[str, Tensor]:
    return {"rows": number + torch.arange(rows * WIDTH).view(rows, WIDTH) / 8.0}


def sources_of(factory: Any, scratch: Path | None) -> KeySources:
    return KeySources(factory, device=CPU, scratch=scratch)


def files_in(scratch: Path) -> list[str]:
    return sorted(p.name for p in (scratch / f"key-tables-{os.getuid()}").iterdir())


@pytest.fixture
def factory(tmp_path: Path) -> ToyFactory:
    return ToyFactory(tmp_path / "journal")


TOKENS = torch.tensor([[3], [49]])


def test_tables_that_are_still_to_be_made_are_counted(factory: ToyFactory) -> None:
    sources = sources_of(factory, None)
    assert sources.bytes_to_come(1) == TABLES_BYTES
    sources.get(1, lambda: weights_of(1), tabled=False)
    assert sources.bytes_to_come(1) == TABLES_BYTES
    sources.get(1, lambda: weights_of(1), tabled=True)
    assert sources.bytes_to_come(1) == 0
    plain: Any = lambda weights: None  # noqa: E731
    assert sources_of(plain, None).bytes_to_come(1) == 0


@pytest.mark.parametrize(
    ("rescoring", "pay_from"),
    [(False, PAY_FROM), (True, 0)],
)
def test_tables_are_used_from_where_they_pay(
    factory: ToyFactory, tmp_path: Path, rescoring: bool, pay_from: int
) -> None:
    assert tables_pay_from(factory, entry_tokens=9, rescoring=rescoring) == pay_from
    without: Any = ToyFactory(tmp_path / "other", has_tables=False)
    plain: Any = lambda weights: None  # noqa: E731
    for none in (without, plain):
        assert tables_pay_from(none, entry_tokens=9, rescoring=rescoring) is None
    for scratch, tabled in itertools.product((None, tmp_path), (False, True)):
        sources = sources_of(factory, scratch)
        source: Any = sources.get(1, lambda: weights_of(1), tabled=tabled)
        assert factory.made()[-1] == ("tables" if tabled else "direct")
        assert torch.equal(source(TOKENS), weights_of(1)["rows"][TOKENS[:, 0]])
        sources.close()


def test_an_encoder_is_made_once_and_tables_stay_once_they_are_there(factory: ToyFactory) -> None:
    loads = []
    sources = sources_of(factory, None)

    def load() -> dict[str, Tensor]:
        loads.append(1)
        return weights_of(1)

    for tabled in (False, False, True, False, True):
        sources.get(1, load, tabled=tabled)
    assert factory.made() == ["direct", "tables"]
    assert len(loads) == 2
    sources.forget_except([1])
    sources.get(1, load, tabled=True)
    assert len(loads) == 2
    sources.forget_except([2])
    sources.get(1, load, tabled=True)
    assert len(loads) == 3
    sources.close()


def test_factories_without_tables_and_stored_keys_pass_through(tmp_path: Path) -> None:
    stored = object()
    plain: Any = lambda weights: stored  # noqa: E731
    assert not isinstance(plain, TabledFactory)
    sources = sources_of(plain, tmp_path)
    assert sources.get(1, dict, tabled=True) is stored
    without = ToyFactory(tmp_path / "journal", has_tables=False)
    sources_of(without, tmp_path).get(1, lambda: weights_of(1), tabled=True)
    assert without.made() == ["direct"]


def test_one_who_needs_what_exists_does_not_wait_for_other_tables(tmp_path: Path) -> None:
    slow = ToyFactory(tmp_path / "journal", block_s=60.0)
    sources = sources_of(slow, None)
    live = sources.get(1, lambda: weights_of(1), tabled=False)
    threading.Thread(
        target=sources.get, args=(2, lambda: weights_of(2)), kwargs={"tabled": True}, daemon=True
    ).start()
    while "tables" not in slow.made():
        time.sleep(0.01)
    assert sources.get(1, lambda: weights_of(1), tabled=False) is live
    sources.forget_except([1])  # returns too


def use_tables(factory: ToyFactory, scratch: Path, told: Any, stop: Event, number: int = 1) -> None:
    sources = sources_of(factory, scratch)
    source: Any = sources.get(number, lambda: weights_of(number, 20_000), tabled=True)
    mapped = ".safetensors" in Path("/proc/self/maps").read_text()  # so not a copy of its own
    told.put((source(TOKENS).tolist(), mapped))
    stop.wait(60)
    sources.close()


def start(factory: ToyFactory, scratch: Path, told: Any, stop: Event) -> Any:
    process = spawning.Process(target=use_tables, args=(factory, scratch, told, stop))
    process.start()
    return process


@pytest.mark.slow
def test_processes_share_one_file_which_the_last_of_them_removes(tmp_path: Path) -> None:
    factory = ToyFactory(tmp_path / "journal", block_s=0.5)
    told, stop = spawning.Queue(), spawning.Event()
    processes = [start(factory, tmp_path, told, stop) for _ in range(3)]
    expected = weights_of(1, 20_000)["rows"][TOKENS[:, 0]].tolist()
    assert [told.get(timeout=60) for _ in processes] == [(expected, True)] * 3
    assert factory.made() == ["tables"]
    assert files_in(tmp_path) == ["1.lock", "1.safetensors"]
    stop.set()
    for process in processes:
        process.join(60)
    assert files_in(tmp_path) == []


@pytest.mark.slow
def test_a_builder_that_dies_is_replaced_at_once(tmp_path: Path) -> None:
    told, stop = spawning.Queue(), spawning.Event()
    first = start(ToyFactory(tmp_path / "first", block_s=600.0), tmp_path, told, stop)
    while not (tmp_path / "first").exists():
        time.sleep(0.02)
    others = [start(ToyFactory(tmp_path / "others"), tmp_path, told, stop) for _ in range(2)]
    time.sleep(0.3)
    assert not (tmp_path / "others").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    assert [told.get(timeout=60)[1] for _ in others] == [True, True]
    assert (tmp_path / "others").read_text().split() == ["tables"]
    # Killed users leave files; whoever next shares tables removes them.
    for process in others:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert files_in(tmp_path) == ["1.lock", "1.safetensors"]
    sources = sources_of(ToyFactory(tmp_path / "later"), tmp_path)
    sources.get(2, lambda: weights_of(2), tabled=True)
    assert files_in(tmp_path) == ["2.lock", "2.safetensors"]
    sources.close()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage"])
def test_a_damaged_file_is_built_anew(
    factory: ToyFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    directory = table_files.private_directory(tmp_path)
    made = table_files.shared_tables(tmp_path, "1", lambda: factory.tables(weights_of(1)) or {})
    path = directory / "1.safetensors"
    whole = path.read_bytes()
    made.close()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    path.write_bytes(
        {"truncated": whole[:-7], "empty": b"", "flipped": flipped, "garbage": b"x" * 900}[damage]
    )
    sources = sources_of(factory, tmp_path)
    source: Any = sources.get(1, lambda: weights_of(1), tabled=True)
    assert torch.equal(source(TOKENS), weights_of(1)["rows"][TOKENS[:, 0]])
    assert factory.made() == ["tables", "tables"]
    assert "built anew" in caplog.text
    assert path.read_bytes() == whole
    sources.close()


def test_what_was_given_goes_on_after_its_weights_are_forgotten(
    factory: ToyFactory, tmp_path: Path
) -> None:
    sources = sources_of(factory, tmp_path)
    source: Any = sources.get(1, lambda: weights_of(1), tabled=True)
    sources.forget_except([])
    assert files_in(tmp_path) == []
    assert torch.equal(source(TOKENS), weights_of(1)["rows"][TOKENS[:, 0]])


def _a_link(scratch: Path) -> None:
    (scratch / "elsewhere").mkdir(mode=0o700)
    (scratch / f"key-tables-{os.getuid()}").symlink_to(scratch / "elsewhere")


def _open_to_all(scratch: Path) -> None:
    directory = scratch / f"key-tables-{os.getuid()}"
    directory.mkdir()
    directory.chmod(0o777)


def _missing(scratch: Path) -> None:
    scratch.rmdir()
    scratch.parent.rmdir()


@pytest.mark.parametrize("prepare", [_a_link, _open_to_all, _missing])
def test_where_sharing_is_unsafe_a_process_builds_for_itself_and_says_so(
    factory: ToyFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture, prepare: Any
) -> None:
    scratch = tmp_path / "parent" / "scratch"
    scratch.mkdir(parents=True)
    prepare(scratch)
    with caplog.at_level(logging.WARNING):
        source: Any = sources_of(factory, scratch).get(1, lambda: weights_of(1), tabled=True)
    assert torch.equal(source(TOKENS), weights_of(1)["rows"][TOKENS[:, 0]])
    assert "key tables of its own" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_is_no_obstacle(
    factory: ToyFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Python ignores SIGXFSZ
    try:
        sources = sources_of(factory, tmp_path)
        source: Any = sources.get(1, lambda: weights_of(1, 20_000), tabled=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(source(TOKENS), weights_of(1)["rows"][TOKENS[:, 0]])
    assert "key tables of its own" in caplog.text
    assert files_in(tmp_path) == ["1.lock"]
    sources.close()


def test_a_builders_error_is_the_callers(tmp_path: Path) -> None:
    class Refusing(ToyFactory):
        def tables(self, *args: Any, **settings: Any) -> Mapping[str, Tensor] | None:
            raise ValueError("these weights do not fit")

    sources = sources_of(Refusing(tmp_path / "journal"), tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="do not fit"):
            sources.get(1, lambda: weights_of(1), tabled=True)
    sources.close()
