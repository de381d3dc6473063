"""Tunings side by side: sums, hacking by hand, the front."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from ibkit.evaluate import figures
from ibkit.evaluate.arms import arms_of
from ibkit.evaluate.tunings import KEYS, arm_plane, arm_shares, hacked, pareto_front, read_arms, tuning_costs


def curve(arm, shown, above, tune_seed=0):
    n = len(shown)
    return pd.DataFrame(
        {"subject": "cat", "arm": arm, "seed": 0, "tune_seed": tune_seed, "epoch": range(n)}
        | {"pictures": [48 * (i + 1) for i in range(n)], "gradient_steps": range(1, n + 1)}
        | {"seconds": [2.0 * i for i in range(n)], "judge_activity": shown, "above_level": above}
    )


HACKED = curve("dreambooth+draft", [0.5, 0.9, 0.9, 0.9, 0.2, 0.0], [0.0, 0.2, 0.6, 0.8, 0.9, 1.0])
FELL = curve("dreambooth+dpok", [0.9, 0.9, 0.5, 0.2, 0.1, 0.1], [0.0] * 6)
ROSE = curve("dreambooth+ddpo", [0.5, 0.6, 0.7, 0.8, 0.9, 0.9], [0.0, 0.5, 0.8, 0.9, 0.9, 0.9])


def test_hacked_is_passed_and_fallen_together():
    found = hacked(pd.concat([HACKED, FELL, ROSE])).set_index("arm")
    # windows of three: .5 .7 .77 .9 .67 .37, above the level 0 .1 .27 .53 .77 .9: from the fifth epoch on
    assert found.loc["dreambooth+draft", "hacked_at"] == 5 * 48
    assert found.loc["dreambooth+draft", "best"] == pytest.approx(0.9)
    assert pd.isna(found.loc["dreambooth+dpok", "hacked_at"])  # it fell, but no reward was passed
    assert pd.isna(found.loc["dreambooth+ddpo", "hacked_at"])  # it passed, and the pictures show more


def test_costs_are_means_over_an_arms_runs():
    twice = pd.concat([ROSE, curve("dreambooth+ddpo", [0.5] * 4, [0.0] * 4, tune_seed=1)])
    [row] = tuning_costs(twice).to_dict("records")
    assert row == {"arm": "dreambooth+ddpo", "pictures": 240, "gradient_steps": 5, "seconds": 8, "runs": 2}
    assert KEYS[1] == "arm"


@pytest.mark.parametrize(
    "means, front",
    [
        ({"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.4, 0.4)}, ["a", "b", "c"]),
        ({"a": (1.0, 0.5), "b": (0.0, 1.0), "c": (0.9, 0.5)}, ["a", "b"]),  # as good in one, worse in the other
        ({"a": (1.0, 1.0), "b": (1.0, 1.0)}, ["a", "b"]),  # equals beat nobody
        ({"a": (1.0, 1.0), "b": (1.0, 0.9)}, ["a"]),
    ],
)
def test_the_front_by_hand(means, front):
    table = pd.DataFrame(means, index=["judge_activity", "judge_identity"]).T
    assert pareto_front(table, "judge_activity", "judge_identity") == front


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shares():
    return 100 * arm_shares(read_arms(*(ROOT / "outputs/reference" / name for name in ("objectives", "tunings"))))


def test_shares_are_of_seeds_and_a_picture_counts_once(tmp_path):
    pictures = pd.DataFrame({"identifier": [True, True, False], "shown": [1, 0, 0], "same_subject": [1, 1, 0]})
    for folder, name in (("a", "cat-start"), ("a", "cat-text-0"), ("b", "cat-start"), ("b", "cat-text_and_DINO-1")):
        (tmp_path / folder).mkdir(exist_ok=True)
        pictures.to_csv(tmp_path / folder / f"{name}.csv", index=False)
    pictures.assign(shown=1).to_csv(tmp_path / "a" / "cat-text-1.csv", index=False)
    pictures.to_csv(tmp_path / "a" / "cat-text-1-history.csv", index=False)
    found = read_arms(tmp_path / "a", tmp_path / "b")
    assert found.groupby(["arm", "rl_seed"]).size().to_dict() == {
        ("start", -1): 3, ("text", 0): 3, ("text", 1): 3, ("text and DINO", 1): 3
    }  # fmt: skip
    of = arm_shares(found).loc[("cat", "text")]
    assert of["shown"].tolist() == [0.75, 0.5, 1.0] and of["both"].tolist() == [0.75, 0.5, 1.0]


def test_the_plane_has_a_cross_an_arm(shares):
    cat, dog = arm_plane(shares / 100).axes
    assert (cat.get_title(loc="left"), dog.get_title(loc="left")) == ("cat", "dog")
    crosses = {c.get_label(): c[0].get_xydata()[0] for c in cat.containers}
    assert set(crosses) == {"start", "text", "text and DINO", "text and subject", "DRaFT", "DRaFT long"}
    assert crosses["text"].round(4).tolist() == [0.8778, 0.7472]
    [upright], [level] = (bars.get_segments() for bars in cat.containers[1][2])
    ends = [*level[:, 0], *upright[:, 1]] if level[0, 0] != level[1, 0] else [*upright[:, 0], *level[:, 1]]
    assert [round(end, 4) for end in ends] == [0.8, 0.9583, 0.6917, 0.7917]


def test_readme_says_what_the_arms_tables_say(shares):
    text, subject = (ROOT / "README.md").read_text(encoding="utf-8"), ""
    names = {"LoRA DreamBooth": "start", "RL, text alone": "text", "RL, text and subject": "text and subject"}
    names |= {"RL, text and DINO": "text and DINO"}
    lines = text[text.index("| both in one picture |") :].splitlines()[2:10]
    for line in lines:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        subject = label.split(",")[0] if "LoRA DreamBooth" in label else subject
        arm = names[label.removeprefix(f"{subject}, ")]
        for cell, column in zip(cells, ("shown", "same_subject", "both"), strict=True):
            said = [int(n) for n in re.findall(r"\d+", cell)]
            assert said == shares.loc[(subject, arm), column].round().tolist()[: len(said)], line
    assert len(lines) == 8
    mean = shares.xs("mean", axis=1, level=1).loc["cat"].round().astype(int).astype(str)
    draft, long, start, ddpo = (mean.loc[arm] for arm in ("DRaFT", "DRaFT long", "start", "text"))
    flat = " ".join(text.split())
    assert f"from {start['shown']} to {draft['shown']} % of the pictures and keeps the subject in" in flat
    assert (
        f"in {draft['same_subject']} % (two seeds; DDPO's 20 epochs: {ddpo['shown']} and {ddpo['same_subject']} %)"
        in flat
    )
    assert f"hacked to {long['shown']} and {long['same_subject']} %" in flat


def test_notebook_12_takes_several_subjects_and_arms_in_any_order(monkeypatch):
    """Its cells of curves: a line a training over seconds, since no two take the same; each mean is of one training."""
    both = [one.assign(subject=noun) for noun in ("dog", "cat") for one in (ROSE, FELL, ROSE.assign(tune_seed=1))]
    curves = pd.concat(both, ignore_index=True).assign(reward=0.0, judge_identity=1.0)
    monkeypatch.setattr("ibkit.evaluate.tunings.tuning_curves", lambda runs: curves.copy())
    notebook = json.loads((ROOT / "notebooks/12_compare_rl.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run = SimpleNamespace(write_table=lambda name, table: None, save_figure=lambda name, figure, data: None)
    names = {"evaluated": [], "run": run, "figures": figures, "looks": arms_of(set(curves["arm"]))}
    for word in ("tuning_curves([", "Learning curves"):
        (source,) = (source for source in sources if word in source)
        exec(compile(source, word, "exec"), names)
    lines = [sum(len(line.get_xdata()) > 0 for line in axis.lines) for axis in names["figure"].axes]
    assert lines == [2, 2, 2, 6, 6, 6]
    own = names["smooth"].groupby(KEYS)["judge_activity"].first()
    assert (own == curves.groupby(KEYS)["judge_activity"].first()).all()


def test_how_to_choose_says_what_the_committed_tables_say(shares):
    """The gains of notebook 12, and the two moments of DRaFT that it tells of."""
    text = (ROOT / "notebooks/12_compare_rl.ipynb").read_text(encoding="utf-8")
    means = shares.xs("mean", axis=1, level=1).unstack("subject")
    gained, lost = (means.loc["text", column] - means.loc["start", column] for column in ("shown", "same_subject"))
    assert f"won {gained['cat']:.0f} and {gained['dog']:.0f} points of text and lost one" in text
    assert lost.round().tolist() == [-1, -1]
    history = pd.read_csv(ROOT / "outputs/reference/tunings/cat-DRaFT_long-0-history.csv")
    history.index = history["pictures"].cumsum()
    for pictures, shown, same in ((384, 92, 92), (624, 21, 4)):
        found = 100 * history.loc[pictures, ["judge_activity", "judge_identity"]]
        assert found.round().tolist() == [shown, same] and f"{shown} %" in text
