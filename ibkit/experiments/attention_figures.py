"""Figures of notebook 04: attention maps, how two trainings went, and what differs between their pictures.

As in `ibkit.evaluate.figures`: tidy data in, `(figure, data)` out, one row of data for each mark.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ibkit.evaluate.arms import GREY, label_of
from ibkit.evaluate.figures import FAINT, HOUSE_STYLE, INK, NotebookFigure
from ibkit.evaluate.stats import METRICS
from ibkit.model.attention import AttentionRecord

# Okabe and Ito's two colours that no arm of a default run has: both are DreamBooth. Told apart by marker and dash too.
ARM_STYLES = {
    "with_description": ("#56b4e9", "o", "-"),
    "without_description": ("#e69f00", "^", "--"),
    "base": (GREY, "s", ":"),
}
ROLE_ORDER = ("identifier", "description", "class noun", "activity", "filler", "start mark")


@dataclass(frozen=True)
class MapRow:
    """One row of a grid of maps.

    Attributes:
        label: at its left.
        picture: shown in front, and dimmed behind each map.
        maps: column -> map (r, r); a column without a map stays empty.
    """

    label: str
    picture: Image.Image
    maps: Mapping[str, torch.Tensor]


def map_grid(rows: Sequence[MapRow], title: str = "", shared_scale: bool = False) -> tuple[Figure, pd.DataFrame]:
    """Maps over their pictures: bright is where a word is read.

    Args:
        rows: the columns are those of all rows, in order of appearance.
        title: above the grid; say what the scale is.
        shared_scale: whether the maps of a row share one scale (to compare how much), or each has its own (where).

    Returns:
        The figure, and one row a place of a map: row, column, y, x, value. Maps of more than 16×16 are averaged to that
        in the data.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.maps))
    with matplotlib.rc_context(HOUSE_STYLE):
        # Every length is in inches; a layout engine takes seconds for so many axes.
        cell, gap, left, head = 1.1, 0.06, 1.0, 0.62 if title else 0.35
        width, height = left + (cell + gap) * (len(columns) + 1), head + (cell + gap) * len(rows)
        places = {"left": left / width, "right": 1, "bottom": 0, "top": 1 - head / height}
        places |= {"wspace": gap / cell, "hspace": gap / cell}
        figure = NotebookFigure(figsize=(width, height))
        axes = figure.subplots(len(rows), len(columns) + 1, squeeze=False, gridspec_kw=places)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for row, line in zip(rows, axes, strict=True):
            line[0].imshow(np.asarray(row.picture.convert("RGB")), interpolation=_smooth(row.picture))
            line[0].set_ylabel(textwrap.fill(row.label, 14), rotation=0, ha="right", va="center", fontsize=9)
            top = max(float(m.max()) for m in row.maps.values())
            for name, axis in zip(columns, line[1:], strict=True):
                if name in row.maps:
                    _draw_map(axis, row.picture, row.maps[name], top if shared_scale else float(row.maps[name].max()))
        for name, axis in zip(["picture", *columns], axes[0], strict=True):
            axis.set_title(textwrap.fill(name, 14), loc="center", fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, y=1 - 0.1 / height, va="top", ha="left", fontsize=11, fontweight="bold")
    return figure, pd.concat(
        [_places(row.label, name, m) for row in rows for name, m in row.maps.items()], ignore_index=True
    )


def _draw_map(axis: matplotlib.axes.Axes, picture: Image.Image, values: torch.Tensor, top: float) -> None:
    """The picture in grey with the map over it."""
    axis.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255, interpolation=_smooth(picture))
    extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
    axis.imshow(values.numpy(), cmap="inferno", alpha=0.72, vmin=0, vmax=top, extent=extent, interpolation="nearest")


def _smooth(picture: Image.Image) -> str:
    return "antialiased" if min(picture.size) > 128 else "nearest"


def _places(label: str, column: str, values: torch.Tensor) -> pd.DataFrame:
    if values.shape[-1] > 16:
        values = torch.nn.functional.adaptive_avg_pool2d(values[None], 16)[0]
    y, x = np.indices(values.shape)
    return pd.DataFrame({"row": label, "column": column, "y": y.ravel(), "x": x.ravel(), "value": values.flatten()})


def over_time(record: AttentionRecord, picture: Image.Image, n: int = 0, n_columns: int = 6) -> list[MapRow]:
    """Picture `n` of the record: a row for each word, a column for each of up to `n_columns` timesteps."""
    steps = record.timesteps
    chosen = [steps[i] for i in dict.fromkeys(np.linspace(0, len(steps) - 1, n_columns).round().astype(int))]
    maps = {t: record.pictures([t])[n] for t in chosen}
    return [
        MapRow(f'"{word}"', picture, {f"t = {t}": of_words[w] for t, of_words in maps.items()})
        for w, word in enumerate(record.words)
    ]


def over_layers(record: AttentionRecord, picture: Image.Image, n: int = 0) -> list[MapRow]:
    """A row for each word, a column for each stage and resolution in order of execution, mean over its layers."""
    stages: dict[str, list[torch.Tensor]] = {}
    for layer in record.layers:
        sides = {r for name, r, _ in record.maps if name == layer}
        for r in sorted(sides):
            total = sum(record.maps[layer, r, t][n] for t in record.timesteps)
            stages.setdefault(f"{layer.split('_')[0]} {r}×{r}", []).append(total)
    maps = {stage: torch.stack(layers).mean(0) for stage, layers in stages.items()}
    return [
        MapRow(f'"{word}"', picture, {stage: of_words[w] for stage, of_words in maps.items()})
        for w, word in enumerate(record.words)
    ]


def over_words(
    record: AttentionRecord, pictures: Sequence[Image.Image], roles: Mapping[str, str], label: str
) -> list[MapRow]:
    """A row for each picture of the record, a column for each role a word has; several words of a role are averaged."""
    maps = record.pictures()
    rows = []
    for n, picture in enumerate(pictures):
        by_role: dict[str, list[torch.Tensor]] = {}
        for w, word in enumerate(record.words):
            by_role.setdefault(roles[word], []).append(maps[n, w])
        ordered = sorted(by_role, key=ROLE_ORDER.index)
        rows.append(MapRow(label, picture, {role: torch.stack(by_role[role]).mean(0) for role in ordered}))
    return rows


def training_looks(histories: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """What was measured during the trainings, an arm a colour: thin lines are seeds, the thick one their mean.

    Args:
        histories: rows of the arms' history.csv with arm and train_seed; rows without measurements are left out.

    Returns:
        The figure, and one row a point: arm, train_seed, steps, metric, value.
    """
    metrics = [name for name in METRICS if name in histories and histories[name].notna().any()]
    looks = histories.dropna(subset=metrics).assign(steps=histories["step"] + 1)
    data = looks.melt(["arm", "train_seed", "steps"], metrics, var_name="metric", value_name="value")
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(max(2.7 * len(metrics), 4.5), 3.1), layout="constrained")
        for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for arm in ARM_STYLES:
                points = data[(data["metric"] == metric) & (data["arm"] == arm)]
                if points.empty:
                    continue
                colour, marker, dash = ARM_STYLES[arm]
                wide = points.pivot(index="steps", columns="train_seed", values="value")
                axis.plot(wide, color=colour, linewidth=0.7, alpha=0.7)
                axis.plot(wide.mean(axis=1), color=colour, linestyle=dash, marker=marker, markersize=4,
                          label=label_of(arm))  # fmt: skip
            axis.set_title(textwrap.fill(METRICS[metric].label, 22), fontsize=9)
            axis.set_xlabel("training steps")
            if METRICS[metric].is_share:
                axis.set_ylim(-0.03, 1.03)
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, data


def differences(compared: pd.DataFrame, seeds: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """With minus without description for each measurement: the mean with its interval, and each training seed.

    Args:
        compared: from `detailed_description.compare`.
        seeds: from `detailed_description.by_seed`.

    Returns:
        The figure, and one row a mark: metric, train_seed (empty for the mean), difference, low, high.
    """
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(7.2, 0.55 * len(compared) + 1.3), layout="constrained")
        axis = figure.subplots()
        for y, row in enumerate(compared.itertuples()):
            whiskers = [[row.difference - row.difference_low], [row.difference_high - row.difference]]
            axis.errorbar(row.difference, y, xerr=np.clip(whiskers, 0, None), fmt="o", color=INK, capsize=3, zorder=3)
            own = seeds.loc[seeds["metric"] == row.metric, "difference"]
            axis.plot(own, np.full(len(own), y + 0.22), "|", color=GREY, markersize=8)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(compared)), [METRICS[name].label for name in compared["metric"]])
        axis.set_ylim(len(compared) - 0.5, -0.6)
        axis.set(xlabel="with − without description (bars: 95 % interval; ticks below: training seeds)", title=title)
    means = compared[["metric", "difference", "difference_low", "difference_high"]].rename(
        columns={"difference_low": "low", "difference_high": "high"}
    )
    return figure, pd.concat([means, seeds[["train_seed", "metric", "difference"]]], ignore_index=True)


def overlap_by_role(summary: pd.DataFrame, measure: str = "lift", title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Overlap of each word's attention with the subject's true mask, a colour for each model.

    Args:
        summary: from `attention_overlap.overlap_by_word`.
        measure: "lift" or "auc".

    Returns:
        The figure, and the rows of `summary` that are drawn.
    """
    chance = {"lift": 1.0, "auc": 0.5}[measure]
    data = summary[summary["measure"] == measure]
    names = dict.fromkeys(f"{row.role}\n{row.word}".strip() for row in _by_role(data).itertuples())
    places = {name: i for i, name in enumerate(names)}
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(1.25 * len(places) + 1.6, 3.3), layout="constrained")
        axis = figure.subplots()
        axis.axhline(chance, color=INK, linewidth=1)
        models = [name for name in ARM_STYLES if name in set(data["model"])]
        for k, model in enumerate(models):
            part = data[data["model"] == model]
            x = [places[f"{r.role}\n{r.word}".strip()] + 0.18 * (k - (len(models) - 1) / 2) for r in part.itertuples()]
            whiskers = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(0)
            colour, marker, _ = ARM_STYLES[model]
            axis.errorbar(x, part["value"], yerr=whiskers, fmt=marker, color=colour, capsize=3, label=label_of(model))
        axis.set_xticks(range(len(places)), list(places))
        axis.grid(False, axis="x")
        label = {"lift": "lift (1 = chance)", "auc": "AUC (0.5 = chance)"}[measure]
        axis.set(ylabel=label, title=title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(models))
        axis.spines["bottom"].set_color(FAINT)
    return figure, data


def _by_role(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("role", key=lambda roles: roles.map(ROLE_ORDER.index), kind="stable")
