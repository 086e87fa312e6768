"""The helper that runs ranks: errors told, hangs ended."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multiprocess.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.multiprocess


def rank_one_fails(rank: int, x: Tensor) -> None:
    assert os.environ["WORLD_SIZE"] == "2"
    dist.all_reduce(x)
    if rank == 1:
        raise KeyError(f"no shard {int(x)}")
    dist.barrier()


def rank_zero_dies(rank: int) -> None:
    os._exit(7 + rank)


def hang(rank: int, alone: dict[str, Any]) -> None:
    assert not dist.is_initialized()
    time.sleep(alone["seconds"])


def test_an_error_on_one_rank_ends_the_others_and_is_told() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 raised.*KeyError: 'no shard 6'"):
        run_ranks(rank_one_fails, 2, torch.tensor(3))


def test_a_rank_that_dies_is_told() -> None:
    with pytest.raises(RankFailedError, match="rank 0 died with exit code 7"):
        run_ranks(rank_zero_dies, 1, process_group=False)


def test_a_rank_that_hangs_is_ended_in_time() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 were not done within 1 s"):
        run_ranks(hang, 1, {"seconds": 600}, timeout_s=1, process_group=False)
