"""The matrix product of a search: keys times queries, by the fastest means that torch brings.

On a CPU, `torch.mm` calls MKL, which leaves half of an AMD processor's AVX-512 idle; the oneDNN
that comes with torch does not. Which of them is faster is measured, once per process.
"""

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor], Tensor]
"""Keys float32 [n, Q] and queries float32 [B, Q], contiguous, to inner products [n, B]."""

PROBE_ROWS, PROBE_BATCH, PROBE_WIDTH, PROBE_TURNS = 4096, 32, 128, 5
CLEARLY_FASTER = 0.9


def inner_products(keys_nQ: Tensor, queries_BQ: Tensor) -> Tensor:
    """Inner products of all keys with all queries, float32 [n, B], rounded in any order."""
    if keys_nQ.device.type != "cpu":
        return by_mm(keys_nQ, queries_BQ)
    return fastest_on_cpu()(keys_nQ, queries_BQ)


def by_mm(keys_nQ: Tensor, queries_BQ: Tensor) -> Tensor:
    """By `torch.mm`: MKL on a CPU, cuBLAS on a GPU."""
    return torch.mm(keys_nQ, queries_BQ.T)


def by_onednn(keys_nQ: Tensor, queries_BQ: Tensor) -> Tensor:
    """By oneDNN, through the operator that torch's compiler uses for `linear`.

    Raises:
        RuntimeError, AttributeError, TypeError: this torch has no such operator.
    """
    products: Tensor = torch.ops.mkldnn._linear_pointwise(keys_nQ, queries_BQ, None, "none", [], "")
    return products


@cache
def fastest_on_cpu() -> Product:
    """Measure both; a few milliseconds at the first call. oneDNN must be right, too."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(PROBE_ROWS, PROBE_WIDTH, generator=generator)
    queries = torch.randn(PROBE_BATCH, PROBE_WIDTH, generator=generator)
    with torch.no_grad():
        expected = by_mm(keys, queries)
        try:
            right = torch.allclose(by_onednn(keys, queries), expected, rtol=0, atol=1e-3)
        except (RuntimeError, AttributeError, TypeError) as error:
            log.info("search uses torch.mm: this torch's oneDNN cannot be called: %s", error)
            return by_mm
        seconds: dict[Product, float] = {}
        for _ in range(PROBE_TURNS):
            for product in (by_mm, by_onednn):
                began = time.perf_counter()
                product(keys, queries)
                spent = time.perf_counter() - began
                seconds[product] = min(spent, seconds.get(product, spent))
    faster = seconds[by_onednn] < CLEARLY_FASTER * seconds[by_mm]
    log.info("search uses %s", "oneDNN" if right and faster else "torch.mm")
    return by_onednn if right and faster else by_mm
