"""Claims of InstructBooth that the experiments of notebooks 04 to 06 test; none is about an arm of notebook 03."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from ibkit.evaluate.claims import INSTRUCTBOOTH, CannotTest, Claim, Outcome, signed
from ibkit.evaluate.columns import ANSWER, NUMBER, OR_NOTHING, SHARE, TEXT, WHOLE, check_table
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.stats import METRICS, PRIMARY
from ibkit.experiments import detailed_description
from ibkit.experiments.prompt_curves import efficiency, kept_by_class
from ibkit.experiments.subject_analysis import fall, misranked, pose_cost

# Columns of each table: the keys of a row, of which it has one, and what claims read of it.
DESCRIBED = {"description": ANSWER, "train_seed": WHOLE, "subject": TEXT, "prompt_id": TEXT, "image_seed": WHOLE}
CHANGED = {"class_noun": TEXT, "subject": TEXT, "pair": WHOLE, "change": TEXT}
ABLATED = {
    "arm": TEXT, "class_noun": TEXT, "subject": TEXT, "dreambooth_steps": WHOLE, "rl_seed": WHOLE, "epoch": WHOLE,
}  # fmt: skip
MEASURED = {name: (SHARE if METRICS[name].is_share else NUMBER) + OR_NOTHING for name in detailed_description.MEASURED}
CURVES = dict.fromkeys(("n_images", "n_identifier_images", "reward_base"), NUMBER)
CURVES |= dict.fromkeys(("reward_identifier", "judge_activity"), NUMBER)
CURVES |= dict.fromkeys(("training_reward_identifier", "training_reward_class"), NUMBER + OR_NOTHING)


def description_helps(claim: Claim, table: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """C5: with − without description, subject.

    The judge's question for the shape alone goes into the detail: the judge is right less often there (notebook 14).
    """
    metric = next((name for name in PRIMARY["subject"] if name in table.columns), None)
    if metric is None or not set(DESCRIBED) <= set(table.columns):
        raise CannotTest("description.csv lacks its columns: run 14_detailed_description again.")
    rows = detailed_description.compare(table).set_index("metric")
    gaps = {
        row.Index: Interval(row.difference, row.difference_low, row.difference_high, row.n) for row in rows.itertuples()
    }
    show = METRICS[metric].show
    detail = (
        f"{METRICS[metric].label}: with {show(rows.at[metric, 'with'])}, without {show(rows.at[metric, 'without'])}"
    )
    for other in (name for name in gaps if name != metric):
        detail += f"; {METRICS[other].label} {signed(other, gaps[other])}"
    cells = table.groupby(["subject", "prompt_id"])["image_seed"].nunique()
    return Outcome(metric, gaps[metric], detail, cells, table["train_seed"].nunique())


def pose_lowers_dino(claim: Claim, table: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """C6: DINO of the same subject in another pose, minus its DINO after a mere change of view."""
    if not {*CHANGED, "dino", "judge_identity"} <= set(table.columns):
        raise CannotTest("changes.csv lacks its columns: run 05_dino_metric again.")
    if not {"view", "pose", "identity"} <= set(table["change"]):
        raise CannotTest("changes.csv has no change of view, pose and identity: photos of a user have no truth.")
    lost, place = fall(table, "dino", "pose"), fall(table, "dino", "place")
    interval = Interval(-lost.value, -lost.high, -lost.low, lost.n)
    cost, wrong = pose_cost(table, "dino"), misranked(table, "dino")
    seen = table[table["change"] == "pose"]["judge_identity"].mean()
    detail = (
        f"a change of place alone costs {place.value:.3f}, a change of pose {cost.value:.2f} [{cost.low:.2f}, "
        f"{cost.high:.2f}] times what another individual costs; in {100 * wrong.value:.0f} % [{100 * wrong.low:.0f}, "
        f"{100 * wrong.high:.0f}] of the pairs the same individual in another pose scores below another individual in "
        f"the same pose; the judge (simulated) knows the individual in {100 * seen:.0f} % of the new poses"
    )
    return Outcome("dino", interval, detail)


def both_kinds_learn_faster(claim: Claim, table: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """C7: images that identifier prompts alone need / images that both kinds need, at equal totals, from the most
    overfitted model of the table.
    """
    if not {*ABLATED, *CURVES} <= set(table.columns):
        raise CannotTest("prompt_kinds.csv lacks its columns: run 06_prompt_ablation again.")
    rows = efficiency(table)
    rows = rows[rows["arm"] == "identifier_equal_totals"].sort_values("dreambooth_steps")
    if rows.empty:
        raise CannotTest("prompt_kinds.csv has no pair of finished runs of both arms.")
    told = [
        f"{row.dreambooth_steps} DreamBooth steps: ratio {row.ratio:.2f} ({row.reached_both} of {row.n_pairs} runs "
        f"with both kinds and {row.reached_other} with the identifier alone got there), {row.verdict}"
        for row in rows.itertuples()
    ]
    last = rows.iloc[-1]
    if np.isnan(last["ratio_low"]):
        raise CannotTest(f"Too few runs for an interval. {'; '.join(told)}.")
    interval = Interval(last["ratio"], last["ratio_low"], last["ratio_high"], int(last["n_pairs"]))
    shown, low, high = (100 * last[f"activity_{which}"] for which in ("difference", "low", "high"))
    told.append(
        f"{last['dreambooth_steps']} steps, on the way: the activity (simulated judge) {shown:+.0f} points "
        f"[{low:+.0f}, {high:+.0f}] more often with both kinds"
    )
    kept = [
        f"{row.class_noun} {100 * row.kept:.0f} % ({row.dreambooth_steps} steps)"
        for row in kept_by_class(table).dropna(subset="kept").itertuples()
    ]
    told.append(f"of the lost reward the class prompts still had before RL: {', '.join(kept)}")
    seeds = table["rl_seed"].nunique()
    return Outcome("reward_identifier", interval, "; ".join(told), None, seeds, "times as many images")


CLAIMS = (
    Claim(
        "C5",
        INSTRUCTBOOTH,
        "A detailed description helps to learn a rare subject.",
        "With minus without the description, at the end of training: subject fidelity",
        "§2.1 and figure 15 (pictures only; no number in the paper)",
        file="description.csv",
        notebook="14_detailed_description",
        check=partial(check_table, keys=DESCRIBED, measured=MEASURED),
        test=description_helps,
    ),
    Claim(
        "C6",
        INSTRUCTBOOTH,
        "DINO falls when the same subject changes its pose.",
        "DINO to the reference: other pose minus other view, the individual the same",
        "Appendix D and E, figure 11 (single pictures), table 2 (DINO 0.699 → 0.650, while people see no loss)",
        side=-1,
        file="changes.csv",
        notebook="05_dino_metric",
        check=partial(check_table, keys=CHANGED, measured={"dino": NUMBER, "judge_identity": SHARE}),
        test=pose_lowers_dino,
    ),
    Claim(
        "C7",
        INSTRUCTBOOTH,
        "RL learns faster with both kinds of prompts than with the identifier alone.",
        "Images until half of the lost reward is won back: identifier alone / both kinds, at equal totals",
        "§2.2 and figure 16 (learning curves of three seeds; no number in the paper)",
        threshold=1.0,
        border="1, equally many images",
        file="prompt_kinds.csv",
        notebook="06_prompt_ablation",
        check=partial(check_table, keys=ABLATED, measured=CURVES),
        test=both_kinds_learn_faster,
    ),
)
