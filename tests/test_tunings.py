"""Tunings side by side: sums, hacking by hand, the front."""

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.arms import read
from ibkit.evaluate.tunings import KEYS, hacked, pareto_front, tuning_costs


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


def test_how_to_choose_says_what_the_committed_tables_say():
    """The table of notebook 12 and the two moments of DRaFT that it tells of."""
    root = Path(__file__).parents[1]
    text = (root / "notebooks/12_compare_rl.ipynb").read_text(encoding="utf-8")
    rows = pd.concat(map(read, (root / "outputs/reference/objectives", root / "outputs/reference/tunings")))
    rows = rows[rows["identifier"]].drop_duplicates()  # both folders have the cat's start
    means = 100 * rows.groupby(["arm", "subject"])[["shown", "same_subject"]].mean()
    named = {"the start": "start", "DDPO, text": "text", "DDPO, text and `subject`": "text and subject"}
    named |= {"DDPO, text and DINO": "text and DINO", "DRaFT, its preset": "DRaFT", "DRaFT, past its end": "DRaFT long"}
    for label, arm in named.items():
        said = re.search(rf"\| {re.escape(label)} \| \d+ \| (.*?) \| (.*?) \|", text)
        for subject, cell in zip(("cat", "dog"), said.groups(), strict=True):
            if cell != "–":
                assert [float(n) for n in cell.split(" / ")] == means.loc[arm, subject].round().tolist()
    history = pd.read_csv(root / "outputs/reference/tunings/cat-DRaFT_long-0-history.csv")
    history.index = history["pictures"].cumsum()
    for pictures, shown, same in ((384, 92, 92), (624, 21, 4)):
        found = 100 * history.loc[pictures, ["judge_activity", "judge_identity"]]
        assert found.round().tolist() == [shown, same] and f"{shown} %" in text
