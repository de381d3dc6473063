"""How well the words' attention finds the subject: overlap with the true masks of rendered scenes.

Only of a rendered scene is it known which pixels are the subject's, so the model reads scenes that it did not draw. The
article and the start mark are controls: they say nothing about the picture.
"""

import random
from collections.abc import Sequence

import pandas as pd
import torch
from PIL import Image

from ibkit.data.prompts import SLOT
from ibkit.data.subject import PersonalizedSubject
from ibkit.device import generator
from ibkit.evaluate.intervals import mean_interval
from ibkit.evaluate.stats import unit_groups, unit_matrix
from ibkit.methods.engine.photos import add_noise
from ibkit.model.attention import auc, lift, mask_at, record_attention, token_positions
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import NO_ACCESSORY, Scene, Subject, sample_scene

START_MARK = "start mark"


def at_size(pictures: Sequence[Image.Image], model: TextToImage) -> list[Image.Image]:
    """Pictures of the pocket world at the model's own size."""
    return [p.resize((model.image_px, model.image_px), Image.Resampling.BICUBIC) for p in pictures]


def new_scenes(subject: Subject, activities: Sequence[str], n: int, seed: int, *names: str) -> list[Scene]:
    """`n` scenes of the subject for each activity, nothing worn, place and view random; `names` name the stream."""
    rng = random.Random(f"{seed} {names} {subject}")
    return [sample_scene(rng, subject, activity, None, NO_ACCESSORY) for activity in activities for _ in range(n)]


def words_of(who: PersonalizedSubject, activity: str) -> dict[str, str]:
    """The words of a prompt whose maps are looked at: word or phrase -> its role."""
    prompt, first = who.prompt(activity).text, who.instance_prompt.split()[0]
    words = {first: "filler"} if first in prompt.lower().split() else {}
    words |= {who.identifier: "identifier"} | {word: "description" for word in who.description.split()}
    if not who.alone:
        words[who.class_noun] = "class noun"
    return words | ({activity: "activity"} if activity and SLOT not in activity else {})


@torch.no_grad()
def overlap(
    model: TextToImage, who: PersonalizedSubject, scenes: Sequence[Scene], timesteps: Sequence[int], seed: int = 0
) -> pd.DataFrame:
    """Measure the overlap on rendered scenes: one row for each scene, timestep and word, with scene, activity, t, role,
    word, lift, auc.

    Teacher-forced: the scene's latents with noise of timestep t pass through the U-Net once, with the prompt of the
    scene's activity.

    Args:
        who: the subject, whose words make the prompt.
        timesteps: t of the noise; a scene has the same noise at all of them, and for every model.
        seed: of the noise.
    """
    tables, alpha_bar = [], model.alphas_cumprod.float().to(model.device)
    t = torch.tensor(list(timesteps), device=model.device)
    for i, scene in enumerate(scenes):
        words, prompt = words_of(who, scene.activity), who.prompt(scene.activity).text
        z0 = model.encode_images(at_size([render(scene)], model)).expand(len(t), -1, -1, -1)
        noise = torch.randn(z0.shape[1:], generator=generator(seed, "overlap", i)).to(z0).expand_as(z0)
        columns = {word: token_positions(model, prompt, word) for word in words} | {START_MARK: [0]}
        with record_attention(model, prompt, columns) as record:
            model.predict_noise(add_noise(z0, noise, alpha_bar[t]), t, [prompt] * len(t))
        mask = mask_at(subject_mask(scene), record.statistics_resolution)
        roles = [*words.values(), START_MARK]
        shown = ["" if role in ("activity", START_MARK) else word for word, role in zip(columns, roles, strict=True)]
        for step in timesteps:
            maps = record.statistics(step)[0]
            what = {"scene": i, "activity": scene.activity, "t": step, "role": roles, "word": shown}
            measured = {"lift": lift(maps, mask).tolist(), "auc": auc(maps, mask).tolist()}
            tables.append(pd.DataFrame(what | measured))
    return pd.concat(tables, ignore_index=True)


def overlap_by_word(table: pd.DataFrame) -> pd.DataFrame:
    """Mean overlap of each model and word with its interval over activities, their scenes, and training seeds.

    Args:
        table: `overlap` of one or more models, with the columns model and train_seed. A scene's timesteps are averaged.

    Returns:
        One row for each model, word and measure: model, role, word, measure, value, low, high, n (scenes × seeds),
        seeds.
    """
    rows, unit, word = [], ["activity", "scene"], ["model", "role", "word"]
    table = table.rename(columns={"train_seed": "seed"})
    scenes = table.groupby([*word, "seed", *unit], as_index=False, sort=False)[["lift", "auc"]].mean()
    for labels, part in scenes.groupby(word, sort=False):
        for measure in ("lift", "auc"):
            matrix = unit_matrix(part, measure, unit)
            interval = mean_interval(matrix.to_numpy(), unit_groups(matrix))
            row = dict(zip(word, labels, strict=True)) | {"measure": measure}
            rows.append(row | vars(interval) | {"seeds": len(matrix)})
    return pd.DataFrame(rows)
