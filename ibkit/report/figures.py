"""The figures of a report: found in the runs' folders, recognized by a word in their file name, described in words."""

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image

from ibkit.evaluate.arms import arms_of, label_of
from ibkit.evaluate.stats import METRICS
from ibkit.runs import CompletedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PX_PER_DOT = 100 / 150  # Run.save_figure writes 150 dots to the inch; at 100 px to the inch all letters have one size


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure.

    Attributes:
        word: in the file name, such as "curves" in `figures/curves.png`.
        title: heading above the figure.
        caption: how to read it.
        describe: makes the alternative text from the figure's table.
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


def figures_of(stages: Iterable[CompletedRun]) -> tuple[list[ReportFigure], list[ReportFigure]]:
    """The figures of all stages: those of `FIGURE_KINDS`, in that order, and the rest."""
    found: dict[bytes, ReportFigure] = {}  # by content: a later notebook may show the same figure again
    for stage in stages:
        # A figure is a picture with the table it draws; generated images have none.
        stems = (name.removesuffix(".png") for name in sorted(stage.outputs) if name.endswith(".png"))
        for stem in (stem for stem in stems if f"{stem}.csv" in stage.outputs):
            content = stage.path(f"{stem}.png").read_bytes()
            if content not in found:
                found[content] = _figure(content, stage.table(f"{stem}.csv"), stage.folder.name, stem)
    others = [figure for figure in found.values() if figure.kind is OTHER_KIND]
    return [figure for kind in FIGURE_KINDS for figure in found.values() if figure.kind is kind], others


def _figure(content: bytes, table: pd.DataFrame, folder: str, stem: str) -> ReportFigure:
    with Image.open(io.BytesIO(content)) as picture:
        width, height = (round(side * PX_PER_DOT) for side in picture.size)
    words = Path(stem).name
    kind = next((kind for kind in FIGURE_KINDS if kind.word in words), OTHER_KIND)
    try:
        alt = kind.describe(table)
    except (KeyError, IndexError, ValueError):  # a figure of that name with a table of another shape
        kind, alt = OTHER_KIND, OTHER_KIND.describe(table)
    title = kind.title if words == kind.word else words.replace("_", " ").capitalize()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return ReportFigure(kind, title, uri, width, height, alt, table, f"{folder}/{stem}")


def drawn(figure: "Figure", table: pd.DataFrame, stem: str, source: str) -> ReportFigure:
    """A figure that the report draws itself, of several runs; `source` says of what."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return _figure(buffer.getvalue(), table, source, stem)


def _describe_photos(table: pd.DataFrame) -> str:
    return f"{len(table)} reference photos of the subject, side by side."


def _describe_grid(table: pd.DataFrame) -> str:
    arms = ", ".join(arm.label for arm in arms_of(table["arm"].unique()).values())
    prompts = "; ".join(table["text"].drop_duplicates().astype(str))
    return f"Generated pictures by {arms}, each on the same noise, for the prompts: {prompts}."


def _describe_cuts(table: pd.DataFrame) -> str:
    rows = [f"{len(part)} of {label_of(arm)}" for arm, part in table.groupby("arm", sort=False)]
    return f"Enlarged cuts of pictures, a row for each: {'; '.join(rows)}."


def _describe_curves(table: pd.DataFrame) -> str:
    parts = []
    for series, points in table.groupby("series", sort=False):
        means = points.groupby("epoch")["value"].mean()
        parts.append(f"{series.replace('_', ' ')} from {means.iloc[0]:.2f} to {means.iloc[-1]:.2f}")
    return f"Curves over epochs {table['epoch'].min()} to {table['epoch'].max()}: {'; '.join(parts)}."


def _describe_trainings(table: pd.DataFrame) -> str:
    if "series" not in table or "arm" not in table:
        return _describe_curves(table)
    rewards, last = table[table["series"] == "reward"], table["epoch"].max()
    ends = [f"{label_of(arm)} {part['value'].mean():.2f}" for arm, part in rewards.groupby("arm", sort=False)]
    n = len(table.drop_duplicates(["arm", "subject", "seed", "tune_seed"]))
    return f"Curves of {n} trainings over epochs 0 to {last}; mean reward over the epochs: {', '.join(ends)}."


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


def _describe_agreement(table: pd.DataFrame) -> str:
    rows = zip(table["metric"], table["value"], table["n"], strict=True)
    bars = [f"{METRICS[name].label} {value:.2f} of {n} pairs" for name, value, n in rows]
    return f"Bars of how often a metric prefers the picture that the judge accepts. {'; '.join(bars)}."


def _describe_other(table: pd.DataFrame) -> str:
    return f"A figure drawn from {len(table)} rows of {', '.join(map(str, table.columns))}; its table follows."


FIGURE_KINDS = (
    FigureKind("references", "The subject", "The photos the model was personalized on.", _describe_photos),
    FigureKind(
        "grid",
        "Same prompt, same noise, each arm",
        "Pictures in the same place of each block start from the same noise. Look for two things: does the picture "
        "show what the prompt says, and is it still the subject of the photos?",
        _describe_grid,
    ),
    FigureKind(
        "identity",
        "Closer: is it the same one?",
        "The part of each picture that stands out from its border, enlarged; the photos come first. Compare markings, "
        "colours and shape.",
        _describe_cuts,
    ),
    FigureKind(
        "plane",
        "Text fidelity against subject fidelity",
        "Up and to the right is better. The base model does not know the subject. Personalization moves it up and to "
        "the left; a good second stage moves it back to the right without going down. Whiskers are 95 % intervals "
        "over subjects, prompts and trainings.",
        _describe_plane,
    ),
    FigureKind(
        "bars",
        "Prompt by prompt",
        "Where the text is lost and where it is won back, with 95 % intervals.",
        _describe_bars,
    ),
    FigureKind(
        "metric_agreement",
        "Which metrics agree with the judge",
        "Of two pictures for one prompt of which the simulated judge accepts one, how often a metric prefers that one; "
        "½ is chance. Intervals are over prompts.",
        _describe_agreement,
    ),
    FigureKind(
        "curves",
        "While it learns",
        "Left: the reward that training maximizes. Right: what the reward does not see. A reward that rises while the "
        "curves on the right fall is being hacked.",
        _describe_curves,
    ),
    FigureKind(
        "trainings",
        "While they learn: every training",
        "Thin lines are single trainings, each ending at its seeds (s of the personalization, t of the tuning); thick "
        "lines are an arm's mean, and the band is one standard deviation of its trainings. A reward that rises while "
        "the other curves fall is being hacked.",
        _describe_trainings,
    ),
)
OTHER_KIND = FigureKind("", "", "", _describe_other)
