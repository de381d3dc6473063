"""Prompts of both kinds, or only those with the identifier: InstructBooth's section 2.2 and figure 16 as an experiment.

Three arms of RL start from the same personalized model, with the same settings and random streams:

| arm | images an epoch | what it holds equal to "both" |
|---|---|---|
| `both` | n with the identifier + n of the class | |
| `identifier_equal_identifier` | n with the identifier | images that show the subject; half the cost |
| `identifier_equal_totals` | 2n with the identifier | images in all, so the cost |

In every arm a gradient step takes half of the epoch's images, as InstructBooth does (8 of 16), so each arm makes two
gradient steps an epoch. All are measured on the same identifier prompts and the same noise.

Shapes: E epochs of a run, N pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file

from ibkit.adapt import attach, load_state, state
from ibkit.data.prompts import Prompt, training_prompts
from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject, world_photos
from ibkit.device import generator
from ibkit.errors import ArtifactError
from ibkit.evaluate.arms import BLUE, GREEN, ORANGE
from ibkit.evaluate.score import image_seeds
from ibkit.methods import ddpo, dreambooth
from ibkit.methods.ddpo import DDPOConfig, Monitor, Reward
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.methods.engine.objectives import Objective
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.world import IDENTIFIERS
from ibkit.runs import Run
from ibkit.scorers.judge import Judge

# Columns of prompt_kinds.csv: which personalized model and RL seed, and what was measured on the fixed noise.
RUN_KEYS = ("class_noun", "subject", "dreambooth_steps", "rl_seed")
MEASURED = ("reward_identifier", "judge_activity", "judge_identity", "monitor")


@dataclass(frozen=True)
class Arm:
    """One way to choose the prompts of an epoch.

    Attributes:
        label, short, colour, dash: for figures.
        n_identifier, n_class: images an epoch for each prompt, as multiples of those of the arm "both".
        axis: the column along which it is compared with "both": what the two hold equal.
    """

    label: str
    short: str
    n_identifier: int
    n_class: int
    colour: str
    dash: str
    axis: str

    def prompts(self, subject: PersonalizedSubject, activities: Sequence[str]) -> list[Prompt]:
        """What the arm trains on."""
        return training_prompts(
            activities, subject.class_noun, subject.identifier, subject.description, use_class_prompts=self.n_class > 0
        )

    def images(self, per_prompt: int, n_activities: int) -> dict[str, int]:
        """Images an epoch of each kind."""
        per_activity = per_prompt * n_activities
        return {"identifier": self.n_identifier * per_activity, "class": self.n_class * per_activity}

    def config(self, config: DDPOConfig, per_prompt: int, n_activities: int) -> DDPOConfig:
        """The preset's settings with this arm's images; a gradient step takes half of them, rounded up."""
        n = sum(self.images(per_prompt, n_activities).values())
        return replace(config, images_per_epoch=n, batch=math.ceil(n / 2))


ARMS = {
    "both": Arm("both kinds of prompts", "both kinds", 1, 1, BLUE, "-", ""),
    "identifier_equal_totals": Arm("identifier only, as many images", "as many images", 2, 0, ORANGE, "--", "n_images"),
    "identifier_equal_identifier": Arm(
        "identifier only, half the images", "half the images", 1, 0, GREEN, ":", "n_identifier_images"
    ),
}


def images_per_prompt(n_images: int, n_prompts: int) -> int:
    """Images of each prompt, equally many and at least one, so that all make up about `n_images`."""
    return max(1, round(n_images / n_prompts))


def on_fixed_noise(prompts: Sequence[Prompt], n_images: int, seed: int) -> tuple[list[Prompt], list[int]]:
    """The prompt and the noise seed of each picture on which a policy is measured: every prompt with the same seeds.

    Args:
        n_images: pictures in all, see `images_per_prompt`.
        seed: the notebook's; no picture repeats the noise of a training picture.
    """
    seeds = image_seeds(seed, images_per_prompt(n_images, len(prompts)))
    return [prompt for prompt in prompts for _ in seeds], seeds * len(prompts)


# --- the personalized models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A subject of the pocket world with its photos and the activities it is trained on."""

    subject: PersonalizedSubject
    photos: list[Image.Image]
    activities: list[str]

    def model_file(self, n_steps: int) -> str:
        """The run's file of the U-Net after `n_steps` of DreamBooth."""
        return f"models/{self._stem(n_steps)}.safetensors"

    def arm_folder(self, arm: str, n_steps: int, rl_seed: int) -> str:
        return f"arms/{self._stem(n_steps)}-{arm}-seed{rl_seed}"

    def _stem(self, n_steps: int) -> str:
        return f"{self.subject.class_noun.replace(' ', '-')}-{n_steps:05d}"


def make_cases(
    class_nouns: Sequence[str], asked: Sequence[str], usual: Sequence[str], model: str, revision: str, image_px: int
) -> list[Case]:
    """The demonstration subjects of the classes, each class once; a ParameterError where the pocket world has no such
    class, or the class no such activity.

    Args:
        asked: activities for every class.
        usual: the preset's activities, where none is asked for; see `choose_activities`.
        model, revision: the base model, as `load_model` takes it.
    """
    cases = []
    for class_noun in dict.fromkeys(class_nouns):
        world = demo_subject(class_noun)
        words = f"{world.body} {class_noun}", class_noun, IDENTIFIERS[0], ""
        subject = PersonalizedSubject(*words, model, revision, world)
        photos = [photo.resize((image_px, image_px)) for photo in world_photos(world)]
        cases.append(Case(subject, photos, choose_activities(subject, asked, usual)))
    return cases


def personalize(
    run: Run,
    base: TextToImage,
    case: Case,
    priors: Sequence[Image.Image],
    config: DreamBoothConfig,
    steps: Sequence[int],
    seed: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train DreamBooth to each of `steps` and write the U-Nets as outputs of the run, unless they are there already; an
    ArtifactError where the training is past a step whose U-Net has been lost.

    A training of fewer steps is the same training ended earlier: its random streams are named by the step, and the
    learning rate is constant. So each training continues from the checkpoints of the one before it.

    Args:
        priors: class images.
        config: its `n_steps` is not used.
    """
    folder = run.folder / "personalize" / case.subject.class_noun.replace(" ", "-")
    words = (case.subject.instance_prompt, case.subject.class_prompt)
    for n in sorted(steps):
        file = case.model_file(n)
        if run.has(file):
            continue
        model, ended = base.copy(), replace(config, n_steps=n)
        rows = dreambooth.train(model, case.photos, *words, priors, ended, folder, seed, on_step=on_step)
        if len(rows) > n:
            raise ArtifactError(f"the model of step {n} is lost, and {folder} is past it: remove it, then resume.")
        run.write_tensors(file, model.unet.state_dict())


def load_personalized(run: Run, base: TextToImage, case: Case, n_steps: int) -> TextToImage:
    """The base model with the U-Net that `personalize` kept."""
    model = base.copy()
    model.unet.load_state_dict(load_file(run.path(case.model_file(n_steps))))
    return model


# --- what there is to learn from ------------------------------------------------------------------------------------


def draw_both_kinds(
    model: TextToImage, case: Case, n_images: int, seed: int, sampler: Sampler, reward: Reward, judge: Judge
) -> tuple[pd.DataFrame, list[Image.Image]]:
    """Draw `n_images` pictures of every prompt of the arm "both" on fixed noise, and measure each.

    Returns:
        One row a picture: prompt, activity, identifier, reward, shown and same_subject (the judge's answers, 1 or 0);
        and the pictures.
    """
    assert case.subject.world, "a case is of the pocket world"
    prompts = ARMS["both"].prompts(case.subject, case.activities)
    asked, seeds = on_fixed_noise(prompts, n_images * len(prompts), seed)
    rows = pd.DataFrame(asked).drop(columns="clean").rename(columns={"text": "prompt"})
    pictures = sample(model, list(rows["prompt"]), seeds, sampler)
    rows["reward"] = Objective.of(reward)(pictures, asked)[0].double().numpy()
    rows["shown"] = judge.agrees(pictures, "activity", list(rows["activity"])).numpy()
    rows["same_subject"] = judge.identifies(pictures, case.subject.world).numpy()
    return rows, pictures


def explained_share(rewards: torch.Tensor, shown: torch.Tensor) -> float:
    """Share of the rewards' variance that goes with showing the activity, η² = Var(E[r | shown]) / Var(r).

    It is 0 where every picture shows the activity or none does: then the prompt's advantages rank the pictures by
    something else, at best by how nearly they show it. For N pictures whose reward is independent of showing the
    activity it is 1 / (N - 1) on average.

    Args:
        rewards, shown: (N,) of one prompt; shown is 1 where the picture shows the activity, else 0.
    """
    rewards, shown = rewards.double(), shown.bool()
    total = rewards.var(unbiased=False)
    if shown.all() or not shown.any() or total == 0:
        return 0.0
    p = shown.double().mean()
    between = p * (1 - p) * (rewards[shown].mean() - rewards[~shown].mean()) ** 2
    return float(between / total)


# --- the arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedNoise:
    """A monitor that measures the policy on fixed noise, the same in each epoch and arm, not on the epoch's pictures.

    So the curves of all arms are means over equally many pictures, which differ by the policy alone; an arm that makes
    more images does not look smoother. The monitor is called between rollout and update: row k of a history is the
    policy after k epochs.

    Attributes:
        prompts, seeds: one a picture.
        reward: what is trained on.
        watch: measures the pictures, see `SubjectMonitor`.
    """

    model: TextToImage
    prompts: list[Prompt]
    seeds: list[int]
    sampler: Sampler
    reward: Reward
    watch: Monitor

    def __call__(self, images: list[Image.Image], prompts: list[Prompt]) -> dict[str, float]:
        pictures = sample(self.model, [p.text for p in self.prompts], self.seeds, self.sampler)
        scores, _ = Objective.of(self.reward)(pictures, self.prompts)
        return {"fixed_reward": scores.mean().item(), **self.watch(pictures, self.prompts)}


def train_arm(
    run: Run,
    folder: str,
    model: TextToImage,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: DDPOConfig,
    seed: int,
    look: FixedNoise,
    on_epoch: Callable[[dict[str, float], TextToImage], None] | None = None,
) -> None:
    """Train one arm in `folder` of the run, whose outputs become its history and adapter; skip it where they are there.

    An interrupted training resumes from its checkpoint.

    Args:
        model: the personalized model; trained in place.
        prompts, config: of the arm, see `Arm`.
    """
    outputs = f"{folder}/lora.safetensors", f"{folder}/history.csv"
    if all(run.has(name) for name in outputs):
        return
    history = ddpo.train(model, prompts, reward, config, run.folder / folder, seed, look, on_epoch=on_epoch)
    run.write_tensors(outputs[0], state(model, "ddpo"))
    run.write_table(outputs[1], pd.DataFrame(history))


def train_arms(
    run: Run,
    base: TextToImage,
    case: Case,
    steps: Sequence[int],
    rl_seeds: Sequence[int],
    config: DDPOConfig,
    look: Callable[[TextToImage], FixedNoise],
    reward_base: float,
    on_epoch: Callable[[str, dict[str, float]], None] = lambda folder, row: None,
) -> pd.DataFrame:
    """Train every arm from every personalized model with every seed: the rows of prompt_kinds.csv, see `arm_rows`.

    Args:
        config: the preset's, with the images of an epoch of the arm "both".
        look: makes the monitor of a model; its reward is what is trained on.
        reward_base: see `arm_rows`.
        on_epoch: called with the arm's folder and each row of its history.
    """
    n_activities = len(case.activities)
    per_prompt = images_per_prompt(config.images_per_epoch, 2 * n_activities)
    parts = []
    for n_steps, rl_seed, (name, arm) in product(steps, rl_seeds, ARMS.items()):
        folder = case.arm_folder(name, n_steps, rl_seed)
        model = load_personalized(run, base, case, n_steps)
        prompts, own = arm.prompts(case.subject, case.activities), arm.config(config, per_prompt, n_activities)
        watch, on_row = look(model), lambda row, _, folder=folder: on_epoch(folder, row)
        train_arm(run, folder, model, prompts, watch.reward, own, rl_seed, watch, on_row)
        history = pd.read_csv(run.path(f"{folder}/history.csv"))
        parts.append(arm_rows(history, name, case, n_steps, rl_seed, per_prompt, reward_base))
    return pd.concat(parts, ignore_index=True)


def load_arm(
    run: Run, base: TextToImage, case: Case, n_steps: int, arm: str, rl_seed: int, lora_rank: int
) -> TextToImage:
    """The result of `train_arm`: the personalized model with the arm's adapter."""
    model = load_personalized(run, base, case, n_steps)
    attach(model, "lora", "ddpo", {"rank": lora_rank}, generator(rl_seed, "lora"))
    load_state(model, "ddpo", load_file(run.path(f"{case.arm_folder(arm, n_steps, rl_seed)}/lora.safetensors")))
    model.unet.requires_grad_(False)
    return model


def arm_rows(
    history: pd.DataFrame, arm: str, case: Case, n_steps: int, rl_seed: int, per_prompt: int, reward_base: float
) -> pd.DataFrame:
    """The rows of prompt_kinds.csv for one arm: one an epoch, which measures the policy after `epoch` epochs.

    Args:
        history: of `train_arm`.
        per_prompt: images of each prompt in an epoch of the arm "both".
        reward_base: what the base model gets for the class prompts, on the same noise.

    Returns:
        arm, `RUN_KEYS`, epoch; n_images and n_identifier_images made until then; `MEASURED` on the fixed noise;
        training_reward_identifier and training_reward_class of the epoch's own pictures; reward_base.
    """
    made, epoch = ARMS[arm].images(per_prompt, len(case.activities)), history["epoch"]
    return pd.DataFrame(
        {
            "arm": arm,
            "class_noun": case.subject.class_noun,
            "subject": case.subject.name,
            "dreambooth_steps": n_steps,
            "rl_seed": rl_seed,
            "epoch": epoch,
            "n_images": epoch * sum(made.values()),
            "n_identifier_images": epoch * made["identifier"],
            "reward_identifier": history["fixed_reward"],
            **{name: history[name] for name in MEASURED[1:]},
            **{f"training_{name}": history.get(name) for name in ("reward_identifier", "reward_class")},
            "reward_base": reward_base,
        }
    )
