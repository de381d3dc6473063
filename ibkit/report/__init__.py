"""The report of a run: one HTML file that reads offline, on a phone, in print and with a screen reader.

It is built from what the notebooks wrote to their run folders: scores, figures (each with the table it draws),
parameters, versions and seconds. Nothing else is computed here but means with their intervals, and verdicts on claims.
Pictures are inlined, there are no scripts, and a content policy forbids every request.
"""

from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ibkit import __version__
from ibkit.errors import ArtifactError
from ibkit.evaluate.arms import arms_of, label_of
from ibkit.evaluate.claims import CONTRADICTED, NOT_TESTED, SCORES, SUPPORTED, UNDECIDED, claims_from, evidence_files
from ibkit.evaluate.claims.command import summary
from ibkit.evaluate.published import EVALUATORS, PAPER, PUBLISHED, TABLE_TITLES, PublishedNumber, published
from ibkit.evaluate.stats import METRICS, as_compared, check_scores, summarise
from ibkit.progress import duration
from ibkit.report.figures import figures_of
from ibkit.runs import CompletedRun, read_run, write_atomically

MAX_ROWS = 60  # of a figure's table; all rows are in the CSV file beside the figure
TEMPLATE, STYLE = "report.html", "report.css"
MARKS = {SUPPORTED: ("good", "✓"), CONTRADICTED: ("bad", "✗"), UNDECIDED: ("open", "?"), NOT_TESTED: ("open", "–")}


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` of a main run and return its path.

    Args:
        run_folder: `outputs/<run>`, whose subfolders are the finished runs of the notebooks.

    Raises:
        ArtifactError: there is no finished notebook run in the folder, or one is incomplete or altered.
        ScoreError: the score table is malformed.
    """
    folder = Path(run_folder)
    stages = [read_run(child) for child in sorted(folder.glob("*/")) if (child / "manifest.json").is_file()]
    if not stages:
        raise ArtifactError(f"{folder} has no finished run, so there is nothing to report: finish one first.")
    data = render(folder.resolve().name, stages).encode()
    path = folder / "report.html"
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))
    return path


def render(name: str, stages: list[CompletedRun]) -> str:
    """Make the HTML text of a report from finished notebook runs, in the order they ran."""
    evaluation = next((stage for stage in stages if SCORES in stage.outputs), None)
    scores = check_scores(evaluation.table(SCORES), f"03_evaluate/{SCORES}") if evaluation else None
    evidence = {SCORES: scores} if scores is not None else {}
    for file, notebook in evidence_files().items():
        made = next((stage for stage in stages if stage.kind == notebook and file in stage.outputs), None)
        if made and file != SCORES:
            evidence[file] = made.table(file)
    claims = claims_from(evidence) if evidence else []
    known, others = figures_of(stages)
    environment = Environment(
        loader=PackageLoader("ibkit.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"arm": label_of, "seconds": duration, "cell": _cell, "nobreak": _nobreak}
    return environment.get_template(TEMPLATE).render(
        css=Path(__file__).with_name(STYLE).read_text(encoding="utf-8"),
        name=name,
        subject=_subject(stages, scores),
        summary=summary(claims),
        counts=[(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in MARKS],
        marks=MARKS,
        claims=claims,
        figures=known,
        more_figures=others,
        results=_results(scores, evaluation) if evaluation else [],
        gaps=evaluation.metrics.get("gaps", {}) if evaluation else {},
        published=_published_tables(),
        paper=PAPER,
        paper_evaluators={_published_label(metric): words for metric, words in EVALUATORS.items()},
        models=sorted({str(stage.parameters["model"]) for stage in stages if "model" in stage.parameters}),
        stages=stages,
        total_seconds=sum(stage.manifest["seconds"] for stage in stages),
        versions=_versions(stages),
        commits=dict.fromkeys(stage.manifest["git"]["commit"] for stage in stages if stage.manifest["git"]),
        max_rows=MAX_ROWS,
        version=__version__,
    )


def _subject(stages: list[CompletedRun], scores: pd.DataFrame | None) -> str:
    """The names of the run's subjects."""
    if scores is not None:
        return ", ".join(map(str, scores["subject"].unique()))
    return next((str(s.parameters["subject"]) for s in stages if "subject" in s.parameters), "no subject")


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
