"""The matrix product of a search: keys times queries, by the fastest means that torch brings.

On a CPU, `torch.mm` calls MKL, which leaves half of an AMD processor's AVX-512 idle; the oneDNN
that comes with torch does not. Which of them is faster is measured, once per process; and whether
products of int8 are faster still, as they are where the processor has instructions for them.
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
    with torch.no_grad():
        keys, queries = _probe()
        expected = by_mm(keys, queries)
        try:
            right = torch.allclose(by_onednn(keys, queries), expected, rtol=0, atol=1e-3)
        except (RuntimeError, AttributeError, TypeError) as error:
            log.info("search uses torch.mm: this torch's oneDNN cannot be called: %s", error)
            return by_mm
        faster = _seconds(by_onednn, keys, queries) < CLEARLY_FASTER * _seconds(
            by_mm, keys, queries
        )
    log.info("search uses %s", "oneDNN" if right and faster else "torch.mm")
    return by_onednn if right and faster else by_mm


def by_int8(keys_nQ: Tensor, queries_BQ: Tensor, out_nB: Tensor | None = None) -> Tensor:
    """Inner products of int8 keys with int8 queries, int32 [n, B], without rounding.

    Args:
        out_nB: int32, where to put them.

    Raises:
        RuntimeError, AttributeError, TypeError: this torch cannot.
    """
    products: Tensor = torch._int_mm(keys_nQ, queries_BQ.T, out=out_nB)
    return products


@cache
def int8_pays_on_cpu() -> bool:
    """Whether `by_int8` is right here, and clearly faster than products of float32."""
    with torch.no_grad():
        keys, queries = _probe()
        keys8, queries8 = (keys * 40).to(torch.int8), (queries * 40).to(torch.int8)
        try:
            right = torch.equal(
                by_int8(keys8, queries8).double(), keys8.double() @ queries8.double().T
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            log.info("int8 keys are decoded: this torch cannot multiply them: %s", error)
            return False
        spent = _seconds(by_int8, keys8, queries8)
        return right and spent < CLEARLY_FASTER * _seconds(fastest_on_cpu(), keys, queries)


def _probe() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(PROBE_ROWS, PROBE_WIDTH, generator=generator)
    return keys, torch.randn(PROBE_BATCH, PROBE_WIDTH, generator=generator)


def _seconds(product: Product, keys: Tensor, queries: Tensor) -> float:
    product(keys, queries)
    spent = []
    for _ in range(PROBE_TURNS):
        began = time.perf_counter()
        product(keys, queries)
        spent.append(time.perf_counter() - began)
    return min(spent)
