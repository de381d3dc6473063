"""Intervals: hand-worked cases, known distributions, and the table functions that feed them."""

import numpy as np
import pandas as pd
import pytest

from ibkit.errors import ScoreError
from ibkit.stats import (
    METRICS,
    as_compared,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
    check_scores,
    in_method_order,
    mean_interval,
    newcombe_interval,
    summarise,
    unit_matrix,
    wilson_interval,
)


def tidy(method, values, prompts, *, rl_seed=0, identifier=True, metric="judge_activity", subject="cat"):
    """One row per image; the image seed counts within its prompt."""
    rows = pd.DataFrame({"prompt_id": prompts, metric: values})
    rows["image_seed"] = rows.groupby("prompt_id").cumcount()
    return rows.assign(method=method, rl_seed=rl_seed, identifier=identifier, subject=subject)


# --- plain arrays --------------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    # 8 of 10 at 95 %: centre (0.8 + 3.8415/20)/(1 + 3.8415/10), worked by hand; also in Brown, Cai, DasGupta 2001.
    interval = wilson_interval(8, 10)
    assert interval.value == 0.8 and interval.n == 10
    assert (interval.low, interval.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    # At the ends: z²/(n + z²).
    assert wilson_interval(10, 10).low == pytest.approx(10 / (10 + 1.959964**2))
    assert wilson_interval(10, 10).high == 1.0
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(8, 10, level=0.5).low > interval.low


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ScoreError, match="not a proportion"):
        wilson_interval(successes, n)


def test_newcombe_by_hand():
    # Two perfect proportions of 100: each Wilson interval is [0.963, 1]; the difference 0 gets ± 0.037.
    perfect = wilson_interval(100, 100)
    interval = newcombe_interval(perfect, perfect, 100)
    assert interval.value == 0
    assert (interval.low, interval.high) == pytest.approx((perfect.low - 1, 1 - perfect.low))


def test_mean_of_two_groups_has_the_exact_bootstrap_distribution():
    # Groups of one image with scores 0 and 1: the resampled mean is 0, ½, 1 with probability ¼, ½, ¼.
    interval = bootstrap_mean([0.0, 1.0], ["a", "b"], level=0.6, n_resamples=20_000)
    assert (interval.value, interval.low, interval.high, interval.n) == (0.5, 0.0, 1.0, 2)
    narrow = bootstrap_mean([0.0, 1.0], ["a", "b"], level=0.4, n_resamples=20_000)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_theory_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_same_seed_same_interval_and_another_seed_another():
    values, groups = np.arange(30.0), np.repeat(list("abcdef"), 5)
    assert bootstrap_mean(values, groups, seed=3) == bootstrap_mean(values, groups, seed=3)
    assert bootstrap_mean(values, groups, seed=3) != bootstrap_mean(values, groups, seed=4)


def test_images_of_a_prompt_are_not_independent_units():
    # Ten prompts whose images all agree: twenty times the images must not give a narrower interval.
    scores = np.random.default_rng(0).normal(size=10)
    few = bootstrap_mean(np.repeat(scores, 2), np.repeat(np.arange(10), 2))
    many = bootstrap_mean(np.repeat(scores, 40), np.repeat(np.arange(10), 40))
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.05)
    naive = bootstrap_mean(np.repeat(scores, 40))
    assert naive.high - naive.low < 0.3 * (many.high - many.low)


def test_nested_groups_resample_every_level():
    # All the variation is between two subjects: the interval must span them although there are many prompts.
    subjects, prompts = np.repeat(["cat", "pot"], 20), np.tile(np.arange(20), 2)
    values = np.where(subjects == "cat", 0.0, 1.0)
    assert bootstrap_mean(values, [subjects, prompts]).low == 0.0
    assert bootstrap_mean(values, [subjects, prompts]).high == 1.0


def test_rl_seeds_are_crossed_with_the_images():
    # Three seeds with identical scores carry no more information than one.
    scores = np.random.default_rng(0).normal(size=60)
    groups = np.repeat(np.arange(6), 10)
    one = bootstrap_mean(scores, groups)
    three = bootstrap_mean(np.stack([scores] * 3), groups)
    assert three.n == 180 and one.n == 60
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)
    # Seeds that differ among themselves widen it: here they are all the variation there is.
    apart = bootstrap_mean(np.array([[0.0] * 60, [1.0] * 60]), groups)
    assert (apart.low, apart.high) == (0.0, 1.0)


@pytest.mark.parametrize("seeded", [False, True])
def test_coverage_of_the_hierarchical_bootstrap(seeded):
    """Simulated experiments with a known truth: the 95 % interval must hold it about 95 times in 100."""
    rng = np.random.default_rng(0)
    n_experiments, n_prompts, n_images, n_seeds = 200, 20, 6, 8
    groups = np.repeat(np.arange(n_prompts), n_images)
    covered = naive = 0
    for _ in range(n_experiments):
        values = np.repeat(rng.normal(size=n_prompts), n_images) + rng.normal(size=n_prompts * n_images)
        if seeded:
            values = values + 0.3 * rng.normal(size=(n_seeds, 1)) + rng.normal(size=(n_seeds, len(values)))
        interval = bootstrap_mean(values, groups, n_resamples=300)
        covered += interval.low <= 0 <= interval.high
        images_only = bootstrap_mean(values, n_resamples=300)
        naive += images_only.low <= 0 <= images_only.high
    assert 0.88 <= covered / n_experiments <= 0.995
    assert naive < covered - 0.1 * n_experiments


def test_a_ratio_of_differences_moves_with_its_parts():
    rng = np.random.default_rng(0)
    base, groups = np.ones(200), np.repeat(np.arange(20), 10)
    lost = rng.random(200) < 0.5
    columns = {"base": base, "db": 1.0 * lost, "ib": 1.0 * (lost | (rng.random(200) < 0.8))}
    share = bootstrap_statistic(columns, lambda base, db, ib: (ib - db) / (base - db), groups)
    by_hand = (columns["ib"].mean() - columns["db"].mean()) / (1 - columns["db"].mean())
    assert share.value == pytest.approx(by_hand)
    assert 0.6 < share.low < 0.8 < share.high < 0.95


def test_missing_cells_are_left_out_of_the_mean():
    table = np.array([[1.0, 1.0, np.nan], [0.0, 0.0, np.nan], [np.nan, np.nan, 1.0]])
    interval = bootstrap_statistic({"x": table}, lambda x: x)
    assert interval.value == pytest.approx((0.5 + 0.5 + 1) / 3) and interval.n == 5


def test_a_subject_with_fewer_seeds_does_not_make_a_difference():
    # Two subjects, ten units each: both methods are 0 on the first and 1 on the second, which has fewer RL seeds.
    before = np.repeat([[0.0, 1.0]], 10, axis=1)
    after = np.repeat([[0.0, 1.0], [0.0, np.nan], [0.0, np.nan]], 10, axis=1)
    groups = np.repeat(["a", "b"], 10)
    interval = bootstrap_statistic({"a": after, "b": before}, lambda a, b: a - b, groups)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    assert bootstrap_statistic({"x": after}, lambda x: x, groups).value == pytest.approx(0.5)


def test_a_unit_that_one_column_lacks_counts_in_none():
    interval = bootstrap_statistic({"a": np.array([1.0, 5.0]), "b": np.array([0.0, np.nan])}, lambda a, b: a - b)
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)


def test_mean_interval_takes_wilson_where_the_bootstrap_would_claim_certainty():
    assert mean_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    always = mean_interval([1] * 50, ["a"] * 25 + ["b"] * 25)
    assert always == wilson_interval(50, 50) and always.low < 1
    with_seeds = mean_interval(np.ones((3, 50)), ["a"] * 25 + ["b"] * 25)
    assert (with_seeds.low, with_seeds.n) == (always.low, 150)
    # Two prompts under one subject are two groups: the bootstrap over prompts is meant, not Wilson.
    labels = [["cat"] * 20, ["a"] * 10 + ["b"] * 10]
    assert mean_interval([1] * 10 + [0] * 10, labels).low == 0.0
    assert mean_interval([0.2, 0.4]) == bootstrap_mean([0.2, 0.4])


def test_bad_input_is_refused():
    with pytest.raises(ScoreError, match="non-empty"):
        bootstrap_mean([])
    with pytest.raises(ScoreError, match="1 of 2 scores are missing"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(ScoreError, match="2 scores but 3 group labels"):
        bootstrap_mean([1.0, 2.0], ["a", "b", "c"])
    with pytest.raises(ScoreError, match="different lengths"):
        bootstrap_statistic({"a": np.ones(2), "b": np.ones(3)}, lambda a, b: a - b)
    with pytest.raises(ScoreError, match="divides by zero"):
        bootstrap_statistic({"a": np.zeros(2)}, lambda a: 1 / a)
    with pytest.raises(ScoreError, match="level between 0 and 1"):
        bootstrap_mean([1.0], level=95)


# --- the score table -----------------------------------------------------------------------------------------------


def test_difference_is_paired_by_prompt_and_image_seed():
    # Scores differ wildly between images but by exactly 0.25 within each pair: the interval has no width.
    noise = np.random.default_rng(0).normal(size=40)
    prompts = np.repeat(["p1", "p2"], 20)
    a = tidy("b", noise + 0.25, prompts, metric="dino").sample(frac=1, random_state=0)
    b = tidy("a", noise, prompts, metric="dino")
    interval = bootstrap_difference(a, b, "dino")
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))
    assert interval.n == 40
    assert bootstrap_difference(b, a, "dino").value == pytest.approx(-0.25)


def test_difference_uses_only_what_both_have():
    a = tidy("a", [1, 1, 1, 0], ["p1", "p1", "p2", "p3"])
    b = tidy("b", [0, 0, 1], ["p1", "p1", "p2"])
    assert bootstrap_difference(a, b, "judge_activity").value == pytest.approx(2 / 3)
    assert bootstrap_difference(a, b, "judge_activity").n == 3
    with pytest.raises(ScoreError, match="same prompts and seeds"):
        bootstrap_difference(a, tidy("b", [1], ["p9"]), "judge_activity")


def test_difference_of_several_rl_seeds_against_one_set_of_images():
    prompts = np.repeat(["p1", "p2"], 10)
    db = tidy("dreambooth", [0] * 20, prompts)
    ib = pd.concat(tidy("instructbooth", [seed] * 20, prompts, rl_seed=seed) for seed in (0, 1))
    interval = bootstrap_difference(ib, db, "judge_activity")
    assert interval.value == 0.5 and interval.n == 40
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_pairs_that_all_agree_do_not_claim_certainty():
    rows = tidy("a", [1] * 60, np.repeat(["p1", "p2"], 30))
    interval = bootstrap_difference(rows, rows.assign(method="b"), "judge_activity")
    assert interval.value == 0 and interval.low < -0.05 and interval.high > 0.05


def test_unit_matrix_refuses_doubles():
    rows = tidy("a", [1, 1], ["p1", "p1"]).assign(image_seed=0)
    with pytest.raises(ScoreError, match="more than once"):
        unit_matrix(rows, "judge_activity")


def test_compared_rows_are_base_by_class_and_others_by_identifier():
    rows = pd.concat(
        tidy(method, [1], ["p"], identifier=identifier)
        for method in ("base", "dreambooth")
        for identifier in (True, False)
    )
    kept = as_compared(check_scores(rows))
    assert list(zip(kept["method"], kept["identifier"], strict=True)) == [("base", False), ("dreambooth", True)]


def test_summary_has_a_row_per_method_and_metric():
    rows = pd.concat(
        [
            tidy("base", [1] * 8 + [0] * 2, ["p1"] * 5 + ["p2"] * 5, identifier=False),
            tidy("instructbooth", [1] * 10, ["p1"] * 5 + ["p2"] * 5, rl_seed=1),
            tidy("instructbooth", [1] * 10, ["p1"] * 5 + ["p2"] * 5, rl_seed=2),
        ]
    ).assign(clip_t=0.25)
    table = summarise(rows).set_index(["method", "metric"])
    assert len(table) == 4
    assert table.loc[("base", "judge_activity"), "value"] == pytest.approx(0.8)
    assert table.loc[("instructbooth", "judge_activity"), ["n", "seeds"]].tolist() == [20, 2]
    per_prompt = summarise(rows, ("method", "prompt_id"), ["judge_activity"])
    cell = per_prompt.query("method == 'base' and prompt_id == 'p2'").iloc[0]
    assert (cell["low"], cell["high"]) == pytest.approx((wilson_interval(3, 5).low, wilson_interval(3, 5).high))


def test_summary_of_seeds_with_gaps():
    rows = pd.concat([tidy("x", [1, 0], ["p1", "p2"]), tidy("x", [1], ["p1"], rl_seed=1)])
    assert summarise(rows).iloc[0]["n"] == 3


def test_score_table_is_checked():
    good = tidy("base", [1, 0], ["p1", "p2"], identifier="False")
    assert check_scores(good)["identifier"].tolist() == [False, False]
    # The same image listed twice is one image; with two different scores it is a contradiction.
    assert len(check_scores(pd.concat([good, good]))) == 2
    for change, message in [
        (good.drop(columns="image_seed"), "lacks the columns image_seed"),
        (good.iloc[:0], "no rows"),
        (good.assign(judge_activity=0.5), "0, 1 or nothing"),
        (good.assign(clip_t="high"), "not a number"),
        (good.assign(clip_t=np.inf), "infinite"),
        (good.assign(identifier="maybe"), "True or False"),
        (pd.concat([good, good.assign(judge_activity=1)]), "more than once with different scores"),
    ]:
        with pytest.raises(ScoreError, match=message):
            check_scores(change)


def test_values_are_shown_in_their_unit():
    assert METRICS["judge_activity"].show(0.912) == "91.2 %"
    assert METRICS["judge_activity"].show(-0.05, sign=True) == "−5.0"
    assert METRICS["clip_t"].show(0.3101) == "0.310"
    assert in_method_order(["zeta", "instructbooth", "base", "alpha"]) == ["base", "instructbooth", "alpha", "zeta"]
