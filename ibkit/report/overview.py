"""What stands first in a report, and what its captions say: the headline, the facts, figures and rows over all runs."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibkit.evaluate import figures
from ibkit.evaluate.arms import BASE, REAL, arms_of, label_of
from ibkit.evaluate.stats import METRICS, SEEDS, as_compared, bootstrap_difference, primary_metrics
from ibkit.report.gather import Gathered

MOST_BARS = 12  # prompts of a bar chart


@dataclass(frozen=True)
class Headline:
    """One metric of one chain: from what it started at, to what, and the difference with its interval."""

    arm: str
    start: str
    metric: str
    before: str
    after: str
    difference: str


def headline(scores: pd.DataFrame) -> list[Headline]:
    """What each chain's last method changed, by the primary metrics of text and subject; paired, 95 % intervals."""
    rows, found = as_compared(scores), []
    arms = [arm for arm in arms_of(rows["arm"].unique()) if arm not in (BASE, REAL)]
    tuned = [arm for arm in arms if "+" in arm]
    for arm in tuned or arms:
        start = arm.rpartition("+")[0] or BASE
        one, other = rows[rows["arm"] == arm], rows[rows["arm"] == start]
        for metric in primary_metrics(scores).values():
            if other.empty or one[metric].isna().all() or other[metric].isna().all():
                continue
            gap, show = bootstrap_difference(one, other, metric), METRICS[metric].show
            unit = " points" if METRICS[metric].is_share else ""
            difference = f"{show(gap.value, True)}{unit} [{show(gap.low, True)}, {show(gap.high, True)}]"
            before, after = (show(table[metric].mean()) for table in (other, one))
            found.append(Headline(label_of(arm), label_of(start), METRICS[metric].label, before, after, difference))
    return found


def facts(runs: Gathered) -> str:
    """What a caption must say: model, subjects, prompts, number of pictures, seeds, steps, and kind of intervals."""
    said = [f"Model: {', '.join(runs.models) or 'not recorded'}."]
    if (scores := runs.scores) is not None:
        rows = as_compared(scores)
        rows = rows[rows["arm"] != REAL]
        n = rows.groupby("arm").size()
        of = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
        counted = [
            _count(rows[name].nunique(), what) for name, what in (("subject", "subject"), ("prompt_id", "prompt"))
        ]
        said.append(f"{', '.join(counted)}, n = {of} images a method.")
        for name, what in zip(SEEDS, ("Personalization", "Tuning"), strict=True):
            if seeds := sorted(map(int, rows[name].dropna().unique())):
                said.append(f"{what} seeds: {', '.join(map(str, seeds))}.")
    for kind, setting, unit in (("01_personalize", "n_steps", "steps"), ("02_rl_finetune", "n_epochs", "epochs")):
        lengths: dict[int, set[str]] = {}
        for stage in (stage for stage in runs.stages if stage.kind == kind):
            if length := (stage.metrics.get("config") or {}).get(setting):
                method = str(stage.parameters.get("method", kind))
                lengths.setdefault(int(length), set()).add(label_of(method))
        if lengths:
            each = [f"{length} ({', '.join(sorted(methods))})" for length, methods in sorted(lengths.items())]
            said.append(f"{unit.capitalize()}: {'; '.join(each)}.")
    said.append("Intervals: 95 %, bootstrap over subjects, prompts, images and trainings.")
    return " ".join(said)


def drawings(runs: Gathered, titles: bool = False) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Name -> figure and its table, drawn of all runs together; what was not measured is left out.

    Args:
        titles: whether each has its name burnt in.
    """
    found: dict[str, Any] = {}
    beside: list[str] = []
    if runs.scores is not None:
        rows, axes = as_compared(runs.scores), primary_metrics(runs.scores)
        rows = rows[rows["arm"] != REAL]
        beside = list(rows["arm"].unique())
        if {"text", "subject"} <= axes.keys():
            found["plane"] = figures.fidelity_plane(
                rows, axes["text"], axes["subject"], "Text against subject fidelity" * titles
            )
        if "text" in axes and "text" in rows and rows["prompt_id"].nunique() <= MOST_BARS:
            found["bars"] = figures.prompt_bars(rows, axes["text"], "Prompt by prompt" * titles)
    if len(runs.histories) and runs.histories.groupby(["run", "arm", "subject", *SEEDS]).ngroups > 1:
        found["trainings"] = figures.training_curves(runs.histories, "While they learn" * titles, beside)
    return found


def label_of_metric(name: str) -> str:
    """A metric's name for people; a reward that is none keeps its own."""
    return METRICS[name].label if name in METRICS else name


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
