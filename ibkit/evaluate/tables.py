"""Tables of results, for people: arms as rows, metrics as columns, each cell a mean with its interval.

A difference between two arms is called one only where its paired interval says so, after Holm's correction for all
metrics but the primary one of text and of subject fidelity (`stats.primary_metrics`). Every table is written three
times: CSV, Markdown and LaTeX. `ibkit tables` makes them of several runs at once, such as one for each subject.
"""

from __future__ import annotations

import difflib
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BASE, REAL, arms_of, label_of
from ibkit.evaluate.claims import load_scores
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.stats import (
    METRICS,
    as_compared,
    bootstrap_difference,
    check_scores,
    primary_metrics,
    summarise,
)
from ibkit.runs import resolve, write_atomically

HIGHER, LOWER, NOT_TOLD_APART = "higher", "lower", "not told apart"
SEEN_LABELS = {True: "seen in RL", False: "unseen"}
LATEX_SPECIAL = str.maketrans({"%": r"\%", "&": r"\&", "_": r"\_", "λ": r"$\lambda$", "−": "$-$", "–": "--"})


def fidelity(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The paper's tables 2 and 3: every arm on every metric.

    Args:
        scores: a checked score table; rows that the paper does not compare are left out (`stats.as_compared`).
        metrics: columns, by default all that were measured.

    Returns:
        Text table: one row an arm, "value [low, high]" in a column for each metric, and the number of images.

    Raises:
        ScoreError: a metric that the scores do not have.
    """
    return _wide(summarise(as_compared(scores), ("arm",), _asked(scores, metrics)), ["arm"])


def measured(scores: pd.DataFrame) -> list[str]:
    """The metrics that were measured, without the judge's single questions that `judge_text` answers together."""
    parts = (
        ("judge_activity", "judge_pose", "judge_things", "judge_place", "judge_accessory")
        if "judge_text" in scores.columns
        else ()
    )
    return [name for name in METRICS if name in scores.columns and name not in parts and scores[name].notna().any()]


def _asked(scores: pd.DataFrame, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, by default all that were measured.

    Raises:
        ScoreError: the scores have none of that name.
    """
    there = [name for name in METRICS if name in scores.columns and scores[name].notna().any()]
    for name in metrics or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"they have {', '.join(there) or 'none'}."
            raise ScoreError(f"The scores have no metric {name!r}; {hint}")
    return list(metrics or measured(scores))


def by_prompts(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The same apart for prompts that RL was trained on and for unseen ones (the paper's figures 6 to 9).

    Raises:
        ScoreError: the scores do not say which prompts were seen, or lack a metric that was asked for.
    """
    if "seen" not in scores.columns:
        raise ScoreError("The scores have no column seen: they are of an older evaluation; run 03_evaluate again.")
    compared = as_compared(scores)
    compared = compared[compared["seen"].notna()]
    compared = compared.assign(prompts=compared["seen"].astype(bool).map(SEEN_LABELS))
    return _wide(summarise(compared, ("arm", "prompts"), _asked(scores, metrics)), ["arm", "prompts"])


def differences(scores: pd.DataFrame, against: str = "", metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Arms minus one that they are compared with, paired by prompt and noise.

    Args:
        scores: a checked score table.
        against: an arm that all others are compared with; empty = each personalization with the base model and with
            its own tunings.
        metrics: by default all that were measured.

    Returns:
        Tidy table: arm, against, metric, value, low, high (of the 95 % interval), n, primary, and verdict: "higher"
        or "lower" where zero is outside the interval, else "not told apart". For metrics that are not primary, the
        interval that decides is the wider one of Holm's procedure (`holm_sides`).

    Raises:
        ScoreError: no rows of `against`, or a metric that the scores do not have.
    """
    compared, rows, asked = as_compared(scores), [], _asked(scores, metrics)
    there = [name for name in arms_of(compared["arm"].unique()) if name != REAL]
    if against and against not in there:
        raise ScoreError(
            f"There are no rows of {against!r} to compare the other arms with; there are: {', '.join(there) or 'none'}."
        )
    primary, verdicts = primary_metrics(scores).values(), {1: HIGHER, -1: LOWER, 0: NOT_TOLD_APART}
    controls = [against] if against else [name for name in there if name != BASE and "+" not in name]
    for control, arm in itertools.product(controls, there):
        if arm == control or not (against or arm == BASE or arm.startswith(f"{control}+")):
            continue
        one, other = (compared[compared["arm"] == name] for name in (control, arm))
        # All that was measured, so that asking for fewer metrics does not change a verdict.
        both = [
            m for m in METRICS if m in {*measured(scores), *asked} and one[m].notna().any() and other[m].notna().any()
        ]

        def at_level(metric: str, level: float, other: pd.DataFrame = other, one: pd.DataFrame = one) -> Interval:
            return bootstrap_difference(other, one, metric, level=level)

        intervals = {metric: at_level(metric, 0.95) for metric in both}
        sides = {metric: intervals[metric].side() for metric in both}
        sides |= holm_sides({metric: intervals[metric] for metric in both if metric not in primary}, at_level)
        for metric in (metric for metric in asked if metric in both):
            row = {"arm": arm, "against": control, "metric": metric, **vars(intervals[metric])}
            rows.append(row | {"primary": metric in primary, "verdict": verdicts[sides[metric]]})
    columns = ["arm", "against", "metric", "value", "low", "high", "n", "primary", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def holm_sides(intervals: Mapping[str, Interval], at_level: Callable[[str, float], Interval]) -> dict[str, int]:
    """On which side of zero each of several intervals lies, with 5 % false verdicts for all of them together.

    Holm 1979, by intervals instead of p-values: with m metrics left, those whose interval at level 1 − 0.05/m lies on
    one side of zero are told apart and leave, until none leaves.

    Args:
        intervals: name -> its interval at 95 %.
        at_level: from a name and a level to its interval.

    Returns:
        name -> 1 above, −1 below, 0 not told apart.
    """
    left, sides = [name for name in intervals if intervals[name].side()], dict.fromkeys(intervals, 0)
    n_left = len(intervals)
    while left:
        found = {name: at_level(name, 1 - 0.05 / n_left).side() for name in left}
        told_apart = {name: side for name, side in found.items() if side}
        if not told_apart:
            break
        sides |= told_apart
        left, n_left = [name for name in left if name not in told_apart], n_left - len(told_apart)
    return sides


def differences_in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`differences` for people: one row an arm and metric, the interval written out, and the verdict."""
    return pd.DataFrame(
        {
            "Method": table["arm"].map(label_of),
            "Against": table["against"].map(label_of),
            "Metric": [METRICS[name].label for name in table["metric"]],
            "Difference [95 %]": [_cell(row, sign=True) for row in table.itertuples()],
            "Verdict": [f"{row.verdict}{'' if row.primary else ' (Holm)'}" for row in table.itertuples()],
            "n": table["n"],
        }
    )


def confirmed(table: pd.DataFrame, rewards: Collection[str]) -> str:
    """Whether measures that were not optimized rose with the rewards, in words.

    Args:
        table: from `differences`: a tuned arm against what it started from, a row a metric.
        rewards: the columns of what RL was trained on, of the text and of the subject.

    Returns:
        Sentences: is it certain that the rewards rose, of which other metrics of the same axes it is, and what follows.
    """
    verdicts = table.set_index("metric")["verdict"]
    said = {HIGHER: "rose", LOWER: "fell", NOT_TOLD_APART: "may have risen or not"}
    optimized = ", ".join(sorted(rewards))
    unknown = sorted(set(rewards) - set(verdicts.index))
    others = [name for name in sorted(rewards) if name in verdicts.index and verdicts[name] != HIGHER]
    # The class is shown before RL already: it has no gain to confirm.
    axes = {METRICS[name].kind for name in rewards}
    apart = [name for name in verdicts.index if METRICS[name].kind in axes and name not in {"judge_class", *rewards}]
    risen = [name for name in apart if verdicts[name] == HIGHER]
    rest = [f"{name} ({verdicts[name]})" for name in apart if name not in risen]
    named = (
        f"Not optimized, and higher: {', '.join(risen) or 'none'}; "
        f"not optimized, and not certain to be higher: {', '.join(rest) or 'none'}."
    )
    if unknown:
        return f"Optimized: {optimized}; {', '.join(unknown)} was not measured, so whether it rose is unknown. {named}"
    if others:
        of_each = "; ".join(f"{name} {said[verdicts[name]]} ({verdicts[name]})" for name in others)
        return f"Optimized: {optimized}, but {of_each}: no gain is certain, so none can be confirmed. {named}"
    kinds = " and ".join(kind for kind in ("text", "subject") if kind in axes)
    unwatched = sorted(axes - {METRICS[name].kind for name in apart})
    if unwatched:
        what = " and ".join(unwatched)
        return f"Optimized, and higher: {optimized}. {named} Nothing else measures the {what}: not confirmed."
    say = "All of the others confirm" if not rest else "Some of the others confirm" if risen else "None confirms"
    return f"Optimized, and higher: {optimized}. {named} {say} the gain in {kinds}."


def as_markdown(table: pd.DataFrame) -> str:
    """A text table in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def as_latex(table: pd.DataFrame) -> str:
    """A text table as a LaTeX tabular, with booktabs' rules."""
    rows = [" & ".join(str(cell).translate(LATEX_SPECIAL) for cell in row) + r" \\" for row in table.to_numpy()]
    head = " & ".join(str(name).translate(LATEX_SPECIAL) for name in table.columns) + r" \\"
    lines = [rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def in_all_formats(table: pd.DataFrame) -> dict[str, str]:
    """The table as text, by the suffix of its file: csv, md, tex."""
    return {"csv": table.to_csv(index=False), "md": as_markdown(table), "tex": as_latex(table)}


def all_tables(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Name -> text table: `fidelity`; `differences`, where there is a personalized arm and another; `seen_and_unseen`,
    where both kinds were drawn.
    """
    found, gaps = {"fidelity": fidelity(scores)}, differences(scores)
    if len(gaps):
        found["differences"] = differences_in_words(gaps)
    if "seen" in scores.columns and as_compared(scores)["seen"].dropna().nunique() == 2:
        found["seen_and_unseen"] = by_prompts(scores)
    return found


def _wide(summary: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row for each cell of `by`, in the order of arms; n is that of the row's first metric."""
    metrics = [name for name in METRICS if name in set(summary["metric"])]
    rows = []
    for arm in arms_of(summary["arm"].unique()):
        for cell, part in summary[summary["arm"] == arm].groupby(by, sort=False):
            found = {row.metric: row for row in part.itertuples()}
            labels = {"Method": label_of(arm)} | {
                n.capitalize(): x for n, x in zip(by, cell, strict=True) if n != "arm"
            }
            values = {METRICS[name].label: _cell(found[name]) if name in found else "–" for name in metrics}
            rows.append(labels | values | {"n": part["n"].max()})
    return pd.DataFrame(rows)


def _cell(row, sign: bool = False) -> str:
    value, low, high = (METRICS[row.metric].show(x, sign) for x in (row.value, row.low, row.high))
    return f"{value} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


# --- the command -----------------------------------------------------------------------------------------------------


def combine(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The scores of several runs as one table, such as of runs on different subjects.

    Raises:
        ScoreError: a folder has no scores, or two runs evaluated the same image of the same subject and arm.
    """
    return check_scores(pd.concat([load_scores(folder) for folder in folders], ignore_index=True), "the runs together")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit tables`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of evaluated runs, such as one a subject")
    parser.add_argument(
        "--out", default="", metavar="FOLDER",
        help="write the tables there as CSV, Markdown and LaTeX, and all scores, on which `ibkit claims` can be run",
    )  # fmt: skip


def main(arguments: Namespace) -> int:
    """Run `ibkit tables`."""
    scores = combine(arguments.runs)
    tables = all_tables(scores)
    for name, table in tables.items():
        print(f"{name.replace('_', ' ').capitalize()}\n\n{as_markdown(table)}")
    if "differences" not in tables:
        print("No table of differences: it needs a personalized arm, and the base model or a tuning of it.")
    if arguments.out:
        folder = resolve(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        files = {f"{name}.{suffix}": text for name, t in tables.items() for suffix, text in in_all_formats(t).items()}
        files["scores.csv"] = scores.to_csv(index=False)
        for name, text in files.items():
            data = text.encode()
            write_atomically(folder / name, len(data), lambda temporary, data=data: temporary.write_bytes(data))
        print(f"written to {folder}: {', '.join(sorted(files))}")
    return 0
