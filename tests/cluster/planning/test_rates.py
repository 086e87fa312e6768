"""Rates: what a calibration and a data sheet become, and how they grow."""

import pytest

from cluster.planning.constants import Figure, FlatSearch
from cluster.planning.gpu_presets import efficiency, gpu_kinds, gpu_sheet, host_sheet
from cluster.planning.rates import SearchLine, fitted, of_gpu_sheet, of_host_sheet
from memory_server.keys.key_codes import KEY_DTYPES

LINE = SearchLine(fixed_s=1e-3, per_query_s=2e-5, per_row_s=3e-8, per_pair_s=4e-10)


def searched(line: SearchLine, entries: int, batch: int, width: int = 128) -> FlatSearch:
    spent = Figure.of([line.seconds(entries, batch, width)])
    return FlatSearch(
        entries=entries,
        width=width,
        batch=batch,
        key_dtype="float32",
        seconds=spent,
        bytes_per_s=spent.inverse(entries * width * 4),
    )


def test_a_fit_finds_the_line_that_was_measured() -> None:
    points = [searched(LINE, n, b) for n in (10_000, 200_000) for b in (1, 64)]
    found = fitted(points)
    for name in ("fixed_s", "per_query_s", "per_row_s", "per_pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(LINE, name), rel=1e-6)


def test_a_fit_has_no_negative_part() -> None:
    """Noise makes the larger memory faster; no coefficient may say that rows save time."""
    faster = SearchLine(fixed_s=5e-4, per_query_s=2e-5, per_row_s=0.0, per_pair_s=0.0)
    found = fitted([searched(LINE, 10_000, 1), searched(faster, 20_000, 1), searched(LINE, 10, 9)])
    assert min(found.fixed_s, found.per_query_s, found.per_row_s, found.per_pair_s) >= 0


def test_wider_keys_and_more_blocks_of_queries_scan_longer() -> None:
    assert LINE.seconds(1e6, 1, 256) - 1.02e-3 == pytest.approx(
        2 * (LINE.seconds(1e6, 1, 128) - 1.02e-3)
    )
    one, two = LINE.seconds(1e6, 512, 128), LINE.seconds(1e6, 1024, 128)
    assert two - LINE.fixed_s == pytest.approx(2 * (one - LINE.fixed_s))


def test_more_threads_are_faster_in_proportion() -> None:
    host = of_host_sheet(host_sheet(cores=8))
    half = host.with_threads(4)
    assert half.key_seconds(64, 128) == pytest.approx(2 * host.key_seconds(64, 128))
    assert half.search["float32"].per_row_s == pytest.approx(2 * host.search["float32"].per_row_s)
    assert half.search["float32"].fixed_s == host.search["float32"].fixed_s


@pytest.mark.parametrize("kind", gpu_kinds())
def test_every_gpu_names_its_data_sheet_and_has_rates(kind: str) -> None:
    sheet = gpu_sheet(kind.lower())
    assert "NVIDIA" in sheet.source
    assert "data sheet" in sheet.source
    rates = of_gpu_sheet(sheet, efficiency())
    assert not rates.measured
    assert set(rates.search) == set(KEY_DTYPES)
    assert rates.products["float16"] > rates.products["float32"]
    assert ("bfloat16" in rates.products) == (kind != "V100-32")
    # Below what the sheet allows: the keys cannot be read faster than its memory.
    line = rates.search["float32"]
    assert line.per_row_s > 4 * 128 / sheet.memory_bytes_per_s


def test_shares_are_shares() -> None:
    share = efficiency()
    for name in ("memory", "gather", "float32", "half", "pinned", "pageable"):
        assert 0 < getattr(share, name) <= 1


def test_an_unknown_gpu_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match="did you mean A100-40 or A100-80"):
        gpu_sheet("A100")
    with pytest.raises(ValueError, match="for another, give the --calibration"):
        gpu_sheet("Z80")
