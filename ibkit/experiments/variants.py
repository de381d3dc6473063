"""Personalizations of the same subjects beside each other: a method's ablations, and what it is compared with.

A variant is a method with settings that differ from its preset; all start from the base model with the same photos and
seed, and are drawn from the same noise. The table has the columns of 03's scores (`evaluate.stats`), with the name of
the variant as the arm, so that the tests of claims read both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from PIL import Image

from ibkit.adapt import Adapted, state
from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject, world_photos
from ibkit.errors import ParameterError
from ibkit.evaluate.score import image_seeds
from ibkit.fields import fields_of, nearest
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.records import METHODS, Job
from ibkit.model.sample import sample
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import Preset
from ibkit.runs import Run
from ibkit.scorers.judge import Judge
from ibkit.train.loop import Row


@dataclass(frozen=True)
class Variant:
    """A method, its settings that differ from the preset's, and what the variant is for."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    why: str = ""


DPG = {
    "lora_dreambooth": Variant("lora_dreambooth", why="what DPG is compared with"),
    "dpg": Variant("dpg", why="look forward, Q learned"),
    "dpg_no_critic": Variant("dpg", {"critic": "none"}, "look forward, the mean in Q's place"),
    "dpg_undiscounted": Variant("dpg", {"discount": 1.0}, "all steps trusted alike: γ = 1"),
    "dpg_dino": Variant("dpg", {"cost": "scorer"}, "the noise's loss and Q of 1 - DINO"),
}
RPO = {
    "lora_dreambooth": Variant("lora_dreambooth", why="what RPO is compared with"),
    "rpo": Variant("rpo", why="the whole method"),
    "rpo_last": Variant("rpo", {"early_stopping": False}, "without early stopping: the last weights"),
    "rpo_no_preference": Variant("rpo", {"preference_weight": 0.0}, "similarity loss with early stopping"),
    "rpo_similarity": Variant("rpo", {"preference_weight": 0.0, "early_stopping": False}, "the similarity loss alone"),
    "rpo_val_5": Variant("rpo", {"lambda_val": 0.5}, "λ_val = 0.5"),
    "rpo_val_7": Variant("rpo", {"lambda_val": 0.7}, "λ_val = 0.7"),
    "rpo_train_3": Variant("rpo", {"lambda_train": 0.3}, "λ_train = 0.3"),
    "rpo_train_5": Variant("rpo", {"lambda_train": 0.5}, "λ_train = 0.5"),
    "rpo_train_7": Variant("rpo", {"lambda_train": 0.7}, "λ_train = 0.7"),
    "rpo_arithmetic": Variant("rpo", {"mean": "arithmetic"}, "the arithmetic mean in the harmonic one's place"),
}


def choose(variants: Mapping[str, Variant], names: Sequence[str]) -> dict[str, Variant]:
    """Those of the names, in their order.

    Raises:
        ParameterError: no such variant (the nearest is named), or no name.
    """
    if not names:
        raise ParameterError(f"There are no variants to train: choose from {', '.join(variants)}.")
    for name in names:
        if name not in variants:
            raise ParameterError(f"There is no variant {name!r}{nearest(name, variants)}")
    return {name: variants[name] for name in names}


def settings_of(variant: Variant) -> list[str]:
    """Dotted names of what can be set of the variant's method."""
    return [each.name for each in fields_of(METHODS[variant.method].settings)]


def config_of(preset: Preset, variant: Variant, given: Mapping[str, Any]) -> Any:
    """The variant's settings: the preset's, those that are given for all and its method has, and its own."""
    has = settings_of(variant)
    return preset.settings(variant.method, {n: v for n, v in given.items() if n in has} | dict(variant.settings))


def train_and_draw(
    run: Run,
    base: TextToImage,
    preset: Preset,
    noun: str,
    name: str,
    variant: Variant,
    seed: int,
    given: Mapping[str, Any],
    n_images: int,
    cache: Path,
    on_row: Callable[[Row], None] = lambda row: None,
) -> tuple[pd.DataFrame, list[Row], TextToImage]:
    """Train one variant for the demonstration subject of a class, draw the preset's activities and ask the judge.

    A training that was stopped goes on from its checkpoints in the run's folder.

    Args:
        given: settings of all variants, such as n_steps; those that a method does not have are not its.
        n_images: of each prompt.
        cache: of class pictures.

    Returns:
        A row a picture, with the picture itself as `image`; the training's history; the model.
    """
    world, method = demo_subject(noun), METHODS[variant.method]
    who = method.names(PersonalizedSubject(noun, noun, "sks", "", base.name, "", world))
    activities = choose_activities(who, [], preset.activities)
    config = config_of(preset, variant, given)
    n_class = method.class_pictures(config)
    classes = class_images(base, who.class_prompt, n_class, preset.class_sampler, cache, seed=0) if n_class else []
    model, asked = base.copy(), [who.prompt(activity) for activity in activities]
    job = Job(
        Adapted.of(base), who, [photo.resize((base.image_px,) * 2) for photo in world_photos(world)], variant.method,
        seed, run.folder / "variants" / f"{noun}-{name}-{seed}".replace(" ", "-"), classes, asked,
        RewardSpec(method.reward, preset.scorers) if method.reward else None,
    )  # fmt: skip
    history = method.train(model, job, config, on_row=lambda row, _: on_row(row))
    rows, pictures = look(model, who, activities, image_seeds(seed, n_images), preset)
    run.write_tensors(f"models/{job.folder.name}.safetensors", state(model, variant.method))
    return rows.assign(arm=name, seed=seed, steps=len(history), image=pictures), history, model


def look(
    model: TextToImage, who: PersonalizedSubject, activities: Sequence[str], seeds: Sequence[int], preset: Preset
) -> tuple[pd.DataFrame, list[Image.Image]]:
    """Pictures of each activity from the same noise, and what the judge says of them, a row a picture."""
    assert who.world, "only of a subject of the pocket world the judge knows what is right"
    judge = Judge.load(model.device)
    asked = [activity for activity in activities for _ in seeds]
    prompts = [who.prompt(activity).text for activity in asked]
    pictures = sample(model, prompts, [*seeds] * len(activities), preset.sampler)
    rows = pd.DataFrame({"prompt_id": asked, "text": prompts, "image_seed": [*seeds] * len(activities)})
    rows = rows.assign(tune_seed=None, subject=who.name, class_noun=who.class_noun, activity=asked, identifier=True)
    rows["judge_text"] = judge.agrees(pictures, "activity", asked).int().tolist()
    rows["judge_identity"] = judge.identifies(pictures, who.world).int().tolist()
    return rows, pictures
