"""Cuts for the eye: they hold the subject, and arms stand below each other on the same prompts and noise."""

import random

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ibkit.data.subject import demo_subject, world_photos
from ibkit.evaluate.identity import find_subject, identity_strip
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import PLACES, Scene, sample_view
from ibkit.scorers.dino import Dino


@pytest.fixture(scope="module")
def dino():
    return Dino.load("pocket")


@pytest.mark.parametrize("noun", ["cat", "cup", "bike"])
def test_a_cut_holds_about_as_much_of_the_subject_as_any_could(dino, noun):
    rng = random.Random(0)
    places = sorted(PLACES)
    scenes = [Scene(demo_subject(noun), place=rng.choice(places), view=sample_view(rng)) for _ in range(16)]
    masks = [np.asarray(subject_mask(scene)) > 127 for scene in scenes]

    def held(mask, box):
        left, top, right, bottom = box
        return mask[top:bottom, left:right].sum() / mask.sum()

    found = find_subject([render(scene) for scene in scenes], dino)
    assert all((right - left, bottom - top) == (32, 32) for left, top, right, bottom in found)
    of_found = np.mean([held(mask, box) for mask, box in zip(masks, found, strict=True)])
    windows = [(x, y, x + 32, y + 32) for x in range(0, 33, 8) for y in range(0, 33, 8)]
    most = np.mean([max(held(mask, box) for box in windows) for mask in masks])
    assert of_found > 0.9 * most and most > 1.5 * np.mean([held(mask, box) for mask in masks for box in windows])


def test_of_a_wide_photo_the_cut_lies_in_what_dino_sees(dino):
    photo = Image.new("RGB", (300, 200), "grey")
    photo.paste("red", (200, 80, 250, 130))
    ((left, top, right, bottom),) = find_subject([photo], dino)
    assert (right - left, bottom - top) == (100, 100)  # half of the square of 200 px in the middle
    assert 50 <= left <= 200 <= right <= 250 and 0 <= top <= 80 and bottom <= 200


def test_the_strip_has_the_photos_and_a_row_for_each_arm(dino, tmp_path):
    photos = world_photos(demo_subject("cat"))
    rows = []
    for arm in ("base", "dreambooth+ddpo", "dreambooth"):
        for prompt in ("tennis", "soccer"):
            for seed in (7, 3, 5, 9):
                image = f"{arm}-{prompt}-{seed}.png"
                photos[seed % 5].save(tmp_path / image)
                rows.append({"arm": arm, "prompt_id": prompt, "image_seed": seed, "image": image})
    figure, data = identity_strip(pd.DataFrame(rows), tmp_path, photos, dino, "Closer")
    assert data["arm"].value_counts().to_dict() == {"real": 5, "base": 6, "dreambooth": 6, "dreambooth+ddpo": 6}
    assert sum(bool(axis.images) for axis in figure.axes) == len(data)
    by_arm = [list(part[["prompt_id", "image_seed"]].itertuples(index=False)) for _, part in data.groupby("arm")]
    assert by_arm[0] == by_arm[1] == by_arm[2] and set(data["image_seed"][5:]) == {3, 5, 7}
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == [
        "Real photos", "Base model", "DreamBooth", "InstructBooth",
    ]  # fmt: skip
