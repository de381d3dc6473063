"""Is it the same one? The part of each picture that holds the subject, cut out, enlarged and put side by side.

Shapes: N pictures, L = r×r patches.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import avg_pool2d, normalize

from ibkit.evaluate.arms import REAL, arms_of, label_of
from ibkit.evaluate.figures import LARGE_IN_ROW, draw_picture, house_figure, opened
from ibkit.scorers.dino import Dino
from ibkit.scorers.subject import patch_tokens

Box = tuple[int, int, int, int]  # left, top, right, bottom, in px
ZOOM = 2  # a crop has half the side of what DINO sees of the picture


def find_subject(images: Sequence[Image.Image], dino: Dino) -> list[Box]:
    """A square of each picture: where its patches are least like those along its border, which are background mostly.

    It is a guess for the eye, and no number is made of it.
    """
    with torch.inference_mode():
        tokens = normalize(patch_tokens(dino, images), dim=-1)
        r = round(tokens.shape[1] ** 0.5)
        border = torch.ones(r, r, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        unlike = 1 - (tokens @ tokens[:, border.flatten()].transpose(1, 2)).mean(2)  # (N, L)
        window = max(r // ZOOM, 1)
        means = avg_pool2d(unlike.view(-1, 1, r, r), window, stride=1).flatten(1)  # (N, windows)
    boxes = []
    for picture, best in zip(images, means.argmax(1).tolist(), strict=True):
        top, left = divmod(best, r - window + 1)
        seen = min(picture.size) * dino.image_px / dino.resize_px  # DINO cuts a square from the middle
        x, y = ((side - seen) / 2 + place * seen / r for side, place in zip(picture.size, (left, top), strict=True))
        boxes.append((round(x), round(y), round(x + window * seen / r), round(y + window * seen / r)))
    return boxes


def identity_strip(
    images: pd.DataFrame, root: str | Path, photos: Sequence[Image.Image], dino: Dino, title: str = ""
) -> tuple[Figure, pd.DataFrame]:
    """Enlarged cuts: a row of the photos, then a row for each arm, of the same prompts and noise in a column.

    Args:
        images: as of `figures.picture_grid`; root: what their paths are relative to.

    Returns:
        The figure, and one row a cut: arm, prompt_id, image_seed, image, left, top, right, bottom (px).
    """
    rank = images.groupby(["arm", "prompt_id"])["image_seed"].rank(method="first")
    chosen = images.assign(rank=rank).sort_values("rank", kind="stable").groupby("arm", sort=False).head(LARGE_IN_ROW)
    rows = [(REAL, "photo", i, f"photo {i}", photo) for i, photo in enumerate(photos[:LARGE_IN_ROW])]
    rows += [(c.arm, c.prompt_id, c.image_seed, c.image, opened(c.image, root)) for c in chosen.itertuples()]
    boxes = find_subject([picture for *_, picture in rows], dino)
    data = pd.DataFrame([row[:4] for row in rows], columns=["arm", "prompt_id", "image_seed", "image"])
    data[["left", "top", "right", "bottom"]] = boxes
    names = [REAL, *(name for name in arms_of(data["arm"]) if name != REAL)]
    with house_figure(1.6 * LARGE_IN_ROW + 1.2, 1.65 * len(names) + 0.3, title) as figure:
        axes = figure.subplots(len(names), LARGE_IN_ROW, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for name, in_row in zip(names, axes, strict=True):
            in_row[0].text(-0.08, 0.5, label_of(name), ha="right", va="center", transform=in_row[0].transAxes)
            for axis, i in zip(in_row, data.index[data["arm"] == name], strict=False):
                draw_picture(axis, rows[i][4].crop(boxes[i]).resize((256, 256), Image.Resampling.LANCZOS))
    return figure, data
