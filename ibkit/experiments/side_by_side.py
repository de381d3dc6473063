"""Short trainings from one start with several settings, side by side: for the exercises of notebooks 01 and 02."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import seaborn
import torch
from matplotlib.figure import Figure

from ibkit.evaluate.figures import house_figure
from ibkit.methods.records import Job, Method, Monitor
from ibkit.model.text_to_image import TextToImage
from ibkit.progress import Progress, duration
from ibkit.train.loop import Row


def side_by_side(
    method: Method,
    tries: Mapping[str, tuple[Job, Any]],
    device: torch.device,
    monitor: Monitor | None = None,
    look: Callable[[TextToImage], dict[str, float]] | None = None,
) -> tuple[pd.DataFrame, dict[str, TextToImage]]:
    """Train with each of several settings, from the same random streams; nothing is written into the notebook's run.

    Args:
        method: that of all.
        tries: label -> what to train on, and the settings.
        monitor: watches each epoch of a tuning.
        look: numbers to measure once on each trained model; they stand in all of its rows.

    Returns:
        The rows of all trainings, with the column `setting`, and the trained models by label.
    """
    parts, models = [], {}
    for label, (job, settings) in tries.items():
        clock, model = time.monotonic(), job.start.build(device)
        progress = Progress(label, getattr(settings, "n_epochs", 0) or settings.n_steps)

        def count(row: Row, model: TextToImage, progress: Progress = progress) -> None:
            progress.update(int(row.get("epoch", row.get("step", 0))) + 1)

        with TemporaryDirectory() as folder:
            rows = method.train(model, replace(job, folder=Path(folder)), settings, on_row=count, monitor=monitor)
        parts.append(pd.DataFrame(rows).assign(setting=label, **(look(model) if look else {})))
        models[label] = model
        print(f"{label}: {duration(time.monotonic() - clock)}")
    return pd.concat(parts, ignore_index=True), models


def tried_curves(rows: pd.DataFrame, x: str, columns: Sequence[str], window: int = 1) -> Figure:
    """Draw columns of `side_by_side`'s rows: a panel each, a line a setting, each value the mean of `window` rows."""
    with house_figure(4 * len(columns), 3) as figure:
        for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            lines = rows.groupby("setting", sort=False)[column]
            means = rows.assign(mean=lines.transform(lambda line: line.rolling(window, min_periods=1).mean()))
            first = axis is figure.axes[0]
            seaborn.lineplot(means, x=x, y="mean", hue="setting", marker="o", ax=axis, legend=first)
            axis.set(title=column.replace("_", " "), ylabel="")
    return figure
