"""What a table of `ibkit.experiments.subject_changes.score_pairs` says about a subject metric, and its figures.

In every function `table` is such a table, and `column` (or each of `columns`) is a metric in it. Individuals are what
varies, so every interval is a 95 % interval that resamples subjects with all their pairs. Metrics have different
scales; what is compared between metrics here does not depend on a scale.

Shapes: N references, R resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import rankdata

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BLUE, GREEN, GREY, ORANGE
from ibkit.evaluate.figures import INK, house_figure, whiskers
from ibkit.evaluate.intervals import Interval, bootstrap_statistic, bootstrap_weighted, mean_interval
from ibkit.evaluate.metric_agreement import pairwise_wins
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
LARGEST_R = 1 - 1e-9  # Fisher's z of a perfect correlation is infinite


def side_by_side(table: pd.DataFrame, column: str, changes: Sequence[str]) -> pd.DataFrame:
    """Scores of several changes of the same references: index (class_noun, subject, pair), one column a change. A
    ScoreError where no reference has all of the changes.
    """
    wide = table.pivot(index=["class_noun", "subject", "pair"], columns="change", values=column)
    wide = wide.reindex(columns=list(changes)).dropna()
    if wide.empty:
        raise ScoreError(f"No reference has the changes {', '.join(changes)}: there is nothing to compare.")
    return wide


def _subjects(wide: pd.DataFrame) -> list[str]:
    return wide.index.get_level_values("subject").tolist()


def subject_auc(table: pd.DataFrame, column: str, same: str, other: str, minus: str = "") -> Interval:
    """AUC of the same subject against another, within each subject's references, as a mean over subjects, with its
    interval and the number of references.

    Args:
        same, other: changes that keep and that replace the subject, such as "pose" and "identity and pose".
        minus: a metric whose AUC on the same pairs is subtracted; empty = none.
    """
    tables = [side_by_side(table, name, (same, other)) for name in (column, minus) if name]
    subjects = _subjects(tables[0])

    def statistic(weights: np.ndarray) -> np.ndarray:
        aucs = [_weighted_auc(wide.to_numpy(), np.array(subjects), weights.astype(float)) for wide in tables]
        return aucs[0] - aucs[1] if minus else aucs[0]

    found = bootstrap_weighted(statistic, subjects, len(subjects))
    return replace(found, low=max(found.low, -1.0 if minus else 0.0), high=min(found.high, 1.0))


def _weighted_auc(values: np.ndarray, subjects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over subjects of the AUC within each, for every row of weights: (N, 2), (N,), (R, N) -> (R,).

    Of a subject's n × n comparisons, n are within a reference. They are easier (same pose, same place), and a resample
    that holds a reference twice would have more of them, so both kinds keep their shares, 1/n and 1 − 1/n. Where a
    resample holds only one reference of a subject, the comparisons across its references are the sample's.
    """
    total = np.zeros(len(weights))
    for subject in np.unique(subjects):
        rows = subjects == subject
        w, wins, n = weights[:, rows], pairwise_wins(values[rows, :1], values[rows, 1]), rows.sum()
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

    Every metric here scores a picture 1 against itself. 0: the metric does not see pose; above 1: another pose costs
    more than another individual.
    """
    wide = side_by_side(table, column, ("pose", "identity"))
    columns = {name: wide[name].to_numpy() for name in wide}
    return bootstrap_statistic(columns, lambda pose, identity: (1 - pose) / (1 - identity), _subjects(wide))


def misranked(table: pd.DataFrame, column: str, same: str = "pose", other: str = "identity") -> Interval:
    """Share of references for which the same individual, changed otherwise (`same`), scores below another individual in
    the reference's own pose and place; a tie counts a half.
    """
    wide = side_by_side(table, column, (same, other))
    return mean_interval(pairwise_wins(wide[other].to_numpy(), wide[same].to_numpy()), _subjects(wide))


def spearman(x: pd.Series, y: pd.Series, subjects: pd.Series) -> Interval:
    """Spearman's rank correlation; its interval is [−1, 1] where too few pairs have any spread. A constant is a
    ScoreError.
    """
    if x.nunique() < 2 or y.nunique() < 2:
        raise ScoreError("A rank correlation needs values that differ: raise n_pairs.")

    def fisher_z(weights: np.ndarray) -> np.ndarray:
        rows = [np.repeat(np.arange(len(x)), weight) for weight in weights]
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample of equal values has no correlation
            r = [np.corrcoef(rankdata(x.to_numpy()[row]), rankdata(y.to_numpy()[row]))[0, 1] for row in rows]
            return np.arctanh(np.clip(r, -LARGEST_R, LARGEST_R))

    value = float(np.tanh(fisher_z(np.ones((1, len(x)), dtype=np.int64))[0]))
    try:
        found = bootstrap_weighted(fisher_z, subjects.tolist(), len(x))
    except ScoreError:  # so few pairs that resamples without any spread are common
        return Interval(value, -1.0, 1.0, len(x))
    return Interval(value, float(np.tanh(found.low)), float(np.tanh(found.high)), found.n)


def compare_metrics(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Every metric's AUC under a change of pose, place and everything, its cost of pose, and how often it misranks.

    Returns:
        Tidy table: metric, measure (auc_pose, auc_place, auc_everything, each also as the difference to DINO's on the
        same pairs: auc_pose_over_dino, …; pose_cost; misranked), value, low, high, n.
    """
    measures: dict[str, Callable[..., Interval]] = {}
    for name, (same, other) in CONTRASTS.items():
        measures[f"auc_{name}"] = partial(subject_auc, table, same=same, other=other)
        measures[f"auc_{name}_over_dino"] = partial(subject_auc, table, same=same, other=other, minus="dino")
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

    Returns:
        The figure, and one row for each metric and change: metric, change, n, low, q1, median, q3, high (whiskers at
        5 and 95 %); for judge_identity: value, low and high of the share's interval.
    """
    changes = [change for change in CHANGES if change in set(table["change"])]
    colours = {change: BLUE if change in SAME_SUBJECT else ORANGE for change in changes}
    rows = []
    with house_figure(4.5 + 2.9 * len(columns), 0.42 * len(changes) + 1.3, title) as figure:
        *axes, judged = figure.subplots(1, len(columns) + 1, sharey=True)
        for column, axis in zip(columns, axes, strict=True):
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
            share = mean_interval(part["judge_identity"].to_numpy(), part["subject"].tolist())
            judged.barh(place, share.value, 0.6, color=colours[change])
            judged.plot([share.low, share.high], [place, place], color=INK, linewidth=1.2)
            rows.append({"metric": "judge_identity", "change": change, **vars(share)})
        judged.set(title="Judge: is the subject", xlabel="share of pictures (simulated judge)", xlim=(0, 1.05))
        judged.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, pd.DataFrame(rows)


def metric_figure(
    compared: Mapping[str, pd.DataFrame], measures: Mapping[str, str], title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Draw measures of every metric with their intervals, a panel a measure.

    Args:
        compared: what the pictures were ("renders", …) -> table of `compare_metrics`; at most two.
        measures: measure -> the panel's title.

    Returns:
        The figure, and one row a mark: pictures, metric, measure, value, low, high, n.
    """
    data = pd.concat([table.assign(pictures=name) for name, table in compared.items()], ignore_index=True)
    data = data[data["measure"].isin(measures)]
    metrics = list(dict.fromkeys(data["metric"]))
    styles = dict(zip(compared, (("o", INK, -0.13), ("D", GREEN, 0.13)), strict=False))
    with house_figure(2.2 + 3.2 * len(measures), 0.42 * len(metrics) + 1.4, title) as figure:
        axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for (measure, label), axis in zip(measures.items(), axes, strict=True):
            for pictures, (marker, colour, shift) in styles.items():
                part = data[(data["measure"] == measure) & (data["pictures"] == pictures)].set_index("metric")
                part = part.reindex(metrics)
                places = np.arange(len(metrics)) + shift
                look = {"fmt": marker, "color": colour, "capsize": 2}
                axis.errorbar(part["value"], places, xerr=whiskers(part), label=pictures, **look)
            axis.set(title=label)
            axis.grid(False, axis="y")
            guessing = 1.0 if measure == "pose_cost" else 0.5
            axis.axvline(guessing, color=INK, linestyle=":", linewidth=1)
        axes[0].set_yticks(range(len(metrics)), [LABELS[metric] for metric in metrics])
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure, data


def pose_figure(table: pd.DataFrame, column: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw a metric by activity, against how much of the silhouette stayed, and against how much changed around it.

    Pairs that change the pose of a subject at rest are drawn.

    Returns:
        The figure, and one row an activity: activity, n, and means: the metric, mask_iou, changed_outside.
    """
    poses = table[(table["change"] == "pose") & (table["reference_activity"] == "none")]
    by_activity = poses.groupby("activity")[[column, "mask_iou", "changed_outside"]]
    means = by_activity.mean().assign(n=by_activity.size()).sort_values(column).reset_index()
    panels = {
        "mask_iou": ("Pose", "silhouette that stayed (IoU of the true masks)"),
        "changed_outside": ("Things", "changed around the subject"),
    }
    with house_figure(11.5, 4.2, title) as figure:
        ranks, *scatters = figure.subplots(1, 3)
        ranks.plot(means[column], means["activity"], "o", color=BLUE)
        ranks.set(title="Activities, from the lowest", xlabel=f"mean {LABELS[column]}")
        for (quantity, (panel, label)), axis in zip(panels.items(), scatters, strict=True):
            axis.scatter(poses[quantity], poses[column], s=12, color=GREY, alpha=0.5, label="pairs")
            axis.scatter(means[quantity], means[column], s=46, color=BLUE, label="means of activities")
            axis.set(title=panel, xlabel=label, ylabel=LABELS[column])
        scatters[1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.legend(*scatters[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure, means
