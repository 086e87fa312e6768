"""Paired differences against values that were worked out by hand."""

import math

import pytest

from trainer.finetune.paired import paired_difference, two_sided_p


def test_a_difference_of_three_pairs_is_what_one_works_out_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t = 0.2 / (0.1 / sqrt(3)) = 3.4641.
    found = paired_difference([0.6, 0.7, 0.9], [0.5, 0.5, 0.6])
    assert found.mean == pytest.approx(0.2)
    assert found.std == pytest.approx(0.1)
    assert found.t == pytest.approx(2 * math.sqrt(3))
    # With two degrees of freedom p = 1 - t / sqrt(t*t + 2) = 1 - sqrt(12 / 14).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.pairs, found.better) == (3, 3)


def test_pairs_count_not_the_two_means() -> None:
    values, others = [0.5, 0.7, 0.9, 0.3], [0.4, 0.8, 0.7, 0.4]
    paired, mixed = paired_difference(values, others), paired_difference(values, others[::-1])
    assert paired.mean == pytest.approx(mixed.mean)
    assert paired.std != pytest.approx(mixed.std)


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216),
     (29, 2.04523)],
)  # fmt: skip
def test_p_is_five_per_cent_where_tables_say_so(degrees: int, t: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(0.05, abs=2e-6)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7])
def test_p_is_the_area_under_the_density(degrees: int) -> None:
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
    scale /= math.sqrt(degrees * math.pi)
    steps, t = 20_000, 1.3
    width = t / steps
    inside = 2 * sum(
        scale * (1 + ((i + 0.5) * width) ** 2 / degrees) ** (-(degrees + 1) / 2) * width
        for i in range(steps)
    )
    assert two_sided_p(t, degrees) == pytest.approx(1 - inside, abs=1e-8)


def test_what_is_no_test_gives_no_p() -> None:
    assert two_sided_p(0.0, 4) == 1.0
    one = paired_difference([0.5], [0.4])
    assert (one.std, one.t, one.p, one.pairs) == (None, None, None, 1)
    equal = paired_difference([0.5, 0.7], [0.4, 0.6])
    assert equal.mean == pytest.approx(0.1)
    assert (equal.std, equal.t, equal.p) == (0.0, None, None)
    nothing = paired_difference([0.5, 0.7], [0.5, 0.7])
    assert (nothing.mean, nothing.p, nothing.better) == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="needs pairs, not 2 values beside 1"):
        paired_difference([0.5, 0.7], [0.5])
    with pytest.raises(ValueError, match="must be at least 1"):
        two_sided_p(1.0, 0)
