"""Tables for a paper: LaTeX floats with caption and label that fit one column of two."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from ibkit.evaluate import stats
from ibkit.evaluate.arms import REAL, arms_of, label_of
from ibkit.evaluate.stats import METRICS, as_compared, metrics_in, primary_metrics, summarise
from ibkit.evaluate.tables import asked_metrics, holm_sides

MOST_COLUMNS = 3  # of metrics, beside the method's: what fits a column of 8.5 cm
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "λ": r"$\lambda$", "−": "$-$", "–": "--", "×": r"$\times$",
    "±": r"$\pm$", "→": r"$\rightarrow$", "η": r"$\eta$", "≥": r"$\geq$", "≤": r"$\leq$", "’": "'",
}  # fmt: skip


def escape(text: str) -> str:
    """A text as LaTeX sets it."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def default_columns(scores: pd.DataFrame) -> list[str]:
    """The primary metrics of text and subject, and one more of those that were measured."""
    first = list(primary_metrics(scores).values())
    others = ("image_reward", "dino", "clip_t", "clip_i")
    return [*first, *metrics_in(scores, [name for name in others if name not in first])][:MOST_COLUMNS]


def best_arms(scores: pd.DataFrame, metrics: Sequence[str]) -> dict[str, str]:
    """metric -> the arm that is certainly the best on it; metrics without one are left out.

    It has the highest mean, and each other arm's paired interval to it lies above zero, after Holm's correction for
    the number of other arms. The photos take no part.
    """
    rows = as_compared(scores)
    tables = {arm: rows[rows["arm"] == arm] for arm in arms_of(rows["arm"].unique()) if arm != REAL}
    best = {}
    for metric in metrics:
        of = {arm: table for arm, table in tables.items() if table[metric].notna().any()}
        if len(of) < 2:
            continue
        means = summarise(rows[rows["arm"].isin(of)], ("arm",), (metric,)).set_index("arm")["value"]
        top = str(means.idxmax())
        others = [arm for arm in of if arm != top]

        def gap(arm: str, level: float, of=of, top=top, metric=metric):
            return stats.bootstrap_difference(of[top], of[arm], metric, level=level)

        sides = holm_sides({arm: gap(arm, 0.95) for arm in others}, gap)
        if all(side == 1 for side in sides.values()):
            best[metric] = top
    return best


def fidelity_table(scores: pd.DataFrame, columns: Sequence[str], facts: str, label: str) -> str:
    """The arms as rows, a column for each metric, as a LaTeX float that fits a column.

    Args:
        scores: checked.
        columns: metrics; empty = `default_columns`.
        facts: what was measured on, for the caption (`report.facts`).
        label: of the float, such as "tab:fidelity".

    Raises:
        ScoreError: a metric that the scores do not have.
    """
    columns = asked_metrics(scores, columns) if columns else default_columns(scores)
    summary = summarise(as_compared(scores), ("arm",), columns)
    found = {(row.arm, row.metric): row for row in summary.itertuples()}
    best = best_arms(scores, columns)
    heads = [_stacked(_wrapped(METRICS[name].label, 11)) for name in columns]
    lines = [r"Method & " + " & ".join(heads) + r" \\", r"\midrule"]
    for arm in arms_of(summary["arm"]):
        cells = [_cell(found.get((arm, name)), name, best.get(name) == arm) for name in columns]
        lines.append(" & ".join([_stacked(_wrapped(label_of(arm), 14), "l"), *cells]) + r" \\")
    bold = (
        "Bold: higher than every other method, by the paired interval after Holm's correction."
        if best
        else "No method is told apart from all the others, so none is bold."
    )
    caption = f"Fidelity to text and subject: mean and 95 % interval. {facts} {bold}"
    return _float(caption, label, "l" + "c" * len(columns), lines)


def difference_table(differences: pd.DataFrame, columns: Sequence[str], facts: str, label: str) -> str:
    """Paired differences (`tables.differences`) as a LaTeX float that fits a column.

    Args:
        columns: the metrics whose rows are kept.
    """
    lines = [r"Method & Metric & Difference \\", r"\midrule"]
    for row in differences[differences["metric"].isin(columns)].itertuples():
        low, high = (METRICS[row.metric].show(x, sign=True) for x in (row.low, row.high))
        value = METRICS[row.metric].show(row.value, sign=True)
        told = "" if row.verdict == "not told apart" else r"\textbf{%s}"
        number = _stacked([(told or "%s") % escape(value), rf"{{\scriptsize[{escape(low)}, {escape(high)}]}}"])
        names = [*_wrapped(label_of(row.arm)), *_wrapped(f"against {label_of(row.against)}")]
        lines.append(
            f"{_stacked(names, 'l')} & {_stacked(_wrapped(METRICS[row.metric].label, 16), 'l')} & {number} \\\\"
        )
    caption = (
        f"Differences paired by prompt and noise, with 95 % intervals. {facts} Bold: zero lies outside the interval, "
        "for other than the primary metrics after Holm's correction. Shares in percentage points."
    )
    return _float(caption, label, "llc", lines)


def _float(caption: str, label: str, form: str, lines: Sequence[str]) -> str:
    body = "\n".join(lines)
    return (
        "% needs \\usepackage{booktabs}\n\\begin{table}[t]\n\\centering\\footnotesize\n\\setlength{\\tabcolsep}{2pt}\n"
        f"\\caption{{{escape(caption)}}}\n\\label{{{label}}}\n\\begin{{tabular}}{{@{{}}{form}@{{}}}}\n\\toprule\n"
        f"{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _cell(row, metric: str, bold: bool) -> str:
    if row is None:
        return "--"
    value, low, high = (METRICS[metric].show(x).removesuffix(" %") for x in (row.value, row.low, row.high))
    unit = r"\,\%" if METRICS[metric].is_share else ""
    number = escape(value) + unit
    return _stacked([rf"\textbf{{{number}}}" if bold else number, rf"{{\tiny[{escape(low)}, {escape(high)}]}}"])


def _wrapped(text: str, letters: int = 20) -> list[str]:
    return [escape(line) for line in textwrap.wrap(text, letters)]


def _stacked(lines: Sequence[str], place: str = "c") -> str:
    return lines[0] if len(lines) == 1 else rf"\shortstack[{place}]{{" + r" \\ ".join(lines) + "}"
