"""Tunings side by side: curves by pictures and by seconds, costs, who is hacked, and the front of text and subject."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ibkit.adapt import Adapted
from ibkit.evaluate.arms import COLOURS, MARKERS
from ibkit.evaluate.figures import house_figure
from ibkit.evaluate.score import RUN_KINDS
from ibkit.evaluate.stats import METRICS
from ibkit.runs import CompletedRun, input_of

KEYS = ["subject", "arm", "seed", "tune_seed"]
SUMS = ("pictures", "gradient_steps", "seconds")  # of a row of the history; of a curve, so far
FALLEN, PASSED = 0.2, 0.5  # below its best, as a share of pictures; share of pictures above the reward's level


def tuning_curves(evaluated: Sequence[CompletedRun]) -> pd.DataFrame:
    """One row for each epoch of each tuning that runs of 03 evaluated: `KEYS`, epoch, what it took up to there
    (`SUMS`), and its history. A run that was evaluated and is gone is an ArtifactError.
    """
    curves = {}
    for run in evaluated:
        for name in run.manifest["inputs"]:
            tuning = input_of(run, name, *RUN_KINDS)
            if tuning.kind == RUN_KINDS[1]:
                curves[str(tuning.folder)] = _curve(tuning, run)
    if not curves:
        return pd.DataFrame(columns=[*KEYS, "epoch", *SUMS, "reward"])
    return pd.concat(curves.values(), ignore_index=True)


def _curve(tuning: CompletedRun, evaluated: CompletedRun) -> pd.DataFrame:
    history, adapted = tuning.table("history.csv"), Adapted.read(tuning)
    subject = evaluated.table("scores.csv")["subject"].iloc[0]
    curve = history.assign(**{name: history[name].cumsum() for name in SUMS})
    seeds = adapted.deltas[0].seed, adapted.deltas[-1].seed
    return curve.assign(subject=subject, arm=adapted.arm, seed=seeds[0], tune_seed=seeds[1])


def tuning_costs(curves: pd.DataFrame) -> pd.DataFrame:
    """What the tunings of each arm took, means over their runs: pictures, gradient_steps, seconds, and runs."""
    totals = curves.groupby(KEYS, sort=False)[list(SUMS)].max()
    by_arm = totals.groupby("arm", sort=False)
    return by_arm.mean().assign(runs=by_arm.size()).reset_index()


def hacked(curves: pd.DataFrame, shown: str = "judge_activity", window: int = 3) -> pd.DataFrame:
    """Where the reward has passed the level of true pictures and what it stands for has fallen.

    A tuning is hacked at the first epoch from which on, in the mean of `window` epochs, half of the pictures or more
    score above the level, and the share that shows the prompt is .2 below the best window before.

    Args:
        curves: from `tuning_curves`, with above_level.
        shown: the column that tells the truth, such as the judge's.

    Returns:
        A row for each tuning: `KEYS`, hacked_at (pictures drawn by then; missing where it was not), best and last (of
        `shown`, in windows).
    """
    rows = []
    for key, curve in curves.groupby(KEYS, sort=False):
        means = curve[["above_level", shown]].rolling(window, min_periods=1).mean()
        fallen = means[shown] <= means[shown].cummax() - FALLEN
        at = curve["pictures"][fallen & (means["above_level"] >= PASSED)]
        row = dict(zip(KEYS, key, strict=True)) | {"hacked_at": at.iloc[0] if len(at) else pd.NA}
        rows.append(row | {"best": means[shown].max(), "last": means[shown].iloc[-1]})
    return pd.DataFrame(rows)


def pareto_front(means: pd.DataFrame, text: str, subject: str) -> list[str]:
    """Arms that no other one beats in both columns, where more is better: none is better in one and at least as good in
    the other. `means` has one row an arm, in its index, and `text` and `subject` are of `METRICS`.
    """
    assert text in METRICS and subject in METRICS
    front = []
    for arm, mine in means.iterrows():
        others = means.drop(index=arm)
        as_good = (others[text] >= mine[text]) & (others[subject] >= mine[subject])
        better = (others[text] > mine[text]) | (others[subject] > mine[subject])
        if not (as_good & better).any():
            front.append(str(arm))
    return front


def read_arms(*folders: Path) -> pd.DataFrame:
    """Tables of `benchmarks.arms`, a row a picture: what they hold, subject, arm ("start" is the personalized model
    that all arms of a subject train) and rl_seed (-1 of the start). What several folders have counts once.
    """
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.csv"))):
        if not path.stem.endswith("-history"):
            noun, arm, *seed = path.stem.replace("_", " ").split("-")
            table = pd.read_csv(path, keep_default_na=False)
            found[path.stem] = table.assign(subject=noun, arm=arm, rl_seed=int(seed[0]) if seed else -1)
    return pd.concat(found.values(), ignore_index=True)


def arm_shares(pictures: pd.DataFrame) -> pd.DataFrame:
    """Shares of the pictures with the identifier, from `read_arms`: shown, same_subject and both, for each subject and
    arm the mean over RL seeds, and the lowest and highest of them (columns mean, min, max).
    """
    named = pictures[pictures["identifier"]].assign(both=lambda table: table["shown"] * table["same_subject"])
    by_seed = named.groupby(["subject", "arm", "rl_seed"], sort=False)[["shown", "same_subject", "both"]].mean()
    shares = by_seed.groupby(["subject", "arm"], sort=False).agg(["mean", "min", "max"])
    return shares.sort_index(level="subject", sort_remaining=False, kind="stable")


def arm_plane(shares: pd.DataFrame) -> Figure:
    """A panel a subject, from `arm_shares`: a cross an arm, from the lowest to the highest seed of both shares."""
    nouns, order = shares.index.unique("subject"), [*shares.index.unique("arm")]
    with house_figure(4.5 * len(nouns), 3.9, "What is measured so far") as figure:
        for axis, noun in zip(figure.subplots(1, len(nouns), sharey=True, squeeze=False)[0], nouns, strict=True):
            for arm, row in shares.loc[noun].iterrows():
                look = order.index(arm) % len(COLOURS)
                (x, *across), (y, *along) = (row[column] for column in ("same_subject", "shown"))
                errors = [[[mean - low], [high - mean]] for mean, (low, high) in ((y, along), (x, across))]
                axis.errorbar(x, y, *errors, label=arm, color=COLOURS[look], fmt=MARKERS[look], ms=6)
            axis.set(xlabel="same subject", ylabel="prompt shown", title=noun, xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
            axis.legend(fontsize=8, loc="center left")
    return figure
