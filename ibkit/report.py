"""The report of a run: one HTML file that reads offline, on a phone, in print and with a screen reader.

It is built from what the notebooks left in their run folders: scores and claims, figures (each with the table it
draws), parameters, versions and seconds. Nothing is drawn or computed here that is not in those files, except means
with their intervals. Pictures are inlined, there are no scripts, and a content policy forbids every request.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from PIL import Image

from ibkit import __version__
from ibkit.errors import ArtifactError
from ibkit.evaluate.arms import arms_of, label_of
from ibkit.evaluate.claims import (
    CONTRADICTED,
    NOT_TESTED,
    SCORES,
    SUPPORTED,
    UNDECIDED,
    claims_from,
    evidence_files,
    summary,
)
from ibkit.evaluate.published import EVALUATORS, PAPER, PUBLISHED, TABLE_TITLES, PublishedNumber, published
from ibkit.evaluate.stats import METRICS, as_compared, check_scores, summarise
from ibkit.progress import duration
from ibkit.runs import CompletedRun, read_run, write_atomically

# Rows of a figure's table that are shown; the rest stands in the CSV file beside the figure.
MAX_ROWS = 60
# Run.save_figure writes 150 dots to the inch; shown at 100 px to the inch, all figures have letters of one size.
PX_PER_DOT = 100 / 150


@dataclass(frozen=True)
class FigureKind:
    """What a figure is, told by a word in its file name.

    Attributes:
        word: the word in the name, such as "curves" in `figures/curves.png`.
        title: heading above the figure.
        caption: how to read it.
        describe: makes the text for people who cannot see it, from the figure's table.
    """

    word: str
    title: str
    caption: str
    describe: Callable[[pd.DataFrame], str]


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report: its picture as a data URI with its size in CSS px, its words, and its table."""

    kind: FigureKind
    title: str
    uri: str
    width: int
    height: int
    alt: str
    table: pd.DataFrame
    source: str


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` of a main run.

    Args:
        run_folder: `outputs/<run>`, whose subfolders are the finished runs of the notebooks.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: there is no finished notebook run in the folder, or one is incomplete or altered.
        ScoreError: the score table is malformed.
    """
    folder = Path(run_folder)
    stages = [read_run(child) for child in sorted(folder.glob("*/")) if (child / "manifest.json").is_file()]
    if not stages:
        raise ArtifactError(f"{folder} has no finished run, so there is nothing to report: finish one first.")
    text = render(folder.resolve().name, stages)
    data = text.encode()
    path = folder / "report.html"
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))
    return path


def render(name: str, stages: list[CompletedRun]) -> str:
    """Make the HTML text of a report from finished notebook runs, in the order they ran."""
    evaluation = next((stage for stage in stages if "scores.csv" in stage.outputs), None)
    scores = check_scores(evaluation.table("scores.csv"), "03_evaluate/scores.csv") if evaluation else None
    evidence = {SCORES: scores} if scores is not None else {}
    for file, notebook in evidence_files().items():
        made = next((stage for stage in stages if stage.kind == notebook and file in stage.outputs), None)
        if made and file != SCORES:
            evidence[file] = made.table(file)
    claims = claims_from(evidence) if evidence else []
    known, others = _figures(stages)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"arm": label_of, "seconds": duration, "cell": _cell, "nobreak": _nobreak}
    return environment.from_string(TEMPLATE).render(
        css=CSS,
        name=name,
        subject=_subject(stages, scores),
        summary=summary(claims),
        counts=[(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in _MARKS],
        marks=_MARKS,
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


_MARKS = {
    SUPPORTED: ("good", "✓"),
    CONTRADICTED: ("bad", "✗"),
    UNDECIDED: ("open", "?"),
    NOT_TESTED: ("open", "–"),
}


def _subject(stages: list[CompletedRun], scores: pd.DataFrame | None) -> str:
    """Name what the run was about."""
    if scores is not None:
        return ", ".join(map(str, scores["subject"].unique()))
    return next((str(s.parameters["subject"]) for s in stages if "subject" in s.parameters), "no subject")


# --- numbers -------------------------------------------------------------------------------------------------------


def _results(scores: pd.DataFrame, evaluation: CompletedRun) -> list[dict]:
    """Return a block for each metric: our value and interval of each method beside the published numbers."""
    evaluators = evaluation.metrics.get("evaluators", {})
    table = summarise(as_compared(scores))
    trained = set(scores.loc[scores["seed"].notna(), "arm"])
    blocks = []
    for metric in table["metric"].unique():
        part = table[table["metric"] == metric].set_index("arm")
        show = METRICS[metric].show
        rows = [
            {
                "arm": arm,
                "value": show(part.loc[arm, "value"]),
                "interval": f"[{show(part.loc[arm, 'low'])}, {show(part.loc[arm, 'high'])}]",
                "n": int(part.loc[arm, "n"]),
                "seeds": int(part.loc[arm, "seeds"]) if arm in trained else "–",
                "published": [_published_value(number) for number in published(arm, metric)],
            }
            for arm in arms_of(part.index)
        ]
        blocks.append(
            {
                "label": METRICS[metric].label,
                "kind": METRICS[metric].kind,
                "evaluator": evaluators.get(metric, "not recorded"),
                "rows": rows,
            }
        )
    return sorted(blocks, key=lambda block: block["kind"] != "text")


def _published_value(number: PublishedNumber) -> str:
    people = number.metric.startswith("people")
    value = f"{100 * number.value:.1f} %" if people else f"{number.value:.3f}".replace("-", "−")
    return f"{value} (table {number.table}{', people' if people else ''})"


def _published_label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric.removeprefix("people_").capitalize() + " (people)"


def _published_tables() -> list[dict]:
    """Return the paper's tables as they are printed there, arm by arm."""
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
    """Return package -> versions; one version where all notebooks ran on the same."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for package, version in stage.manifest["versions"].items():
            found.setdefault(package, []).append(version)
    return [(package, ", ".join(dict.fromkeys(versions))) for package, versions in found.items()]


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(stages: Iterable[CompletedRun]) -> tuple[list[ReportFigure], list[ReportFigure]]:
    """Collect the figures of all stages: those the report knows, in its own order, and the rest."""
    known: list[ReportFigure] = []
    others: list[ReportFigure] = []
    seen: set[str] = set()
    for stage in stages:
        outputs = set(stage.outputs)
        for name in sorted(outputs):
            stem = name.removesuffix(".png")
            # A figure is a picture with the table it draws; generated images have none.
            if not name.endswith(".png") or f"{stem}.csv" not in outputs:
                continue
            content = stage.path(name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if digest in seen:  # a later notebook shows the same figure again
                continue
            seen.add(digest)
            with Image.open(io.BytesIO(content)) as picture:
                width, height = (round(side * PX_PER_DOT) for side in picture.size)
            table = stage.table(f"{stem}.csv")
            words = Path(stem).name
            kind = next((kind for kind in FIGURE_KINDS if kind.word in words), None)
            figure = ReportFigure(
                kind=kind or OTHER_KIND,
                title=kind.title if kind and words == kind.word else words.replace("_", " ").capitalize(),
                uri="data:image/png;base64," + base64.b64encode(content).decode(),
                width=width,
                height=height,
                alt=_describe(kind or OTHER_KIND, table),
                table=table,
                source=f"{stage.folder.name}/{stem}",
            )
            (known if kind else others).append(figure)
    return sorted(known, key=lambda figure: FIGURE_KINDS.index(figure.kind)), others


def _describe(kind: FigureKind, table: pd.DataFrame) -> str:
    try:
        return kind.describe(table)
    except (KeyError, IndexError, ValueError):  # a figure of that name with a table of another shape
        return OTHER_KIND.describe(table)


def _describe_photos(table: pd.DataFrame) -> str:
    return f"{len(table)} reference photos of the subject, side by side."


def _describe_grid(table: pd.DataFrame) -> str:
    arms = ", ".join(arm.label for arm in arms_of(table["arm"].unique()).values())
    prompts = "; ".join(table["text"].drop_duplicates().astype(str))
    return f"Generated pictures by {arms}, each on the same noise, for the prompts: {prompts}."


def _describe_curves(table: pd.DataFrame) -> str:
    parts = []
    for series, points in table.groupby("series", sort=False):
        means = points.groupby("epoch")["value"].mean()
        parts.append(f"{series.replace('_', ' ')} from {means.iloc[0]:.2f} to {means.iloc[-1]:.2f}")
    return f"Curves over epochs {table['epoch'].min()} to {table['epoch'].max()}: {'; '.join(parts)}."


def _describe_plane(table: pd.DataFrame) -> str:
    text, subject = METRICS[table["text_metric"].iloc[0]], METRICS[table["subject_metric"].iloc[0]]
    points = [
        f"{label_of(row.arm)}: text {text.show(row.text_value)}, subject {subject.show(row.subject_value)}"
        for row in table.itertuples()
    ]
    return f"Plane of text fidelity ({text.label}) against subject fidelity ({subject.label}). {'; '.join(points)}."


def _describe_bars(table: pd.DataFrame) -> str:
    metric = METRICS[table["metric"].iloc[0]]
    bars = [f"{row.text}, {label_of(row.arm)}: {metric.show(row.value)}" for row in table.itertuples()]
    return f"Bars of {metric.label} by prompt. {'; '.join(bars)}."


def _describe_other(table: pd.DataFrame) -> str:
    return f"A figure drawn from {len(table)} rows of {', '.join(map(str, table.columns))}; its table follows."


FIGURE_KINDS = (
    FigureKind("references", "The subject", "The photos the model was personalized on.", _describe_photos),
    FigureKind(
        "grid",
        "Same prompt, same noise, each method",
        "Pictures in the same place of each block start from the same noise. Look for two things: does the picture "
        "show what the prompt says, and is it still the subject of the photos?",
        _describe_grid,
    ),
    FigureKind(
        "plane",
        "Text fidelity against subject fidelity",
        "Up and to the right is better. The base model does not know the subject. Personalization moves it up and to "
        "the left; a good second stage moves it back to the right without going down. Whiskers are 95 % intervals "
        "over subjects, prompts and RL seeds.",
        _describe_plane,
    ),
    FigureKind(
        "bars",
        "Prompt by prompt",
        "Where the text is lost and where it is won back, with 95 % intervals.",
        _describe_bars,
    ),
    FigureKind(
        "curves",
        "While it learns",
        "Left: the reward that training maximizes. Right: what the reward does not see. A reward that rises while the "
        "curves on the right fall is being hacked.",
        _describe_curves,
    ),
)
OTHER_KIND = FigureKind("", "", "", _describe_other)


# --- words ---------------------------------------------------------------------------------------------------------


def _nobreak(text: str) -> str:
    """Keep a number and its per-cent sign on one line."""
    return text.replace(" %", "\u00a0%")


def _cell(value: object) -> str:
    """Write a table cell: numbers short, missing values empty."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --page: #f6f7f9; --line: #d8dbe0;
  --link: #0b5cad; --good: #12692f; --good-bg: #dcf3e3; --bad: #a3260f; --bad-bg: #fde6df; --open: #59636e;
  --open-bg: #e9ebee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --paper: #1a1d21; --page: #111316;
  --line: #363b42; --link: #7db7f5; --good: #7ddb97; --good-bg: #15331f; --bad: #ff9d85; --bad-bg: #431c13;
  --open: #a2abb5; --open-bg: #2a2e34; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.4rem; margin: 0 0 .6rem; }
h3 { font-size: 1.08rem; margin: 0 0 .3rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: var(--link); }
.soft, caption, figcaption, .lead { color: var(--soft); }
.lead { font-size: 1.05rem; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 1rem 0 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: .75rem; padding: 1.5rem;
  margin: 1.5rem 0; }
figure { margin: 0 0 2rem; } figure:last-of-type { margin-bottom: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: .6rem auto; background: #fff;
  border-radius: .5rem; }
figcaption { font-size: .93rem; max-width: 46rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; border-bottom-width: 2px; } tbody th { font-weight: 600; }
tr:last-child > * { border-bottom: 0; } thead tr:last-child > * { border-bottom: 2px solid var(--line); }
td.number, th.number { white-space: nowrap; } td small { color: var(--soft); display: block; font-size: .85em; }
.verdict { display: inline-block; white-space: nowrap; border-radius: 1rem; padding: .05rem .65rem; font-size: .87rem;
  font-weight: 600; }
.good { color: var(--good); background: var(--good-bg); } .bad { color: var(--bad); background: var(--bad-bg); }
.open { color: var(--open); background: var(--open-bg); }
.counts { display: flex; flex-wrap: wrap; gap: .5rem; margin: .2rem 0 .8rem; padding: 0; list-style: none; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); } details > * + * { margin-top: .6rem; }
.note { border-left: 4px solid var(--link); padding: .1rem 0 .1rem .9rem; }
code { font-family: ui-monospace, "SF Mono", Consolas, "Liberation Mono", monospace; font-size: .9em;
  overflow-wrap: anywhere; }
.metric + .metric { margin-top: 1.6rem; }
footer { padding-bottom: 2.5rem; font-size: .9rem; color: var(--soft); }
@media (max-width: 40rem) { section { padding: 1rem; } .wide img { max-width: none; width: 42rem; }
  .claims thead { display: none; }
  .claims tr, .claims td, .claims th { display: block; border: 0; padding: .1rem 0; }
  .claims tr { border-bottom: 1px solid var(--line); padding: .7rem 0; } .claims tr:last-child { border: 0; } }
@media print { body { background: none; } section { border: 0; padding: 0; break-inside: auto; } nav { display: none; }
  figure, tr { break-inside: avoid; } }
"""

TEMPLATE = """
{% macro data_table(table, label) %}
<div class="scroll" role="region" aria-label="{{ label }}" tabindex="0">
<table>
<thead><tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.head(max_rows).itertuples(index=False, name=None) %}
<tr>{% for value in row %}<td>{{ value | cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{% macro figure_block(figure) %}
<figure>
<h3>{{ figure.title }}</h3>
<div class="scroll{{ " wide" if figure.width > 700 }}" role="region" aria-label="{{ figure.title }}" tabindex="0">
<img src="{{ figure.uri }}" alt="{{ figure.alt }}" width="{{ figure.width }}" height="{{ figure.height }}">
</div>
<figcaption>{{ figure.kind.caption }}
<details>
<summary>The numbers in this figure</summary>
<div class="soft">{% if figure.table | length > max_rows %}The first {{ max_rows }} of
{{ figure.table | length }} rows; all are in {% else %}Also in {% endif %}<code>{{ figure.source }}.csv</code>.</div>
{{ data_table(figure.table, figure.title ~ ", numbers") }}
</details>
</figcaption>
</figure>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ subject }} · {{ name }} · ibkit report</title>
<style>{{ css | safe }}</style>
</head>
<body>
<a class="skip" href="#claims">Skip to the claims</a>
<header>
<h1>Does it follow the text, and is it still the same subject?</h1>
<p class="soft">Run <code>{{ name }}</code> · subject {{ subject }} ·
{% if models %}model {{ models | join(", ") }} · {% endif %}
{{ stages | length }} notebook{{ "" if stages | length == 1 else "s" }} in {{ total_seconds | seconds }}</p>
{% if claims %}
<ul class="counts" aria-label="Verdicts">
{% for verdict, count in counts if count %}
<li class="verdict {{ marks[verdict][0] }}">{{ marks[verdict][1] }} {{ count }} {{ verdict }}</li>
{% endfor %}
</ul>
<p class="lead">{{ summary }}</p>
{% else %}
<p class="lead">This run holds no scores yet, so no claim was tested: run notebook 03_evaluate.</p>
{% endif %}
<nav aria-label="Sections"><ul>
<li><a href="#claims">Claims</a></li><li><a href="#figures">Figures</a></li><li><a href="#numbers">Numbers</a></li>
<li><a href="#how">How it was made</a></li>
</ul></nav>
</header>
<main>
<section id="claims" aria-labelledby="claims-title">
<h2 id="claims-title">The paper's claims, tested on this run</h2>
{% if claims %}
<p>Each figure compares two models on the same prompts and the same noise. Intervals are 95 %, over subjects, prompts
and RL seeds, and wide where these are few. Supported: the whole interval lies on the claimed side. Contradicted: it
lies on the other side. Undecided: neither. A claim about a full-size model is tested only on the model of this run.</p>
<table class="claims">
<thead><tr><th scope="col">Claim</th><th scope="col">Our figure, 95 % interval</th><th scope="col">Verdict</th>
<th scope="col">In the paper</th></tr></thead>
<tbody>
{% for claim in claims %}
<tr>
<th scope="row">{{ claim.id }}. {{ claim.claim }}</th>
<td><span class="number">{{ claim.figure() | nobreak }}</span>
<small>{{ claim.quantity }}{% if claim.n %}; n = {{ claim.n }}{% endif %}{% if claim.seeds %}, RL seeds:
{{ claim.seeds }}{% endif %}</small>{% if claim.detail %}<small>{{ claim.detail | nobreak }}</small>{% endif %}</td>
<td><span class="verdict {{ marks[claim.verdict][0] }}">{{ marks[claim.verdict][1] }} {{ claim.verdict }}</span>
<small>{{ claim.reason | nobreak }}</small></td>
<td><small>{{ claim.source | nobreak }}</small></td>
</tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>Not tested: there are no scores.</p>
{% endif %}
</section>

<section id="figures" aria-labelledby="figures-title">
<h2 id="figures-title">Figures</h2>
{% for figure in figures %}
{{ figure_block(figure) }}
{% else %}
<p>The notebooks of this run saved no figures.</p>
{% endfor %}
{% if more_figures %}
<details>
<summary>More figures from the notebooks ({{ more_figures | length }})</summary>
{% for figure in more_figures %}
{{ figure_block(figure) }}
{% endfor %}
</details>
{% endif %}
</section>

<section id="numbers" aria-labelledby="numbers-title">
<h2 id="numbers-title">Numbers, beside the paper's</h2>
<p class="note"><strong>Compare directions, not sizes.</strong> The paper measured Stable Diffusion v1.5 at 512 px with
full-size evaluators and asked people.
{% if "pocket" in models %}
This run used the pocket model, pocket evaluators and a simulated judge on 64 px scenes: its numbers are not comparable
in absolute value with the published ones.
{% else %}
This run's numbers compare with the published ones only where model, evaluator, prompts and number of images agree.
{% endif %}
</p>
{% for block in results %}
<div class="metric">
<h3>{{ block.label }} <span class="soft">({{ block.kind }} fidelity)</span></h3>
<div class="scroll" role="region" aria-label="{{ block.label }}" tabindex="0">
<table>
<caption>Evaluator of this run: {{ block.evaluator }}</caption>
<thead><tr><th scope="col">Method</th><th scope="col">This run</th><th scope="col">95 % interval</th>
<th scope="col">Images</th><th scope="col">RL seeds</th><th scope="col">Paper</th></tr></thead>
<tbody>
{% for row in block.rows %}
<tr><th scope="row">{{ row.arm | arm }}</th><td class="number">{{ row.value }}</td>
<td class="number">{{ row.interval }}</td><td class="number">{{ row.n }}</td>
<td class="number">{{ row.seeds }}</td>
<td>{{ row.published | join(", ") or "–" }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
{% else %}
<p>This run holds no scores.</p>
{% endfor %}
{% for metric, why in gaps.items() %}
<p class="note"><strong>{{ metric }} was not measured.</strong> {{ why }}</p>
{% endfor %}
<details>
<summary>All numbers the paper publishes</summary>
<p class="soft">Source: {{ paper }}. Evaluators of the paper:
{% for metric, words in paper_evaluators.items() %}{{ metric }}: {{ words }}{{ "; " if not loop.last }}{% endfor %}.</p>
{% for table in published %}
<div class="scroll" role="region" aria-label="{{ table.title }}" tabindex="0">
<table>
<caption>{{ table.title }}</caption>
<thead>
<tr><th scope="col">Method</th>{% for metric in table.metrics %}<th scope="col">{{ metric }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for arm, values in table.rows %}
<tr><th scope="row">{{ arm | arm }}</th>
{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</details>
</section>

<section id="how" aria-labelledby="how-title">
<h2 id="how-title">How it was made</h2>
<div class="scroll" role="region" aria-label="Notebooks and timings" tabindex="0">
<table>
<caption>Notebooks, in order</caption>
<thead><tr><th scope="col">Notebook</th><th scope="col">Time</th><th scope="col">Device</th>
<th scope="col">Started (UTC)</th><th scope="col">Files</th></tr></thead>
<tbody>
{% for stage in stages %}
<tr><th scope="row">{{ stage.kind }}{{ ", edited by hand after its end" if stage.edited_by_hand }}</th>
<td class="number">{{ stage.manifest.seconds | seconds }}</td>
<td>{{ stage.manifest.device }}</td><td class="number">{{ stage.manifest.started[:19].replace("T", " ") }}</td>
<td class="number">{{ stage.outputs | length }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% for stage in stages %}
<details>
<summary>Parameters and inputs of {{ stage.kind }}</summary>
<div class="scroll" role="region" aria-label="Parameters of {{ stage.kind }}" tabindex="0">
<table>
<thead><tr><th scope="col">Parameter</th><th scope="col">Value</th></tr></thead>
<tbody>
{% for key, value in stage.parameters.items() %}
<tr><th scope="row"><code>{{ key }}</code></th><td><code>{{ value }}</code></td></tr>
{% endfor %}
{% for key, input in stage.manifest.inputs.items() %}
<tr><th scope="row">input <code>{{ key }}</code></th><td><code>{{ input.path }}</code>
<small>sha256 <code>{{ input.sha256 }}</code></small></td></tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endfor %}
<details>
<summary>Versions</summary>
<div class="scroll" role="region" aria-label="Versions" tabindex="0">
<table>
<thead><tr><th scope="col">Package</th><th scope="col">Version</th></tr></thead>
<tbody>
{% for package, version in versions %}
<tr><th scope="row">{{ package }}</th><td class="number">{{ version }}</td></tr>
{% endfor %}
{% for commit in commits %}
<tr><th scope="row">git commit</th><td><code>{{ commit }}</code></td></tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
</section>
</main>
<footer>Built by ibkit {{ version }} from the files of the run; every file was compared with its hash first.
{% if "pocket" in models %}The judge is simulated: a classifier of the pocket world, never used as a reward.{% endif %}
</footer>
</body>
</html>
""".lstrip()
