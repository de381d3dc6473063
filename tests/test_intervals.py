"""Intervals: hand-worked cases, textbook intervals that they must equal, and simulated experiments of known truth."""

import json

import numpy as np
import pytest
from scipy import stats as textbook

from benchmarks import intervals as benchmark
from ibkit.errors import ScoreError
from ibkit.evaluate.intervals import (
    Interval,
    bootstrap_statistic,
    bootstrap_weighted,
    difference_interval,
    mean_interval,
    wilson_interval,
)


def bounds(interval):
    return interval.low, interval.high


# --- shares --------------------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    # 8 of 10 at 95 %: centre (0.8 + 3.8415/20)/(1 + 3.8415/10), worked by hand; also in Brown, Cai, DasGupta 2001.
    interval = wilson_interval(8, 10)
    assert interval.value == 0.8 and interval.n == 10
    assert bounds(interval) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    # At the ends: z²/(n + z²).
    assert wilson_interval(10, 10).low == pytest.approx(10 / (10 + 1.959964**2))
    assert wilson_interval(10, 10).high == 1.0
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(8, 10, level=0.5).low > interval.low


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ScoreError, match="not a proportion"):
        wilson_interval(successes, n)


def test_a_share_of_independent_images_is_wilsons():
    assert mean_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    assert mean_interval([1, 0, 1, 1], [["cat"] * 4, ["soccer"] * 4]) == wilson_interval(3, 4)
    assert mean_interval([0.5, 1.5]) != wilson_interval(2, 2)


def test_a_share_of_prompts_is_wilsons_at_the_number_of_images_that_they_are_worth():
    # Ten prompts, five of them always right: by Student ± √(.25/9) · 2.262 = .377, and by Wilson n = z² · .25/.377².
    right, prompts = np.repeat([1.0, 0.0] * 5, 20), np.repeat(np.arange(10), 20)
    n = 1.959964**2 * 0.25 / (2.262157 * np.sqrt(0.25 / 9)) ** 2
    assert bounds(mean_interval(right, prompts)) == pytest.approx(bounds(wilson_interval(n / 2, n)), abs=0.01)


def test_images_that_all_agree_claim_no_certainty():
    # 5 prompts × 20 images are worth √(5 · 100) at the most, times (z / t with 4 degrees of freedom)².
    n = np.sqrt(500) * (1.959964 / 2.776445) ** 2
    prompts = np.repeat(np.arange(5), 20)
    always = mean_interval(np.ones(100), prompts)
    assert always.value == always.high == 1 and always.low == pytest.approx(n / (n + 1.959964**2), abs=1e-6)
    assert mean_interval(np.ones(100), np.repeat(np.arange(2), 50)).low < 0.2
    # Seeds share their noise: thrice the images are not thrice the evidence.
    assert bounds(mean_interval(np.ones((3, 100)), prompts)) == bounds(always)
    # Bonett and Price: with one pair more for either side the variance is 2/(n + 2), the half width 1.96 √2/(n + 2).
    same = difference_interval(np.ones((3, 100)), np.ones(100), prompts)
    n = 100 * (1.959964 / 2.776445) ** 2
    half = 1.959964 * np.sqrt(2) / (n + 2)
    assert (same.value, *bounds(same)) == pytest.approx((0, -half, half), abs=1e-6)
    never = difference_interval(np.zeros(100), np.ones(100), prompts)
    assert never.value == never.low == -1 and -1 < never.high < -0.85


def test_two_prompts_do_not_decide_by_agreeing():
    lost = difference_interval(np.zeros(60), np.ones(60), np.repeat([0, 1], 30))
    assert lost.value == -1 and lost.side() == 0
    assert difference_interval(np.zeros(160), np.ones(160), np.repeat(np.arange(8), 20)).side() == -1


@pytest.mark.parametrize("one", [[0.3], [1.0]])
def test_one_image_decides_nothing(one):
    mean, difference = mean_interval(one), difference_interval(one, one)
    assert difference.value == 0 and difference.side() == 0 and difference.side(-0.05) == 0
    assert mean.side() == 0 or one == [1.0] and mean.low == pytest.approx(0.2065, abs=1e-4)


# --- means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_groups", [2, 3, 5, 20])
def test_the_mean_of_groups_has_students_interval(n_groups):
    scores = np.random.default_rng(n_groups).normal(3, 2, n_groups)
    interval = mean_interval(np.repeat(scores, 7), np.repeat(np.arange(n_groups), 7), n_resamples=100_000)
    half = textbook.t.ppf(0.975, n_groups - 1) * scores.std(ddof=1) / np.sqrt(n_groups)
    assert interval.value == pytest.approx(scores.mean()) and interval.n == 7 * n_groups
    # Two and three groups have few different resamples, so that tails are a little lighter than Student's.
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15 if n_groups < 5 else 0.06)


def test_same_seed_same_interval_and_another_seed_another():
    values, groups = np.arange(30.0), np.repeat(list("abcdef"), 5)
    assert mean_interval(values, groups, seed=3) == mean_interval(values, groups, seed=3)
    assert mean_interval(values, groups, seed=3) != mean_interval(values, groups, seed=4)


def test_images_of_a_prompt_are_not_independent_units():
    # Ten prompts whose images all agree: twenty times the images must not give a narrower interval.
    scores = np.random.default_rng(0).normal(size=10)
    few = mean_interval(np.repeat(scores, 2), np.repeat(np.arange(10), 2))
    many = mean_interval(np.repeat(scores, 40), np.repeat(np.arange(10), 40))
    assert bounds(many) == pytest.approx(bounds(few))
    naive = mean_interval(np.repeat(scores, 40))
    assert naive.high - naive.low < 0.3 * (many.high - many.low)


def test_prompts_are_nested_in_subjects_or_crossed_with_them_by_their_labels():
    # Six subjects of the same mean; what varies is the prompt.
    subjects, prompts = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    values = np.array([0.1, 0.2, 0.7, 0.9])[prompts]
    nested = mean_interval(values, [subjects, [f"{s} {p}" for s, p in zip(subjects, prompts, strict=True)]])
    assert nested.high - nested.low == pytest.approx(0, abs=1e-9)  # the subjects carry it, and do not vary
    crossed = mean_interval(values, [subjects, prompts])
    assert bounds(crossed) == pytest.approx(bounds(mean_interval(values, prompts)), rel=0.15)
    between = mean_interval(np.where(subjects == 0, 1.0, 0.1), [subjects, prompts])
    assert between.low < 0.1 < 0.5 < between.high


def test_rl_seeds_are_crossed_with_the_images():
    # Three seeds with identical scores carry no more information than one.
    scores = np.random.default_rng(0).normal(size=60)
    groups = np.repeat(np.arange(6), 10)
    one, three = mean_interval(scores, groups), mean_interval(np.stack([scores] * 3), groups)
    assert three.n == 180 and one.n == 60
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)
    # Seeds that differ among themselves widen it: here they are all the variation there is.
    seeds = np.array([0.2, 0.5, 0.9, 1.3])
    apart = mean_interval(np.repeat(seeds[:, None], 60, axis=1), groups)
    half = textbook.t.ppf(0.975, 3) * seeds.std(ddof=1) / 2
    assert apart.high - apart.low == pytest.approx(2 * half, rel=0.12)


def test_rows_may_be_two_kinds_of_seeds():
    # Rows: two personalization seeds × two RL seeds each. Only the personalization differs.
    table = np.repeat([[0.0], [0.0], [1.0], [1.0]], 40, axis=1)
    columns, groups = {"x": table}, np.repeat(np.arange(4), 10)
    by_row = bootstrap_statistic(columns, lambda x: x, groups)
    nested = bootstrap_statistic(columns, lambda x: x, groups, seeds=[[0, 0, 1, 1], [0, 1, 2, 3]])
    assert nested.high - nested.low > 3 * (by_row.high - by_row.low)  # two levels, not four
    crossed = bootstrap_statistic(columns, lambda x: x, groups, seeds=[[0, 0, 1, 1], [0, 1, 0, 1]])
    assert bounds(crossed) == pytest.approx(bounds(nested), rel=0.2)


def test_a_ratio_of_differences_moves_with_its_parts():
    rng = np.random.default_rng(0)
    base, groups = np.ones(200), np.repeat(np.arange(20), 10)
    lost = rng.random(200) < 0.5
    columns = {"base": base, "db": 1.0 * lost, "ib": 1.0 * (lost | (rng.random(200) < 0.8))}
    share = bootstrap_statistic(columns, lambda base, db, ib: (ib - db) / (base - db), groups)
    by_hand = (columns["ib"].mean() - columns["db"].mean()) / (1 - columns["db"].mean())
    assert share.value == pytest.approx(by_hand)
    assert 0.6 < share.low < 0.8 < share.high < 0.95


def test_a_statistic_that_is_no_function_of_means():
    # Of the mean, which is one, it is the same.
    values, groups = np.random.default_rng(0).normal(size=60), np.repeat(np.arange(6), 10)
    found = bootstrap_weighted(lambda w: (w @ values) / w.sum(axis=1), groups, 60, n_resamples=10_000)
    assert bounds(found) == pytest.approx(bounds(mean_interval(values, groups)), rel=0.1)
    assert found.n == 60 and found.value == pytest.approx(values.mean())


def test_missing_cells_are_left_out_of_the_mean():
    table = np.array([[1.0, 1.0, np.nan], [0.0, 0.0, np.nan], [np.nan, np.nan, 1.0]])
    assert mean_interval(table).value == pytest.approx((0.5 + 0.5 + 1) / 3) and mean_interval(table).n == 5


def test_a_subject_with_fewer_seeds_does_not_make_a_difference():
    # Two subjects, ten units each: both methods are 0 on the first and 1 on the second, which has fewer RL seeds.
    before = np.repeat([[0.0, 1.0]], 10, axis=1)
    after = np.repeat([[0.0, 1.0], [0.0, np.nan], [0.0, np.nan]], 10, axis=1)
    groups = np.repeat(["a", "b"], 10)
    interval = bootstrap_statistic({"a": after, "b": before}, lambda a, b: a - b, groups)
    assert (interval.value, *bounds(interval)) == (0, 0, 0)
    assert mean_interval(after, groups).value == pytest.approx(0.5)


def test_a_unit_that_one_column_lacks_counts_in_none():
    interval = bootstrap_statistic(
        {"a": np.array([1.0, 2.0, 5.0]), "b": np.array([0.0, 1.0, np.nan])}, lambda a, b: a - b
    )
    assert (interval.value, *bounds(interval)) == (1, 1, 1)


def test_resamples_that_are_not_finite_are_counted():
    def inverse(x):
        return 1 / x

    # A mean of zero is drawn with probability (1 − 1/G)^G = 0.36 of 30 groups, and with ½^10 = 0.1 % of ten halves.
    with pytest.raises(ScoreError, match=r"not finite in 3\d\d of 1000 resamples: .*More prompts"):
        bootstrap_statistic({"x": np.eye(30)[0]}, inverse, n_resamples=1000)
    halves = bootstrap_statistic({"x": np.repeat([0.0, 1.0], 5)}, inverse)
    assert np.isfinite(bounds(halves)).all()
    with pytest.raises(ScoreError, match="divides by zero"):
        bootstrap_statistic({"x": np.zeros(2)}, inverse)


def test_a_side_is_not_taken_by_rounding():
    assert [Interval(0, *pair, 1).side() for pair in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [1, -1, 0]
    assert Interval(0, 1e-17, 1e-16, 1).side() == 0 and Interval(0, np.nan, np.nan, 1).side() == 0
    assert Interval(0, -0.04, 0.1, 1).side(-0.05) == 1


def test_bad_input_is_refused():
    with pytest.raises(ScoreError, match="non-empty"):
        mean_interval([])
    with pytest.raises(ScoreError, match="an infinite score"):
        mean_interval([1.0, float("inf")])
    with pytest.raises(ScoreError, match="or none that was measured"):
        mean_interval([float("nan")])
    with pytest.raises(ScoreError, match="2 scores but 3 group labels"):
        mean_interval([1.0, 2.0], ["a", "b", "c"])
    with pytest.raises(ScoreError, match="different lengths"):
        difference_interval(np.ones(2), np.ones(3))
    with pytest.raises(ScoreError, match="level between 0 and 1"):
        mean_interval([1.0], level=95)


# --- simulated experiments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", benchmark.QUICK, ids=str)
def test_intervals_hold_the_truth_and_find_nothing_where_there_is_nothing(design):
    """Bounds: three standard errors of a share of 300 draws around 95 % and 5 %.

    The plain percentile bootstrap held the truth in 70 to 87 % of these draws, and told equals apart in 7 to 32 %.
    """
    n = 300
    found = benchmark.measure(design, n, np.random.default_rng(0))
    tolerance = 3 * np.sqrt(0.05 * 0.95 / n)
    assert found["coverage"] >= 0.95 - tolerance and found["below"] + found["above"] <= 0.05 + tolerance


def test_intervals_are_no_wider_than_they_must():
    """20 prompts × 8 seeds: the sum over crossed factors is careful, not blind."""
    rng, widths = np.random.default_rng(0), []
    design = benchmark.Design(20, 8)
    for _ in range(50):
        interval = mean_interval(design.draw(rng)[0], design.groups(), n_resamples=1000)
        widths.append(interval.high - interval.low)
    known = 2 * 1.96 * np.sqrt(0.25**2 / 20 + 0.12**2 / 8)  # by the deviations that it is drawn with
    assert known < np.mean(widths) < 1.3 * known


def test_the_benchmark_prints_every_design(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["intervals.py", "--draws", "3", "--json"])
    monkeypatch.setattr(benchmark, "N_RESAMPLES", 50)
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["designs"]
    assert len(rows) == len(benchmark.DESIGNS) + len(benchmark.SUBJECTS_AND_SEEDS)
    assert all({"coverage", "below", "above"} <= set(row) for row in rows.values())
    assert "2 prompts × 1 seed " in printed and "30 subjects × 25 prompts × 3 seeds" in printed
