"""The kit's figures: tidy data in, `(figure, data)` out, one house style.

The returned data hold one row for each mark, so that `Run.save_figure(figure, stem, data)` writes what was drawn. Every
function takes a `title` to write above its figure. Figures are made without pyplot: none is shown or kept open, no
backend is chosen, and the same call works in JupyterLab, in a batch run and in a test. End a notebook cell with
`figure` to see it.
"""

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatterMathtext, MaxNLocator, PercentFormatter
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.evaluate.arms import BLUE, GREEN, GREY, ORANGE, arms_of
from ibkit.evaluate.stats import METRICS, summarise

INK, FAINT = "#1f2328", "#d8dbe0"
MOST_IN_STRIP = 30  # pictures of a strip; of more, as many spread evenly are shown
LARGE_IN_ROW = 6  # large pictures of a grid; a report is some 1,050 px wide
HOUSE_STYLE = seaborn.axes_style("whitegrid") | {
    "figure.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#eceef1",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.labelsize", "font.size"), 10),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 9),
}

# Columns of history.csv: label, colour and dash of their curves, for each of the two panels.
REWARD_SERIES = {
    "reward": ("All prompts", INK, "-"),
    "reward_identifier": ("With identifier", BLUE, "--"),
    "reward_class": ("Without identifier", GREY, ":"),
}
MONITOR_SERIES = {
    "monitor": ("Subject fidelity (monitor)", ORANGE, "-"),
    "text_monitor": ("Text fidelity (not optimised)", GREY, "-"),
    "judge_activity": ("Activity shown (simulated judge)", BLUE, "--"),
    "judge_identity": ("Same subject (simulated judge)", GREEN, ":"),
}


class NotebookFigure(Figure):
    """A figure that a notebook shows when it is the last line of a cell, without pyplot.

    Its texts hold no formulas: a "$" in a prompt or in a folder's name is a dollar.
    """

    def draw(self, renderer: RendererBase) -> None:
        """Draw it; only numbers on a logarithmic axis are formulas, "$10^2$"."""
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            axis.get_major_ticks(len(axis.get_majorticklocs()))  # makes those that drawing would make
            axis.get_minor_ticks(len(axis.get_minorticklocs()))
        for text in self.findobj(Text):
            text.set_parse_math(False)
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                    tick.label1.set_parse_math(True)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def use_house_style() -> None:
    """Draw the user's own figures in a notebook in the house style."""
    matplotlib.rcParams.update(HOUSE_STYLE)


@contextmanager
def house_figure(
    width: float, height: float, title: str = "", layout: Literal["constrained"] | None = "constrained"
) -> Iterator[NotebookFigure]:
    """Make a figure of `width` × `height` inches to draw on in the house style; its title is written last."""
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(width, height), layout=layout)
        yield figure
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def reference_strip(
    photos: Sequence[Image.Image], names: Sequence[str] | None = None, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Show pictures side by side, such as the subject's photos, their names below; large ones at most five in a row.

    Returns:
        The figure, and one row a photo: position, name, width_px, height_px.
    """
    names = names if names is not None else [""] * len(photos)
    if (n_all := len(photos)) > MOST_IN_STRIP:
        shown = [i * n_all // MOST_IN_STRIP for i in range(MOST_IN_STRIP)]
        photos, names = [photos[i] for i in shown], [names[i] for i in shown]
        title = f"{title} ({MOST_IN_STRIP} of {n_all} shown)".strip()
    size, most = (2.0, 5) if is_large(photos[0]) else (1.6, len(photos))
    n_rows = math.ceil(len(photos) / most)
    columns = math.ceil(len(photos) / n_rows)
    with house_figure(size * max(columns, 3), (size + 0.3) * n_rows + 0.2, title) as figure:
        axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
        for axis in axes[len(photos) :]:
            axis.set_axis_off()
        for axis, photo, name in zip(axes, photos, names, strict=False):
            draw_picture(axis, photo)
            axis.set_xlabel(name, fontsize=8)
    rows = [(i, name, *photo.size) for i, (name, photo) in enumerate(zip(names, photos, strict=True))]
    return figure, pd.DataFrame(rows, columns=["position", "name", "width_px", "height_px"])


def picture_wall(columns: Mapping[str, Sequence[Image.Image]], title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Show groups of pictures side by side, each as a named column: name -> pictures, as many in each. The data have
    one row a picture: column, row.
    """
    n_rows = max(map(len, columns.values()))
    size = 2.0 if is_large(next(iter(columns.values()))[0]) else 1.2
    with house_figure((size + 0.05) * len(columns), size * n_rows + 0.6, title) as figure:
        axes = figure.subplots(n_rows, len(columns), squeeze=False)
        for (name, pictures), column in zip(columns.items(), axes.T, strict=True):
            column[0].set_title(name, loc="center", fontsize=9)
            for picture, axis in zip(pictures, column, strict=True):
                draw_picture(axis, picture)
    places = [(name, row) for name, pictures in columns.items() for row in range(len(pictures))]
    return figure, pd.DataFrame(places, columns=["column", "row"])


def picture_grid(
    images: pd.DataFrame, root: str | Path = ".", n_seeds: int = 0, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Show every arm on the same prompts and the same noise: a row for each prompt, a block for each arm.

    Args:
        images: one row per image with arm, prompt_id, text, image_seed, and image: a path below `root`, or a
            picture. Give one row for each (arm, prompt_id, image_seed), of one subject (`stats.one_seed`).
        root: folder the paths are relative to.
        n_seeds: pictures an arm gets for a prompt, the smallest seeds that all arms have; 0 = four, or of large
            pictures as many as leave them large in a report.

    Returns:
        The figure, and one row a picture: row, column, arm, prompt_id, text, image_seed, image.
    """
    arms = arms_of(images["arm"].unique())
    prompts = images.drop_duplicates("prompt_id").set_index("prompt_id")["text"]
    large = is_large(opened(images["image"].iloc[0], root))
    n_seeds = n_seeds or (max(LARGE_IN_ROW // len(arms), 1) if large else 4)
    n_arms = images.groupby("prompt_id")["arm"].transform("nunique")
    shared = images[images.groupby(["prompt_id", "image_seed"])["arm"].transform("nunique") == n_arms]
    place = shared.groupby(["arm", "prompt_id"])["image_seed"].rank(method="first").astype(int) - 1
    shared = shared.assign(
        row=shared["prompt_id"].map(list(prompts.index).index),
        column=shared["arm"].map(list(arms).index) * n_seeds + place,
    )
    names = ["row", "column", "arm", "prompt_id", "text", "image_seed", "image"]
    data = shared.loc[place < n_seeds, names].sort_values(["row", "column"], ignore_index=True)

    # A label column, then for each arm its pictures and a gap; every length is in inches.
    label, picture, gap, head = 1.4, 1.6 if large else 0.74, 0.1, 0.55 if title else 0.3
    widths = [label] + ([picture] * n_seeds + [gap]) * len(arms)
    between = 0.06 * sum(widths) / len(widths)
    height = (picture + between) * len(prompts) + head
    with house_figure(sum(widths) + between * (len(widths) - 1), height, title, layout=None) as figure:
        grid = figure.add_gridspec(
            len(prompts), len(widths), width_ratios=widths, wspace=0.06, hspace=between / picture,
            left=0, right=1, bottom=0, top=1 - head / height,
        )  # fmt: skip
        for row, text in enumerate(prompts):
            margin = figure.add_subplot(grid[row, 0])
            margin.set_axis_off()
            margin.text(0.96, 0.5, textwrap.fill(str(text), 18), ha="right", va="center", fontsize=9)
        for cell in data.itertuples():
            block, place_in_block = divmod(cell.column, n_seeds)
            axis = figure.add_subplot(grid[cell.row, 1 + cell.column + block])
            draw_picture(axis, opened(cell.image, root))
            if cell.row == 0 and place_in_block == 0:
                arm, letters = arms[cell.arm], round(12 * picture * n_seeds)
                axis.set_title(textwrap.fill(arm.label, letters), color=arm.colour, fontsize=10, pad=5)
    data["image"] = [str(value) if isinstance(value, str | Path) else "" for value in data["image"]]
    return figure, data


def learning_curves(history: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw the reward beside what training does not optimize: the monitors and the judge.

    Args:
        history: one row per epoch as in `history.csv` (epoch, reward, …). Several runs have a column `tune_seed`, and
            are drawn as mean and standard deviation, as in the paper's figure 16. For a single run the guard's alarms
            and best epoch are marked.

    Returns:
        The figure, and one row a point: panel, series, epoch, tune_seed (if given), value.
    """
    panels = [
        ("Reward", "reward of the epoch's images", REWARD_SERIES),
        ("What the reward does not see", "share of images, or similarity", MONITOR_SERIES),
    ]
    names = ["epoch"] + (["tune_seed"] if "tune_seed" in history.columns else [])
    parts = []
    with house_figure(9.6, 4.4, title) as figure:
        for axis, (panel, label, all_series) in zip(figure.subplots(1, 2), panels, strict=True):
            for column, (series, colour, dash) in all_series.items():
                if column not in history.columns or history[column].isna().all():
                    continue
                points = history[[*names, column]].dropna().rename(columns={column: "value"})
                parts.append(points.assign(panel=panel, series=column))
                seaborn.lineplot(
                    points, x="epoch", y="value", errorbar="sd", color=colour, linestyle=dash, label=series, ax=axis
                )
            axis.set(title=panel, xlabel="epoch", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if "tune_seed" not in names:
                _mark_guard(axis, history)
            if axis.get_legend():  # below, where no curve runs
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    return figure, pd.concat(parts, ignore_index=True)[["panel", "series", *names, "value"]]


def training_curves(
    histories: pd.DataFrame, title: str = "", beside: Sequence[str] = ()
) -> tuple[Figure, pd.DataFrame]:
    """Draw several trainings: each a thin line that ends at its name, each arm's mean, and a band around it.

    Args:
        histories: one row an epoch and training, with arm, subject, seed, tune_seed, epoch, reward, and any of
            monitor, judge_activity, judge_identity (`report.gather`).
        beside: arms of the figures beside this one, so that each arm has one colour in all of them.

    Returns:
        The figure, and one row a point: series, arm, subject, seed, tune_seed, epoch, value. The band is one standard
        deviation of an arm's trainings.
    """
    wanted = {"reward": REWARD_SERIES["reward"][0], **{name: words[0] for name, words in MONITOR_SERIES.items()}}
    shown = {name: label for name, label in wanted.items() if name in histories and histories[name].notna().any()}
    shown["reward"] = "Reward, mean of the epoch's images"
    trained = list(arms_of(histories["arm"].unique()))
    looks = arms_of({*trained, *beside})
    arms = {name: looks[name] for name in trained}
    names = ["arm", "subject", "seed", "tune_seed", "epoch"]
    parts, n_rows = [], math.ceil(len(shown) / 2)
    with house_figure(9.6, 3.1 * n_rows + 0.5, title) as figure:
        axes = figure.subplots(n_rows, 2, squeeze=False).ravel()
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        for axis, (column, label) in zip(axes, shown.items(), strict=False):
            points = histories[[*names, column]].dropna(subset=[column]).rename(columns={column: "value"})
            parts.append(points.assign(series=column))
            for training, line in points.groupby(names[:-1], sort=False):
                look = arms[training[0]]
                axis.plot(line["epoch"], line["value"], color=look.colour, lw=0.7, alpha=0.5)
                words = f" {training[1]} s{training[2]} t{training[3]}" if len(points["subject"].unique()) > 1 else ""
                words = words or f" s{training[2]} t{training[3]}"
                axis.annotate(words, line[["epoch", "value"]].iloc[-1], fontsize=6, color=look.colour, va="center")
            for arm, of in points.groupby("arm", sort=False):
                found = of.groupby("epoch")["value"].agg(["mean", "std"]).fillna(0)
                axis.plot(found.index, found["mean"], color=arms[arm].colour, lw=2, label=arms[arm].label)
                low, high = found["mean"] - found["std"], found["mean"] + found["std"]
                axis.fill_between(found.index, low, high, color=arms[arm].colour, alpha=0.12, lw=0)
            axis.set(xlabel="epoch", ylabel=label)
            axis.yaxis.label.set_size(8)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 3))
    return figure, pd.concat(parts, ignore_index=True)[["series", *names, "value"]]


def _mark_guard(axis: Axes, history: pd.DataFrame) -> None:
    """Mark the guard's alarms, and the epoch whose policy it holds for the best (`ibkit.train.guard`)."""
    if "alarm" in history:
        for k, epoch in enumerate(history.loc[history["alarm"] == 1, "epoch"]):
            label = "_" if k else "Guard's alarm"
            axis.axvspan(epoch - 0.5, epoch + 0.5, color="#c0392b", alpha=0.12, lw=0, label=label)
    if "frontier" in history and history["frontier"].notna().any():
        best = history.loc[history["frontier"].idxmax(), "epoch"]
        axis.axvline(best, color=INK, lw=1, ls=":", label="Best frontier")


def trajectory(
    beliefs: Mapping[int, Image.Image], steps: pd.DataFrame, clip_range: float, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Draw one episode of the RL stage along its denoising steps: the model's x̂0, and what an update reads, `steps`.

    Args:
        beliefs: t -> decoded x̂0 of some steps, first to last.
        steps: one row for each step: t, log_prob (of the policy that drew the episode), ratio (of the current policy to
            that one), clip_high and clip_low (shares of all episodes whose gradient is clipped).
        clip_range: ε, drawn around a ratio of 1.
    """
    panels = {
        "Log-probability of the step": {"log_prob": GREY},
        "Ratio, new over old policy": {"ratio": BLUE},
        "Gradient cut, share of episodes": {"clip_high": BLUE, "clip_low": ORANGE},
    }
    large = is_large(next(iter(beliefs.values())))
    n_rows = 2 if large and len(beliefs) > 1 else 1
    heights = (2.1 * n_rows if large else 1.45, 2.75)
    with house_figure(9.6, sum(heights), title) as figure:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
        axes = above.subplots(n_rows, math.ceil(len(beliefs) / n_rows), squeeze=False).ravel()
        for axis in axes[len(beliefs) :]:
            axis.set_axis_off()
        for axis, (t, picture) in zip(axes, beliefs.items(), strict=False):
            draw_picture(axis, picture)
            axis.set_xlabel(f"t = {t}", fontsize=8)
        for axis, (name, lines) in zip(below.subplots(1, len(panels)), panels.items(), strict=True):
            for column, colour in lines.items():
                label = column if len(lines) > 1 else None
                size = 6 if len(steps) <= 20 else 3  # 50 points of the usual size hide their line
                seaborn.lineplot(steps, x="t", y=column, marker="o", ms=size, color=colour, label=label, ax=axis)
            axis.set(title=name, xlabel="t, from noise to picture", ylabel="")
            axis.invert_xaxis()
            if "ratio" in lines:
                axis.axhspan(1 - clip_range, 1 + clip_range, color=FAINT, lw=0)
            if "clip_high" in lines:
                axis.set_ylim(-0.05, 1.05)
    return figure, steps


def fidelity_plane(
    scores: pd.DataFrame, text: str = "judge_text", subject: str = "judge_identity", title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Place every arm on the plane of text fidelity against subject fidelity, with 95 % intervals.

    Args:
        scores: a checked score table, usually through `stats.as_compared`.
        text, subject: metrics of the horizontal and of the vertical axis.

    Returns:
        The figure, and one row an arm: arm, n, and for text and subject: metric, value, low, high.
    """
    table = summarise(scores, ("arm",), (text, subject)).set_index(["arm", "metric"])
    arms = arms_of(name for name in scores["arm"].unique() if {(name, text), (name, subject)} <= set(table.index))
    rows = []
    with house_figure(5.6, 4.4) as figure:
        axis = figure.subplots()
        for arm, look in arms.items():
            cells = {"text": table.loc[(arm, text)], "subject": table.loc[(arm, subject)]}
            found = {f"{side}_{part}": cell[part] for side, cell in cells.items() for part in ("value", "low", "high")}
            rows.append({"arm": arm, "n": int(cells["text"]["n"])} | found)
            x, y = cells.values()
            axis.errorbar(
                x["value"], y["value"], xerr=whiskers(x), yerr=whiskers(y), fmt=look.marker,
                color=look.colour, markersize=9, capsize=3, elinewidth=1.4, label=look.label,
            )  # fmt: skip
        axis.set(
            xlabel=f"Text fidelity: {METRICS[text].label} →", ylabel=f"Subject fidelity: {METRICS[subject].label} →"
        )
        axis.margins(0.15)
        _percent_axes(axis, METRICS[text].is_share, METRICS[subject].is_share)
        axis.legend(loc="best")
        axis.set_title(title)
    data = pd.DataFrame(rows).assign(text_metric=text, subject_metric=subject)
    return figure, data


def prompt_bars(scores: pd.DataFrame, metric: str = "judge_text", title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw one metric for every prompt, a bar for each arm, with 95 % intervals.

    Args:
        scores: a checked score table with a column `text`, usually through `stats.as_compared`.

    Returns:
        The figure, and one row a bar: arm, prompt_id, text, metric, value, low, high, n, seeds.
    """
    data = summarise(scores, ("arm", "prompt_id"), (metric,))
    texts = scores.drop_duplicates("prompt_id").set_index("prompt_id")["text"]
    prompts = list(dict.fromkeys(data["prompt_id"]))
    arms = arms_of(data["arm"].unique())
    bar = 0.8 / max(len(arms), 1)
    with house_figure(max(5.5, 1.5 * len(prompts) + 1.5), 3.6) as figure:
        axis = figure.subplots()
        for place, (arm, look) in enumerate(arms.items()):
            part = data[data["arm"] == arm].set_index("prompt_id").reindex(prompts)
            x = np.arange(len(prompts)) + (place - (len(arms) - 1) / 2) * bar
            axis.bar(x, part["value"], bar * 0.9, color=look.colour, hatch=look.hatch, edgecolor="w", label=look.label)
            axis.errorbar(x, part["value"], yerr=whiskers(part), fmt="none", color=INK, capsize=2, elinewidth=1)
        axis.set_xticks(range(len(prompts)), [textwrap.fill(str(texts[prompt]), 16) for prompt in prompts])
        axis.grid(False, axis="x")
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(ylabel=METRICS[metric].label, title=title)
        _percent_axes(axis, False, METRICS[metric].is_share)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(len(arms), 4))
    return figure, data.merge(texts, left_on="prompt_id", right_index=True)


def is_large(picture: Image.Image) -> bool:
    """Whether a picture has detail to show, as photos have and pictures of the pocket world do not."""
    return min(picture.size) > 128


def opened(image: Image.Image | str | Path, root: str | Path) -> Image.Image:
    """A picture, or the one at a path below `root`."""
    return image if isinstance(image, Image.Image) else read_rgb(Path(root) / image)


def draw_picture(axis: Axes, picture: Image.Image) -> None:
    """Show a picture without ticks or frame; small pictures keep their pixels sharp."""
    smooth = "antialiased" if is_large(picture) else "nearest"
    axis.imshow(np.asarray(picture.convert("RGB")), interpolation=smooth)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def whiskers(found: pd.DataFrame | pd.Series) -> np.ndarray:
    """Lengths of the whiskers below and above the value of one row or of N rows with value, low and high, (2, N)."""
    return np.stack([found["value"] - found["low"], found["high"] - found["value"]]).clip(0).reshape(2, -1)


def _percent_axes(axis: Axes, x: bool, y: bool) -> None:
    """Write shares in per cent and end their axis just above 100 %."""
    if x:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xlim(right=1.05)
    if y:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylim(top=1.05)
