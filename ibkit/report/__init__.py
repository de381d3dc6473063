"""The report of one run or of many: one HTML file that reads offline, on a phone, in print and with a screen reader.

It is built from what the notebooks wrote to their run folders: scores, figures (each with the table it draws),
parameters, versions and seconds. Nothing else is computed here but means with their intervals,
verdicts on claims, and figures over many runs.
Pictures are inlined, there are no scripts, and a content policy forbids every request.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ibkit import __version__
from ibkit.evaluate.arms import arms_of, label_of
from ibkit.evaluate.claims import CONTRADICTED, NOT_TESTED, SUPPORTED, UNDECIDED, claims_from
from ibkit.evaluate.claims.command import summary
from ibkit.evaluate.published import EVALUATORS, PAPER, PUBLISHED, TABLE_TITLES, PublishedNumber, published
from ibkit.evaluate.stats import METRICS, as_compared, summarise
from ibkit.evaluate.tables import by_subjects, by_trainings, differences, differences_in_words
from ibkit.progress import duration
from ibkit.report.figures import ReportFigure, drawn, figures_of
from ibkit.report.gather import Gathered, gather
from ibkit.report.overview import drawings, facts, headline, label_of_metric
from ibkit.report.pictures import FIRST, check_choice, hacked, walls, worst
from ibkit.runs import CompletedRun, write_atomically

MOST_NOTEBOOKS = 24  # whose own figures and parameters are shown
MAX_ROWS = 60  # of a figure's table; all rows are in the CSV file beside the figure
TEMPLATE, STYLE = "report.html", "report.css"
MARKS = {SUPPORTED: ("good", "✓"), CONTRADICTED: ("bad", "✗"), UNDECIDED: ("open", "?"), NOT_TESTED: ("open", "–")}


def build_report(
    run_folder: str | Path | Sequence[str | Path], path: str | Path = "", pictures: str = FIRST, against: str = ""
) -> Path:
    """Write the report of one main run or grid, or of several together, and return its path.

    Args:
        run_folder: `outputs/<run>`, whose subfolders are the finished runs of the notebooks; or several of them.
        path: of the file; empty = `report.html` in the folder, which must be a single one.
        pictures: which to show: first, best, worst, or image seeds such as "0,3".
        against: an arm to subtract from all others; empty = no such table.

    Raises:
        ArtifactError: there is no finished notebook run in a folder, or one is incomplete or altered.
        ScoreError: a score table is malformed, or two runs score one image differently.
        ParameterError: `pictures` is none of these.
    """
    folders = [run_folder] if isinstance(run_folder, str | Path) else list(run_folder)
    data = render(gather(folders), check_choice(pictures), against).encode()
    path = Path(path) if path else Path(folders[0]) / "report.html"
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))
    return path


def render(runs: Gathered, pictures: str = FIRST, against: str = "") -> str:
    """Make the HTML text of a report from finished notebook runs, in the order they ran."""
    stages, scores = runs.stages, runs.scores
    claims = claims_from(runs.evidence) if runs.evidence else []
    # Of many notebooks only what all show together: each has its own figures beside it, and a page stays small.
    known, others = figures_of(stages) if len(stages) <= MOST_NOTEBOOKS else ([], [])
    if runs.many:  # what a single run drew of itself is not what all show together
        known, others = [], [*known, *others]
    redrawn = _redrawn(runs)
    known = [figure for figure in known if figure.kind.word != "curves" or len(redrawn) == 0] + redrawn
    shown = walls(scores, pictures) if scores is not None and (scores["file"] != "").any() else []
    if shown:  # the same pictures, larger
        known = [figure for figure in known if figure.kind.word != "grid"]
    rewards = {stage.parameters["reward"] for stage in stages if stage.parameters.get("reward")}
    environment = Environment(
        loader=PackageLoader("ibkit.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"arm": label_of, "seconds": duration, "cell": _cell, "nobreak": _nobreak}
    gaps = {metric: why for stage in runs.evaluations for metric, why in stage.metrics.get("gaps", {}).items()}
    return environment.get_template(TEMPLATE).render(
        css=Path(__file__).with_name(STYLE).read_text(encoding="utf-8"),
        name=runs.name,
        many=runs.many,
        subject=", ".join(runs.subjects) or "no subject",
        headline=headline(scores) if scores is not None else [],
        facts=facts(runs),
        walls=shown,
        worst=worst(scores) if shown else [],
        hacked=hacked(scores, next(iter(rewards))) if shown and len(rewards) == 1 else [],
        reward=label_of_metric(next(iter(rewards))) if len(rewards) == 1 else "",
        summary=summary(claims),
        counts=[(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in MARKS],
        marks=MARKS,
        claims=claims,
        figures=known,
        more_figures=others,
        results=_results(scores, runs.evaluations[0]) if scores is not None else [],
        rows=by_trainings(scores) if scores is not None else None,
        by_subject=by_subjects(scores) if scores is not None and scores["subject"].nunique() > 1 else None,
        against=label_of(against),
        differences=differences_in_words(differences(scores, against)) if against and scores is not None else None,
        unfinished=runs.unfinished,
        shown=stages if len(stages) <= MOST_NOTEBOOKS else [],
        gaps=gaps,
        published=_published_tables(),
        paper=PAPER,
        paper_evaluators={_published_label(metric): words for metric, words in EVALUATORS.items()},
        models=runs.models,
        stages=stages,
        total_seconds=sum(stage.manifest["seconds"] for stage in stages),
        versions=_versions(stages),
        commits=dict.fromkeys(stage.manifest["git"]["commit"] for stage in stages if stage.manifest["git"]),
        max_rows=MAX_ROWS,
        version=__version__,
    )


def _redrawn(runs: Gathered) -> list[ReportFigure]:
    """Figures over all runs, where one notebook's own does not show them all."""
    of = "all runs" if runs.many else runs.name
    found = [drawn(*figure, stem, of) for stem, figure in drawings(runs).items() if runs.many or stem == "trainings"]
    return found


# --- numbers -------------------------------------------------------------------------------------------------------


def _results(scores: pd.DataFrame, evaluation: CompletedRun) -> list[dict]:
    """A block for each metric: our value and interval of each arm beside the published numbers."""
    evaluators = evaluation.metrics.get("evaluators", {})
    table = summarise(as_compared(scores))
    trained = set(scores.loc[scores["seed"].notna(), "arm"])
    blocks = []
    for name, part in table.groupby("metric", sort=False):
        metric, by_arm, rows = METRICS[name], part.set_index("arm"), []
        for arm in arms_of(by_arm.index):
            row = by_arm.loc[arm]
            rows.append(
                {
                    "arm": arm,
                    "value": metric.show(row["value"]),
                    "interval": f"[{metric.show(row['low'])}, {metric.show(row['high'])}]",
                    "n": row["n"],
                    "seeds": row["seeds"] if arm in trained else "–",
                    "published": [_published_value(number) for number in published(arm, name)],
                }
            )
        evaluator = evaluators.get(name, "not recorded")
        blocks.append({"label": metric.label, "kind": metric.kind, "evaluator": evaluator, "rows": rows})
    return sorted(blocks, key=lambda block: block["kind"] != "text")


def _published_value(number: PublishedNumber) -> str:
    people = number.metric.startswith("people")
    value = f"{100 * number.value:.1f} %" if people else f"{number.value:.3f}".replace("-", "−")
    return f"{value} (table {number.table}{', people' if people else ''})"


def _published_label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric.removeprefix("people_").capitalize() + " (people)"


def _published_tables() -> list[dict]:
    """The paper's tables as they are printed there, arm by arm."""
    tables = []
    for table, title in TABLE_TITLES.items():
        numbers = [number for number in PUBLISHED if number.table == table]
        metrics = list(dict.fromkeys(number.metric for number in numbers))
        values = {(number.arm, number.metric): _published_value(number).split(" (")[0] for number in numbers}
        rows = [(arm, [values[arm, metric] for metric in metrics]) for arm in arms_of(number.arm for number in numbers)]
        labels = [_published_label(metric) for metric in metrics]
        tables.append({"title": title, "metrics": labels, "rows": rows})
    return tables


def _versions(stages: list[CompletedRun]) -> list[tuple[str, str]]:
    """Each package with its versions in the runs, mostly one."""
    found = pd.DataFrame([stage.manifest["versions"] for stage in stages])
    return [(package, ", ".join(found[package].dropna().unique())) for package in found]


def _nobreak(text: str) -> str:
    """Keep a number and its per-cent sign on one line."""
    return text.replace(" %", "\u00a0%")


def _cell(value: object) -> str:
    """Write a table cell: numbers short, missing values empty."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)
