"""What a device does apart from any memory server: copies, matrix products, small operations."""

from __future__ import annotations

from functools import partial

import torch

from cluster.planning.constants import Copies, Figure, Products
from cluster.planning.timing import Clock

KEY_WIDTH = 128
SMALL_OPERATIONS = 500


def copy_rate(clock: Clock, device: torch.device, bytes_: int) -> Figure:
    """Bytes read and written per second by a copy on the device."""
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.empty_like(source)
    spent = clock.on_device(partial(target.copy_, source))
    return spent.inverse(2 * source.nbytes)


def copies(clock: Clock, bytes_: int) -> Copies:
    """Between the host and the GPU of the clock."""
    device = clock.device
    pageable = torch.ones(bytes_, dtype=torch.uint8)
    pinned = torch.ones(bytes_, dtype=torch.uint8, pin_memory=True)
    there = torch.ones(bytes_, dtype=torch.uint8, device=device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> Figure:
        # On the wall clock: a copy from pageable memory is the host's work, too.
        return clock.wall(partial(target.copy_, source, non_blocking=True)).inverse(bytes_)

    return Copies(
        to_device_pinned=rate(there, pinned),
        to_device_pageable=rate(there, pageable),
        to_host_pinned=rate(pinned, there),
        to_host_pageable=rate(pageable, there),
    )


def products(clock: Clock, dtype: torch.dtype, *, side: int, rows: int, batch: int) -> Products:
    """Matrix products in a number format, as torch is set up in this process.

    Args:
        side: of the square matrices. rows, batch: keys and queries of the skinny product.
    """
    device = clock.device
    one = torch.randn(side, side, device=device).to(dtype)
    other = torch.randn(side, side, device=device).to(dtype)
    square = clock.on_device(partial(torch.mm, one, other)).inverse(2 * side**3)
    del one, other
    keys = torch.randn(rows, KEY_WIDTH, device=device).to(dtype)
    queries = torch.randn(batch, KEY_WIDTH, device=device).to(dtype)
    skinny = clock.on_device(partial(torch.mm, keys, queries.T))
    return Products(
        dtype=str(dtype).removeprefix("torch."),
        square=square,
        skinny=skinny.inverse(2 * rows * batch * KEY_WIDTH),
    )


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The number formats whose products the device has instructions for, as torch tells."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [torch.float32, torch.float16]
    return [torch.float32, torch.bfloat16]


def small_operations(clock: Clock) -> tuple[Figure, Figure]:
    """Seconds of one small operation among many, and of one until its result is on the host."""
    number = torch.zeros(1, device=clock.device)

    def many() -> None:
        for _ in range(SMALL_OPERATIONS):
            number.add_(1)

    def one() -> float:
        return float(number.add_(1))

    spent = clock.wall(many)
    each = Figure(
        median=spent.median / SMALL_OPERATIONS,
        low=spent.low / SMALL_OPERATIONS,
        high=spent.high / SMALL_OPERATIONS,
        count=spent.count,
    )
    return each, clock.wall(one)
