"""A detailed description for a rare subject: InstructBooth's section 2.1 and figure 15 as an experiment.

Two arms are personalized from the same base model, on the same photos and the same random streams; they differ in the
words alone:

| arm | trained on and asked for |
|---|---|
| with description | "a [identifier] [description] [class noun]" |
| without | "a [identifier] [class noun]" |

Both then draw the same activities from the same noise. An arm is trained once for each training seed; pictures of two
arms are compared within a seed, and the seeds are resampled like the prompts (`ibkit.evaluate.intervals`).

Shapes: N pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.torch import load_file

from ibkit.data.photos import read_rgb
from ibkit.data.prompts import article
from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import ParameterError
from ibkit.evaluate.intervals import Interval, wilson_interval
from ibkit.evaluate.score import image_seeds, prompt_ids
from ibkit.evaluate.stats import (
    METRICS,
    UNIT,
    bootstrap_difference,
    summarise,
    unit_matrix,
)
from ibkit.experiments.attention_overlap import at_size, new_scenes
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.draw import render
from ibkit.pocket.world import PATTERNS, RARE_SUBJECT, SHAPES, Subject
from ibkit.runs import Run
from ibkit.scorers.base import Scorer, batches
from ibkit.scorers.judge import Judge

# The columns of description.csv, without the measurements.
KEYS = ("description", "train_seed", "subject", "prompt_id", "prompt", "text", "image", "image_seed")
MEASURED = ("judge_activity", "judge_identity", "judge_shape", "dino")


@dataclass(frozen=True)
class Arm:
    """One personalization.

    Attributes:
        described: whether the description is in its words.
        train_seed: of its training; the two arms of a seed see the same photos, noise and timesteps in every step.
        who: the subject with this arm's words.
    """

    described: bool
    train_seed: int
    who: PersonalizedSubject

    @property
    def name(self) -> str:
        """As tables that compare arms have it."""
        return arm_name(self.described)

    @property
    def folder(self) -> str:
        """Where its files are below the run folder."""
        return f"arms/{self.name.replace('_', '-')}-seed{self.train_seed}"

    @property
    def weights(self) -> str:
        """Its trained U-Net, an output of the run."""
        return f"{self.folder}/unet.safetensors"


# (model, arm) -> numbers about the model as it is now
Look = Callable[[TextToImage, Arm], dict[str, float]]


def arm_name(described: bool) -> str:
    return "with_description" if described else "without_description"


def make_arms(who: PersonalizedSubject, train_seeds: Sequence[int]) -> list[Arm]:
    """Both arms for each training seed; a seed named twice counts once.

    Raises:
        ParameterError: the subject has no description to leave out.
    """
    if not who.description:
        raise ParameterError("there is no description to compare with: give one, such as description='triangular'.")
    return [
        Arm(described, seed, who if described else replace(who, description=""))
        for seed in dict.fromkeys(train_seeds)
        for described in (True, False)
    ]


def rare_subject(class_noun: str) -> Subject:
    """The pocket world's rare subject: its shape was never drawn on its class in pre-training.

    Raises:
        ParameterError: another class noun was asked for.
    """
    if class_noun != RARE_SUBJECT.class_noun:
        raise ParameterError(
            f"the pocket world's rare subject is a {RARE_SUBJECT.class_noun}, not a {class_noun}: leave class_noun as "
            "it is, or give a folder of photos as the subject."
        )
    return RARE_SUBJECT


# --- training ------------------------------------------------------------------------------------------------------


def look_steps(n_steps: int, checkpoint_every: int, n_looks: int) -> list[int]:
    """After how many steps a training is looked at: `n_looks` times at equal distances, fewer in a short training.

    Never right after a checkpoint: a training that is stopped there goes on behind it, and the look would be lost.
    """
    steps = {round(n_steps * i / n_looks) for i in range(1, n_looks + 1)}
    moved = {step - (step % checkpoint_every == 0 and step < n_steps) for step in steps}
    return sorted(step for step in moved if step > 0)


def train_arm(
    run: Run,
    arm: Arm,
    base: TextToImage,
    photos: Sequence[Image.Image],
    class_pictures: Sequence[Image.Image],
    config: DreamBoothConfig,
    look: Look,
    n_looks: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Personalize a copy of `base` and keep its U-Net and its history in the run, unless they are there.

    A training that was stopped goes on from its last checkpoint. The looks draw from streams of their own, so that
    they do not change what is learned.

    Args:
        look: (model, arm) -> numbers, asked `n_looks` times; they stand in `history.csv` beside the loss.
        on_step: called with each step's row, for progress.

    Raises:
        TrainingError: see `dreambooth.train`.
    """
    if run.has(arm.weights):
        return
    model, folder = base.copy(), run.path(arm.weights).parent
    steps = set(look_steps(config.n_steps, config.checkpoint_every, n_looks))

    def after_step(row: dict[str, float]) -> None:
        if row["step"] + 1 in steps:
            row.update(look(model, arm))  # the row is in the training's history, and so in its next checkpoint
        if on_step:
            on_step(row)

    words = arm.who.instance_prompt, arm.who.class_prompt
    history = dreambooth.train(
        model, photos, *words, class_pictures, config, folder, arm.train_seed, on_step=after_step
    )
    run.write_table(f"{arm.folder}/history.csv", pd.DataFrame(history))
    run.write_tensors(arm.weights, model.unet.state_dict())
    if (checkpoints := folder / "checkpoints").exists():
        shutil.rmtree(checkpoints)  # their work is done


def load_arm(run: Run, arm: Arm, base: TextToImage) -> TextToImage:
    """A trained arm from the run."""
    model = base.copy()
    model.unet.load_state_dict(load_file(run.path(arm.weights)))
    return model


def histories(run: Run, arms: Sequence[Arm]) -> pd.DataFrame:
    """Every trained arm's history in one table: arm, train_seed, step, the losses, and what was looked at."""
    tables = [pd.read_csv(run.path(f"{arm.folder}/history.csv")) for arm in arms]
    named = [t.assign(arm=arm.name, train_seed=arm.train_seed) for t, arm in zip(tables, arms, strict=True)]
    return pd.concat(named, ignore_index=True)


# --- pictures and measurements -------------------------------------------------------------------------------------


def jobs(arms: Sequence[Arm], activities: Sequence[str], n_images: int, seed: int) -> pd.DataFrame:
    """List the pictures, one row each, without measurements; for `evaluation.generate`.

    Args:
        activities: what every arm draws, in its own words.
        n_images: noise seeds for each activity, the same for all arms.
        seed: the notebook's, from which the noise seeds are derived.

    Returns:
        Table with `KEYS`, and activity, and what `as_arms` adds.

    Raises:
        ParameterError: no activity, or no image.
    """
    if not activities or n_images < 1:
        raise ParameterError("the arms need something to draw: give prompts and n_images.")
    rows = []
    for arm in arms:
        for activity, prompt_id in prompt_ids(activities).items():
            prompt = arm.who.prompt(activity)
            for i, image_seed in enumerate(image_seeds(seed, n_images)):
                image = f"images/{Path(arm.folder).name}/{prompt_id}-{i:03d}.png"
                keys = (arm.described, arm.train_seed, arm.who.name, prompt_id, prompt.text, prompt.clean, image)
                rows.append(dict(zip(KEYS, (*keys, image_seed), strict=True)) | {"activity": activity})
    return as_arms(pd.DataFrame(rows))


def as_arms(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of description.csv with the columns arm, seed and tune_seed, by which stats and figures compare."""
    return table.assign(
        arm=[arm_name(described) for described in table["description"]], seed=table["train_seed"], tune_seed=None
    )


@dataclass(frozen=True)
class Measures:
    """What is asked about a picture; for a user's photos, whose truth nobody knows, DINO alone.

    Attributes:
        photos: of the subject, for DINO.
        dino: similarity to the photos.
        judge: answers where the subject is one of the pocket world; None otherwise.
        world: that subject.
    """

    photos: Sequence[Image.Image]
    dino: Scorer
    judge: Judge | None
    world: Subject | None

    def __call__(self, images: Sequence[Image.Image], activities: Sequence[str]) -> dict[str, np.ndarray]:
        """Column -> (N,): judge_* are 1 or 0, whether the activity is shown, whether the subject is picked out of a
        line-up of its class, and whether its shape is picked among look-alikes of other shapes.
        """
        columns = {"dino": self.dino(images, references=self.photos).double().numpy()}
        if self.judge is not None and self.world is not None:
            shapes = np.array(self.judge.pick(images, look_alikes(self.world)))
            columns |= {
                "judge_activity": self.judge.agrees(images, "activity", activities).double().numpy(),
                "judge_identity": self.judge.identifies(images, self.world).double().numpy(),
                "judge_shape": (shapes == 0).astype(float),
            }
        return columns

    def look(self, activities: Sequence[str], sampler: Sampler, n: int) -> Look:
        """Make a `look` for `train_arm`: means over `n` pictures of each activity, always from the same noise."""

        def look(model: TextToImage, arm: Arm) -> dict[str, float]:
            asked = [activity for activity in activities for _ in range(n)]
            prompts = [arm.who.prompt(activity).text for activity in asked]
            images = sample(model, prompts, list(range(n)) * len(activities), sampler)
            return {name: float(values.mean()) for name, values in self(images, asked).items()}

        return look


def measure(
    rows: pd.DataFrame,
    folder: str | Path,
    measures: Measures,
    batch_size: int = 64,
    on_image: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """A copy of `rows` (from `jobs`, pictures made) with a column for each measurement."""
    parts = []
    for part in batches(rows, batch_size):
        images = [read_rgb(Path(folder) / path) for path in part["image"]]
        parts.append(part.assign(**measures(images, list(part["activity"]))))
        if on_image:
            on_image(sum(map(len, parts)))
    return pd.concat(parts)


def table_of(scores: pd.DataFrame) -> pd.DataFrame:
    """The measured rows as description.csv holds them."""
    return scores[[*KEYS, *(name for name in MEASURED if name in scores)]]


# --- comparing the arms --------------------------------------------------------------------------------------------


def difference(table: pd.DataFrame, metric: str) -> Interval:
    """With minus without description, on the same prompts and noise, within training seeds.

    Args:
        table: description.csv.
        metric: one of its measured columns.

    Raises:
        ScoreError: one of the arms has no measured picture that the other has.
    """
    named = as_arms(table)
    with_, without = (named[named["description"] == described] for described in (True, False))
    return bootstrap_difference(with_, without, metric, UNIT)


def verdict(table: pd.DataFrame, metric: str) -> str:
    """What the difference says, in a sentence; `table` is description.csv."""
    gap, label, n_seeds = difference(table, metric), METRICS[metric], table["train_seed"].nunique()
    value, low, high = (label.show(x, sign=True) for x in (gap.value, gap.low, gap.high))
    said = "helps" if gap.low > 0 else "harms" if gap.high < 0 else "makes no difference that these pictures can show"
    seeds = f"{n_seeds} training seeds" if n_seeds > 1 else "one training seed: run three before you believe it"
    return f"{label.label}: the description {said}: {value} [{low}, {high}], {gap.n} pairs, {seeds}."


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Both arms and their difference for every measurement.

    Args:
        table: description.csv.

    Returns:
        One row a metric: metric; with, without and difference, each with _low and _high; n pairs; seeds.
    """
    metrics = [name for name in MEASURED if name in table]
    cells = summarise(as_arms(table), metrics=metrics).set_index(["metric", "arm"])
    rows = []
    for metric in metrics:
        row = {"metric": metric}
        for name, described in (("with", True), ("without", False)):
            cell = cells.loc[(metric, arm_name(described))]
            row |= {name: cell["value"], f"{name}_low": cell["low"], f"{name}_high": cell["high"]}
        d = difference(table, metric)
        row |= {"difference": d.value, "difference_low": d.low, "difference_high": d.high, "n": d.n}
        rows.append(row | {"seeds": table["train_seed"].nunique()})
    return pd.DataFrame(rows)


def along_training(histories: pd.DataFrame) -> pd.DataFrame:
    """With minus without description, averaged over the looks at the trainings: which arm was ahead on the way?

    Looks are paired by training seed and step, and resampled like pictures. Those of one training resemble each other,
    so with one seed the interval is too narrow.

    Args:
        histories: from `histories`.

    Returns:
        One row a metric: metric; with, without (means over looks and seeds), difference, low, high, n (pairs of looks),
        seeds. Where the judge was asked, also `both`: in each look the harmonic mean of its shares for activity and
        identity, which is high only where the model has both.
    """
    metrics = [name for name in MEASURED if name in histories]
    looks = histories.dropna(subset=metrics).assign(seed=lambda rows: rows["train_seed"])
    if "judge_activity" in metrics:
        shares = looks["judge_activity"], looks["judge_identity"]
        total = (shares[0] + shares[1]).where(lambda x: x > 0)
        looks = looks.assign(both=(2 * shares[0] * shares[1] / total).fillna(0.0))
        metrics = [*metrics, "both"]
    arms = {described: looks[looks["arm"] == arm_name(described)] for described in (True, False)}
    rows = []
    for metric in metrics:
        gap = bootstrap_difference(arms[True], arms[False], metric, ("step",))
        means = {"with": arms[True][metric].mean(), "without": arms[False][metric].mean()}
        bounds = {"difference": gap.value, "low": gap.low, "high": gap.high, "n": gap.n}
        rows.append({"metric": metric} | means | bounds | {"seeds": looks["train_seed"].nunique()})
    return pd.DataFrame(rows)


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """With minus without in each training seed: train_seed, metric, difference, n pairs."""
    rows = []
    for metric in (name for name in MEASURED if name in table):
        with_, without = (unit_matrix(as_arms(table[table["description"] == d]), metric) for d in (True, False))
        gaps = (with_ - without).dropna(axis=1, how="all")
        rows += [
            {"train_seed": seed, "metric": metric, "difference": gap.mean(), "n": int(gap.notna().sum())}
            for (seed, _), gap in gaps.iterrows()
        ]
    return pd.DataFrame(rows)


# --- the shape question, and what the base model knows -------------------------------------------------------------


def look_alikes(subject: Subject) -> list[Subject]:
    """The subject and those that differ from it in body shape alone; the subject comes first."""
    shapes = dict.fromkeys((subject.shape, *SHAPES["container"]))
    return [replace(subject, shape=shape) for shape in shapes]


def ask_about_renders(
    judge: Judge, subject: Subject, activities: Sequence[str], n: int, model: TextToImage | None = None, seed: int = 0
) -> pd.DataFrame:
    """The shape question on pictures whose answer is known: how far can `judge_shape` be trusted?

    Args:
        n: renders of each look-alike and activity.
        model: its autoencoder makes the pictures as soft as generated ones; None asks about the renders themselves.

    Returns:
        One row a picture: shape (the truth), activity, picked (the judge's answer).
    """
    parade, rows = look_alikes(subject), []
    for alike in parade:
        there = new_scenes(alike, activities, n, seed, "shape question")
        pictures = [render(scene) for scene in there]
        if model is not None:
            pictures = model.decode(model.encode_images(at_size(pictures, model)))
        for scene, k in zip(there, judge.pick(pictures, parade), strict=True):
            rows.append({"shape": alike.shape, "activity": scene.activity, "picked": parade[k].shape})
    return pd.DataFrame(rows)


def trust(answers: pd.DataFrame, shape: str) -> pd.DataFrame:
    """How often the answer was `shape`, by the truth; from `ask_about_renders`.

    Returns:
        One row a true shape: shape, picked (share of the answer `shape`), low, high (Wilson, 95 %), n.
    """
    rows = []
    for truth, part in answers.groupby("shape", sort=False):
        share = wilson_interval(int((part["picked"] == shape).sum()), len(part))
        rows.append({"shape": truth, "picked": share.value, "low": share.low, "high": share.high, "n": share.n})
    return pd.DataFrame(rows)


def in_known_words(subject: Subject, description: str = "") -> str:
    """The subject in the words of pre-training's captions: "a triangular red monster toy with a white belly".

    Raises:
        ParameterError: the pocket world has no noun for its pattern (a plain subject).
    """
    noun = PATTERNS[subject.pattern]
    if not noun:
        raise ParameterError(f"a {subject.pattern} {subject.class_noun} has no pattern to name.")
    head = " ".join(word for word in (description, subject.body, subject.class_noun) if word)
    return f"{article(head)} {head} with {'a ' if subject.pattern == 'patched' else ''}{subject.second} {noun}"
