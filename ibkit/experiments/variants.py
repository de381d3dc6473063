"""Personalizations of the same subjects beside each other: a method's ablations, and what it is compared with.

A variant is a method with settings that differ from its preset; all start from the base model with the same photos and
seed, and are drawn from the same noise. RPO's variants that differ only in which validated weights they take share one
training (`train`). The table has the columns of 03's scores (`evaluate.stats`), with the name of
the variant as the arm, so that the tests of claims read both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from PIL import Image
from safetensors.torch import load_file

from ibkit.adapt import Adapted, load_state, state
from ibkit.data.prompts import Prompt
from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject, world_photos
from ibkit.errors import ParameterError
from ibkit.evaluate.score import image_seeds
from ibkit.fields import fields_of, nearest
from ibkit.methods import rpo
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.records import METHODS, Job
from ibkit.methods.rpo import RPOConfig, Validations, harmonic
from ibkit.model.sample import sample
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.presets import Preset
from ibkit.runs import Run, hash_json
from ibkit.runs.files import save_tensors
from ibkit.scorers.judge import Judge
from ibkit.train.loop import Row


@dataclass(frozen=True)
class Variant:
    """A method, its settings that differ from the preset's, and what the variant is for.

    Attributes:
        start: a method that personalizes the model first, with its preset; the variant then trains a delta on top.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    why: str = ""
    start: str = ""


DPG = {
    "lora_dreambooth": Variant("lora_dreambooth", why="what DPG is compared with"),
    "dpg": Variant("dpg", why="look forward, Q learned"),
    "dpg_no_critic": Variant("dpg", {"critic": "none"}, "look forward, the mean in Q's place"),
    "dpg_undiscounted": Variant("dpg", {"discount": 1.0}, "all steps trusted alike: γ = 1"),
    "dpg_dino": Variant("dpg", {"cost": "scorer"}, "the noise's loss and Q of 1 - DINO"),
    "dpg_after": Variant("dpg", why="from the personalized model", start="lora_dreambooth"),
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
    "rpo_after": Variant("rpo", why="from the personalized model", start="lora_dreambooth"),
}


def choose(variants: Mapping[str, Variant], names: Sequence[str]) -> dict[str, Variant]:
    """Those of the names, in their order; a ParameterError where there is none, or no such variant (the nearest is
    named).
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


def unchosen(config: RPOConfig) -> RPOConfig:
    """The training of a variant without its choice among validated weights: all steps, and the last weights."""
    same_labels = config.lambda_train in (0.0, 1.0)  # a mean of one part is that part
    mean = RPOConfig.mean if same_labels else config.mean
    return replace(config, lambda_val=RPOConfig.lambda_val, mean=mean, early_stopping=False, patience=0)


def train(
    model: TextToImage, job: Job, method: str, config: Any, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Train a variant, see `records.Train`; one of RPO chooses from the training that it shares with others.

    That training lies beside the job's folder, with the weights and the scores of each validation, from which a variant
    gets the history and the weights that it would have had alone.
    """
    if not isinstance(config, RPOConfig):
        return METHODS[method].train(model, job, config, on_row=lambda row, _: on_row(row))
    assert job.reward is not None
    scorer, seen, whole = job.reward.scorer(model.device), [], unchosen(config)
    key = hash_json([asdict(whole), model_fingerprint(model)])[:8]
    name = f"rpo-{job.subject.name}-{job.seed}-{key}".replace(" ", "-")
    folder = job.folder.parent / name
    folder.mkdir(parents=True, exist_ok=True)

    def see(pictures: list[Image.Image], prompts: list[Prompt]) -> dict[str, float]:
        parts = dict(zip(rpo.PARTS, rpo.parts_of(scorer, pictures, prompts, job.photos), strict=True))
        seen.append(state(model, job.name) | parts)
        return {}

    def keep(row: Row, _: TextToImage) -> None:
        done = int(row["step"]) + 1
        for number, tensors in zip((0, 1) if done == 1 else (done,), seen, strict=False):  # of 0 steps too: the start
            save_tensors(tensors, folder / f"validated-{number:07d}.safetensors")
        seen.clear()
        on_row(row)

    history = METHODS[method].train(model, replace(job, folder=folder), whole, on_row=keep, monitor=see)
    return _choose(model, job.name, config, folder, history)


def _choose(model: TextToImage, name: str, config: RPOConfig, folder: Path, history: list[Row]) -> list[Row]:
    """Put the weights on the model that RPO's early stopping ends with, and return the history up to there."""
    validations, best = Validations(), None
    for path in sorted(folder.glob("validated-*.safetensors")):
        tensors, number = load_file(path), int(path.stem.partition("-")[2])
        subject, text = (tensors.pop(part) for part in rpo.PARTS)
        reward = harmonic(subject, text, config.lambda_val, config.mean).mean().item()
        history[max(number - 1, 0)]["validation"] = reward
        if validations.add(reward):
            best = tensors
        if config.early_stopping and 0 < config.patience <= validations.without_gain:
            history = history[:number]
            break
    if config.early_stopping and best is not None:
        load_state(model, name, best)
    return history


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
    world, model = demo_subject(noun), base.copy()
    who = METHODS[variant.method].names(PersonalizedSubject(noun, noun, "sks", "", base.name, "", world))
    activities = choose_activities(who, [], preset.activities)
    asked, photos = [who.prompt(each) for each in activities], world_photos(world)
    start = {variant.start: Variant(variant.start)} if variant.start else {}
    for stage, each in (start | {name: variant}).items():
        method, config = METHODS[each.method], config_of(preset, each, given)
        n_class = method.class_pictures(config)
        job = Job(
            Adapted.of(base), who, [photo.resize((base.image_px,) * 2) for photo in photos], each.method, seed,
            run.folder / "variants" / f"{noun}-{stage}-{seed}".replace(" ", "-"),
            class_images(base, who.class_prompt, n_class, preset.class_sampler, cache, seed=0) if n_class else [],
            asked, RewardSpec(method.reward, preset.scorers) if method.reward else None,
        )  # fmt: skip
        history = train(model, job, each.method, config, on_row if each is variant else lambda row: None)
        run.write_tensors(f"models/{job.folder.name}.safetensors", state(model, each.method))
    rows, pictures = look(model, who, activities, image_seeds(seed, n_images), preset)
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
