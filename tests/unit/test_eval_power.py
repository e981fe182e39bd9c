"""Power: the specification's table to the printed digits, and simulation. Run: pytest tests/unit/test_eval_power.py"""

import numpy as np
import pytest

from sft.eval import power, stats

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


@pytest.mark.parametrize(
    ("n", "points"),
    [
        (14042, ["0.24", "0.33", "0.53", "0.75", "1.06"]),
        (10042, ["0.28", "0.40", "0.63", "0.88", "1.25"]),
        (1534, ["0.71", "1.01", "1.60", "2.26", "3.20"]),
        (100, ["2.77", "3.92", "6.19", "8.76", "12.4"]),
    ],
)
def test_minimum_detectable_drops_are_the_published_table(n, points):
    found = [100 * power.minimum_detectable(n, rate) for rate in RATES]
    assert [f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in found] == points


@pytest.mark.parametrize(
    ("n", "powers"),
    [(14042, ["1.00", "1.00", "1.00", "0.98", "0.84"]), (10042, ["1.00", "1.00", "1.00", "0.94", "0.72"])],
)
def test_power_of_non_inferiority_is_the_published_one(n, powers):
    assert [f"{power.power_non_inferior(n, rate, 0.01):.2f}" for rate in RATES] == powers


def test_items_needed_are_the_published_ones():
    assert [power.items_needed(rate, 0.01) for rate in RATES[1:]] == [1568, 3923, 7847, 15696]


@pytest.mark.parametrize("rate", [0.01, 0.2])
@pytest.mark.parametrize("n", [60, 14042])
def test_minimum_detectable_inverts_items_needed(n, rate):
    assert power.items_needed(rate, power.minimum_detectable(n, rate)) in (n, n + 1)


def test_three_items_detect_nothing():
    assert power.minimum_detectable(3, 0.2) == 1.0
    assert power.minimum_detectable(5, 0.2) < 0.45


def z_of(lost, won, n):
    delta = (won - lost) / n
    return delta, np.sqrt(((lost + won) / n - delta**2) / (n - 1))


def test_the_formulas_say_what_simulation_shows():
    """20,000 experiments each: with the drop that 3,923 items are said to show, and without one."""
    rng, n, rate = np.random.default_rng(0), 3923, 0.05
    lost, won, _ = rng.multinomial(n, [(rate + 0.01) / 2, (rate - 0.01) / 2, 1 - rate], size=20_000).T
    delta, error = z_of(lost, won, n)
    assert (delta + 1.959964 * error < 0).mean() == pytest.approx(0.8, abs=0.012)
    lost, won, _ = rng.multinomial(n, [rate / 2, rate / 2, 1 - rate], size=20_000).T
    delta, error = z_of(lost, won, n)
    assert (delta - 1.644854 * error > -0.01).mean() == pytest.approx(
        power.power_non_inferior(n, rate, 0.01), abs=0.012
    )
    assert (delta + 1.959964 * error < 0).mean() < 0.03  # negative control: no drop, no power


def test_items_to_rule_out():
    """80 % of simulated experiments of that many items rule the margin out; none do so often at half of them."""
    rate, delta = 0.06, -0.004
    n = power.items_to_rule_out(rate - delta**2, delta, 0.01, 0.95)
    for num, expected in ((n, 0.8), (n // 2, 0.55)):
        rng = np.random.default_rng(1)
        shares = [(rate - delta) / 2, (rate + delta) / 2, 1 - rate]
        lost, won, _ = rng.multinomial(num, shares, size=20_000).T
        seen, error = z_of(lost, won, num)
        assert (seen - 1.644854 * error > -0.01).mean() == pytest.approx(expected, abs=0.03)
    assert power.items_to_rule_out(rate, -0.01, 0.01, 0.95) is None
    assert power.items_to_rule_out(rate, 0.02, 0.01, 0.95) < n


def test_lines_for_a_limit():
    lines = power.describe_power(200, [0.05, 0.1])
    assert len(lines) == 2
    assert lines[0] == (
        "with 200 items a drop below 4.40 points cannot be shown at 5 % flips; to see one of 1 points takes 3,923 items"
    )
    assert "to see one of 0.5 points takes 15,696 items" in power.describe_power(200, [0.05], margin=0.005)[0]


def test_power_counts_on_the_level_of_the_report():
    assert stats.LEVEL == 0.95
    strict = power.power_non_inferior(3923, 0.05, 0.01, confidence=0.99)
    assert strict < power.power_non_inferior(3923, 0.05, 0.01)
