"""Tables: what stands in them, when a difference is one, three formats, and several runs together."""

import re
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from ibkit.cli import main
from ibkit.errors import ScoreError
from ibkit.evaluate.claims import evaluate_claims
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.stats import check_scores, primary_metrics
from ibkit.evaluate.tables import (
    NAMES,
    all_tables,
    as_latex,
    as_markdown,
    by_prompts,
    combine,
    confirmed,
    differences,
    differences_in_words,
    fidelity,
    holm_sides,
)
from tests.test_claims import images, story


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    rows = story()
    real = images("real", True, 1, 1, seed=None).assign(prompt_id="photo", judge_text=np.nan, seen=np.nan).iloc[:3]
    rows = pd.concat([rows, real.assign(image_seed=range(3))], ignore_index=True)
    return check_scores(rows.assign(dino=0.4 + rng.normal(0, 0.05, len(rows))))


def test_fidelity_has_a_row_a_method_and_the_real_photos_last(scores):
    table = fidelity(scores)
    assert table["Method"].tolist() == ["Base model", "DreamBooth", "InstructBooth", "Real photos"]
    assert list(table.columns) == [
        "Method",
        "Prompt shown (simulated judge)",
        "Same subject (simulated judge)",
        "DINO",
        "n",
    ]
    shown = table["Prompt shown (simulated judge)"]
    assert shown[0].startswith("100.0 % [") and shown[1].startswith("30.0 % [") and shown[3] == "–"
    assert shown[1].count("%") == 1 and table["n"].tolist() == [160, 160, 160, 3]


def test_seen_and_unseen_prompts_stand_apart(scores):
    table = by_prompts(scores)
    assert table[["Method", "Prompts", "n"]].to_numpy().tolist()[:3] == [
        ["Base model", "seen in RL", 80], ["Base model", "unseen", 80], ["DreamBooth", "seen in RL", 80]
    ]  # fmt: skip
    assert "Real photos" not in set(table["Method"])
    with pytest.raises(ScoreError, match="no column seen"):
        by_prompts(scores.drop(columns="seen"))


def test_a_difference_is_one_only_where_its_interval_says_so(scores):
    table = differences(scores).set_index(["arm", "metric"])
    assert set(table.index.get_level_values("arm")) == {"base", "dreambooth+ddpo"}
    assert table.loc[("dreambooth+ddpo", "judge_text"), "verdict"] == "higher"
    assert table.loc[("base", "judge_identity"), "verdict"] == "lower"
    tuned = scores["arm"] == "dreambooth+ddpo"
    centred = scores["dino"] - tuned * table.loc[("dreambooth+ddpo", "dino"), "value"]
    for shift in (0.001, -0.001):  # on either side of zero, and within what chance does
        found = differences(scores.assign(dino=centred + shift * tuned), metrics=["dino"]).set_index("arm")
        row = found.loc["dreambooth+ddpo"]
        assert row["value"] == pytest.approx(shift) and row["low"] < 0 < row["high"]
        assert row["verdict"] == "not told apart"


def test_metrics_that_are_not_primary_are_corrected_for_their_number(scores):
    """Of ten metrics without any difference some lies beyond its own interval by chance, and Holm holds it back."""
    rng, names = (
        np.random.default_rng(0),
        ("image_reward", "clip_t", "pick_score", "align_t", "clip_i", "dino", "align_i"),
    )
    paired = scores["arm"].isin(("dreambooth", "dreambooth+ddpo")) & scores["identifier"]
    alone, corrected, n = 0, 0, 40
    for _ in range(n):
        by_prompt = {name: rng.normal(size=(2, 8)) for name in names}
        which = (scores["arm"] == "dreambooth+ddpo").astype(int), pd.factorize(scores["prompt_id"])[0] % 8
        noise = {name: by_prompt[name][which] + rng.normal(0, 0.1, len(scores)) for name in names}
        table = differences(scores.assign(**noise)[paired], metrics=names)
        alone += ((table["low"] > 0) | (table["high"] < 0)).any()
        corrected += (table["verdict"] != "not told apart").any()
        assert not table["primary"].any()
    assert alone > 5 >= corrected  # 1 − .95⁷ = 30 % of 40 runs are 12, and 5 % are 2


def test_the_primary_metrics_are_not_corrected(scores):
    assert primary_metrics(scores) == {"text": "judge_text", "subject": "judge_identity"}
    assert primary_metrics(scores.drop(columns=["judge_text"]).assign(image_reward=1.0, clip_t=0.3)) == {
        "text": "clip_t",
        "subject": "judge_identity",
    }
    table = differences(scores).set_index("metric")
    assert table.loc["judge_text", "primary"].all() and not table.loc["dino", "primary"].any()
    said = differences_in_words(differences(scores))
    assert said["Verdict"].str.endswith("(Holm)").tolist() == (said["Metric"] == "DINO").tolist()


def test_holm_by_hand():
    # Standard errors of 1 and normal intervals: z of 3, 2.3, 2.1 and 0 give p = .003, .021, .036 and 1. Holm compares
    # them with .05/4 and .05/3: only the first stays. z of 3, 2.55, 2.3, 2 all do: .003, .011, .021, .045.
    def told_apart(*zs):
        def at_level(name, level):
            half = NormalDist().inv_cdf((1 + level) / 2)
            return Interval(zs[name], zs[name] - half, zs[name] + half, 1)

        return list(holm_sides({k: at_level(k, 0.95) for k in range(len(zs))}, at_level).values())

    assert told_apart(3, 2.3, -2.1, 0) == [1, 0, 0, 0]
    assert told_apart(3, -2.55, 2.3, -2) == [1, -1, 1, -1]
    assert told_apart() == []


def test_a_table_of_what_was_not_measured_is_refused(scores):
    for table in (differences, fidelity, by_prompts):
        with pytest.raises(ScoreError, match="no metric 'dinos'; did you mean 'dino'"):
            table(scores, metrics=["dinos"])
    with pytest.raises(ScoreError, match="no metric 'clip_t'; they have judge_text, judge_identity, dino"):
        differences(scores, metrics=["clip_t"])
    with pytest.raises(ScoreError, match=r"no rows of 'dreambooth' to compare .*there are: base, dreambooth\+ddpo"):
        differences(scores[scores["arm"] != "dreambooth"], "dreambooth")


@pytest.mark.parametrize(
    "reward, clip_t, judge_text, words",
    [
        ("higher", "higher", "higher", "Optimized, and higher: image_reward. .*All of the others confirm"),
        (
            "higher",
            "higher",
            "lower",
            r"higher: clip_t; .* not certain to be higher: judge_text \(lower\). .*Some of the others confirm",
        ),
        ("higher", "not told apart", "lower", "higher: none; .*None confirms"),
        (
            "not told apart",
            "higher",
            "higher",
            r"image_reward may have risen or not \(not told apart\): no gain",
        ),
        ("lower", "higher", "higher", r"image_reward fell \(lower\): no gain is certain"),
        (None, "higher", "higher", "image_reward was not measured, so .* unknown. .*higher: judge_text, clip_t"),
    ],
)
def test_a_gain_is_confirmed_only_where_the_reward_rose(reward, clip_t, judge_text, words):
    verdicts = {"judge_text": judge_text, "image_reward": reward, "clip_t": clip_t, "dino": "higher", "judge_class": ""}
    table = pd.DataFrame([{"metric": m, "verdict": v} for m, v in verdicts.items() if v is not None])
    said = confirmed(table, {"image_reward"})
    assert re.search(words, said) and "dino" not in said and "judge_class" not in said
    assert ("confirm" in said) == (reward == "higher") or "none can be confirmed" in said


def test_a_reward_of_the_subject_needs_a_witness_of_the_subject():
    verdicts = dict.fromkeys(("image_reward", "subject_score", "clip_t", "dino"), "higher")
    rewards = {"image_reward", "subject_score"}
    table = pd.DataFrame(verdicts.items(), columns=["metric", "verdict"])
    assert confirmed(table, rewards).endswith("All of the others confirm the gain in text and subject.")
    blind = table[table["metric"] != "dino"]
    assert confirmed(blind, rewards).endswith("Nothing else measures the subject: not confirmed.")
    fell = confirmed(table.replace({"verdict": {"higher": "lower"}}), rewards)
    assert "image_reward fell (lower); subject_score fell (lower): no gain is certain" in fell


def test_every_personalization_is_set_beside_the_base_model_and_its_own_tunings(scores):
    names = {"dreambooth": "neti", "dreambooth+ddpo": "neti+ddpo"}
    others = scores[(scores["arm"] != "base") & (scores["arm"] != "real")].replace({"arm": names})
    table = differences(pd.concat([scores, others]), metrics=["judge_text"])
    assert table[["arm", "against"]].to_numpy().tolist() == [
        ["base", "dreambooth"], ["dreambooth+ddpo", "dreambooth"], ["base", "neti"], ["neti+ddpo", "neti"]
    ]  # fmt: skip
    assert set(differences(scores, "base")["arm"]) == {"dreambooth", "dreambooth+ddpo"}


def test_three_formats_say_the_same(scores):
    tables = all_tables(scores)
    assert set(tables) == {"fidelity", "differences", "seen_and_unseen"}
    lines = as_markdown(tables["fidelity"]).splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == 6 for line in lines)
    latex = as_latex(tables["fidelity"])
    assert latex.startswith("\\begin{tabular}{lllll}") and latex.count("\\\\\n") == 5 and " %" not in latex
    assert all_tables(scores.assign(seen=True)).keys() == {"fidelity", "differences"}


def test_several_trainings_of_a_subject_have_a_row_each(scores):
    twice = pd.concat([scores, scores[scores["arm"] != "base"].assign(seed=1)])
    table = all_tables(twice)["trainings"]
    rows = table[table["Method"] == "DreamBooth"]
    assert list(rows["Seed"]) == ["0", "1"] and set(rows["Tuning seed"]) == {"–"} and rows.iloc[0, 4] == rows.iloc[1, 4]
    assert set(table.loc[table["Method"] == "Base model", "Seed"]) == {"–"}


def test_tables_are_written_over_those_of_before(tmp_path, scores):
    """Whatever tables there are: `NAMES` lists all that `all_tables` makes."""
    (tmp_path / "run").mkdir()
    dog = scores.assign(subject="dog")
    pd.concat([scores, dog, dog[dog["arm"] != "base"].assign(seed=1)]).to_csv(
        tmp_path / "run" / "scores.csv", index=False
    )
    for _ in range(2):
        assert main(["tables", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {*NAMES, "scores"}


def test_without_dreambooth_there_are_the_other_tables(tmp_path, scores, capsys):
    (tmp_path / "run").mkdir()
    scores[scores["arm"] != "dreambooth"].to_csv(tmp_path / "run" / "scores.csv", index=False)
    assert main(["tables", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "No table of differences" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"fidelity", "seen_and_unseen", "scores"}


def test_runs_on_several_subjects_make_one_table(tmp_path, scores, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        scores.assign(subject=name).to_csv(tmp_path / name / "scores.csv", index=False)
    together = combine([tmp_path / "cat", tmp_path / "dog"])
    assert len(together) == 2 * len(scores) and together["seen"].isna().sum() == 6
    assert main(["tables", str(tmp_path / "cat"), str(tmp_path / "dog"), "--out", str(tmp_path / "both")]) == 0
    assert "| Base model | 100.0 % [" in capsys.readouterr().out
    tables = ("fidelity", "differences", "seen_and_unseen", "subjects")
    names = {f"{table}.{suffix}" for table in tables for suffix in ("csv", "md", "tex")}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names | {"scores.csv"}
    claims = {claim.id: claim for claim in evaluate_claims(tmp_path / "both")}
    assert claims["C1"].n == 320 and claims["C8"].n == 160


def test_one_subject_in_two_runs_is_refused(tmp_path, scores, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        scores.assign(dino=0.1 * len(name) + (name == "one")).to_csv(tmp_path / name / "scores.csv", index=False)
    assert main(["tables", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "more than once with different scores" in capsys.readouterr().err
    assert main(["tables", str(tmp_path / "nowhere")]) == 2
