"""How fast one device does what a memory and its training need: from a calibration, or from a
data sheet and assumed efficiencies. Both give the same coefficients; the plan does not ask which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from cluster.planning.constants import ApproximateIndex, Constants, FlatSearch
from cluster.planning.gpu_presets import Efficiency, GpuSheet, HostSheet
from memory_server.index.flat_index import QUERY_BLOCK
from memory_server.keys.key_codes import TORCH_DTYPES

WIDTH = 128  # that coefficients are given for
CHECKSUM_BYTES_PER_S = 10e9  # xxh3 of keys on one thread of the host. Assumed where not measured.


@dataclass(frozen=True, kw_only=True)
class SearchLine:
    """Seconds of one exact search: a + b·B + N·(c + d·B), N rows of 128 numbers, B queries.

    Of more queries than FlatIndex takes at once, each block scans the keys anew.
    """

    fixed_s: float
    per_query_s: float
    per_row_s: float
    per_pair_s: float

    def seconds(self, rows: float, batch: float, width: int) -> float:
        blocks = max(1, -(-batch // QUERY_BLOCK))
        scan = rows * (blocks * self.per_row_s + self.per_pair_s * batch) * width / WIDTH
        return self.fixed_s + self.per_query_s * batch + scan

    def faster(self, times: float) -> SearchLine:
        return SearchLine(
            fixed_s=self.fixed_s,
            per_query_s=self.per_query_s / times,
            per_row_s=self.per_row_s / times,
            per_pair_s=self.per_pair_s / times,
        )


@dataclass(frozen=True, kw_only=True)
class ApproximateLine:
    """Seconds of an approximate search of a batch and of filling the index again: power laws
    through the measured sizes; one size: search as the root of N, filling as N."""

    kind: str
    entries: int
    batch: int
    search_s: float
    search_power: float
    refill_s: float
    refill_power: float

    def search_seconds(self, rows: float, batch: float) -> float:
        by_rows = self.search_s * (rows / self.entries) ** self.search_power
        return float(by_rows * max(batch, 1) / self.batch)

    def refill_seconds(self, rows: float) -> float:
        return float(self.refill_s * (rows / self.entries) ** self.refill_power)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one GPU, or of all cores of one node.

    Attributes:
        on_gpu: which of them. threads: that the figures are for, on a CPU.
        search: by key dtype. approximate: by preset; empty: not known.
        token_s, number_s, gather_s: of making one key by tables: per token, per number of the key,
            per token and number.
        table_s: of building tables, per unit of `build_units`.
        direct_s: of making one key without tables, per unit of `direct_units`.
        products: floating-point operations per second of large products, by number format.
        disk_bytes_per_s: read.
        measured: whether a calibration is behind it, or assumptions.
    """

    name: str
    source: str
    measured: bool
    on_gpu: bool
    threads: int
    memory_bytes: int
    search: dict[str, SearchLine]
    approximate: dict[str, ApproximateLine]
    token_s: float
    number_s: float
    gather_s: float
    table_s: float
    direct_s: float
    products: dict[str, float]
    disk_bytes_per_s: float

    def key_seconds(self, tokens: int, width: int) -> float:
        """Of making and storing one key by tables."""
        return tokens * self.token_s + width * self.number_s + tokens * width * self.gather_s

    def with_threads(self, threads: float) -> Rates:
        """A CPU's with another number of threads, in proportion."""
        if self.on_gpu or threads == self.threads:
            return self
        times = threads / self.threads
        return replace(
            self,
            threads=max(1, round(threads)),
            search={name: line.faster(times) for name, line in self.search.items()},
            approximate={
                name: replace(line, search_s=line.search_s / times, refill_s=line.refill_s / times)
                for name, line in self.approximate.items()
            },
            token_s=self.token_s / times,
            number_s=self.number_s / times,
            gather_s=self.gather_s / times,
            table_s=self.table_s / times,
            direct_s=self.direct_s / times,
            products={name: rate * times for name, rate in self.products.items()},
        )


def build_units(vocabulary: int, tokens: int, hidden: int, width: int) -> float:
    """What building tables takes, in the unit of `model.key_tables.tables_pay_from`."""
    return vocabulary * (tokens * 0.6 * hidden + 0.01 * hidden * (hidden + width))


def direct_units(tokens: int, hidden: int, layers: int = 0, intermediate: int = 0) -> float:
    """What encoding one entry takes, likewise; each of `first_n` layers as its products."""
    of_layers = layers * 0.01 * hidden * (4 * hidden + 2 * intermediate)
    return tokens * (2.5 * hidden + 0.021 * hidden**2 + of_layers)


def calibrated(constants: Constants) -> Rates:
    """Out of what `pluglm calibrate` measured."""
    keys = constants.keys
    more = keys.refresh_entries - keys.small_refresh_entries
    of_refresh = (keys.refresh.median - keys.small_refresh.median) / max(1, more)
    each = max(of_refresh, 1 / keys.tabled.median)
    # What a refresh takes whatever its size: it builds tables on a thread that gives way.
    build = keys.small_refresh.median - each * keys.small_refresh_entries
    build = max(build, keys.build.median)
    # As tables_pay_from has it: a token's scalars, and a row of the table for each token.
    unit = each / (keys.tokens * (5.0 + 0.11 * keys.width))
    dtypes = sorted({search.key_dtype for search in constants.flat})
    lines = {
        dtype: fitted([search for search in constants.flat if search.key_dtype == dtype])
        for dtype in dtypes
    }
    for missing in TORCH_DTYPES:
        if missing not in lines:  # float16 is decoded as bfloat16 is
            lines[missing] = lines.get("bfloat16", lines[dtypes[0]])
    kinds = {index.kind for index in constants.approximate}
    disk = constants.disk.read or constants.disk.write
    return Rates(
        name=constants.name,
        source=f"calibration of {constants.measured}",
        measured=True,
        on_gpu=constants.device == "cuda",
        threads=constants.threads,
        memory_bytes=constants.device_bytes,
        search=lines,
        approximate={
            kind: power_law([index for index in constants.approximate if index.kind == kind])
            for kind in kinds
        },
        token_s=5.0 * unit,
        number_s=0.0,
        gather_s=0.11 * unit,
        table_s=build / build_units(keys.vocabulary, keys.tokens, keys.hidden, keys.width),
        direct_s=1 / keys.direct.median / direct_units(keys.tokens, keys.hidden),
        products={product.dtype: product.square.median for product in constants.products},
        disk_bytes_per_s=disk.median,
    )


def fitted(searches: Sequence[FlatSearch]) -> SearchLine:
    """The line that is nearest to what was measured, in relative terms; no coefficient below 0.

    With four unknowns every choice of those that are 0 is tried.
    """
    rows = np.array([search.entries * search.width / WIDTH for search in searches], dtype=float)
    batch = np.array([search.batch for search in searches], dtype=float)
    spent = np.array([search.seconds.median for search in searches])
    columns = np.stack([np.ones_like(rows), batch, rows, rows * batch], axis=1) / spent[:, None]
    best, least = np.zeros(4), np.inf
    for count in range(1, 5):
        for chosen in combinations(range(4), count):
            part, *_ = np.linalg.lstsq(columns[:, chosen], np.ones(len(spent)), rcond=None)
            error = float(np.square(columns[:, chosen] @ part - 1).sum())
            if (part >= 0).all() and error < least:
                best, least = np.zeros(4), error
                best[list(chosen)] = part
    return SearchLine(
        fixed_s=float(best[0]),
        per_query_s=float(best[1]),
        per_row_s=float(best[2]),
        per_pair_s=float(best[3]),
    )


def power_law(indexes: Sequence[ApproximateIndex]) -> ApproximateLine:
    """Through the smallest and the largest that were measured."""
    small, large = (pick(indexes, key=lambda one: one.entries) for pick in (min, max))

    def power(low: float, high: float, otherwise: float, least: float, most: float) -> float:
        if small.entries == large.entries:
            return otherwise
        found = float(np.log(high / low) / np.log(large.entries / small.entries))
        return min(most, max(least, found))

    searching = power(small.seconds.median, large.seconds.median, 0.5, 0.25, 1.0)
    refilling = power(small.refill.median, large.refill.median, 1.0, 0.75, 1.25)
    return ApproximateLine(
        kind=large.kind,
        entries=large.entries,
        batch=large.batch,
        search_s=large.seconds.median,
        search_power=searching,
        refill_s=large.refill.median,
        refill_power=refilling,
    )


def of_gpu_sheet(sheet: GpuSheet, share: Efficiency) -> Rates:
    """Out of a data sheet: what the code moves and multiplies, over the rates that are assumed."""
    memory = sheet.memory_bytes_per_s * share.memory
    gather = sheet.memory_bytes_per_s * share.gather
    products = sheet.float32_flops * share.float32
    pageable = sheet.pcie_bytes_per_s * share.pageable

    def line(dtype: str) -> SearchLine:
        held = TORCH_DTYPES[dtype].itemsize * WIDTH
        # Codes are decoded: written and read again as float32 (KeyCodes).
        moved = held if dtype == "float32" else held + 2 * 4 * WIDTH + 6
        rescoring = 0.0 if dtype == "float32" else share.rescore_fixed_s
        return SearchLine(
            fixed_s=share.search_fixed_s + rescoring,
            per_query_s=share.per_query_s,
            per_row_s=moved / memory,
            # Products are float32; each score is written and read again for its group's best.
            per_pair_s=2 * WIDTH / products + 8 / memory,
        )

    # The tables' sigmoids: an elementwise pass of six numbers read or written per component.
    per_component = 6 * 4 / memory / 0.6
    return Rates(
        name=sheet.name,
        source=f"{sheet.source}; times assumed efficiencies",
        measured=False,
        on_gpu=True,
        threads=0,
        memory_bytes=sheet.memory_bytes,
        search={dtype: line(dtype) for dtype in TORCH_DTYPES},
        approximate={},
        # int32 tokens come from memory that is not pinned; keys go back for their checksum.
        token_s=4 / pageable + 20 / gather + 8 / CHECKSUM_BYTES_PER_S,
        number_s=4 / pageable + 4 / CHECKSUM_BYTES_PER_S,
        gather_s=4 / gather,
        table_s=per_component,
        direct_s=per_component,
        products={
            "float32": products,
            "float16": sheet.half_flops * share.half,
            **({"bfloat16": sheet.half_flops * share.half} if sheet.bfloat16 else {}),
        },
        disk_bytes_per_s=0.0,
    )


def of_host_sheet(host: HostSheet) -> Rates:
    """Out of what is assumed of a node's processors."""
    unit = host.row_s_per_thread / host.cores / (64 * (5.0 + 0.11 * WIDTH))

    def line(dtype: str) -> SearchLine:
        held = TORCH_DTYPES[dtype].itemsize * WIDTH
        rescoring = 0.0 if dtype == "float32" else 7e-3  # as measured on two cores
        return SearchLine(
            fixed_s=1e-3 + rescoring,
            per_query_s=2e-4 / host.cores * 2 + (0 if dtype == "float32" else 1e-4),
            per_row_s=held / host.memory_bytes_per_s,
            per_pair_s=2 * WIDTH / host.float32_flops,
        )

    return Rates(
        name="a node's processors",
        source="gpus.toml, [host]: assumed",
        measured=False,
        on_gpu=False,
        threads=host.cores,
        memory_bytes=host.memory_bytes,
        search={dtype: line(dtype) for dtype in TORCH_DTYPES},
        approximate={
            kind: ApproximateLine(
                kind=kind,
                entries=int(table["entries"]),
                batch=int(table["batch"]),
                search_s=table["search_thread_s"] / host.cores,
                search_power=table["search_power"],
                refill_s=table["refill_thread_s"] / host.cores,
                refill_power=table["refill_power"],
            )
            for kind, table in host.approximate.items()
        },
        token_s=5.0 * unit,
        number_s=0.0,
        gather_s=0.11 * unit,
        table_s=host.build_s_per_thread / host.cores / build_units(30_522, 64, 768, 128),
        direct_s=host.direct_s_per_thread / host.cores / direct_units(64, 768),
        products={"float32": host.float32_flops, "bfloat16": host.float32_flops},
        disk_bytes_per_s=host.disk_bytes_per_s,
    )
