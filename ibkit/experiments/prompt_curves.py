"""Results of `prompt_ablation`: images until half of the lost reward is won back, and learning curves.

In every function `table` is prompt_kinds.csv (`prompt_ablation.arm_rows`).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BLUE, ORANGE
from ibkit.evaluate.figures import INK, house_figure
from ibkit.evaluate.intervals import bootstrap_statistic
from ibkit.experiments.prompt_ablation import ARMS, RUN_KEYS

AXES = {"n_images": "images made", "n_identifier_images": "images made with the identifier"}
SHARE, WINDOW = 0.5, 3  # the share of the lost reward to win back, by the mean over a window of epochs
MIN_PAIRS = 6  # with fewer pairs of runs, t-quantiles make the interval too wide to say anything: none is given


# --- sample efficiency ----------------------------------------------------------------------------------------------


def images_to_reach(images: Sequence[float], values: Sequence[float], level: float) -> float:
    """Images made until the mean of a curve's newest `WINDOW` rows is at `level`; infinite if it never is. Images and
    values are (E,), in the order of training.

    Between two rows the mean is interpolated linearly.
    """
    mean = pd.Series(values, dtype=float).rolling(WINDOW, min_periods=1).mean().to_numpy()
    if not (mean >= level).any():
        return math.inf
    i = int((mean >= level).argmax())
    if i == 0:
        return float(images[0])
    way = (level - mean[i - 1]) / (mean[i] - mean[i - 1])
    return float(images[i - 1] + way * (images[i] - images[i - 1]))


def mean_gain(images: Sequence[float], values: Sequence[float], horizon: float) -> float:
    """Mean of a curve's gain over its start, over the images up to `horizon`."""
    x, y = np.asarray(images, dtype=float), np.asarray(values, dtype=float)
    inside = x < horizon
    x_cut = np.append(x[inside], horizon)
    y_cut = np.append(y[inside], np.interp(horizon, x, y))
    return float(np.trapezoid(y_cut, x_cut) / horizon - y[0])


def pair_runs(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Set each run of `arm` beside the run of "both" from the same personalized model with the same RL seed.

    Returns:
        One row a pair, with `RUN_KEYS`; the start, the level to reach and the horizon (images of the shorter run);
        `both` and `other`, images to reach the level, infinite where a run never does; `gain_both` and `gain_other`
        (`mean_gain`) of the reward, `activity_both` and `activity_other` of the judge's share.
        Pairs in which personalization lost no reward have nothing to win back and are left out.

    Raises:
        ScoreError: a column is missing, or an epoch of a run stands there twice.
    """
    axis = ARMS[arm].axis
    _check_columns(table, {"arm", "epoch", "reward_identifier", "judge_activity", "reward_base", axis, *RUN_KEYS})
    if table.duplicated(["arm", *RUN_KEYS, "epoch"]).any():
        raise ScoreError("the table of prompt kinds holds an epoch of a run twice: keep one of each.")
    rows = []
    for keys, part in table.sort_values("epoch").groupby(list(RUN_KEYS)):
        curves = {name: part[part["arm"] == of_arm] for name, of_arm in (("both", "both"), ("other", arm))}
        if any(len(curve) < 2 for curve in curves.values()):
            continue
        start = float(np.mean([curve["reward_identifier"].iloc[0] for curve in curves.values()]))
        level = start + SHARE * (float(part["reward_base"].iloc[0]) - start)
        if level <= start:
            continue
        horizon = float(min(curve[axis].iloc[-1] for curve in curves.values()))
        row = dict(zip(RUN_KEYS, keys, strict=True)) | {"start": start, "level": level, "horizon": horizon}
        for name, curve in curves.items():
            x, reward, shown = curve[[axis, "reward_identifier", "judge_activity"]].to_numpy(float).T
            n = images_to_reach(x, reward, level)
            row |= {name: n if n <= horizon else math.inf, f"gain_{name}": mean_gain(x, reward, horizon)}
            row |= {f"activity_{name}": mean_gain(x, shown, horizon)}
        rows.append(row)
    columns = [f"{kind}{name}" for name in ("both", "other") for kind in ("", "gain_", "activity_")]
    return pd.DataFrame(rows, columns=[*RUN_KEYS, "start", "level", "horizon", *columns])


def efficiency(table: pd.DataFrame) -> pd.DataFrame:
    """How many times as many images the identifier prompts alone need as both kinds, and by how much less they gain.

    For each number of DreamBooth steps, and each arm with the identifier only against "both" along what the two hold
    equal (`Arm.axis`):

        ratio = mean of min(n_other, horizon) / mean of min(n_both, horizon)

    over pairs of runs from the same model with the same RL seed, n the images until half of the lost reward is won
    back (`images_to_reach`). Above 1, both kinds are faster. A run that never gets there counts with its horizon, as in
    a restricted mean survival time: the ratio then understates how slow the slower arm is, as long as only that arm's
    runs are cut. Where no run of either arm gets there, there is no ratio. The difference of mean gains (`mean_gain`,
    both - other) needs no level and always exists, for the trained reward and for the activity that the judge sees,
    which was not trained.

    Returns:
        One row a comparison: dreambooth_steps, arm, axis, n_pairs, reached_both, reached_other, ratio, ratio_low,
        ratio_high, gain_difference, gain_low, gain_high, activity_difference, activity_low, activity_high, verdict (of
        the ratio). Bounds are of a paired 95 % bootstrap over subjects, or over the RL seeds of a single one; missing
        below `MIN_PAIRS` pairs.
    """
    rows = []
    for steps, part in table.groupby("dreambooth_steps"):
        for arm in (name for name in ARMS if name != "both"):
            pairs = pair_runs(part, arm)
            if pairs.empty:
                continue
            cut = {name: np.minimum(pairs[name], pairs["horizon"]).to_numpy() for name in ("both", "other")}
            row = {"dreambooth_steps": steps, "arm": arm, "axis": ARMS[arm].axis, "n_pairs": len(pairs)}
            row |= {f"reached_{name}": int(np.isfinite(pairs[name]).sum()) for name in cut}
            row |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), math.nan)
            if row["reached_both"] or row["reached_other"]:
                # Of the logarithm, whose interval stays above zero.
                low, high = _bounds(pairs, cut, lambda both, other: np.log(other / both))
                row |= {"ratio": cut["other"].mean() / cut["both"].mean()}
                row |= {"ratio_low": math.exp(low), "ratio_high": math.exp(high)}
            for kind, most in (("gain", math.inf), ("activity", 1.0)):  # a share of pictures differs by 1 at the most
                gains = {name: pairs[f"{kind}_{name}"].to_numpy() for name in cut}
                low, high = _bounds(pairs, gains, lambda both, other: both - other)
                row |= {f"{kind}_difference": gains["both"].mean() - gains["other"].mean()}
                row |= {f"{kind}_low": max(low, -most), f"{kind}_high": min(high, most)}
            rows.append(row | {"verdict": _verdict(row)})
    return pd.DataFrame(rows)


def _bounds(
    pairs: pd.DataFrame, columns: dict[str, np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[float, float]:
    if len(pairs) < MIN_PAIRS:
        return math.nan, math.nan
    found = bootstrap_statistic(columns, statistic, list(pairs["class_noun"]))
    return found.low, found.high


def kept_by_class(table: pd.DataFrame) -> pd.DataFrame:
    """Of the reward that personalization took from the identifier prompts, the share that the class prompts still have.

    From the first epoch's own pictures, before any update. Near 1, the class prompts can teach what the identifier
    prompts have lost, as InstructBooth's section 2.2 says; near 0, they have lost as much.

    Returns:
        One row for each class_noun and dreambooth_steps: rewards `identifier` (all arms), `class` (of "both") and
        `base`, and `kept` = (class - identifier) / (base - identifier), missing where nothing was lost. A
        ScoreError where the table lacks a column.
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
        column: one of `MEASURED`. For the reward, what the base model gets and the level to reach are marked.

    Returns:
        The figure, and one row a point: subject, dreambooth_steps, arm, rl_seed, epoch, the two axes, value.
    """
    cells = list(table.groupby(["subject", "dreambooth_steps"], sort=False))
    with house_figure(9.6, 3.1 * len(cells) + 0.9, title) as figure:
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
                    level = start + SHARE * (base - start)
                    axis.axhline(base, color=INK, lw=1, ls="-", label="base model, class prompts")
                    axis.axhline(level, color=INK, lw=1, ls=":", label="half of the loss won back")
                elif column != "monitor":
                    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                    axis.set_ylim(bottom=0)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.set(xlabel=label, ylabel=LABELS[column], title=f"{subject}, {steps} DreamBooth steps")
        figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    keys = ["subject", "dreambooth_steps", "arm", "rl_seed", "epoch", *AXES]
    return figure, table[[*keys, column]].rename(columns={column: "value"})


def reward_spread(drawn: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """The rewards of single pictures before RL, by prompt: where no picture shows the activity, what ranks them?
    `drawn` has one row a picture: dreambooth_steps, prompt, reward, shown (1 or 0).
    """
    groups = list(drawn.groupby("dreambooth_steps", sort=False))
    with house_figure(9.6, 0.45 * drawn["prompt"].nunique() * len(groups) + 1.6, title) as figure:
        axes = figure.subplots(len(groups), 1, squeeze=False, sharex=True)[:, 0]
        for axis, (steps, part) in zip(axes, groups, strict=True):
            for shown, colour, marker, label in ((0, ORANGE, "X", "no"), (1, BLUE, "o", "yes")):
                others = np.random.get_state()
                np.random.seed(0)  # seaborn draws the jitter from here: equal tables give equal figures
                seaborn.stripplot(
                    part[part["shown"] == shown], x="reward", y="prompt", order=list(part["prompt"].unique()),
                    color=colour, marker=marker, size=6, alpha=0.7, label=label, legend=False, ax=axis,
                )  # fmt: skip
                np.random.set_state(others)
            axis.set(title=f"{steps} DreamBooth steps", ylabel="", xlabel="reward")
        handles, names = axis.get_legend_handles_labels()
        by_name, asked = dict(zip(names, handles, strict=True)), "activity shown (simulated judge)"
        figure.legend(by_name.values(), by_name.keys(), title=asked, loc="outside lower center", ncols=2)
    return figure, drawn
