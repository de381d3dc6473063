"""Tables of results, for people: methods as rows, metrics as columns, each cell a mean with its interval.

A difference between two methods is called one only where its paired interval says so, after Holm's correction for all
metrics but the primary one of text and of subject fidelity (`claims.primary_metrics`). Every table is written three
times: CSV, Markdown and LaTeX. `ibkit tables` makes them of several runs at once, such as one for each subject.
"""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ibkit.errors import ScoreError
from ibkit.evaluate.claims import load_scores, primary_metrics
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.stats import (
    METRICS,
    as_compared,
    bootstrap_difference,
    check_scores,
    in_method_order,
    method_label,
    summarise,
)
from ibkit.runs import resolve, write_atomically

HIGHER, LOWER, NOT_TOLD_APART = "higher", "lower", "not told apart"
SEEN_LABELS = {True: "seen in RL", False: "unseen"}
LATEX_SPECIAL = str.maketrans({"%": r"\%", "&": r"\&", "_": r"\_", "λ": r"$\lambda$", "−": "$-$", "–": "--"})


def fidelity(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The paper's tables 2 and 3: every method on every metric.

    Args:
        scores: a checked score table; rows that the paper does not compare are left out (`stats.as_compared`).
        metrics: columns, by default all that were measured.

    Returns:
        Text table: one row a method, "value [low, high]" in a column for each metric, and the number of images.

    Raises:
        ScoreError: a metric that the scores do not have.
    """
    return _wide(summarise(as_compared(scores), ("method",), _asked(scores, metrics)), ["method"])


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
    return _wide(summarise(compared, ("method", "prompts"), _asked(scores, metrics)), ["method", "prompts"])


def differences(
    scores: pd.DataFrame, against: str = "dreambooth", metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """Every other method minus one, paired by prompt and noise.

    Returns:
        Tidy table: method, against, metric, value, low, high (of the 95 % interval), n, primary, and verdict: "higher"
        or "lower" where zero is outside the interval, else "not told apart". For metrics that are not primary, the
        interval that decides is the wider one of Holm's procedure (`holm_sides`).

    Raises:
        ScoreError: no rows of `against`, or a metric that the scores do not have.
    """
    compared, rows, asked = as_compared(scores), [], _asked(scores, metrics)
    one = compared[compared["method"] == against]
    if one.empty:
        there = ", ".join(in_method_order(compared["method"].unique())) or "none"
        raise ScoreError(f"There are no rows of {against!r} to compare the other methods with; there are: {there}.")
    primary, verdicts = primary_metrics(scores), {1: HIGHER, -1: LOWER, 0: NOT_TOLD_APART}
    for method in in_method_order(set(compared["method"]) - {against, "real"}):
        other = compared[compared["method"] == method]
        # All that was measured, so that asking for fewer metrics does not change a verdict.
        both = [
            m for m in METRICS if m in {*measured(scores), *asked} and one[m].notna().any() and other[m].notna().any()
        ]

        def at_level(metric: str, level: float, other: pd.DataFrame = other) -> Interval:
            return bootstrap_difference(other, one, metric, level=level)

        intervals = {metric: at_level(metric, 0.95) for metric in both}
        sides = {metric: intervals[metric].side() for metric in both}
        sides |= holm_sides({metric: intervals[metric] for metric in both if metric not in primary}, at_level)
        for metric in (metric for metric in asked if metric in both):
            row = {"method": method, "against": against, "metric": metric, **vars(intervals[metric])}
            rows.append(row | {"primary": metric in primary, "verdict": verdicts[sides[metric]]})
    columns = ["method", "against", "metric", "value", "low", "high", "n", "primary", "verdict"]
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
    """`differences` for people: one row a method and metric, the interval written out, and the verdict."""
    return pd.DataFrame(
        {
            "Method": table["method"].map(method_label),
            "Against": table["against"].map(method_label),
            "Metric": [METRICS[name].label for name in table["metric"]],
            "Difference [95 %]": [_cell(row, sign=True) for row in table.itertuples()],
            "Verdict": [f"{row.verdict}{'' if row.primary else ' (Holm)'}" for row in table.itertuples()],
            "n": table["n"],
        }
    )


def confirmed(table: pd.DataFrame, rewards: Collection[str]) -> str:
    """Whether measures of text fidelity that were not optimized rose with the reward, in words.

    Args:
        table: from `differences`: InstructBooth against DreamBooth, a row a metric.
        rewards: what RL was trained on.

    Returns:
        Sentences: did the reward rise, which others rose and which did not, and what follows.
    """
    verdicts = table.set_index("metric")["verdict"]
    reward = ", ".join(sorted(rewards))
    unknown = sorted(set(rewards) - set(verdicts.index))
    flat = [name for name in sorted(rewards) if name in verdicts.index and verdicts[name] != HIGHER]
    # The class is shown before RL already: it has no gain to confirm.
    left_out = {"judge_class", *rewards}
    apart = [name for name in verdicts.index if METRICS[name].kind == "text" and name not in left_out]
    risen = [name for name in apart if verdicts[name] == HIGHER]
    others = [f"{name} ({verdicts[name]})" for name in apart if name not in risen]
    named = (
        f"Not optimized, and higher: {', '.join(risen) or 'none'}; "
        f"not optimized, and not higher: {', '.join(others) or 'none'}."
    )
    if unknown:
        return f"Optimized: {reward}; {', '.join(unknown)} was not measured, so whether it rose is not known. {named}"
    if flat:
        return (
            f"Optimized: {reward}, but {', '.join(f'{name} did not rise ({verdicts[name]})' for name in flat)}: "
            f"there is no gain to confirm. {named}"
        )
    if not apart:
        return f"Optimized, and higher: {reward}. Nothing else measures the text: the gain is not confirmed."
    say = "All of the others confirm" if not others else "Some of the others confirm" if risen else "None confirms"
    return f"Optimized, and higher: {reward}. {named} {say} the gain."


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
    """Name -> text table: `fidelity`; `differences`, where DreamBooth is among the methods; `seen_and_unseen`, where
    both kinds were drawn.
    """
    found = {"fidelity": fidelity(scores)}
    if "dreambooth" in set(as_compared(scores)["method"]):
        found["differences"] = differences_in_words(differences(scores))
    if "seen" in scores.columns and as_compared(scores)["seen"].dropna().nunique() == 2:
        found["seen_and_unseen"] = by_prompts(scores)
    return found


def _wide(summary: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row for each cell of `by`, in the order of methods; n is that of the row's first metric."""
    metrics = [name for name in METRICS if name in set(summary["metric"])]
    rows = []
    for method in in_method_order(summary["method"].unique()):
        for cell, part in summary[summary["method"] == method].groupby(by, sort=False):
            found = {row.metric: row for row in part.itertuples()}
            labels = dict(zip(by, cell, strict=True)) | {"method": method_label(method)}
            values = {METRICS[name].label: _cell(found[name]) if name in found else "–" for name in metrics}
            rows.append({name.capitalize(): label for name, label in labels.items()} | values | {"n": part["n"].max()})
    return pd.DataFrame(rows)


def _cell(row, sign: bool = False) -> str:
    value, low, high = (METRICS[row.metric].show(x, sign) for x in (row.value, row.low, row.high))
    return f"{value} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


# --- the command -----------------------------------------------------------------------------------------------------


def combine(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The scores of several runs as one table, such as of runs on different subjects.

    Raises:
        ScoreError: a folder has no scores, or two runs evaluated the same image of the same subject and method.
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
        print("No table of differences: it sets the other methods beside DreamBooth, of which there are no rows.")
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
