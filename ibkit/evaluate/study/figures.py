"""Figures of the human study, in the house style of `ibkit.evaluate.figures`: tidy data in, `(figure, data)` out.

Every function takes a `title` to write above its figure; `who` names the raters, such as "seven simulated raters".
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.evaluate.arms import GREY, arms_of
from ibkit.evaluate.figures import FAINT, INK, house_figure, whiskers
from ibkit.evaluate.published import published
from ibkit.evaluate.study.items import QUESTIONS
from ibkit.evaluate.study.ratings import Task

FIDELITY = {"text": "Text fidelity", "subject": "Subject fidelity"}
COUNTERPART = {"text": "people_text", "subject": "people_subject"}  # what published.py calls table 1's columns
PREFERRED_TWICE = 2 / 3  # "at least twice as much as baselines" (InstructBooth, section 3.3)


def questionnaire(
    tasks: Sequence[Task], references: Mapping[str, Sequence[Image.Image]], title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Show what a rater sees: a row for each task, with its question, the reference photos and the pictures.

    Args:
        tasks: from `ratings.tasks_of`, such as the first one of each question.
        references: subject -> its photos; three at most are drawn.

    Returns:
        The figure, and one row a task: question, item, shown, text.
    """
    with house_figure(8.4, 1.75 * len(tasks) + 0.4, title) as figure:
        for task, row in zip(tasks, figure.subfigures(len(tasks), 1, squeeze=False).flat, strict=True):
            asked = QUESTIONS[task.question]
            axes = row.subplots(1, 6, width_ratios=[2.6, 0.8, 0.8, 0.8, 1.3, 1.3])
            for axis in axes:
                axis.set_axis_off()
            words = [textwrap.fill(asked.ask, 30)]
            if task.question != "subject":
                words.append(textwrap.fill(f"“{task.text}”", 30))
            axes[0].text(0, 0.5, "\n\n".join(words), va="center", fontsize=9, transform=axes[0].transAxes)
            photos = references[task.subject] if task.question != "text" else []
            for axis, photo in zip(axes[1:4], photos[:3], strict=False):
                axis.imshow(photo, interpolation="nearest")
            if len(photos):
                axes[2].set_title("reference photos", loc="center", fontsize=8)
            labels = asked.labels if len(task.images) == 2 else (f"{asked.labels[0]} or {asked.labels[1]}?",)
            for axis, path, label in zip(axes[4:], task.images, labels, strict=False):
                axis.imshow(read_rgb(path), interpolation="nearest")
                axis.set_title(label, loc="center", fontsize=8)
    rows = [(task.question, task.item, task.shown, task.text) for task in tasks]
    return figure, pd.DataFrame(rows, columns=["question", "item", "shown", "text"])


def fidelity_bars(shares: pd.DataFrame, who: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw table 1: shares of "yes" by the majority (`votes.shares`), with 95 % intervals, beside the paper's; the data
    have a column `paper` (missing where the paper has no such number).
    """
    numbers = [published(row.arm, COUNTERPART[row.question]) for row in shares.itertuples()]
    data = shares.assign(paper=[found[0].value if found else np.nan for found in numbers])
    arms = arms_of(data["arm"])
    with house_figure(8.4, 3.6, title) as figure:
        for axis, (question, name) in zip(figure.subplots(1, 2, sharey=True), FIDELITY.items(), strict=True):
            part = data[data["question"] == question].set_index("arm").reindex(list(arms))
            x = np.arange(len(arms))
            axis.bar(
                x, part["value"], 0.6, edgecolor="w", color=[arm.colour for arm in arms.values()],
                hatch=[arm.hatch for arm in arms.values()],
            )  # fmt: skip
            axis.errorbar(x, part["value"], yerr=whiskers(part), fmt="none", color=INK, capsize=3, elinewidth=1.2)
            axis.plot(x, part["paper"], "D", color="white", markeredgecolor=INK, markersize=7)
            axis.set_xticks(x, [textwrap.fill(arm.label, 14) for arm in arms.values()])
            axis.grid(False, axis="x")
            axis.set(title=name, ylim=(0, 1.06))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.axes[0].set_ylabel("share of pictures, majority says yes")
        ours = Line2D([], [], marker="s", color=FAINT, markersize=9, label=f"ours: {who}")
        papers = Line2D([], [], marker="D", color="white", label="paper, table 1: people, SD 1.5")
        for mark in (ours, papers):
            mark.set(linestyle="", markeredgecolor=INK)
        figure.legend(handles=[ours, papers], loc="outside lower center", ncols=2)
    return figure, data


def preference_bars(preferences: pd.DataFrame, who: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw figure 4: for every pair of arms, how often the majority prefers the one and the other
    (`votes.preferences`).

    The newer arm of a pair (in the kit's order) stands on the left, so that InstructBooth leads wherever it takes
    part. The whisker is the 95 % interval of the left arm's share.
    """
    outcomes = preferences.set_index(["arm_a", "arm_b", "outcome"])
    pairs = preferences[["arm_a", "arm_b"]].drop_duplicates()
    arms = arms_of([*pairs["arm_a"], *pairs["arm_b"]])
    pairs = sorted(pairs.itertuples(index=False), key=lambda p: (-arms[p.arm_b].order, -arms[p.arm_a].order))
    with house_figure(8.4, 0.75 * len(pairs) + 1.5, title) as figure:
        axis = figure.subplots()
        for y, pair in enumerate(pairs):
            part = outcomes.loc[(pair.arm_a, pair.arm_b)]
            left = 0.0
            colours = {"b": arms[pair.arm_b].colour, "tie": FAINT, "a": arms[pair.arm_a].colour}
            for outcome, colour in colours.items():
                width = part.loc[outcome, "value"]
                axis.barh(y, width, 0.56, left=left, color=colour)
                if width >= 0.08:
                    ink = INK if outcome == "tie" else "white"
                    axis.text(left + width / 2, y, f"{width:.0%}", ha="center", va="center", color=ink, fontsize=9)
                left += width
            row = part.loc["b"]
            axis.errorbar(row["value"], y + 0.36, xerr=whiskers(row), fmt="none", color=INK, capsize=3, elinewidth=1.2)
        axis.axvline(PREFERRED_TWICE, color=INK, ls=":", lw=1.2)
        right = axis.secondary_yaxis("right")
        right.spines["right"].set_visible(False)
        for side, end in ((axis, "arm_b"), (right, "arm_a")):
            side.set_yticks(range(len(pairs)), [arms[getattr(pair, end)].label for pair in pairs])
            side.tick_params(length=0)
        axis.grid(False)
        axis.set(xlim=(0, 1), ylim=(len(pairs) - 0.45, -0.5), xlabel=f"share of pairs; dotted: two to one ({who})")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, preferences


def agreement_bars(decided: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw how far the raters agreed (`votes.majority`): the share of each question's items by the votes for and
    against the majority.

    Returns:
        The figure, and one row a bar: question, agreeing (raters on the larger side), n (raters), items, share.
    """
    agreeing = np.maximum(decided["n_first"], decided["n_raters"] - decided["n_first"])
    data = decided.assign(agreeing=agreeing, n=decided["n_raters"]).groupby(["question", "agreeing", "n"]).size()
    data = data.rename("items").reset_index()
    data["share"] = data["items"] / data.groupby("question")["items"].transform("sum")
    with house_figure(8.4, 2.8, title) as figure:
        axes = figure.subplots(1, len(QUESTIONS), sharey=True)
        for axis, question in zip(axes, QUESTIONS, strict=True):
            part = data[data["question"] == question].sort_values(["n", "agreeing"])
            labels = [f"{row.agreeing} : {row.n - row.agreeing}" for row in part.itertuples()]
            axis.bar(labels, part["share"], 0.7, color=GREY)
            axis.set(title=question.capitalize(), xlabel="votes")
            axis.grid(False, axis="x")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[0].set_ylabel("share of items")
    return figure, data


def strength_dots(strengths: pd.DataFrame, who: str, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw Bradley–Terry strengths (`agreement.strengths`) with 95 % intervals."""
    arms = arms_of(strengths["arm"])
    rows = strengths.set_index("arm").loc[list(arms)]
    with house_figure(6.4, 0.5 * len(rows) + 1.3, title) as figure:
        axis = figure.subplots()
        for y, (arm, row) in enumerate(rows.iterrows()):
            axis.errorbar(
                row["value"], y, xerr=whiskers(row), fmt=arms[arm].marker, color=arms[arm].colour,
                markersize=9, capsize=3, elinewidth=1.4,
            )  # fmt: skip
        axis.axvline(1 / len(rows), color=INK, ls=":", lw=1.2)
        axis.set_yticks(range(len(rows)), [arm.label for arm in arms.values()])
        axis.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel=f"strength; dotted: all alike ({who})")
    return figure, strengths
