"""Which metrics agree with the judge: of two pictures for one prompt of which it accepts one, which do they prefer?"""

from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BLUE, GREEN
from ibkit.evaluate.figures import INK, house_figure, whiskers
from ibkit.evaluate.intervals import mean_interval
from ibkit.evaluate.stats import METRICS, metrics_in

JUDGED = {"text": "judge_text", "subject": "judge_identity"}  # kind of a metric -> the judge's answer it should follow
COLOURS = {"text": BLUE, "subject": GREEN}


def pairwise_wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first is larger, ½ where they tie, else 0; the two are broadcast."""
    return np.heaviside(first - second, 0.5)


def auc(higher: ArrayLike, lower: ArrayLike) -> float:
    """The chance that a score that should be higher is above one that should be lower; a tie counts a half. Without any
    of one kind it is a ScoreError.

    It is the area under the ROC curve (Hanley and McNeil 1982): 0.5 for guessing, 1 when a threshold parts them.
    """
    first, second = np.asarray(higher, float), np.asarray(lower, float)
    if not first.size or not second.size:
        raise ScoreError("An AUC needs scores of both kinds; one of the two is empty.")
    return float(pairwise_wins(first[:, None], second).mean())


def pairwise_accuracy(scores: pd.DataFrame) -> pd.DataFrame:
    """How often a metric prefers the picture that the judge accepts, of all pairs for one subject and prompt of which
    it accepts one alone (`auc`): so ImageReward and PickScore are held against people (Xu et al. 2023; Kirstain et al.
    2023).

    Args:
        scores: a checked score table, usually through `stats.as_compared`; pictures of all arms are compared.

    Returns:
        A row a metric: metric, kind, judged ("judge_text"), value, low, high (interval over prompts), n (pairs),
        prompts. Empty where no prompt has pictures of both kinds.
    """
    rows = []
    for name in metrics_in(scores):
        kind = METRICS[name].kind
        judged = JUDGED.get(kind, "")
        if METRICS[name].is_share or judged not in scores:
            continue
        areas, places, n = [], [], 0
        for place, part in scores.dropna(subset=[name, judged]).groupby(["subject", "prompt_id"], sort=False):
            right, wrong = (part.loc[part[judged] == answer, name] for answer in (1, 0))
            if len(right) and len(wrong):
                areas.append(auc(right, wrong))
                places.append(place)
                n += len(right) * len(wrong)
        if areas:
            found = mean_interval(np.array(areas), list(zip(*places, strict=True)))
            rows.append({"metric": name, "kind": kind, "judged": judged, **vars(found), "n": n, "prompts": len(areas)})
    return pd.DataFrame(rows, columns=["metric", "kind", "judged", "value", "low", "high", "n", "prompts"])


def agreement_bars(table: pd.DataFrame, rewards: Collection[str] = (), title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw `pairwise_accuracy`, a bar a metric from chance (one half) on; those in `rewards` are marked."""
    table = table.sort_values(["kind", "value"], ascending=[False, False], ignore_index=True)
    with house_figure(7, 0.42 * len(table) + 1.3, title) as figure:
        axis = figure.subplots()
        places = np.arange(len(table))[::-1]
        axis.barh(places, table["value"] - 0.5, 0.7, left=0.5, color=table["kind"].map(COLOURS))
        axis.errorbar(table["value"], places, xerr=whiskers(table), fmt="none", color=INK, capsize=2, elinewidth=1)
        marks = [" (was the reward)" if name in rewards else "" for name in table["metric"]]
        labels = [METRICS[name].label + mark for name, mark in zip(table["metric"], marks, strict=True)]
        axis.set_yticks(places, [f"{kind}: {label}" for kind, label in zip(table["kind"], labels, strict=True)])
        axis.axvline(0.5, color=INK, linewidth=0.8)
        axis.set(xlim=(0, 1), xlabel="prefers the picture that the judge accepts (½ is chance)")
        axis.grid(False, axis="y")
    return figure, table.assign(reward=table["metric"].isin(list(rewards)))
