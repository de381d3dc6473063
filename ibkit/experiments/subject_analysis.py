"""What the tables of `ibkit.experiments.subject_changes` say about a subject metric, with intervals, and their figures.

Individuals are what varies, so every interval resamples subjects with all their pairs. Scores of different
metrics have different scales; what is compared between metrics here does not depend on a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BLUE, GREEN, GREY, ORANGE
from ibkit.evaluate.figures import HOUSE_STYLE, INK, NotebookFigure
from ibkit.evaluate.intervals import Interval, bootstrap_statistic, bootstrap_weighted, mean_interval
from ibkit.experiments.subject_changes import CHANGES, CONTRASTS, SAME_SUBJECT

LABELS = {
    "dino": "DINO (class token)",
    "clip_i": "CLIP-I",
    "patch_match": "Patch matching",
    "true_mask_last": "True mask, last layer (oracle)",
    "true_mask": "True mask, middle layer (oracle)",
    "found_mask": "Found mask, middle layer",
    "subject_score": "Subject head (shipped)",
    "learned_unseen": "Quick heads, activities unseen",
}
# Fisher's z of a perfect correlation is infinite.
LARGEST_R = 1 - 1e-9
SAME_COLOUR, OTHER_COLOUR = BLUE, ORANGE


def auc(same: Sequence[float], other: Sequence[float]) -> float:
    """The chance that a score of the same subject is above one of another subject; a tie counts a half.

    It is the area under the ROC curve (Hanley and McNeil 1982): 0.5 for guessing, 1 when a threshold parts them.

    Raises:
        ScoreError: one of the two is empty.
    """
    if not len(same) or not len(other):
        raise ScoreError("An AUC needs scores of the same subject and of other subjects; one of the two is empty.")
    return float(_wins(np.asarray(same, float), np.asarray(other, float)).mean())


def _wins(same: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (same[:, None] > other) + 0.5 * (same[:, None] == other)


def side_by_side(table: pd.DataFrame, column: str, changes: Sequence[str]) -> pd.DataFrame:
    """Scores of several changes of the same references: index (class_noun, subject, pair), one column a change.

    Raises:
        ScoreError: no reference has all of the changes.
    """
    wide = table.pivot(index=["class_noun", "subject", "pair"], columns="change", values=column)
    wide = wide.reindex(columns=list(changes)).dropna()
    if wide.empty:
        raise ScoreError(f"No reference has the changes {', '.join(changes)}: there is nothing to compare.")
    return wide


def _subjects(wide: pd.DataFrame) -> np.ndarray:
    return wide.index.get_level_values("subject").to_numpy()


def subject_auc(
    table: pd.DataFrame,
    column: str,
    same: str,
    other: str,
    minus: str = "",
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUC of the same subject against another, within each subject's references, as a mean over subjects.

    Args:
        table: of `subject_changes.score_pairs`.
        column: the metric.
        same, other: changes that keep and that replace the subject, such as "pose" and "identity and pose".
        minus: a metric whose AUC on the same pairs is taken away; empty = none.

    Returns:
        The AUC (or the difference), its 95 % interval, and the number of references.
    """
    tables = [side_by_side(table, name, (same, other)) for name in (column, minus) if name]
    subjects = _subjects(tables[0])

    def over_dino(weights: np.ndarray) -> np.ndarray:
        first, *second = [_weighted_auc(wide.to_numpy(), subjects, weights.astype(float)) for wide in tables]
        return first - second[0] if second else first

    found = bootstrap_weighted(over_dino, subjects, len(subjects), n_resamples=n_resamples, seed=seed)
    most = (-1, 1) if minus else (0, 1)
    return Interval(found.value, *np.clip((found.low, found.high), *most).tolist(), found.n)


def _weighted_auc(values: np.ndarray, subjects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over subjects of the AUC within each, for every row of weights: (N, 2), (N,), (R, N) -> (R,).

    Of a subject's n × n comparisons n are within a reference. A resample that holds a reference twice would have more
    of them, and they are easier (same pose, same place), so both kinds keep their share: 1/n and 1 − 1/n. Where a
    resample holds only one reference of a subject, the comparisons across its references are the sample's.
    """
    total = np.zeros(len(weights))
    for subject in np.unique(subjects):
        rows = subjects == subject
        w, wins, n = weights[:, rows], _wins(values[rows, 0], values[rows, 1]), rows.sum()
        own_wins, own = w @ wins.diagonal(), w.sum(1)
        across_wins, across = ((w @ wins) * w).sum(1) - (w**2) @ wins.diagonal(), own**2 - (w**2).sum(1)
        within = np.divide(own_wins, own, out=np.zeros_like(own), where=own > 0)
        of_sample = (wins.sum() - wins.trace()) / max(n * (n - 1), 1)
        between = np.divide(across_wins, across, out=np.full_like(own, of_sample), where=across > 0)
        total += own * (within / n + between * (1 - 1 / n))
    return total / weights.sum(1)


def fall(table: pd.DataFrame, column: str, change: str, below: str = "view") -> Interval:
    """How far a change lowers a metric below another change of the same reference (`below`: the noise floor)."""
    wide = side_by_side(table, column, (below, change))
    return mean_interval((wide[below] - wide[change]).to_numpy(), _subjects(wide))


def pose_cost(table: pd.DataFrame, column: str) -> Interval:
    """What a change of pose costs, in units of what a change of identity costs: (1 − s(pose)) / (1 − s(identity)).

    Every metric here gives a picture 1 with itself. 0: pose is not seen; above 1: another pose costs more than another
    individual.
    """
    wide = side_by_side(table, column, ("pose", "identity"))
    columns = {name: wide[name].to_numpy() for name in wide}
    return bootstrap_statistic(columns, lambda pose, identity: (1 - pose) / (1 - identity), _subjects(wide))


def misranked(table: pd.DataFrame, column: str, same: str = "pose", other: str = "identity") -> Interval:
    """Share of references for which the same individual, changed otherwise (`same`), scores below another individual in
    the reference's own pose and place; a tie counts a half.
    """
    wide = side_by_side(table, column, (same, other))
    wrong = (wide[same] < wide[other]) + 0.5 * (wide[same] == wide[other])
    return mean_interval(wrong.to_numpy(), _subjects(wide))


def spearman(x: pd.Series, y: pd.Series, subjects: pd.Series, *, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Rank correlation (Pearson's of the ranks, ties sharing theirs) with a 95 % interval over subjects; it is
    [−1, 1] where too few pairs have any spread.

    Raises:
        ScoreError: x or y is constant.
    """
    if x.nunique() < 2 or y.nunique() < 2:
        raise ScoreError("A rank correlation needs values that differ: raise n_pairs.")

    def fisher_z(weights: np.ndarray) -> np.ndarray:
        rows = [np.repeat(np.arange(len(x)), weight) for weight in weights]
        ranked = [(_ranks(x.to_numpy()[row]), _ranks(y.to_numpy()[row])) for row in rows]
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample of equal values has no correlation
            return np.arctanh([np.corrcoef(a, b)[0, 1].clip(-LARGEST_R, LARGEST_R) for a, b in ranked])

    value = float(np.tanh(fisher_z(np.ones((1, len(x)), dtype=np.int64))[0]))
    try:
        found = bootstrap_weighted(fisher_z, subjects.to_numpy(), len(x), n_resamples=n_resamples, seed=seed)
    except ScoreError:  # so few pairs that resamples without any spread are common
        return Interval(value, -1.0, 1.0, len(x))
    return Interval(value, *np.tanh((found.low, found.high)).tolist(), found.n)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; values that tie share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def compare_metrics(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Every metric's AUC under a change of pose, place and everything, its cost of pose, and how often it misranks.

    Returns:
        Tidy table: metric, measure (auc_pose, auc_place, auc_everything, each also as the difference to DINO's on the
        same pairs: auc_pose_over_dino, …; pose_cost; misranked), value, low, high, n.
    """
    measures = {}
    for name, contrast in CONTRASTS.items():
        measures[f"auc_{name}"] = partial(subject_auc, table, same=contrast[0], other=contrast[1])
        measures[f"auc_{name}_over_dino"] = partial(measures[f"auc_{name}"], minus="dino")
    measures |= {"pose_cost": partial(pose_cost, table), "misranked": partial(misranked, table)}
    rows = [
        {"metric": column, "measure": name, **vars(measure(column=column))}
        for column in columns
        for name, measure in measures.items()
    ]
    return pd.DataFrame(rows)


# --- figures ---------------------------------------------------------------------------------------------------


def change_figure(table: pd.DataFrame, columns: Sequence[str], title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw the distribution of each metric for every change, and the share that the judge takes for the subject.

    Args:
        table: of `subject_changes.score_pairs`.
        columns: metrics, a panel each.
        title: above the figure.

    Returns:
        The figure, and one row for each metric and change: metric, change, n, low, q1, median, q3, high (whiskers at
        5 and 95 %); for judge_identity: value, low and high of the share's interval.
    """
    changes = [change for change in CHANGES if change in set(table["change"])]
    colours = {change: SAME_COLOUR if change in SAME_SUBJECT else OTHER_COLOUR for change in changes}
    rows = []
    with matplotlib.rc_context(HOUSE_STYLE):
        n_panels = len(columns) + 1
        figure = NotebookFigure(figsize=(1.6 + 2.9 * n_panels, 0.42 * len(changes) + 1.3), layout="constrained")
        axes = figure.subplots(1, n_panels, sharey=True)
        for column, axis in zip(columns, axes, strict=False):
            seaborn.boxplot(
                table, x=column, y="change", order=changes, hue="change", hue_order=changes, palette=colours,
                whis=(5, 95), fliersize=2, linewidth=1, width=0.6, saturation=1, legend=False, ax=axis,
            )  # fmt: skip
            axis.set(title=LABELS[column], xlabel="score against the reference", ylabel="")
            for change in changes:
                scores = table.loc[table["change"] == change, column]
                bounds = scores.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).set_axis(["low", "q1", "median", "q3", "high"])
                rows.append({"metric": column, "change": change, "n": len(scores), **bounds})
        for place, change in enumerate(changes):
            part = table[table["change"] == change]
            share = mean_interval(part["judge_identity"].to_numpy(), part["subject"].to_numpy())
            axes[-1].barh(place, share.value, 0.6, color=colours[change])
            axes[-1].plot([share.low, share.high], [place, place], color=INK, linewidth=1.2)
            rows.append({"metric": "judge_identity", "change": change, **vars(share)})
        axes[-1].set(title="Judge: is the subject", xlabel="share of pictures (simulated judge)", xlim=(0, 1.05))
        axes[-1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, pd.DataFrame(rows)


def metric_figure(
    compared: Mapping[str, pd.DataFrame], measures: Mapping[str, str], title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Draw measures of every metric with their intervals, a panel a measure.

    Args:
        compared: what the pictures were ("renders", …) -> table of `compare_metrics`; at most two.
        measures: measure -> the panel's title.
        title: above the figure.

    Returns:
        The figure, and one row a mark: pictures, metric, measure, value, low, high, n.
    """
    data = pd.concat([table.assign(pictures=name) for name, table in compared.items()], ignore_index=True)
    data = data[data["measure"].isin(measures)]
    metrics = list(dict.fromkeys(data["metric"]))
    styles = dict(zip(compared, (("o", INK), ("D", GREEN)), strict=False))
    with matplotlib.rc_context(HOUSE_STYLE):
        size = (2.2 + 3.2 * len(measures), 0.42 * len(metrics) + 1.4)
        figure = NotebookFigure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for (measure, label), axis in zip(measures.items(), axes, strict=True):
            for shift, (pictures, (marker, colour)) in zip((-0.13, 0.13), styles.items(), strict=False):
                part = data[(data["measure"] == measure) & (data["pictures"] == pictures)].set_index("metric")
                part = part.reindex(metrics)
                places = np.arange(len(metrics)) + shift
                whiskers = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(0)
                axis.errorbar(part["value"], places, xerr=whiskers, fmt=marker, color=colour, capsize=2, label=pictures)
            axis.set(title=label)
            axis.grid(False, axis="y")
            guessing = 1.0 if measure == "pose_cost" else 0.5
            axis.axvline(guessing, color=INK, linestyle=":", linewidth=1)
        axes[0].set_yticks(range(len(metrics)), [LABELS[metric] for metric in metrics])
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, data


def pose_figure(table: pd.DataFrame, column: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw a metric by activity, against how much of the silhouette stayed, and against how much changed around it.

    Args:
        table: of `subject_changes.score_pairs`; pairs that change the pose of a subject at rest are drawn.
        column: the metric.
        title: above the figure.

    Returns:
        The figure, and one row an activity: activity, n, and means: the metric, mask_iou, changed_outside.
    """
    poses = table[(table["change"] == "pose") & (table["reference_activity"] == "none")]
    by_activity = poses.groupby("activity")[[column, "mask_iou", "changed_outside"]]
    means = by_activity.mean().assign(n=by_activity.size()).sort_values(column).reset_index()
    panels = {
        "mask_iou": "silhouette that stayed (IoU of the true masks)",
        "changed_outside": "changed around the subject",
    }
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(11.5, 4.2), layout="constrained")
        ranks, *scatters = figure.subplots(1, 3)
        ranks.plot(means[column], means["activity"], "o", color=SAME_COLOUR)
        ranks.set(title="Activities, from the lowest", xlabel=f"mean {LABELS[column]}")
        for (quantity, label), axis in zip(panels.items(), scatters, strict=True):
            axis.scatter(poses[quantity], poses[column], s=12, color=GREY, alpha=0.5, label="pairs")
            axis.scatter(means[quantity], means[column], s=46, color=SAME_COLOUR, label="means of activities")
            axis.set(xlabel=label, ylabel=LABELS[column], title="Pose" if quantity == "mask_iou" else "Things")
        scatters[1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.legend(*scatters[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, means
