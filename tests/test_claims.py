"""Claims: every verdict from hand-made scores, the stand-ins where there is no judge, and the command."""

import json
import re
from argparse import ArgumentParser

import numpy as np
import pandas as pd
import pytest

from ibkit.errors import ArtifactError, ParameterError, ScoreError
from ibkit.evaluate.claims import (
    all_claims,
    claims_from,
    claims_from_scores,
    command,
    evaluate_claims,
    instructbooth,
    stand_ins,
)
from ibkit.evaluate.claims.command import claims_as_text, claims_command, main, summary
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.published import PUBLISHED, published
from ibkit.evaluate.stats import check_scores
from ibkit.runs import Run

PROMPTS = ("soccer", "bike", "tennis", "guitar", "cooking", "dancing", "surfing", "reading")
UNSEEN = PROMPTS[4:]
N_IMAGES = 20


def images(arm, identifier, activity, identity, seed=0, tune_seed=None):
    """20 images for each of eight prompts, of which a given share is right: the first ones."""
    rows = []
    for prompt in PROMPTS:
        for image_seed in range(N_IMAGES):
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "tune_seed": tune_seed,
                    "subject": "cat",
                    "class_noun": "cat",
                    "prompt_id": prompt,
                    "prompt": f"a {'[v] ' if identifier else ''}cat {prompt}",
                    "text": f"a cat {prompt}",
                    "activity": prompt,
                    "seen": prompt not in UNSEEN,
                    "identifier": identifier,
                    "image": f"{arm}/{prompt}-{image_seed}.png",
                    "image_seed": image_seed,
                    "judge_text": int(image_seed < activity * N_IMAGES),
                    "judge_identity": int(image_seed < identity * N_IMAGES),
                }  # fmt: skip
            )
    return pd.DataFrame(rows)


def story(ib_activity=0.95, ib_identity=1.0, db_activity=0.3, base_activity=1.0, db_class_identity=0.4, n_seeds=1):
    """Scores of a whole experiment, by default one in which the paper is right."""
    return pd.concat(
        [
            images("base", False, base_activity, 0.05, seed=None),
            images("dreambooth", True, db_activity, 1.0),
            images("dreambooth", False, 0.85, db_class_identity),
            *(images("dreambooth+ddpo", True, ib_activity, ib_identity, tune_seed=seed) for seed in range(n_seeds)),
        ],
        ignore_index=True,
    )


def verdicts(scores):
    return {claim.id: claim.verdict for claim in claims_from_scores(check_scores(scores))}


def by_id(scores):
    return {claim.id: claim for claim in claims_from_scores(check_scores(scores))}


def test_all_are_supported_when_the_paper_is_right():
    claims = by_id(story(n_seeds=3))
    assert {claim.verdict for claim in claims.values()} == {"supported"}
    assert claims["C1"].reason == "The whole interval lies below zero. Of one training: it speaks of that one alone."
    assert claims["C2"].reason == "The whole interval of InstructBooth − DreamBooth lies above zero."
    assert claims["C1"].value == pytest.approx(-0.70) and claims["C1"].high < 0
    assert (claims["C1"].n, claims["C1"].seeds) == (160, 1)
    assert claims["C2"].value == pytest.approx(0.65 / 0.70)
    assert (claims["C2"].n, claims["C2"].seeds) == (480, 3)
    assert "two thirds won back: yes" in claims["C2"].detail
    assert claims["C3"].value == 0 and -0.05 < claims["C3"].low < 0 < claims["C3"].high
    assert claims["C4"].value == pytest.approx(0.35) and claims["C4"].low > 0
    assert "text fidelity of the class prompt changed by −15.0" in claims["C4"].detail
    assert claims["C8"].value == pytest.approx(0.65) and (claims["C8"].n, claims["C8"].seeds) == (240, 3)
    assert "on seen prompts the gain is +65.0" in claims["C8"].detail


def test_c1_needs_a_loss_and_a_gain_contradicts_it():
    assert verdicts(story(db_activity=1.0))["C1"] == "undecided"
    assert verdicts(story(db_activity=0.9, base_activity=0.4))["C1"] == "contradicted"


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_one_picture_of_each_prompt_decides_nothing(n_prompts):
    scores = story(n_seeds=1)
    few = scores[(scores["image_seed"] == 0) & scores["prompt_id"].isin(PROMPTS[:n_prompts])]
    noise = np.random.default_rng(0).normal(size=len(few))
    for change in (few, few.assign(judge_identity=np.nan, dino=0.6), few.assign(judge_text=np.nan, clip_t=noise)):
        assert not {"supported", "contradicted"} & set(verdicts(change).values())
    claims = by_id(few.assign(judge_identity=np.nan, dino=0.6))
    assert claims["C3"].reason == "One picture of each prompt decides nothing: draw more."
    if n_prompts == 1:
        assert claims["C3"].low is None and claims["C3"].figure() == "+0.000, interval unknown"


def test_pictures_of_one_prompt_say_nothing_about_others():
    scores = story()
    claim = by_id(scores[scores["prompt_id"] == "soccer"])["C1"]
    assert claim.verdict == "undecided" and claim.high < 0 and "say nothing about others" in claim.reason


def test_few_prompts_are_named_and_decide_only_by_their_interval():
    scores = story()
    two, three = (by_id(scores[scores["prompt_id"].isin(PROMPTS[:n])])["C1"] for n in (2, 3))
    assert two.verdict == "undecided" and "holds zero. Only 2 prompts × subjects; draw more." in two.reason
    assert three.verdict == "supported" and "Only 3 prompts × subjects, but they decide." in three.reason
    same = scores.assign(judge_identity=np.nan, dino=0.6)
    few = by_id(same[same["prompt_id"].isin(PROMPTS[:4])])["C3"]
    assert few.verdict == "undecided" and "all pairs differ by the same" in few.reason
    assert by_id(same)["C3"].verdict == "supported"


def test_c2_needs_a_gain_and_says_whether_two_thirds_are_reached():
    assert verdicts(story(ib_activity=0.3))["C2"] == "undecided"
    assert verdicts(story(ib_activity=0.1))["C2"] == "contradicted"
    some = by_id(story(ib_activity=0.6))["C2"]
    assert some.verdict == "supported" and some.value == pytest.approx(3 / 7)
    assert "two thirds won back: no" in some.detail and "Of one training" in some.reason


def test_c2_is_not_tested_when_nothing_was_lost():
    claim = by_id(story(db_activity=1.0, ib_activity=1.0))["C2"]
    assert claim.verdict == "not tested" and "nothing to win back" in claim.reason
    assert claim.value is None and claim.low is None and claim.n == 0


def test_c2_without_a_loss_in_some_resamples_has_no_share(monkeypatch):
    """The loss is certain, but by prompts that are drawn without it too often for a ratio: a sentence, no crash."""
    scores = story(n_seeds=3)
    lossless = (scores["arm"] == "dreambooth") & ~scores["prompt_id"].isin(PROMPTS[:2])
    scores = scores.assign(judge_text=scores["judge_text"].where(~lossless, 1))
    monkeypatch.setattr(instructbooth, "difference_interval", lambda *_, **__: Interval(0.2, 0.1, 0.3, 160))
    claim = by_id(scores)["C2"]
    assert claim.verdict == "not tested" and claim.value is None
    assert re.search(r"not finite in \d+ of 10000 resamples.* InstructBooth − DreamBooth is \+20.0 \[", claim.reason)


def test_c3_allows_a_loss_of_five_points_by_the_bound():
    lost = by_id(story(ib_identity=0.7))["C3"]
    assert lost.verdict == "contradicted" and lost.reason.startswith("The whole interval lies below −0.05, the loss")
    # Within the margin by the estimate, not by the bound.
    at_the_margin = by_id(story(ib_identity=0.95))["C3"]
    assert at_the_margin.value == pytest.approx(-0.05) and at_the_margin.low < -0.05 < at_the_margin.high
    assert at_the_margin.verdict == "undecided" and "holds −0.05" in at_the_margin.reason
    assert by_id(story())["C3"].verdict == "supported"


def test_c4_needs_drift():
    assert verdicts(story(db_class_identity=0.05))["C4"] == "undecided"


def test_c8_asks_for_a_gain_where_rl_was_not_trained():
    scores = story(ib_activity=0.3)
    won = scores["arm"] == "dreambooth+ddpo"
    only_seen = scores.assign(judge_text=scores["judge_text"].where(~(won & scores["seen"]), 1))
    claim = by_id(only_seen)["C8"]
    assert claim.verdict == "undecided" and "on seen prompts the gain is +70.0" in claim.detail
    all_seen = by_id(scores.assign(seen=True))["C8"]
    assert all_seen.verdict == "not tested" and "evaluate on others" in all_seen.reason
    assert "do not say which prompts" in by_id(scores.drop(columns="seen"))["C8"].reason


def test_what_is_missing_is_not_tested_and_says_why():
    scores = story()
    without_rl = by_id(scores[scores["arm"] != "dreambooth+ddpo"])
    assert [without_rl[name].verdict for name in ("C2", "C3")] == ["not tested", "not tested"]
    assert "no images of dreambooth+ddpo" in without_rl["C3"].reason
    no_class_prompt = by_id(scores[(scores["arm"] != "dreambooth") | scores["identifier"]])
    assert "class prompt (no identifier)" in no_class_prompt["C4"].reason
    no_scores = by_id(scores.drop(columns=["judge_text", "judge_identity"]))
    assert "None of judge_text, pick_score, clip_t, image_reward was scored" in no_scores["C1"].reason
    other_seeds = scores.assign(image_seed=scores["image_seed"] + 100 * (scores["arm"] == "base"))
    assert by_id(other_seeds)["C1"].verdict == "not tested"


def test_without_a_judge_the_scorers_stand_in():
    noise = np.random.default_rng(0).normal(0, 0.02, 640)
    scores = story().assign(
        image_reward=lambda t: t["judge_text"] + noise[: len(t)],
        dino=lambda t: 0.3 + 0.4 * t["judge_identity"] + noise[: len(t)],
        judge_text=np.nan,
        judge_identity=np.nan,
    )
    claims = by_id(scores)
    assert [claims[name].metric for name in ("C1", "C2", "C3", "C4")] == [
        "image_reward",
        "image_reward",
        "dino",
        "dino",
    ]
    assert {claim.verdict for claim in claims.values()} == {"supported"}
    assert claims["C1"].unit == "score" and "points" not in claims["C1"].figure()
    # ImageReward is what RL raised, so any other text scorer speaks before it
    assert by_id(scores.assign(clip_t=scores["image_reward"]))["C2"].metric == "clip_t"


def test_prompts_without_an_activity_do_not_enter_text_fidelity():
    plain = images("base", False, 0, 0, seed=None).assign(judge_text=np.nan, prompt_id="plain", text="a cat")
    plain["image_seed"] = range(len(plain))
    drifted = plain.assign(arm="dreambooth", seed=0, judge_identity=1)
    claims = by_id(pd.concat([story(), plain, drifted]))
    assert claims["C1"].n == 160
    assert claims["C4"].n == 320 and claims["C4"].value == pytest.approx((0.35 + 1) / 2)


def test_figures_are_written_in_their_units():
    claims = by_id(story(n_seeds=2))
    assert claims["C1"].figure().startswith("−70.0 [") and claims["C1"].figure().endswith("points")
    assert claims["C2"].figure().startswith("93 % [")
    assert by_id(story(db_activity=1.0))["C2"].figure() == "–"


def test_summary_counts_verdicts():
    text = summary(list(by_id(story(db_activity=1.0)).values()))
    assert "Supported, 2 of 5: C3" in text and "Undecided, 2 of 5: C1" in text and "Not tested, 1 of 5: C2" in text


# --- other arms in the roles, several personalizations --------------------------------------------------------------


def test_other_arms_can_play_the_roles_and_give_the_sentences_their_names():
    names = {"dreambooth": "lora_dreambooth", "dreambooth+ddpo": "lora_dreambooth+ddpo"}
    other = check_scores(story().replace({"arm": names}))
    claims = {claim.id: claim for claim in claims_from_scores(other)}  # the only ones that can
    arms = {"personalized": "lora_dreambooth", "tuned": "lora_dreambooth+ddpo"}
    assert claims_from_scores(other, arms) == list(claims.values())
    both = check_scores(pd.concat([story(), story().replace({"arm": names})]))
    assert claims_from_scores(both)[0].claim.startswith("DreamBooth loses")  # the paper's own, where they are there
    assert claims_from_scores(both, arms)[0].claim.startswith("DreamBooth (LoRA) loses")
    assert {claim.verdict for claim in claims.values()} == {"supported"}
    assert claims["C1"].claim == "DreamBooth (LoRA) loses text fidelity against the base model."
    assert claims["C3"].quantity == "InstructBooth (LoRA) minus DreamBooth (LoRA), subject fidelity"
    assert [(c.value, c.low, c.high) for c in claims.values()] == [
        (c.value, c.low, c.high) for c in by_id(story()).values()
    ]
    with pytest.raises(ParameterError, match="No claim has the role 'tuner'; did you mean 'tuned'"):
        claims_from_scores(other, {"tuner": "dreambooth"})


@pytest.mark.parametrize(
    ("there", "cast"),
    [
        ({"base", "dreambooth", "dreambooth+ddpo", "real"}, {}),
        ({"base", "neti"}, {"personalized": "neti"}),
        ({"base", "neti", "neti+ddpo"}, {"personalized": "neti", "tuned": "neti+ddpo"}),
        ({"base", "dreambooth", "neti+ddpo"}, {}),  # a tuning of a system that the paper compares with
        (
            {"base", "lora_dreambooth", "neti", "neti+ddpo", "lora_dreambooth+ddpo"},
            {"personalized": "lora_dreambooth", "tuned": "lora_dreambooth+ddpo"},
        ),
        ({"base", "neti", "custom_diffusion"}, {}),  # nobody can say which
        ({"base", "neti+ddpo", "neti+dpok"}, {"tuned": "neti+ddpo"}),  # by the paper's method
        ({"base", "neti+draft", "neti+dpok"}, {}),
    ],
)
def test_who_stands_in_where_the_papers_arms_are_missing(there, cast):
    assert stand_ins(there) == cast


def test_a_tuning_is_compared_with_the_personalization_it_started_from():
    """Of two personalizations one shows all, one nothing; each tuning adds a fifth to its own."""
    parts = [images("base", False, 1.0, 0.05, seed=None)]
    for seed, level in ((0, 0.8), (1, 0.0)):
        parts.append(images("dreambooth", True, level, 1.0, seed=seed))
        parts += [images("dreambooth+ddpo", True, level + 0.2, 1.0, seed=seed, tune_seed=7 + k) for k in range(2)]
    claims = by_id(pd.concat(parts, ignore_index=True))
    assert claims["C8"].value == pytest.approx(0.2) and claims["C8"].verdict == "supported"
    assert (claims["C8"].seeds, claims["C8"].n) == (4, 4 * 80) and (claims["C1"].seeds, claims["C1"].n) == (2, 320)
    only_first = by_id(pd.concat([parts[0], parts[1], *parts[5:]], ignore_index=True))
    assert only_first["C8"].verdict == "not tested"  # the tunings are of the other personalization


def line_up(**changes):
    """The arms of the paper's table 2: text and subject, in its order unless changed."""
    arms = {
        "dreambooth": (0.4, 1.0), "textual_inversion": (0.1, 0.5), "custom_diffusion": (0.8, 0.2), "neti": (0.5, 0.7),
        "dreambooth+ddpo": (0.95, 0.9),
    } | changes  # fmt: skip
    rows = [images("base", False, 1.0, 0.0)]
    rows += [images(arm, True, *shares, tune_seed=0 if "+" in arm else None) for arm, shares in arms.items() if shares]
    return pd.concat(rows)


def test_the_order_of_table_2_is_supported_where_it_holds():
    found = by_id(line_up())
    assert {name: found[name].verdict for name in ("B1", "B2", "B3", "B4", "B5")} == dict.fromkeys(
        ("B1", "B2", "B3", "B4", "B5"), "supported"
    )
    assert (
        found["B1"].value == pytest.approx(0.3) and "of the difference from NeTI" in found["B1"].reason
    )  # the nearest
    assert found["B4"].value == pytest.approx(-0.3) and "− DreamBooth −30.0 [" in found["B4"].detail
    assert found["B5"].value == pytest.approx(0.15) and found["B5"].claim.startswith("InstructBooth follows the text")


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"neti": (1.0, 0.7)}, "B1", "contradicted"),  # one that is better is enough, however far the others are
        ({"neti": (0.8, 0.7)}, "B1", "undecided"),
        ({"textual_inversion": (0.1, 0.0)}, "B2", "contradicted"),
        ({"neti": (0.5, 1.0)}, "B3", "undecided"),
        ({"dreambooth": (0.0, 1.0)}, "B4", "contradicted"),
        ({"dreambooth+ddpo": (0.5, 0.9)}, "B5", "contradicted"),
        ({"dreambooth+ddpo": None}, "B5", "not tested"),
        ({"custom_diffusion": None}, "B1", "not tested"),
        ({"custom_diffusion": None}, "B3", "supported"),
    ],
)
def test_each_order_of_table_2_can_fail(changes, claim, verdict):
    assert by_id(line_up(**changes))[claim].verdict == verdict


def test_runs_without_a_baseline_do_not_list_their_claims():
    assert not {"B1", "B2", "B3", "B4", "B5"} & by_id(story()).keys()
    lora = {"dreambooth": "lora_dreambooth", "dreambooth+ddpo": "lora_dreambooth+ddpo"}
    found = by_id(line_up().replace({"arm": lora}))  # the only ones that are no baseline of the paper's
    assert found["B3"].verdict == "supported" and found["B3"].claim.startswith("DreamBooth (LoRA) keeps most")


def test_every_claim_has_a_place_of_its_own():
    ids = [(claim.paper, claim.id) for claim in all_claims()]
    expected = [f"C{i}" for i in range(1, 10)] + [f"B{i}" for i in range(1, 6)]
    papers = {"InstructBooth": expected, "DPG": ["D1", "D2", "D3"], "RPO": [f"R{i}" for i in range(1, 8)]}
    assert len(set(ids)) == len(ids)
    for paper, names in papers.items():
        assert [name for of, name in ids if of == paper] == names


# --- claims that other notebooks test ------------------------------------------------------------------------------


def claim_of(name, table):
    """The one claim that reads this table."""
    return {claim.id: claim for claim in claims_from({f"{name}.csv": table})}[
        {"description": "C5", "changes": "C6", "prompt_kinds": "C7", "votes": "C9"}[name]
    ]


def described(with_, without):
    return pd.DataFrame(
        {
            "description": described,
            "train_seed": seed,
            "subject": "monster",
            "prompt_id": prompt,
            "image_seed": i,
            "judge_shape": 1,
            "judge_identity": int(i < 10 * (with_ if described else without)),
            "dino": 0.5 + 0.01 * i,
        }
        for described in (True, False)
        for seed in range(3)
        for prompt in PROMPTS
        for i in range(10)
    )


def test_c5_asks_whether_the_subject_is_drawn_more_often():
    claim = claim_of("description", described(0.9, 0.2))
    assert claim.verdict == "supported" and claim.value == pytest.approx(0.7) and (claim.n, claim.seeds) == (240, 3)
    assert "with 90.0 %, without 20.0 %" in claim.detail and "Right shape (simulated judge) +0.0" in claim.detail
    assert claim_of("description", described(0.2, 0.2)).verdict == "undecided"
    photos = claim_of("description", described(0.9, 0.2).drop(columns=["judge_shape", "judge_identity"]))
    assert photos.metric == "dino" and photos.verdict == "undecided"


def changed(pose):
    scores = {"view": 0.9, "place": 0.85, "pose": pose, "identity": 0.6}
    return pd.DataFrame(
        {
            "class_noun": "cat",
            "subject": f"cat {s}",
            "change": change,
            "pair": pair,
            "same_identity": change != "identity",
            "dino": score + 0.01 * pair + 0.005 * s,
            "judge_identity": int(change != "identity"),
        }
        for change, score in scores.items()
        for s in range(4)
        for pair in range(4)
    )


def test_c6_asks_whether_another_pose_costs_more_than_another_view():
    claim = claim_of("changes", changed(pose=0.5))
    assert claim.verdict == "supported" and claim.value == pytest.approx(-0.4) and claim.n == 16
    assert "in 100 % [" in claim.detail and "place alone costs 0.050" in claim.detail
    assert claim_of("changes", changed(pose=0.9)).verdict == "undecided"
    assert claim_of("changes", changed(pose=0.95)).verdict == "contradicted"
    only_views = changed(0.5)[lambda t: t["change"] == "view"]
    assert "no change of view, pose and identity" in claim_of("changes", only_views).reason


def curves(slope_identifier, n_seeds=6):
    return pd.DataFrame(
        {
            "arm": arm,
            "class_noun": "cat",
            "subject": "orange cat",
            "dreambooth_steps": 950,
            "rl_seed": seed,
            "epoch": epoch,
            "n_images": 48 * epoch,
            "n_identifier_images": (24 if arm == "both" else 48) * epoch,
            "reward_identifier": -4 + slope * (1 + 0.02 * seed) * epoch,
            "judge_activity": epoch / (24 if arm == "both" else 48),
            "reward_base": 0.0,
            "training_reward_identifier": -4.0,
            "training_reward_class": -3.0 if arm == "both" else None,
        }
        for arm, slope in (("both", 0.4), ("identifier_equal_totals", slope_identifier))
        for seed in range(n_seeds)
        for epoch in range(13)
    )


def test_c7_compares_the_images_that_both_arms_need():
    claim = claim_of("prompt_kinds", curves(0.2))
    assert claim.verdict == "supported" and claim.low > 1 and claim.figure().endswith(" times")
    assert "the activity (simulated judge) +12 points [+12, +12] more often with both kinds" in claim.detail
    assert claim.detail.endswith("the class prompts still had before RL: cat 25 % (950 steps)")
    assert claim_of("prompt_kinds", curves(0.8)).verdict == "contradicted"
    few = claim_of("prompt_kinds", curves(0.2, n_seeds=5))
    assert few.verdict == "not tested" and "Too few runs" in few.reason


def votes(n_for_instructbooth):
    return pd.DataFrame(
        {
            "rater": f"judge {rater}",
            "simulated": True,
            "question": "preference",
            "subject": "cat",
            "prompt_id": prompt,
            "image_seed": i,
            "seed": 0,
            "tune_seed": 0,
            "arm": "",
            "arm_a": "dreambooth",
            "arm_b": "dreambooth+ddpo",
            "answer": "b" if i < n_for_instructbooth else "a",
            "item": f"{prompt}-{i}",
        }
        for rater in range(3)
        for prompt in PROMPTS
        for i in range(10)
    )


def test_c9_asks_what_most_raters_prefer():
    claim = claim_of("votes", votes(9))
    assert claim.verdict == "supported" and claim.value == pytest.approx(0.9) and claim.n == 80
    assert "3 raters, all simulated" in claim.detail and "preference 1.00" in claim.detail
    assert claim.figure().startswith("90 % [")
    assert claim_of("votes", votes(5)).verdict == "undecided"
    assert claim_of("votes", votes(1)).verdict == "contradicted"
    others = votes(9).assign(arm_a="base")
    assert claim_of("votes", others).verdict == "not tested"


def test_a_claim_without_its_table_says_which_notebook_makes_it(tmp_path):
    story().to_csv(tmp_path / "scores.csv", index=False)
    votes(9).to_csv(tmp_path / "votes.csv", index=False)
    claims = {claim.id: claim for claim in evaluate_claims(tmp_path)}
    assert list(claims) == [f"C{i}" for i in range(1, 10)]
    assert claims["C9"].verdict == "supported"
    assert claims["C6"].reason == "Needs changes.csv of notebook 05_dino_metric."


# --- where scores are read from ------------------------------------------------------------------------------------


def evaluated(folder, scores):
    run = Run.open(folder, kind="03_evaluate", parameters={"n_images": N_IMAGES})
    run.write_table("scores.csv", scores)
    run.finish()


def test_a_main_run_its_stage_and_a_bare_folder_say_the_same(tmp_path):
    evaluated(tmp_path / "main" / "03_evaluate", story())
    (tmp_path / "reference").mkdir()
    story().to_csv(tmp_path / "reference" / "scores.csv", index=False)
    in_memory = claims_from_scores(check_scores(story()))
    for folder in ("main", "main/03_evaluate", "reference"):
        assert [c for c in evaluate_claims(tmp_path / folder) if c.verdict != "not tested"] == in_memory


def test_folders_without_scores_are_refused(tmp_path):
    with pytest.raises(ScoreError, match="There is no run folder"):
        evaluate_claims(tmp_path / "nowhere")
    with pytest.raises(ScoreError, match="holds no table that a claim reads: .* or one of changes.csv, description"):
        evaluate_claims(tmp_path)
    (tmp_path / "scores.csv").write_text("")
    with pytest.raises(ScoreError, match="not a readable CSV"):
        evaluate_claims(tmp_path)
    (tmp_path / "scores.csv").write_text("arm,score\nbase,1\n")
    with pytest.raises(ScoreError, match="lacks the columns"):
        evaluate_claims(tmp_path)


def test_an_altered_or_unfinished_run_is_refused(tmp_path):
    evaluated(tmp_path / "03_evaluate", story())
    table = tmp_path / "03_evaluate" / "scores.csv"
    table.write_text(table.read_text().replace("soccer", "tennis"))
    with pytest.raises(ArtifactError, match="altered"):
        evaluate_claims(tmp_path)
    run = Run.open(tmp_path / "half" / "03_evaluate", kind="03_evaluate", parameters={})
    run.write_table("scores.csv", story())
    run.fail("stopped for the test")
    with pytest.raises(ArtifactError, match="failed"):
        evaluate_claims(tmp_path / "half")


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_prints_json_with_the_agreed_keys(tmp_path, capsys):
    story(db_activity=1.0).to_csv(tmp_path / "scores.csv", index=False)
    assert claims_command(tmp_path, json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [claim["id"] for claim in printed] == [f"C{i}" for i in range(1, 10)]
    agreed = {"id", "claim", "source", "value", "low", "high", "n", "seeds", "verdict", "reason"}
    assert all(agreed <= set(claim) for claim in printed)
    assert printed[1]["value"] is None and printed[1]["verdict"] == "not tested"
    assert all(claim["low"] <= claim["value"] <= claim["high"] for claim in printed if claim["value"] is not None)


def test_command_prints_a_plain_table(tmp_path, capsys):
    story().to_csv(tmp_path / "scores.csv", index=False)
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert main(parser.parse_args([str(tmp_path)])) == 0
    printed = capsys.readouterr().out
    assert printed.count("supported  ") == 5 and "−70.0 [" in printed and "Table 1 (people" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100


def test_command_without_a_run_takes_the_newest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "resolve", lambda path: tmp_path / path)
    with pytest.raises(ScoreError, match="reference"):
        claims_command()
    evaluated(tmp_path / "outputs" / "mine" / "03_evaluate", story())
    claims_command()
    assert str(tmp_path / "outputs" / "mine") in capsys.readouterr().out


def test_text_table_shows_claims_that_were_not_tested():
    assert "not tested" in claims_as_text(claims_from_scores(check_scores(story(db_activity=1.0))))


# --- the paper's numbers -------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_ours():
    assert [number.value for number in published("dreambooth+ddpo", "image_reward")] == [1.196, 0.651]
    assert [number.value for number in published("dreambooth", "judge_text")] == [0.813]
    assert published("base", "clip_t") == []
    # 5 methods × (2 + 4) numbers in tables 1 and 2, and 3 methods × 4 in table 3.
    assert len(PUBLISHED) == 42 and len({(n.arm, n.metric, n.table) for n in PUBLISHED}) == 42
