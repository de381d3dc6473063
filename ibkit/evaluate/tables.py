"""Tables of results, for people: arms as rows, metrics as columns, each cell a mean with its interval.

Two arms are told apart only where their paired interval excludes zero, after Holm's correction for all metrics but the
primary one of text and of subject fidelity (`stats.primary_metrics`). Every table is written three times: CSV, Markdown
and LaTeX. `ibkit tables` makes them of several runs at once, such as one for each subject.
"""

import difflib
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ibkit.errors import ArtifactError, ScoreError
from ibkit.evaluate import stats
from ibkit.evaluate.arms import BASE, REAL, arms_of, label_of
from ibkit.evaluate.claims import SCORES, load_scores
from ibkit.evaluate.intervals import Interval
from ibkit.evaluate.stats import METRICS, NO_SEED, SEEDS, as_compared, check_scores, metrics_in, summarise
from ibkit.runs import write_atomically

HIGHER, LOWER, NOT_TOLD_APART = "higher", "lower", "not told apart"
SEEN_LABELS = {True: "seen in RL", False: "unseen"}
NAMES = ("fidelity", "subjects", "trainings", "differences", "seen_and_unseen")
WRITTEN = {f"{name}.{suffix}" for name in NAMES for suffix in ("csv", "md", "tex")}
LATEX_SPECIAL = str.maketrans({"%": r"\%", "&": r"\&", "_": r"\_", "λ": r"$\lambda$", "−": "$-$", "–": "--"})


def fidelity(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The paper's tables 2 and 3: every arm on every metric.

    Args:
        scores: a checked score table; only rows that the paper compares are used (`stats.as_compared`).
        metrics: columns, by default all that were measured; one that the scores do not have is a ScoreError.

    Returns:
        Text table: one row an arm, "value [low, high]" in a column for each metric, and the number of images.
    """
    return _wide(summarise(as_compared(scores), ("arm",), asked_metrics(scores, metrics)), ["arm"])


def measured(scores: pd.DataFrame) -> list[str]:
    """The metrics that were measured, without the judge's single questions that `judge_text` sums up."""
    parts = {f"judge_{question}" for question in ("activity", "pose", "things", "place", "accessory")}
    return [name for name in metrics_in(scores) if "judge_text" not in scores.columns or name not in parts]


def asked_metrics(scores: pd.DataFrame, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, by default all that were measured; a ScoreError for one that the scores do not have."""
    there = metrics_in(scores)
    for name in metrics or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"they have {', '.join(there) or 'none'}."
            raise ScoreError(f"The scores have no metric {name!r}; {hint}")
    return list(metrics or measured(scores))


def by_prompts(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """`fidelity` apart for prompts that RL was trained on and for unseen ones (the paper's figures 6 to 9); a
    ScoreError where the scores do not say which were seen.
    """
    if "seen" not in scores.columns:
        raise ScoreError("The scores have no column seen: they are of an older evaluation; run 03_evaluate again.")
    compared = as_compared(scores)
    compared = compared[compared["seen"].notna()]
    compared = compared.assign(prompts=compared["seen"].astype(bool).map(SEEN_LABELS))
    return _wide(summarise(compared, ("arm", "prompts"), asked_metrics(scores, metrics)), ["arm", "prompts"])


def differences(scores: pd.DataFrame, against: str = "", metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Differences between arms, paired by prompt and noise.

    Args:
        scores: a checked score table.
        against: the arm to subtract from all others; empty = each personalization from the base model and from its own
            tunings. Without rows of it, as with a metric that the scores do not have, a ScoreError.
        metrics: by default all that were measured.

    Returns:
        Tidy table: arm, against, metric, value, low, high (of the 95 % interval), n, primary, and verdict: "higher"
        or "lower" where zero is outside the interval, else "not told apart". For metrics that are not primary, the
        wider interval of Holm's procedure decides (`holm_sides`).
    """
    compared, rows, asked = as_compared(scores), [], asked_metrics(scores, metrics)
    there = [name for name in arms_of(compared["arm"]) if name != REAL]
    if against and against not in there:
        known = ", ".join(there) or "none"
        raise ScoreError(f"There are no rows of {against!r} to compare the other arms with; there are: {known}.")
    primary, verdicts = stats.primary_metrics(scores).values(), {1: HIGHER, -1: LOWER, 0: NOT_TOLD_APART}
    controls = [against] if against else [name for name in there if name != BASE and "+" not in name]
    for control, arm in itertools.product(controls, there):
        if arm == control or not (against or arm == BASE or arm.startswith(f"{control}+")):
            continue
        one, other = (compared[compared["arm"] == name] for name in (control, arm))
        # All that was measured, so that asking for fewer metrics does not change a verdict.
        both = [m for m in metrics_in(one) if m in {*measured(scores), *asked} and m in metrics_in(other)]
        at_level = partial(stats.bootstrap_difference, other, one)
        intervals = {metric: at_level(metric) for metric in both}
        sides = {metric: intervals[metric].side() for metric in both}
        sides |= holm_sides({metric: intervals[metric] for metric in both if metric not in primary}, at_level)
        for metric in (metric for metric in asked if metric in both):
            row = {"arm": arm, "against": control, "metric": metric, **vars(intervals[metric])}
            rows.append(row | {"primary": metric in primary, "verdict": verdicts[sides[metric]]})
    columns = ["arm", "against", "metric", "value", "low", "high", "n", "primary", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def holm_sides(intervals: Mapping[str, Interval], at_level: Callable[..., Interval]) -> dict[str, int]:
    """On which side of zero each of several intervals lies (1 above, −1 below, 0 not told apart), with 5 % false
    verdicts for all of them together.

    Holm 1979, by intervals instead of p-values: with m metrics left, those whose interval at level 1 − 0.05/m lies on
    one side of zero are told apart and leave, until none leaves.

    Args:
        intervals: name -> its interval at 95 %.
        at_level: (name, level=…) -> its interval at that level.
    """
    left, sides = [name for name in intervals if intervals[name].side()], dict.fromkeys(intervals, 0)
    n_left = len(intervals)
    while left:
        found = {name: at_level(name, level=1 - 0.05 / n_left).side() for name in left}
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
    """Say whether metrics that RL did not optimize rose with its rewards, by the `differences` of a tuned arm from what
    it started from: did the rewards certainly rise, did other metrics of the same axes, and what follows.
    """
    verdicts = table.set_index("metric")["verdict"]
    optimized, axes = ", ".join(sorted(rewards)), {METRICS[name].kind for name in rewards}
    # The base model shows the class already: there is no gain of it to confirm.
    apart = [name for name in verdicts.index if METRICS[name].kind in axes and name not in {"judge_class", *rewards}]
    risen = [name for name in apart if verdicts[name] == HIGHER]
    rest = [f"{name} ({verdicts[name]})" for name in apart if name not in risen]
    named = (
        f"Not optimized, and higher: {', '.join(risen) or 'none'}; "
        f"not optimized, and not certain to be higher: {', '.join(rest) or 'none'}."
    )
    if unknown := ", ".join(sorted(set(rewards) - set(verdicts.index))):
        return f"Optimized: {optimized}; {unknown} was not measured, so whether it rose is unknown. {named}"
    said = {LOWER: "fell (lower)", NOT_TOLD_APART: "may have risen or not (not told apart)"}
    if others := "; ".join(f"{name} {said[verdicts[name]]}" for name in sorted(rewards) if verdicts[name] != HIGHER):
        return f"Optimized: {optimized}, but {others}: no gain is certain, so none can be confirmed. {named}"
    if unwatched := " and ".join(sorted(axes - {METRICS[name].kind for name in apart})):
        return f"Optimized, and higher: {optimized}. {named} Nothing else measures the {unwatched}: not confirmed."
    kinds = " and ".join(kind for kind in ("text", "subject") if kind in axes)
    say = "All of the others confirm" if not rest else "Some of the others confirm" if risen else "None confirms"
    return f"Optimized, and higher: {optimized}. {named} {say} the gain in {kinds}."


def as_markdown(table: pd.DataFrame) -> str:
    """A text table in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def as_latex(table: pd.DataFrame) -> str:
    """A text table as a LaTeX tabular, with booktabs' rules."""
    text = table.astype(str).map(lambda cell: cell.translate(LATEX_SPECIAL))
    text.columns = [name.translate(LATEX_SPECIAL) for name in table.columns]
    return text.to_latex(index=False, column_format="l" * len(text.columns))


def in_all_formats(table: pd.DataFrame) -> dict[str, str]:
    """The table as text, by the suffix of its file: csv, md, tex."""
    return {"csv": table.to_csv(index=False), "md": as_markdown(table), "tex": as_latex(table)}


def by_subjects(scores: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """`fidelity` apart for each subject; by default the primary metrics alone."""
    asked = asked_metrics(scores, metrics or list(stats.primary_metrics(scores).values()))
    return _wide(summarise(as_compared(scores), ("arm", "subject"), asked), ["arm", "subject"])


def by_trainings(scores: pd.DataFrame) -> pd.DataFrame | None:
    """The primary metrics of each arm, subject and training, as texts; None where an arm has one of each only."""
    rows = as_compared(scores)
    rows = rows[rows["arm"] != REAL]
    rows = rows.assign(**{name: rows[name].astype("Int64").fillna(NO_SEED).astype(int) for name in SEEDS})
    if len(rows.drop_duplicates(["arm", "subject", *SEEDS])) == rows["arm"].nunique():
        return None
    keys = ["arm", "subject", *SEEDS]
    table = _wide(summarise(rows, keys, list(stats.primary_metrics(scores).values())).sort_values(keys[1:]), keys)
    seeds = {"Seed": "Seed", "Tune_seed": "Tuning seed"}
    texts = {name: table[name].astype(str).replace(str(NO_SEED), "–") for name in seeds}
    return table.assign(**texts).rename(columns=seeds)


def all_tables(scores: pd.DataFrame, against: str = "") -> dict[str, pd.DataFrame]:
    """Name -> text table, of `NAMES`: `subjects` where there are several, `trainings` where a subject has several of an
    arm, `differences` (see there for `against`) where there is a personalized arm and another, and `seen_and_unseen`
    where both kinds were drawn.
    """
    found, gaps = {"fidelity": fidelity(scores)}, differences(scores, against)
    if scores["subject"].nunique() > 1:
        found["subjects"] = by_subjects(scores)
    if scores.groupby(["arm", "subject"])[list(SEEDS)].nunique().to_numpy().max(initial=0) > 1:
        found["trainings"] = by_trainings(scores)
    if len(gaps):
        found["differences"] = differences_in_words(gaps)
    if "seen" in scores.columns and as_compared(scores)["seen"].dropna().nunique() == 2:
        found["seen_and_unseen"] = by_prompts(scores)
    return found


def _wide(summary: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """One row for each cell of `by` (the arm first), in the order of arms; n is the largest of the row's metrics."""
    metrics = [name for name in METRICS if name in set(summary["metric"])]
    order = list(arms_of(summary["arm"]))
    summary = summary.sort_values("arm", key=lambda arms: arms.map(order.index), kind="stable")
    rows = []
    for (arm, *others), part in summary.groupby(by, sort=False):
        found = {row.metric: row for row in part.itertuples()}
        labels = {"Method": label_of(arm)} | dict(zip(map(str.capitalize, by[1:]), others, strict=True))
        values = {METRICS[name].label: _cell(found[name]) if name in found else "–" for name in metrics}
        rows.append(labels | values | {"n": part["n"].max()})
    return pd.DataFrame(rows)


def _cell(row: Any, sign: bool = False) -> str:
    """Value and interval of a row with metric, value, low and high."""
    value, low, high = (METRICS[row.metric].show(x, sign) for x in (row.value, row.low, row.high))
    return f"{value} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


# --- the command -----------------------------------------------------------------------------------------------------


def combine(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The scores of several runs as one table, such as of runs on different subjects; a ScoreError where a folder has
    none, or two runs evaluated the same image of the same subject and arm.
    """
    return check_scores(pd.concat([load_scores(folder) for folder in folders], ignore_index=True), "the runs together")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit tables`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of evaluated runs, such as one a subject, or grids"
    )
    parser.add_argument(
        "--against", default="", metavar="ARM",
        help="subtract this arm from all others, such as lora_dreambooth (default: each from what it started from)",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="", metavar="FOLDER",
        help="write the tables there as CSV, Markdown and LaTeX, and all scores, on which `ibkit claims` can be run",
    )  # fmt: skip


def main(arguments: Namespace) -> int:
    """Run `ibkit tables`."""
    folder = _new_folder(arguments.out) if arguments.out else None
    scores = combine([Path(run).expanduser() for run in arguments.runs])
    tables = all_tables(scores, arguments.against)
    for name, table in tables.items():
        print(f"{name.replace('_', ' ').capitalize()}\n\n{as_markdown(table)}")
    if "differences" not in tables:
        print("No table of differences: it needs a personalized arm, and the base model or a tuning of it.")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for old in WRITTEN:  # of other runs, whose tables need not be these
            (folder / old).unlink(missing_ok=True)
        files = {f"{name}.{suffix}": text for name, t in tables.items() for suffix, text in in_all_formats(t).items()}
        files[SCORES] = scores.to_csv(index=False)
        for name, text in files.items():
            data = text.encode()
            write_atomically(folder / name, len(data), partial(Path.write_bytes, data=data))
        print(f"written to {folder}: {', '.join(sorted(files))}")
    return 0


def _new_folder(out: str) -> Path:
    """The folder to write into, from the current one as the runs are: a new one, an empty one, or one of this command;
    a file, or a folder with something else in it, is an ArtifactError.
    """
    folder = Path(out).expanduser().resolve()
    try:
        there = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        there = set()
    except OSError as error:
        raise ArtifactError(f"--out {folder} is no folder to write into ({error.strerror}): name a new one.") from error
    if other := sorted(there - WRITTEN - ({SCORES} if there & WRITTEN else set())):
        raise ArtifactError(
            f"--out {folder} has {other[0]} in it, which `ibkit tables` did not write: name a new folder."
        )
    return folder
