"""A detailed description for a rare subject: InstructBooth's section 2.1 and figure 15 as an experiment.

Two arms are personalized from the same base model on the same photos and random streams. Only their words differ:

| arm | trained on and asked for |
|---|---|
| with description | `a [identifier] [description] [class noun]` |
| without | `a [identifier] [class noun]` |

Both then draw the same activities from the same noise. Each arm is trained once per training seed. Pictures of the two
arms are compared within a seed, and the seeds are resampled like the prompts (`ibkit.evaluate.intervals`).

Shapes: N pictures.
"""

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
from ibkit.evaluate.stats import METRICS, UNIT, bootstrap_difference, summarise, unit_matrix
from ibkit.experiments.attention_overlap import at_size, new_scenes
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.draw import render
from ibkit.pocket.world import PATTERNS, RARE_SUBJECT, SHAPES, Subject
from ibkit.runs import Run
from ibkit.scorers.base import Scorer
from ibkit.scorers.judge import Judge

# Columns of description.csv: what a picture is, and what was measured.
KEYS = ("description", "train_seed", "subject", "prompt_id", "prompt", "text", "image", "image_seed")
MEASURED = ("judge_activity", "judge_identity", "judge_shape", "dino")
ARM_NAMES = {True: "with_description", False: "without_description"}


@dataclass(frozen=True)
class Arm:
    """One personalization.

    Attributes:
        described: whether its words include the description.
        train_seed: the two arms of a seed see the same photos, noise and timesteps in every step.
        who: the subject with this arm's words.
    """

    described: bool
    train_seed: int
    who: PersonalizedSubject

    @property
    def name(self) -> str:
        """As in tables that compare arms."""
        return ARM_NAMES[self.described]

    @property
    def folder(self) -> str:
        """Relative to the run folder."""
        return f"arms/{self.name.replace('_', '-')}-seed{self.train_seed}"

    @property
    def weights(self) -> str:
        """Its trained U-Net, an output of the run."""
        return f"{self.folder}/unet.safetensors"


# Measures a model during training: (model, arm) -> name and value of each measurement.
Look = Callable[[TextToImage, Arm], dict[str, float]]


def make_arms(who: PersonalizedSubject, train_seeds: Sequence[int]) -> list[Arm]:
    """Both arms for each distinct training seed; a ParameterError where the subject has no description to leave out."""
    if not who.description:
        raise ParameterError("there is no description to compare with: give one, such as description='triangular'.")
    return [
        Arm(described, seed, who if described else replace(who, description=""))
        for seed in dict.fromkeys(train_seeds)
        for described in (True, False)
    ]


def rare_subject(class_noun: str) -> Subject:
    """The pocket world's rare subject: in pre-training no individual of its class had its shape. One of another class
    is a ParameterError.
    """
    if class_noun != RARE_SUBJECT.class_noun:
        raise ParameterError(
            f"the pocket world's rare subject is a {RARE_SUBJECT.class_noun}, not a {class_noun}: leave class_noun as "
            "it is, or give a folder of photos as the subject."
        )
    return RARE_SUBJECT


# --- training ------------------------------------------------------------------------------------------------------


def look_steps(n_steps: int, checkpoint_every: int, n_looks: int) -> list[int]:
    """After how many steps a training is measured: `n_looks` times at equal distances, fewer in a short training.

    Never at a checkpoint step before the end: resuming from it would skip the measurement.
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
    """Personalize a copy of `base` and write its U-Net and its history to the run, unless they are there already.

    An interrupted training resumes from its last checkpoint.

    Args:
        look: called `n_looks` times; its numbers go into `history.csv` beside the loss. It draws from random streams
            of its own, so that it does not change what is learned.
        on_step: called with each step's row, for progress.
    """
    if run.has(arm.weights):
        return
    model, folder = base.copy(), run.path(arm.weights).parent
    steps = set(look_steps(config.n_steps, config.checkpoint_every, n_looks))

    def after_step(row: dict[str, float]) -> None:
        if row["step"] + 1 in steps:
            row.update(look(model, arm))  # the training keeps this row in its history and its next checkpoint
        if on_step:
            on_step(row)

    words, seed = (arm.who.instance_prompt, arm.who.class_prompt), arm.train_seed
    history = dreambooth.train(model, photos, *words, class_pictures, config, folder, seed, on_step=after_step)
    run.write_table(f"{arm.folder}/history.csv", pd.DataFrame(history))
    run.write_tensors(arm.weights, model.unet.state_dict())
    if (checkpoints := folder / "checkpoints").exists():
        shutil.rmtree(checkpoints)


def load_arm(run: Run, arm: Arm, base: TextToImage) -> TextToImage:
    """A trained arm of the run."""
    model = base.copy()
    model.unet.load_state_dict(load_file(run.path(arm.weights)))
    return model


def histories(run: Run, arms: Sequence[Arm]) -> pd.DataFrame:
    """The histories of all arms in one table: step, losses, what the looks measured, arm, train_seed."""
    tables = [
        pd.read_csv(run.path(f"{arm.folder}/history.csv")).assign(arm=arm.name, train_seed=arm.train_seed)
        for arm in arms
    ]
    return pd.concat(tables, ignore_index=True)


# --- pictures and measurements -------------------------------------------------------------------------------------


def jobs(arms: Sequence[Arm], activities: Sequence[str], n_images: int, seed: int) -> pd.DataFrame:
    """List the pictures to draw, one row each, for `ibkit.evaluate.score.generate`: `KEYS`, activity, and the columns
    of `as_arms`. No activity, or no image, is a ParameterError.

    Args:
        activities: what every arm draws, in its own words.
        n_images: noise seeds for each activity, the same for all arms.
        seed: the notebook's, from which the noise seeds are derived.
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
    return table.assign(arm=table["description"].map(ARM_NAMES), seed=table["train_seed"], tune_seed=None)


@dataclass(frozen=True)
class Measures:
    """What is measured on a picture. A user's photos have no known truth, so DINO alone measures those.

    Attributes:
        photos: of the subject.
        dino: similarity to the photos.
        judge, world: the judge and the pocket world's subject; None for a user's photos.
    """

    photos: Sequence[Image.Image]
    dino: Scorer
    judge: Judge | None
    world: Subject | None

    def __call__(self, images: Sequence[Image.Image], activities: Sequence[str]) -> dict[str, np.ndarray]:
        """Column -> (N,). The judge's are 1 or 0: judge_activity, whether the activity is shown; judge_identity,
        whether the judge picks the subject out of a line-up of its class; judge_shape, whether it picks the subject's
        shape among look-alikes of other shapes.
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
        """A `Look` for `train_arm`: means over `n` pictures of each activity, always from the same noise."""

        def look(model: TextToImage, arm: Arm) -> dict[str, float]:
            asked = [activity for activity in activities for _ in range(n)]
            prompts = [arm.who.prompt(activity).text for activity in asked]
            images = sample(model, prompts, list(range(n)) * len(activities), sampler)
            return {name: float(values.mean()) for name, values in self(images, asked).items()}

        return look


def measure(
    rows: pd.DataFrame, folder: str | Path, measures: Measures, on_image: Callable[[int], None] = lambda done: None
) -> pd.DataFrame:
    """A copy of `rows` (from `jobs`, pictures drawn) with a column for each measurement."""
    parts = []
    for _, part in rows.groupby(np.arange(len(rows)) // 64):
        images = [read_rgb(Path(folder) / path) for path in part["image"]]
        parts.append(part.assign(**measures(images, list(part["activity"]))))
        on_image(sum(map(len, parts)))
    return pd.concat(parts)


def table_of(scores: pd.DataFrame) -> pd.DataFrame:
    """The columns of description.csv."""
    return scores[[*KEYS, *(name for name in MEASURED if name in scores)]]


# --- comparing the arms; `table` is description.csv, `metric` one of its measured columns ---------------------------


def difference(table: pd.DataFrame, metric: str) -> Interval:
    """With minus without description, on the same prompts and noise, within training seeds; a ScoreError where the two
    arms share no measured picture.
    """
    return bootstrap_difference(*_both_arms(as_arms(table)), metric, UNIT)


def _both_arms(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with description, and those without."""
    return rows[rows["arm"] == ARM_NAMES[True]], rows[rows["arm"] == ARM_NAMES[False]]


def verdict(table: pd.DataFrame, metric: str) -> str:
    """The difference in a sentence."""
    gap, label, n_seeds = difference(table, metric), METRICS[metric], table["train_seed"].nunique()
    value, low, high = (label.show(x, sign=True) for x in (gap.value, gap.low, gap.high))
    said = "helps" if gap.low > 0 else "harms" if gap.high < 0 else "makes no difference that these pictures can show"
    seeds = f"{n_seeds} training seeds" if n_seeds > 1 else "one training seed: run three before you believe it"
    return f"{label.label}: the description {said}: {value} [{low}, {high}], {gap.n} pairs, {seeds}."


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """One row a metric: metric; with, without and difference, each with _low and _high; n pairs; seeds."""
    metrics = [name for name in MEASURED if name in table]
    cells = summarise(as_arms(table), metrics=metrics).set_index(["metric", "arm"])
    rows = []
    for metric in metrics:
        gap = difference(table, metric)
        with_, without = (cells.loc[(metric, arm)] for arm in ARM_NAMES.values())
        row: dict[str, str | float] = {"metric": metric}
        for name, cell in (("with", with_), ("without", without), ("difference", gap)):
            row |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
        rows.append(row | {"n": gap.n, "seeds": table["train_seed"].nunique()})
    return pd.DataFrame(rows)


def along_training(histories: pd.DataFrame) -> pd.DataFrame:
    """With minus without description, averaged over the looks in `histories`: which arm was ahead on the way?

    Looks are paired by training seed and step, and resampled like pictures. With one seed the interval is too narrow,
    since looks at one training resemble each other.

    Returns:
        One row a metric: metric; with, without (means over looks and seeds), difference, low, high, n (pairs of looks),
        seeds. Where the judge was asked, also `both`: the harmonic mean of its shares for activity and identity in each
        look, which is high only where the model has both.
    """
    metrics = [name for name in MEASURED if name in histories]
    looks = histories.dropna(subset=metrics).rename(columns={"train_seed": "seed"})
    if "judge_activity" in metrics:
        shown, same = looks["judge_activity"], looks["judge_identity"]
        looks["both"] = (2 * shown * same / (shown + same)).fillna(0.0)  # 0/0 where both are 0
        metrics.append("both")
    with_, without = _both_arms(looks)
    gaps = {metric: bootstrap_difference(with_, without, metric, ("step",)) for metric in metrics}
    means = pd.DataFrame({"with": with_[metrics].mean(), "without": without[metrics].mean()})
    found = means.join(pd.DataFrame(map(vars, gaps.values()), index=metrics)).rename(columns={"value": "difference"})
    return found.rename_axis("metric").reset_index().assign(seeds=looks["seed"].nunique())


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """With minus without in each training seed: train_seed, metric, difference, n pairs."""
    rows = []
    for metric in (name for name in MEASURED if name in table):
        with_, without = (unit_matrix(rows_of_arm, metric) for rows_of_arm in _both_arms(as_arms(table)))
        rows += [
            {"train_seed": seed, "metric": metric, "difference": gap.mean(), "n": int(gap.notna().sum())}
            for (seed, _), gap in (with_ - without).iterrows()
        ]
    return pd.DataFrame(rows)


# --- the shape question, and what the base model knows -------------------------------------------------------------


def look_alikes(subject: Subject) -> list[Subject]:
    """The subject, and after it those that differ from it in body shape alone."""
    return [replace(subject, shape=shape) for shape in dict.fromkeys((subject.shape, *SHAPES["container"]))]


def ask_about_renders(
    judge: Judge, subject: Subject, activities: Sequence[str], n: int, model: TextToImage | None = None, seed: int = 0
) -> pd.DataFrame:
    """Ask for the shape on pictures whose answer is known: how far can `judge_shape` be trusted? One row a picture:
    shape (the truth), activity, picked (the judge's answer).

    Args:
        n: renders of each look-alike and activity.
        model: its autoencoder makes the pictures as soft as generated ones; None asks about the renders themselves.
    """
    parade, rows = look_alikes(subject), []
    for alike in parade:
        scenes = new_scenes(alike, activities, n, seed, "shape question")
        pictures = [render(scene) for scene in scenes]
        if model is not None:
            pictures = model.decode(model.encode_images(at_size(pictures, model)))
        rows += [
            {"shape": alike.shape, "activity": scene.activity, "picked": parade[k].shape}
            for scene, k in zip(scenes, judge.pick(pictures, parade), strict=True)
        ]
    return pd.DataFrame(rows)


def trust(answers: pd.DataFrame, shape: str) -> pd.DataFrame:
    """How often the answer was `shape`, by true shape: shape, picked (that share), low, high (Wilson, 95 %), n."""
    picked = (answers["picked"] == shape).groupby(answers["shape"], sort=False)
    shares = {truth: wilson_interval(int(is_shape.sum()), len(is_shape)) for truth, is_shape in picked}
    return pd.DataFrame([{"shape": truth, **vars(share)} for truth, share in shares.items()]).rename(
        columns={"value": "picked"}
    )


def in_known_words(subject: Subject, description: str = "") -> str:
    """The subject in the words of pre-training's captions: "a triangular red monster toy with a white belly". A plain
    subject, for whose pattern there is no noun, is a ParameterError.
    """
    noun = PATTERNS[subject.pattern]
    if not noun:
        raise ParameterError(f"a {subject.pattern} {subject.class_noun} has no pattern to name.")
    head = " ".join(word for word in (description, subject.body, subject.class_noun) if word)
    return f"{article(head)} {head} with {'a ' if subject.pattern == 'patched' else ''}{subject.second} {noun}"
