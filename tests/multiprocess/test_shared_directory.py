"""A run directory that is not the same one for every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.multiprocess.ranks import run_ranks
from trainer.errors import TrainingError
from trainer.shared_directory import check_shared, driver_mark

pytestmark = pytest.mark.multiprocess


def _check(rank: int, folders: list[str]) -> str | None:
    try:
        check_shared(Path(folders[rank]), torch.device("cpu"), rank=rank, ranks=2, patience_s=0.5)
    except TrainingError as error:
        return str(error)
    return None


def test_one_directory_for_all_is_fine_and_left_clean(tmp_path: Path) -> None:
    assert run_ranks(_check, 2, [str(tmp_path)] * 2) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_two_directories_are_refused_on_every_rank_alike(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    first, second = run_ranks(_check, 2, [str(mine), str(theirs)])
    assert first is not None
    assert second is not None
    assert "rank 1 of 2 does not see what rank 0 writes" in first
    assert str(mine) in first
    assert str(theirs) in second
    assert list(mine.iterdir()) == []


def _check_driver(rank: int, folder: str, mark: str) -> str | None:
    try:
        check_shared(
            Path(folder), torch.device("cpu"), rank=rank, ranks=2, driver=mark, patience_s=0.5
        )
    except TrainingError as error:
        return str(error)
    return None


def test_the_drivers_directory_must_be_the_same_one_too(tmp_path: Path) -> None:
    with driver_mark(tmp_path) as mark:
        assert run_ranks(_check_driver, 2, str(tmp_path), mark) == [None, None]
    first, second = run_ranks(_check_driver, 2, str(tmp_path), mark)
    assert first == second
    assert first is not None
    assert "rank 0 does not see what the driver writes there" in first
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_gone_is_refused_on_every_rank_alike(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    first, second = run_ranks(_check, 2, [gone, gone])
    assert first == second
    assert first is not None
    assert "cannot be written to" in first
