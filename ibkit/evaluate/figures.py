"""Every figure of the kit: tidy data in, `(figure, data)` out, one house style.

The returned data hold one row for each mark, so that `Run.save_figure(figure, stem, data)` writes what was drawn.
Figures are made without pyplot: nothing is shown or kept open behind the caller's back, no backend is chosen, and the
same call works in JupyterLab, in a batch run and in a test. End a notebook cell with `figure` to see it.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.evaluate.arms import BLUE, GREEN, GREY, ORANGE, arms_of
from ibkit.evaluate.stats import METRICS, summarise

INK, FAINT = "#1f2328", "#d8dbe0"
HOUSE_STYLE = seaborn.axes_style("whitegrid") | {
    "figure.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "grid.color": "#eceef1",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}

# What the columns of history.csv are called: reward panel, and the panel of what the reward does not see.
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
    """A figure that shows itself as the last line of a notebook cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def use_house_style() -> None:
    """Give the user's own figures in a notebook the look of the kit's."""
    matplotlib.rcParams.update(HOUSE_STYLE)


def reference_strip(
    photos: Sequence[Image.Image], names: Sequence[str] | None = None, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Show the subject's photos side by side.

    Args:
        photos: RGB pictures of the subject.
        names: a caption for each, such as the file names.
        title: above the strip.

    Returns:
        The figure, and one row a photo: position, name, width_px, height_px.
    """
    names = list(names) if names is not None else [""] * len(photos)
    data = pd.DataFrame(
        {
            "position": range(len(photos)),
            "name": names,
            "width_px": [photo.width for photo in photos],
            "height_px": [photo.height for photo in photos],
        }
    )
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(1.6 * max(len(photos), 3), 2.1), layout="constrained")
        axes = figure.subplots(1, len(photos), squeeze=False)[0]
        for axis, photo, name in zip(axes, photos, names, strict=True):
            _draw_picture(axis, photo)
            axis.set_xlabel(name, fontsize=8)
        _head(figure, title)
    return figure, data


def picture_wall(columns: Mapping[str, Sequence[Image.Image]], title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Hang pictures side by side, a named column for each group.

    Args:
        columns: name -> pictures, as many in each.
        title: above the wall.

    Returns:
        The figure, and one row a picture: column, row.
    """
    n_rows = max(map(len, columns.values()))
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(1.25 * len(columns), 1.2 * n_rows + 0.6), layout="constrained")
        axes = figure.subplots(n_rows, len(columns), squeeze=False)
        for (name, pictures), column in zip(columns.items(), axes.T, strict=True):
            column[0].set_title(name, loc="center", fontsize=9)
            for picture, axis in zip(pictures, column, strict=True):
                _draw_picture(axis, picture)
        _head(figure, title)
    places = [(name, row) for name, pictures in columns.items() for row in range(len(pictures))]
    return figure, pd.DataFrame(places, columns=["column", "row"])


def picture_grid(
    images: pd.DataFrame, root: str | Path = ".", n_seeds: int = 4, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Show every arm on the same prompts and the same noise: a row for each prompt, a block for each arm.

    Args:
        images: one row per image with arm, prompt_id, text, image_seed, and image: a path below `root`, or a
            picture. Give one row for each (arm, prompt_id, image_seed): choose by `stats.one_seed` and
            the subject before.
        root: folder the paths are relative to.
        n_seeds: pictures an arm gets for a prompt; the smallest seeds that all arms have.
        title: above the grid.

    Returns:
        The figure, and one row a picture: row, column, arm, prompt_id, text, image_seed, image.
    """
    arms = arms_of(images["arm"].unique())
    prompts = images.drop_duplicates("prompt_id")[["prompt_id", "text"]]
    cells = images.set_index(["arm", "prompt_id", "image_seed"])["image"].sort_index()
    drawn = []
    for row, (prompt_id, text) in enumerate(prompts.itertuples(index=False)):
        seeds = [set(cells.loc[(arm, prompt_id)].index) if (arm, prompt_id) in cells.index else set() for arm in arms]
        shared = sorted(set.intersection(*[have for have in seeds if have]))[:n_seeds]
        for block, (arm, have) in enumerate(zip(arms, seeds, strict=True)):
            for place, image_seed in enumerate(shared if have else []):
                drawn.append((row, block * n_seeds + place, arm, prompt_id, text, image_seed))
    data = pd.DataFrame(drawn, columns=["row", "column", "arm", "prompt_id", "text", "image_seed"])

    with matplotlib.rc_context(HOUSE_STYLE):
        # A label column, then for each arm its pictures and a gap; every length is in inches.
        label, picture, gap, head = 1.4, 0.74, 0.1, 0.55 if title else 0.3
        widths = [label] + ([picture] * n_seeds + [gap]) * len(arms)
        between = 0.06 * sum(widths) / len(widths)
        width = sum(widths) + between * (len(widths) - 1)
        height = (picture + between) * len(prompts) + head
        figure = NotebookFigure(figsize=(width, height))
        grid = figure.add_gridspec(
            len(prompts), len(widths), width_ratios=widths, wspace=0.06, hspace=between / picture,
            left=0, right=1, bottom=0, top=1 - head / height,
        )  # fmt: skip
        for row, text in enumerate(prompts["text"]):
            margin = figure.add_subplot(grid[row, 0])
            margin.set_axis_off()
            margin.text(0.96, 0.5, textwrap.fill(str(text), 18), ha="right", va="center", fontsize=9)
        for cell in data.itertuples():
            block = cell.column // n_seeds
            axis = figure.add_subplot(grid[cell.row, 1 + cell.column + block])
            _draw_picture(axis, _picture(cells.loc[(cell.arm, cell.prompt_id, cell.image_seed)], Path(root)))
            if cell.row == 0 and cell.column % n_seeds == 0:
                axis.set_title(
                    textwrap.fill(arms[cell.arm].label, 10 * n_seeds), color=arms[cell.arm].colour, fontsize=10, pad=5
                )
        _head(figure, title)
    data["image"] = [
        str(value) if isinstance(value, str | Path) else ""
        for value in (cells.loc[(c.arm, c.prompt_id, c.image_seed)] for c in data.itertuples())
    ]
    return figure, data


def learning_curves(history: pd.DataFrame, title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Draw the reward beside what the reward does not see: the subject monitor and the judge.

    Args:
        history: one row per epoch as in `history.csv` (epoch, reward, …), with `tune_seed` if it holds several runs;
            several runs are drawn as mean and standard deviation, as in the paper's figure 16. Of a single run the
            guard's alarm and best epoch are marked.
        title: above the figure.

    Returns:
        The figure, and one row a point: panel, series, epoch, value (and tune_seed if it was given).
    """
    panels = [
        ("Reward", "reward of the epoch's images", REWARD_SERIES),
        ("What the reward does not see", "share of images, or similarity", MONITOR_SERIES),
    ]
    names = ["epoch"] + (["tune_seed"] if "tune_seed" in history.columns else [])
    parts = []
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(9.6, 4.4), layout="constrained")
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
        _head(figure, title)
    data = pd.concat(parts, ignore_index=True)
    return figure, data[["panel", "series", *names, "value"]]


def _mark_guard(axis: Axes, history: pd.DataFrame) -> None:
    """Where the reward guard rang, and the epoch whose policy it thinks best (`ibkit.train.guard`)."""
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
    """One episode of the RL stage along its denoising steps: what the model believes, and what an update reads.

    Args:
        beliefs: t -> x̂0, decoded, of some steps, first to last.
        steps: one row for each step: t, log_prob (of the policy that drew the episode), ratio (of the
            policy as it is now), clip_high and clip_low (shares of all episodes whose gradient would be cut).
        clip_range: ε, drawn around a ratio of 1.
        title: above the figure, such as the prompt and the advantage.

    Returns:
        The figure, and `steps`.
    """
    panels = {
        "Log-probability of the step": {"log_prob": GREY},
        "Ratio, new over old policy": {"ratio": BLUE},
        "Gradient cut, share of episodes": {
            "clip_high": BLUE,
            "clip_low": ORANGE,
        },
    }
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(9.6, 4.2), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.9))
        axes = above.subplots(1, len(beliefs), squeeze=False)[0]
        for axis, (t, picture) in zip(axes, beliefs.items(), strict=True):
            _draw_picture(axis, picture)
            axis.set_xlabel(f"t = {t}", fontsize=8)
        for axis, (name, lines) in zip(below.subplots(1, len(panels)), panels.items(), strict=True):
            for column, colour in lines.items():
                label = column if len(lines) > 1 else None
                seaborn.lineplot(steps, x="t", y=column, marker="o", color=colour, label=label, ax=axis)
            axis.set(title=name, xlabel="t, from noise to picture", ylabel="")
            axis.invert_xaxis()
            if "ratio" in lines:
                axis.axhspan(1 - clip_range, 1 + clip_range, color=FAINT, lw=0)
            if "clip_high" in lines:
                axis.set_ylim(-0.05, 1.05)
        _head(figure, title)
    return figure, steps


def fidelity_plane(
    scores: pd.DataFrame, text: str = "judge_text", subject: str = "judge_identity", title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Place every arm on the plane of text fidelity against subject fidelity, with 95 % intervals.

    Args:
        scores: a checked score table, usually through `stats.as_compared`.
        text: metric of text fidelity (horizontal).
        subject: metric of subject fidelity (vertical).
        title: above the figure.

    Returns:
        The figure, and one row an arm: arm, n, and for text and subject: metric, value, low, high.
    """
    table = summarise(scores, ("arm",), (text, subject)).set_index(["arm", "metric"])
    arms = arms_of(name for name in scores["arm"].unique() if {(name, text), (name, subject)} <= set(table.index))
    rows = []
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(5.6, 4.4), layout="constrained")
        axis = figure.subplots()
        for arm, look in arms.items():
            x, y = table.loc[(arm, text)], table.loc[(arm, subject)]
            rows.append(
                {"arm": arm, "n": int(x["n"])}
                | {
                    f"{side}_{part}": cell[part]
                    for side, cell in (("text", x), ("subject", y))
                    for part in ("value", "low", "high")
                }
            )
            axis.errorbar(
                x["value"], y["value"], xerr=_whiskers(x), yerr=_whiskers(y), fmt=look.marker,
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
        metric: the column to draw.
        title: above the figure.

    Returns:
        The figure, and one row a bar: arm, prompt_id, text, metric, value, low, high, n, seeds.
    """
    data = summarise(scores, ("arm", "prompt_id"), (metric,))
    texts = scores.drop_duplicates("prompt_id").set_index("prompt_id")["text"]
    prompts = list(dict.fromkeys(data["prompt_id"]))
    arms = arms_of(data["arm"].unique())
    bar = 0.8 / max(len(arms), 1)
    with matplotlib.rc_context(HOUSE_STYLE):
        figure = NotebookFigure(figsize=(max(5.5, 1.5 * len(prompts) + 1.5), 3.6), layout="constrained")
        axis = figure.subplots()
        for place, (arm, look) in enumerate(arms.items()):
            part = data[data["arm"] == arm].set_index("prompt_id").reindex(prompts)
            x = np.arange(len(prompts)) + (place - (len(arms) - 1) / 2) * bar
            whiskers = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(0)
            axis.bar(x, part["value"], bar * 0.9, color=look.colour, hatch=look.hatch, edgecolor="w", label=look.label)
            axis.errorbar(x, part["value"], yerr=whiskers, fmt="none", color=INK, capsize=2, elinewidth=1)
        axis.set_xticks(range(len(prompts)), [textwrap.fill(str(texts[prompt]), 16) for prompt in prompts])
        axis.grid(False, axis="x")
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(ylabel=METRICS[metric].label, title=title)
        _percent_axes(axis, False, METRICS[metric].is_share)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(len(arms), 4))
    return figure, data.merge(texts, left_on="prompt_id", right_index=True)


def _head(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _draw_picture(axis: matplotlib.axes.Axes, picture: Image.Image) -> None:
    """Show a picture without ticks or frame; small pictures keep their pixels sharp."""
    smooth = "antialiased" if min(picture.size) > 128 else "nearest"
    axis.imshow(np.asarray(picture.convert("RGB")), interpolation=smooth)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _picture(image: Image.Image | str | Path, root: Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return read_rgb(root / image)


def _whiskers(cell: pd.Series) -> np.ndarray:
    """Lengths of the whiskers below and above, shape (2, 1)."""
    return np.array([[max(cell["value"] - cell["low"], 0)], [max(cell["high"] - cell["value"], 0)]])


def _percent_axes(axis: matplotlib.axes.Axes, x: bool, y: bool) -> None:
    """Write shares in per cent and end their axis just above 100 %."""
    if x:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xlim(right=1.05)
    if y:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylim(top=1.05)
