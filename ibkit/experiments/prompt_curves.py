"""What the arms of `prompt_ablation` came to: images until half of the lost reward is won back, and the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BLUE, ORANGE
from ibkit.evaluate.figures import HOUSE_STYLE, INK, NotebookFigure
from ibkit.evaluate.intervals import bootstrap_statistic
from ibkit.experiments.prompt_ablation import ARMS, RUN_KEYS

AXES = {"n_images": "images made", "n_identifier_images": "images made with the identifier"}
# Half of the reward that personalization lost is to be won back; reached when this many epochs are there on average.
SHARE, WINDOW = 0.5, 3
# Of runs, below which an interval is not given: the t-quantiles of fewer make it too wide to say anything.
MIN_PAIRS = 6


# --- sample efficiency ----------------------------------------------------------------------------------------------


def images_to_reach(images: Sequence[float], values: Sequence[float], level: float) -> float:
    """Images made until a curve is at `level`, by the mean of the newest `WINDOW` rows; infinite if it never is.

    Between two rows the mean is taken to be linear.

    Args:
        images, values: (E,), in the order of training.
    """
    mean = pd.Series(values, dtype=float).rolling(WINDOW, min_periods=1).mean().to_numpy()
    there = np.flatnonzero(mean >= level)
    if not len(there):
        return math.inf
    i = there[0]
    if i == 0:
        return float(images[0])
    way = (level - mean[i - 1]) / (mean[i] - mean[i - 1])
    return float(images[i - 1] + way * (images[i] - images[i - 1]))


def mean_gain(images: Sequence[float], values: Sequence[float], horizon: float) -> float:
    """Area between a curve and its start, over the images up to `horizon`, divided by `horizon`: the mean gain."""
    x, y = np.asarray(images, dtype=float), np.asarray(values, dtype=float)
    inside = x < horizon
    x_cut = np.append(x[inside], horizon)
    y_cut = np.append(y[inside], np.interp(horizon, x, y))
    return float(np.trapezoid(y_cut, x_cut) / horizon - y[0])


def pair_runs(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Set each run of `arm` beside the run of "both" from the same personalized model with the same RL seed.

    Args:
        table: prompt_kinds.csv.

    Returns:
        One row a pair, with `RUN_KEYS`; the start, the level to reach and the horizon (images of the shorter run);
        `both` and `other`, images to reach the level, infinite where a run never does; `gain_both` and `gain_other`
        (`mean_gain`) of the reward, `activity_both` and `activity_other` of the judge's share.
        A pair in which personalization lost no reward has nothing to win back and is left out.

    Raises:
        ScoreError: a column is missing, or a run stands there twice.
    """
    axis = ARMS[arm].axis
    _check_columns(table, {"arm", "epoch", "reward_identifier", "judge_activity", "reward_base", axis, *RUN_KEYS})
    if table.duplicated(["arm", *RUN_KEYS, "epoch"]).any():
        raise ScoreError("the table of prompt kinds holds an epoch of a run twice: keep one of each.")
    rows = []
    for keys, part in table.sort_values("epoch").groupby(list(RUN_KEYS), sort=True):
        curves = {name: part[part["arm"] == name] for name in ("both", arm)}
        if any(len(curve) < 2 for curve in curves.values()):
            continue
        start = float(np.mean([curve["reward_identifier"].iloc[0] for curve in curves.values()]))
        level = start + SHARE * (float(part["reward_base"].iloc[0]) - start)
        if level <= start:
            continue
        horizon = float(min(curve[axis].iloc[-1] for curve in curves.values()))
        row = dict(zip(RUN_KEYS, keys, strict=True)) | {"start": start, "level": level, "horizon": horizon}
        for name, curve in zip(("both", "other"), curves.values(), strict=True):
            x, y = curve[axis].to_numpy(float), curve["reward_identifier"].to_numpy(float)
            n = images_to_reach(x, y, level)
            shown = curve["judge_activity"].to_numpy(float)
            row |= {name: n if n <= horizon else math.inf, f"gain_{name}": mean_gain(x, y, horizon)}
            row |= {f"activity_{name}": mean_gain(x, shown, horizon)}
        rows.append(row)
    columns = [*RUN_KEYS, "start", "level", "horizon"]
    columns += [f"{kind}{name}" for name in ("both", "other") for kind in ("", "gain_", "activity_")]
    return pd.DataFrame(rows, columns=columns)


def efficiency(table: pd.DataFrame, n_resamples: int = 10_000) -> pd.DataFrame:
    """How many times as many images the identifier prompts alone need as both kinds, and by how much less they gain.

    For each number of DreamBooth steps, and each arm with the identifier only against "both" along what the two hold
    equal (`Arm.axis`):

        ratio = mean of min(n_other, horizon) / mean of min(n_both, horizon)

    over pairs of runs from the same model with the same RL seed, n the images until half of the lost reward is won
    back (`images_to_reach`). Above 1, both kinds are faster. A run that never gets there counts with its horizon, as in
    a restricted mean survival time: the ratio then says less than the truth about the slower arm, never more, as long
    as only the slower arm's runs are cut. Where no run of either arm gets there, there is no ratio. The difference of
    mean gains (`mean_gain`, both - other) needs no level and is always there, for the reward that was trained and for
    the activity that the judge sees, which was not.

    Returns:
        One row a comparison: dreambooth_steps, arm, axis, n_pairs, reached_both, reached_other, ratio, ratio_low,
        ratio_high, gain_difference, gain_low, gain_high, activity_difference, activity_low, activity_high, verdict (of
        the ratio). Bounds are of a paired 95 % bootstrap over subjects, or over the RL seeds of a single one; missing
        below `MIN_PAIRS` pairs.

    Raises:
        ScoreError: see `pair_runs`.
    """
    rows = []
    for steps, part in table.groupby("dreambooth_steps"):
        for arm, spec in ARMS.items():
            if arm == "both" or (pairs := pair_runs(part, arm)).empty:
                continue
            cut = {name: np.minimum(pairs[name], pairs["horizon"]).to_numpy() for name in ("both", "other")}
            reached = {name: int(np.isfinite(pairs[name]).sum()) for name in ("both", "other")}
            ratio = cut["other"].mean() / cut["both"].mean() if sum(reached.values()) else math.nan
            row = {"dreambooth_steps": steps, "arm": arm, "axis": spec.axis, "n_pairs": len(pairs)}
            row |= {f"reached_{name}": count for name, count in reached.items()}
            row |= {"ratio": ratio, "ratio_low": math.nan, "ratio_high": math.nan}
            options = {"groups": list(pairs["class_noun"]), "n_resamples": n_resamples}
            if len(pairs) >= MIN_PAIRS and sum(reached.values()):
                # Of the logarithm, whose interval stays above zero.
                interval = bootstrap_statistic(cut, lambda both, other: np.log(other / both), **options)
                row |= {"ratio_low": math.exp(interval.low), "ratio_high": math.exp(interval.high)}
            for kind in ("gain", "activity"):
                gains = {name: pairs[f"{kind}_{name}"].to_numpy() for name in ("both", "other")}
                row |= {f"{kind}_difference": gains["both"].mean() - gains["other"].mean()}
                row |= {f"{kind}_low": math.nan, f"{kind}_high": math.nan}
                if len(pairs) >= MIN_PAIRS:
                    gain = bootstrap_statistic(gains, lambda both, other: both - other, **options)
                    # A share of pictures differs by 1 at the most.
                    most = 1.0 if kind == "activity" else math.inf
                    row |= {f"{kind}_low": max(gain.low, -most), f"{kind}_high": min(gain.high, most)}
            rows.append(row | {"verdict": _verdict(row)})
    return pd.DataFrame(rows)


def kept_by_class(table: pd.DataFrame) -> pd.DataFrame:
    """Of the reward that personalization took from the identifier prompts, the share that the class prompts still have.

    From the first epoch's own pictures, before any update. Near 1 the class prompts can teach what the identifier
    prompts have lost, as InstructBooth's section 2.2 has it; near 0 they have lost as much.

    Args:
        table: prompt_kinds.csv.

    Returns:
        One row for each class_noun and dreambooth_steps: rewards `identifier` (all arms), `class` (of "both") and
        `base`, and `kept` = (class - identifier) / (base - identifier), missing where nothing was lost.

    Raises:
        ScoreError: a column is missing.
    """
    kinds = {"identifier": "training_reward_identifier", "class": "training_reward_class", "base": "reward_base"}
    _check_columns(table, {"epoch", "class_noun", "dreambooth_steps", *kinds.values()})
    first = table[table["epoch"] == 0].groupby(["class_noun", "dreambooth_steps"])[list(kinds.values())].mean()
    first = first.set_axis(list(kinds), axis=1)
    lost = first["base"] - first["identifier"]
    return first.assign(kept=((first["class"] - first["identifier"]) / lost).where(lost > 0)).reset_index()


def _check_columns(table: pd.DataFrame, needed: set[str]) -> None:
    if missing := needed - set(table.columns):
        raise ScoreError(f"the table of prompt kinds lacks {', '.join(sorted(missing))}: run 06_prompt_ablation again.")


def _verdict(row: dict) -> str:
    if math.isnan(row["ratio"]):
        return "no run got there: train for more epochs"
    if math.isnan(row["ratio_low"]):
        return "too few runs to say"
    if row["ratio_low"] > 1:
        return "both kinds are faster"
    return "the identifier alone is faster" if row["ratio_high"] < 1 else "not decided"


# --- figures --------------------------------------------------------------------------------------------------------

LABELS = {
    "reward_identifier": "reward, identifier prompts",
    "judge_activity": "activity shown (simulated judge)",
    "judge_identity": "same subject (simulated judge)",
    "monitor": "DINO to the photos",
}


def learning_curves(table: pd.DataFrame, column: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """The paper's figure 16: a row of panels for each subject and number of DreamBooth steps, mean ± standard deviation
    over RL seeds; on the left against all images made, on the right against those with the identifier.

    Args:
        table: prompt_kinds.csv.
        column: one of `MEASURED`. Beside the reward, what the base model gets and the level to reach are marked.
        title: above the figure.

    Returns:
        The figure, and one row a point: subject, dreambooth_steps, arm, rl_seed, epoch, the two axes, value.
    """
    cells = list(table.groupby(["subject", "dreambooth_steps"], sort=False))
    with rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(9.6, 3.1 * len(cells) + 0.9), layout="constrained")
        all_axes = figure.subplots(len(cells), len(AXES), squeeze=False, sharey="row")
        for axes, ((subject, steps), part) in zip(all_axes, cells, strict=True):
            for axis, (x, label) in zip(axes, AXES.items(), strict=True):
                for name in [arm for arm in ARMS if arm in set(part["arm"])]:
                    arm = ARMS[name]
                    seaborn.lineplot(
                        part[part["arm"] == name], x=x, y=column, errorbar="sd", color=arm.colour, linestyle=arm.dash,
                        label=arm.label, legend=False, ax=axis,
                    )  # fmt: skip
                if column == "reward_identifier":
                    start, base = part.loc[part["epoch"] == 0, column].mean(), part["reward_base"].iloc[0]
                    axis.axhline(base, color=INK, lw=1, ls="-", label="base model, class prompts")
                    axis.axhline(
                        start + SHARE * (base - start), color=INK, lw=1, ls=":", label="half of the loss won back"
                    )
                elif column != "monitor":
                    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                    axis.set_ylim(bottom=0)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.set(xlabel=label, ylabel=LABELS[column], title=f"{subject}, {steps} DreamBooth steps")
        handles, names = all_axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    keys = ["subject", "dreambooth_steps", "arm", "rl_seed", "epoch", *AXES]
    return figure, table[[*keys, column]].rename(columns={column: "value"})


def reward_spread(drawn: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """The rewards of single pictures before RL, by prompt: where no picture shows the activity, what ranks them?

    Args:
        drawn: one row a picture: dreambooth_steps, prompt, reward, shown (1 or 0).
        title: above the figure.

    Returns:
        The figure, and `drawn`.
    """
    groups = list(drawn.groupby("dreambooth_steps", sort=False))
    n_prompts = drawn["prompt"].nunique()
    with rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(9.6, 0.45 * n_prompts * len(groups) + 1.6), layout="constrained")
        for axis, (steps, part) in zip(
            figure.subplots(len(groups), 1, squeeze=False, sharex=True)[:, 0], groups, strict=True
        ):
            for shown, colour, label in (
                (0, ORANGE, "no"),
                (1, BLUE, "yes"),
            ):
                others = np.random.get_state()
                np.random.seed(0)  # of the jitter, which seaborn draws from here: equal tables give equal figures
                seaborn.stripplot(
                    part[part["shown"] == shown], x="reward", y="prompt", order=list(part["prompt"].unique()),
                    color=colour, marker="X" if not shown else "o", size=6, alpha=0.7, label=label, legend=False,
                    ax=axis,
                )  # fmt: skip
                np.random.set_state(others)
            axis.set(title=f"{steps} DreamBooth steps", ylabel="", xlabel="reward")
        handles, names = axis.get_legend_handles_labels()
        first = {name: handle for handle, name in zip(handles, names, strict=True)}
        figure.legend(
            first.values(), first.keys(), title="activity shown (simulated judge)", loc="outside lower center", ncols=2
        )
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, drawn
