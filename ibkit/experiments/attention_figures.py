"""Figures of notebooks 04 and 14: attention maps, how two trainings went, and what differs between their pictures.

As in `ibkit.evaluate.figures`: tidy data in, `(figure, data)` out, one row of data for each mark.

Shapes: r×r places of a map, W words.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ibkit.evaluate.arms import GREY, arms_of, label_of
from ibkit.evaluate.figures import FAINT, INK, house_figure, is_large, whiskers
from ibkit.evaluate.stats import METRICS, metrics_in
from ibkit.model.attention import AttentionRecord

# Both arms are DreamBooth: two of Okabe and Ito's colours that no arm of a default run has, told apart by marker and
# dash too.
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
        The figure, and one row a place of a map: row, column, y, x, value. In the data, maps of more than 16×16 are
        averaged to that.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.maps))
    # Every length is in inches; a layout engine takes seconds for so many axes.
    cell, gap, left, head = 1.1, 0.06, 1.0, 0.62 if title else 0.35
    width, height = left + (cell + gap) * (len(columns) + 1), head + (cell + gap) * len(rows)
    places = {"left": left / width, "right": 1, "bottom": 0, "top": 1 - head / height}
    places |= {"wspace": gap / cell, "hspace": gap / cell}
    with house_figure(width, height, layout=None) as figure:
        axes = figure.subplots(len(rows), len(columns) + 1, squeeze=False, gridspec_kw=places)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for row, (first, *others) in zip(rows, axes, strict=True):
            first.imshow(np.asarray(row.picture.convert("RGB")), interpolation=_smooth(row.picture))
            first.set_ylabel(textwrap.fill(row.label, 14), rotation=0, ha="right", va="center", fontsize=9)
            top = max(float(values.max()) for values in row.maps.values())
            for name, axis in zip(columns, others, strict=True):
                if name in row.maps:
                    _draw_map(axis, row.picture, row.maps[name], top if shared_scale else float(row.maps[name].max()))
        for name, axis in zip(["picture", *columns], axes[0], strict=True):
            axis.set_title(textwrap.fill(name, 14), loc="center", fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, y=1 - 0.1 / height, va="top", ha="left", fontsize=11, fontweight="bold")
    parts = [_places(row.label, name, values) for row in rows for name, values in row.maps.items()]
    return figure, pd.concat(parts, ignore_index=True)


def _draw_map(axis: Axes, picture: Image.Image, values: torch.Tensor, top: float) -> None:
    """The picture in grey with the map over it."""
    axis.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255, interpolation=_smooth(picture))
    extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
    axis.imshow(values.numpy(), cmap="inferno", alpha=0.72, vmin=0, vmax=top, extent=extent, interpolation="nearest")


def _smooth(picture: Image.Image) -> str:
    return "antialiased" if is_large(picture) else "nearest"


def _places(label: str, column: str, values: torch.Tensor) -> pd.DataFrame:
    if values.shape[-1] > 16:
        values = torch.nn.functional.adaptive_avg_pool2d(values[None], 16)[0]
    y, x = np.indices(values.shape)
    return pd.DataFrame({"row": label, "column": column, "y": y.ravel(), "x": x.ravel(), "value": values.flatten()})


def over_time(record: AttentionRecord, picture: Image.Image, n: int = 0, n_columns: int = 6) -> list[MapRow]:
    """Picture `n` of the record: a row for each word, a column for each of up to `n_columns` timesteps."""
    steps = record.timesteps
    chosen = [steps[i] for i in dict.fromkeys(np.linspace(0, len(steps) - 1, n_columns).round().astype(int))]
    return _by_word(record, picture, {f"t = {t}": record.pictures([t])[n] for t in chosen})


def over_layers(record: AttentionRecord, picture: Image.Image, n: int = 0) -> list[MapRow]:
    """A row for each word, a column for each stage and resolution in order of execution, mean over its layers."""
    stages: dict[str, list[torch.Tensor]] = {}
    for layer, r in sorted({key[:2] for key in record.maps}, key=lambda key: (record.layers.index(key[0]), key[1])):
        total = sum(record.maps[layer, r, t][n] for t in record.timesteps)
        stages.setdefault(f"{layer.split('_')[0]} {r}×{r}", []).append(total)
    return _by_word(record, picture, {stage: torch.stack(layers).mean(0) for stage, layers in stages.items()})


def _by_word(record: AttentionRecord, picture: Image.Image, maps: Mapping[str, torch.Tensor]) -> list[MapRow]:
    """A row for each word, a column for each entry of `maps`, column -> (W, r, r)."""
    return [
        MapRow(f'"{word}"', picture, {column: of_words[w] for column, of_words in maps.items()})
        for w, word in enumerate(record.words)
    ]


def over_words(
    record: AttentionRecord, pictures: Sequence[Image.Image], roles: Mapping[str, str], label: str
) -> list[MapRow]:
    """A row for each picture of the record, a column for each role; maps of words with the same role are averaged."""
    maps, words = record.pictures(), {}
    for role in sorted(map(roles.__getitem__, record.words), key=ROLE_ORDER.index):
        words[role] = [w for w, word in enumerate(record.words) if roles[word] == role]
    return [
        MapRow(label, picture, {role: maps[n, chosen].mean(0) for role, chosen in words.items()})
        for n, picture in enumerate(pictures)
    ]


def training_looks(histories: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """What was measured during training (history.csv with arm and train_seed; rows without measurements are left out),
    a colour for each arm: thin lines are seeds, the thick one is their mean.

    Returns:
        The figure, and one row a point: arm, train_seed, steps, metric, value.
    """
    metrics = metrics_in(histories)
    looks = histories.dropna(subset=metrics).assign(steps=histories["step"] + 1)
    data = looks.melt(["arm", "train_seed", "steps"], metrics, var_name="metric", value_name="value")
    with house_figure(max(2.7 * len(metrics), 4.5), 3.1, title) as figure:
        for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for arm, (colour, marker, dash) in ARM_STYLES.items():
                points = data[(data["metric"] == metric) & (data["arm"] == arm)]
                if points.empty:
                    continue
                wide = points.pivot(index="steps", columns="train_seed", values="value")
                axis.plot(wide, color=colour, linewidth=0.7, alpha=0.7)
                look = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
                axis.plot(wide.mean(axis=1), label=label_of(arm), **look)
            axis.set_title(textwrap.fill(METRICS[metric].label, 22), fontsize=9)
            axis.set_xlabel("training steps")
            if METRICS[metric].is_share:
                axis.set_ylim(-0.03, 1.03)
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure, data


def differences(compared: pd.DataFrame, seeds: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """With minus without description for each measurement: the mean with its interval (`detailed_description.compare`),
    and each training seed (`by_seed`).

    Returns:
        The figure, and one row a mark: metric, train_seed (empty for the mean), difference, low, high.
    """
    means = compared.rename(columns={"difference": "value", "difference_low": "low", "difference_high": "high"})
    means = means[["metric", "value", "low", "high"]]
    with house_figure(7.2, 0.55 * len(means) + 1.3) as figure:
        axis, places = figure.subplots(), np.arange(len(means))
        axis.errorbar(means["value"], places, xerr=whiskers(means), fmt="o", color=INK, capsize=3, zorder=3)
        rows = seeds["metric"].map(list(means["metric"]).index)
        axis.plot(seeds["difference"], rows + 0.22, "|", color=GREY, markersize=8)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(places, [METRICS[name].label for name in means["metric"]])
        axis.set_ylim(len(means) - 0.5, -0.6)
        axis.set(xlabel="with − without description (bars: 95 % interval; ticks below: training seeds)", title=title)
    means = means.rename(columns={"value": "difference"})
    return figure, pd.concat([means, seeds[["train_seed", "metric", "difference"]]], ignore_index=True)


def overlap_by_role(summary: pd.DataFrame, measure: str = "lift", title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Overlap of each word's attention with the subject's true mask, a colour for each model.

    Args:
        summary: from `attention_overlap.overlap_by_word`; its rows that are drawn are the data.
        measure: "lift" or "auc".
    """
    chance, label = {"lift": (1.0, "lift (1 = chance)"), "auc": (0.5, "AUC (0.5 = chance)")}[measure]
    data = summary[summary["measure"] == measure]
    words = (data["role"] + "\n" + data["word"]).str.strip()
    in_order = data["role"].map(ROLE_ORDER.index).sort_values(kind="stable").index
    names = list(dict.fromkeys(words[in_order]))
    with house_figure(1.25 * len(names) + 1.6, 3.3) as figure:
        axis = figure.subplots()
        axis.axhline(chance, color=INK, linewidth=1)
        drawn = {name: (look.colour, look.marker) for name, look in arms_of(set(data["model"])).items()}
        styles = {name: style[:2] for name, style in ARM_STYLES.items() if name in drawn}
        models = list(styles | drawn)
        for k, model in enumerate(models):
            part = data[data["model"] == model]
            x = words[part.index].map(names.index) + 0.18 * (k - (len(models) - 1) / 2)
            colour, marker = (drawn | styles)[model]
            bars, name = whiskers(part), label_of(model)
            axis.errorbar(x, part["value"], yerr=bars, fmt=marker, color=colour, capsize=3, label=name)
        axis.set_xticks(range(len(names)), names)
        axis.grid(False, axis="x")
        axis.set(ylabel=label, title=title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(models))
        axis.spines["bottom"].set_color(FAINT)
    return figure, data
