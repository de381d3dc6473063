"""The score table: what is checked, what is paired with what, and the intervals of its cells."""

import numpy as np
import pandas as pd
import pytest

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import arms_of
from ibkit.evaluate.intervals import wilson_interval
from ibkit.evaluate.metric_agreement import agreement_bars, pairwise_accuracy
from ibkit.evaluate.stats import (
    METRICS,
    as_compared,
    bootstrap_difference,
    check_scores,
    n_trainings,
    pair_up,
    summarise,
    unit_matrix,
)


def tidy(arm, values, prompts, *, seed=0, tune_seed=None, identifier=True, metric="judge_activity", subject="cat"):
    """One row per image; the image seed counts within its prompt."""
    rows = pd.DataFrame({"prompt_id": prompts, metric: values})
    rows["image_seed"] = rows.groupby("prompt_id").cumcount()
    return rows.assign(arm=arm, seed=seed, tune_seed=tune_seed, identifier=identifier, subject=subject)


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
    ib = pd.concat(tidy("dreambooth+ddpo", [seed] * 20, prompts, tune_seed=seed) for seed in (0, 1))
    interval = bootstrap_difference(ib, db, "judge_activity")
    assert interval.value == 0.5 and interval.n == 40
    assert (interval.low, interval.high) == (-1.0, 1.0)  # two prompts, two seeds: the seeds alone leave all open


def test_pairs_that_all_agree_do_not_claim_certainty():
    rows = tidy("a", [1] * 60, np.repeat(["p1", "p2"], 30))
    interval = bootstrap_difference(rows, rows.assign(arm="b"), "judge_activity")
    assert interval.value == 0 and interval.low < -0.05 and interval.high > 0.05


def test_unit_matrix_refuses_doubles():
    rows = tidy("a", [1, 1], ["p1", "p1"]).assign(image_seed=0)
    with pytest.raises(ScoreError, match="more than once"):
        unit_matrix(rows, "judge_activity")


def test_compared_rows_are_base_by_class_and_others_by_identifier():
    rows = pd.concat(
        tidy(arm, [1], ["p"], identifier=identifier) for arm in ("base", "dreambooth") for identifier in (True, False)
    )
    kept = as_compared(check_scores(rows))
    assert list(zip(kept["arm"], kept["identifier"], strict=True)) == [("base", False), ("dreambooth", True)]


def test_summary_has_a_row_per_method_and_metric():
    rows = pd.concat(
        [
            tidy("base", [1] * 8 + [0] * 2, ["p1"] * 5 + ["p2"] * 5, identifier=False),
            tidy("dreambooth+ddpo", [1] * 10, ["p1"] * 5 + ["p2"] * 5, tune_seed=1),
            tidy("dreambooth+ddpo", [1] * 10, ["p1"] * 5 + ["p2"] * 5, tune_seed=2),
        ]
    ).assign(clip_t=0.25)
    table = summarise(rows).set_index(["arm", "metric"])
    assert len(table) == 4
    assert table.loc[("base", "judge_activity"), "value"] == pytest.approx(0.8)
    assert table.loc[("dreambooth+ddpo", "judge_activity"), ["n", "seeds"]].tolist() == [20, 2]
    per_prompt = summarise(rows, ("arm", "prompt_id"), ["judge_activity"])
    cell = per_prompt.query("arm == 'base' and prompt_id == 'p2'").iloc[0]
    assert (cell["low"], cell["high"]) == pytest.approx((wilson_interval(3, 5).low, wilson_interval(3, 5).high))


def test_summary_of_seeds_with_gaps():
    rows = pd.concat([tidy("x", [1, 0], ["p1", "p2"]), tidy("x", [1], ["p1"], tune_seed=1)])
    assert summarise(rows).iloc[0]["n"] == 3


def test_score_table_is_checked():
    good = tidy("base", [1, 0], ["p1", "p2"], identifier="False")
    assert check_scores(good)["identifier"].tolist() == [False, False]
    # The same image listed twice is one image; with two different scores it is a contradiction.
    assert len(check_scores(pd.concat([good, good]))) == 2
    for change, message in [
        (good.drop(columns="image_seed"), "lacks the columns image_seed"),
        (good.iloc[:0], "no rows"),
        (good.assign(judge_activity=0.5), "must be 0 or 1 or nothing, and is 0.5"),
        (good.assign(clip_t="high"), "clip_t must be a number or nothing, and is .high."),
        (good.assign(clip_t=np.inf), "clip_t must be a number or nothing, and is inf"),
        (good.assign(identifier="maybe"), "True or False"),
        (pd.concat([good, good.assign(judge_activity=1)]), "more than once with different scores"),
    ]:
        with pytest.raises(ScoreError, match=message):
            check_scores(change)


def test_values_are_shown_in_their_unit():
    assert METRICS["judge_activity"].show(0.912) == "91.2 %"
    assert METRICS["judge_activity"].show(-0.05, sign=True) == "−5.0"
    assert METRICS["clip_t"].show(0.3101) == "0.310"
    assert list(arms_of(["zeta", "dreambooth+ddpo", "base", "alpha"])) == ["base", "dreambooth+ddpo", "alpha", "zeta"]


def trainings(arm, *keys, n=2):
    """One score each for two units, the same for both, of trainings by (seed, tune_seed, score)."""
    return pd.concat(
        tidy(arm, [score] * n, [f"p{i}" for i in range(n)], seed=seed, tune_seed=tuning) for seed, tuning, score in keys
    )


def test_tunings_meet_their_own_personalization_and_the_base_model_all():
    tables = {
        "base": trainings("base", (None, None, 9)),
        "dreambooth": trainings("dreambooth", (0, None, 1), (1, None, 2), (2, None, 3)),
        "ddpo": trainings("dreambooth+ddpo", (0, 5, 10), (0, 6, 11), (1, 5, 20)),
        "dpok": trainings("dreambooth+dpok", (0, 7, 100), (1, 5, 200)),
    }
    pairs = pair_up(tables, "judge_activity")
    assert {name: pair.iloc[:, 0].tolist() for name, pair in pairs.items()} == {
        "base": [9], "dreambooth": [1, 1, 2], "ddpo": [10, 11, 20], "dpok": [100, 100, 200]
    }  # fmt: skip
    assert pairs["ddpo"].index.tolist() == [(0, 5), (0, 6), (1, 5)] and n_trainings(pairs) == 3
    apart = {"a": tables["dreambooth"], "b": trainings("dreambooth+ddpo", (9, 9, 1))}
    assert pair_up(apart, "judge_activity")["b"].empty
    with pytest.raises(ScoreError, match="No image of the two arms"):
        bootstrap_difference(apart["a"], apart["b"], "judge_activity")


def test_tunings_are_resampled_within_their_personalization():
    """Personalizations differ, tunings of one do not: the interval is that of the personalizations' means."""
    nested = [(seed, tuning, value) for seed, value in enumerate((1.2, 2.7, 6.1)) for tuning in range(4)]
    rows = trainings("dreambooth+ddpo", *nested).rename(columns={"judge_activity": "dino"})
    alone = trainings("dreambooth+ddpo", *nested[::4]).rename(columns={"judge_activity": "dino"})
    many, few = (summarise(table, metrics=["dino"]).iloc[0] for table in (rows, alone))
    assert (many["seeds"], few["seeds"]) == (12, 3) and many["value"] == pytest.approx(few["value"])
    assert many["high"] - many["low"] == pytest.approx(few["high"] - few["low"], rel=1e-6)


def test_one_picture_scored_twice_counts_once():
    """The last bits of a score may depend on its batch; an answer of the judge may not differ."""
    good = tidy("dreambooth", [0.5, 0.25], ["p", "q"], metric="dino").assign(judge_activity=[1, 0])
    again = good.assign(dino=good["dino"] + 1e-6)
    pd.testing.assert_frame_equal(check_scores(pd.concat([good, again])), check_scores(good))
    for other in (good.assign(dino=good["dino"] + 1e-3), good.assign(judge_activity=[1, 1])):
        with pytest.raises(ScoreError, match="more than once with different scores"):
            check_scores(pd.concat([good, other]))


# --- which metric agrees with the judge ------------------------------------------------------------------------------


def judged(prompt, answers, **metrics):
    rows = tidy("a", answers, [prompt] * len(answers), metric="judge_text")
    return rows.assign(judge_identity=rows["judge_text"], **metrics)


def test_a_metric_agrees_where_it_prefers_what_the_judge_accepts():
    one = judged("p1", [1, 1, 0, 0], clip_t=[3.0, 1.0, 2.0, 0.0], dino=[1.0, 1.0, 1.0, 1.0])  # 3 of 4 pairs; ties
    other = judged("p2", [1, 0, 0, 0], clip_t=[9.0, 8.0, 7.0, 10.0], dino=[0.0, 1.0, 2.0, np.nan])  # 2 of 3; none of 2
    alike = judged("p3", [1, 1], clip_t=[0.0, 1.0], dino=[0.0, 1.0])  # no pair
    table = pairwise_accuracy(pd.concat([one, other, alike])).set_index("metric")
    assert table.loc["clip_t", ["value", "n", "prompts"]].tolist() == pytest.approx([(3 / 4 + 2 / 3) / 2, 7, 2])
    assert table.loc["dino", ["value", "n", "prompts"]].tolist() == pytest.approx([(1 / 2 + 0) / 2, 6, 2])
    assert table["judged"].to_dict() == {"clip_t": "judge_text", "dino": "judge_identity"}
    figure, data = agreement_bars(table.reset_index(), {"clip_t"})
    assert data.set_index("metric")["reward"].to_dict() == {"clip_t": True, "dino": False}
    assert any("was the reward" in label.get_text() for label in figure.axes[0].get_yticklabels())


def test_without_a_judge_no_metric_agrees():
    assert pairwise_accuracy(tidy("a", [0.1, 0.2], ["p", "p"], metric="clip_t")).empty
