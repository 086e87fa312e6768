"""Each of torchrun's ranks sees its own GPU alone, as each of Ray's trainers does."""

from __future__ import annotations

import pytest

from cluster.torchrun import take_own_device


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"LOCAL_RANK": "3"}, "3"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, "6"),
        ({"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "4,6"}, ""),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "GPU-5f,GPU-6a"}, "GPU-5f"),
        ({}, None),
    ],
)
def test_its_own_device(given: dict[str, str], shown: str | None) -> None:
    take_own_device(given)
    assert given.get("CUDA_VISIBLE_DEVICES") == shown
