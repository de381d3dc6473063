"""Learning from feedback in the pocket world: pictures, labels, reward, fine-tuned arms, scores (Lee et al. 2023).

Notebook 09 shows the steps one by one, `benchmarks/feedback.py` runs them at size. The tables:

- `feedback_reward.csv`: a row a picture of a prompt that nobody rated and a seed, with what each reward says of it;
- `feedback.csv`: a row a picture of an arm, in the columns of 03's scores (`evaluate.stats`).

The model is the shipped base with the adapter `counting`, which half knows counts. The counter says what pictures show;
simulated raters repeat it with errors, and the scores of the arms are its answers without.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from ibkit.errors import ParameterError
from ibkit.evaluate.precision import diversity, precision
from ibkit.evaluate.study.items import ITEM_COLUMNS
from ibkit.evaluate.study.ratings import merge_ratings
from ibkit.evaluate.study.votes import majority
from ibkit.experiments.variants import Variant
from ibkit.fields import fill, nearest
from ibkit.methods import feedback
from ibkit.methods.feedback import FeedbackConfig
from ibkit.model.loading import load_model
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket import world
from ibkit.pocket.draw import render
from ibkit.pocket.feedback import KINDS, Asked, Kind, alternatives, split
from ibkit.pocket.words import caption
from ibkit.presets import Preset, preset_of
from ibkit.runs import hash_file, hash_json
from ibkit.scorers import make_scorer
from ibkit.scorers.base import POCKET_WEIGHTS
from ibkit.scorers.clip import ClipT
from ibkit.scorers.counter import COUNTED, Counter
from ibkit.scorers.dino import Dino
from ibkit.scorers.feedback import (
    FeedbackReward,
    FeedbackRewardConfig,
    agreement,
    best_of,
    best_threshold,
    train_reward,
)
from ibkit.train.loop import Row

SEEN, COMBINATION, OBJECT = SUBSETS = ("seen", "unseen combination", "unseen object")
CLIP = "CLIP score"
REWARDS: dict[str, dict[str, Any]] = {"reward": {}, "without prompts": {"aux_weight": 0.0}}
N_OTHERS = 3  # prompts that a picture is told apart from; one of a count alone may have no more that are not unseen
ARMS = {
    "labelled": Variant("feedback", {"pretrain_weight": 0.0}, "rated pictures alone"),
    "scored": Variant("feedback", {"pretrain_weight": 0.0}, "and pictures that nobody rated"),
    "pretrain": Variant("feedback", {}, "and the pre-training term"),
}
BASE = "base"


def check(given: Any) -> None:
    """Refuse (ParameterError) what notebook 09 cannot do with its parameters: a model without a counter, no such kind,
    arm or setting, or a value that is not allowed.
    """
    if not preset_of(given.model).world:
        raise ParameterError("The counter knows the pocket world's pictures alone: give model='pocket'.")
    for what, names, known in (("kind of prompt", given.kinds, KINDS), ("arm", given.arms, tuple(ARMS))):
        if wrong := [name for name in names if name not in known]:
            raise ParameterError(f"There is no {what} {wrong[0]!r}{nearest(wrong[0], known)}")
    fill(FeedbackRewardConfig(), given.reward_settings, "The reward")
    preset_of(given.model).settings("feedback", given.settings)


def counting_model(device: torch.device | str = "cpu") -> TextToImage:
    """The shipped model with the adapter that half knows counts, frozen."""
    from ibkit.adapt import lora

    model = load_model("pocket", device=device)
    lora.attach_file(model, "counting", POCKET_WEIGHTS / "counting" / "pytorch_lora_weights.safetensors")
    return model


@dataclass(frozen=True)
class Prompt:
    """A prompt, of which kind it is and whether pictures of it are rated."""

    subset: str
    kind: str
    asked: Asked


@dataclass(frozen=True)
class Pictures:
    """Pictures of prompts from stated noise, and what the counter says of them.

    Attributes:
        prompts, seeds: of each picture.
        answers: the counter's, by question.
    """

    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    images: Sequence[Image.Image]
    answers: Sequence[Mapping[str, str]]

    @property
    def texts(self) -> list[str]:
        return [one.asked.text for one in self.prompts]

    @property
    def truth(self) -> list[bool]:
        """Whether each shows all that its prompt asks for."""
        return [p.asked.fulfilled(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def take(self, rows: Sequence[int]) -> "Pictures":
        return Pictures(*([column[i] for i in rows] for column in vars(self).values()))

    def __add__(self, other: "Pictures") -> "Pictures":
        columns = zip(vars(self).values(), vars(other).values(), strict=True)
        return Pictures(*([*mine, *theirs] for mine, theirs in columns))


def prompts_of(kinds: Sequence[Kind], n_seen: int, n_unseen: int, seed: int = 0) -> list[Prompt]:
    """Up to `n_seen` prompts of a kind that are rated, and up to `n_unseen` each of new combinations and objects."""
    return [
        Prompt(subset, kind, asked)
        for kind in kinds
        for subset, found in zip(SUBSETS, split(kind, max(n_seen, n_unseen), seed=seed), strict=True)
        for asked in found[: n_seen if subset == SEEN else n_unseen]
    ]


def draw(
    model: TextToImage, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler, counter: Counter
) -> Pictures:
    """A picture of every prompt from the noise of every seed, prompt by prompt."""
    asked = [one for one in prompts for _ in seeds]
    noise = [*seeds] * len(prompts)
    images = sample(model, [one.asked.text for one in asked], noise, sampler)
    return Pictures(asked, noise, images, counter.answers(images))


def rating_items(pictures: Pictures, folder: Path) -> pd.DataFrame:
    """What the rating page of notebook 07 asks of pictures, "does it show what the text says?": an item a picture, in
    the pictures' order (see `evaluate.study.items.make_items`).

    Writes them to `folder`, which with `write_labels` is one that the method `feedback` reads (`labelled`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (one, seed, image) in enumerate(zip(pictures.prompts, pictures.seeds, pictures.images, strict=True)):
        image.save(path := folder / f"{i:04d}.png")
        text, digest = one.asked.text, hash_json(hash_file(path))
        row = dict.fromkeys(ITEM_COLUMNS, "") | {"seed": None, "tune_seed": None, "arm": BASE, "question": "text"}
        row |= {"item": hash_json([text, digest])[:12], "subject": one.asked.noun, "prompt_id": text, "text": text}
        rows.append(row | {"image_seed": seed, "image_a": str(path)})
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


def labels_from(ratings: Sequence[str | Path], items: pd.DataFrame) -> list[float | None]:
    """What most raters said of each item: 1 good, 0 bad; None where nobody did, or as many said yes as no. Raises as
    `merge_ratings`.
    """
    decided = majority(merge_ratings(ratings, items)[0]).set_index("item")["value"]
    return [None if (value := decided.get(item, 0.5)) == 0.5 else float(value) for item in items["item"]]


def write_labels(folder: Path, pictures: Pictures, labels: Sequence[float | None]) -> None:
    """Put labels beside the pictures that `rating_items` wrote, as `read_labelled` of the method reads them."""
    names = [f"{i:04d}.png" for i in range(len(labels))]
    table = pd.DataFrame({"picture": names, "prompt": pictures.texts, "label": pd.Series(labels, dtype=object)})
    table.to_csv(folder / feedback.LABELS, index=False)


def learn(
    pictures: Pictures,
    labels: Sequence[float | None],
    clip: ClipT,
    settings: Mapping[str, Any],
    seed: int,
    asked: Sequence[Prompt] = (),
) -> tuple[dict[str, FeedbackReward], float]:
    """The rewards of `REWARDS` from rated pictures, and the threshold of CLIP's score that agrees best with the same
    labels. A picture without a label has no part.

    Args:
        asked: all prompts; those that are unseen are no wrong answers of the prompt classification, or it would learn
            that they are wrong.
        settings: of both, such as {"n_steps": 200}; the rest is `FeedbackRewardConfig`'s.
    """
    rows = [i for i, label in enumerate(labels) if label is not None]
    rated, y = pictures.take(rows), [float(labels[i] or 0) for i in rows]
    rng = random.Random(f"alternatives {seed}")
    unseen = {one.asked for one in asked if one.subset != SEEN}
    others = [[o.text for o in alternatives(one.asked, N_OTHERS, rng, unseen)] for one in rated.prompts]
    found = {}
    for name, changes in REWARDS.items():
        config = FeedbackRewardConfig(**{**settings, **changes})
        net, _ = train_reward(clip.encoder, rated.images, rated.texts, y, others, config, seed)
        found[name] = FeedbackReward(clip.encoder, net)
    return found, best_threshold(clip(rated.images, rated.texts).cpu(), torch.tensor(y))


def predictions(
    pictures: Pictures, rewards: Mapping[str, FeedbackReward], clip: ClipT, threshold: float, seed: int
) -> pd.DataFrame:
    """Rows of `feedback_reward.csv`: scores, and 1 where one predicts what the picture shows, above 0.5 or, for CLIP's,
    the threshold.
    """
    truth = torch.tensor(pictures.truth).float()
    rows = pd.DataFrame({
        "seed": seed, "subset": [p.subset for p in pictures.prompts], "kind": [p.kind for p in pictures.prompts],
        "prompt": pictures.texts, "image_seed": pictures.seeds, "fulfilled": truth.int().tolist(),
    })  # fmt: skip
    for name, score, border in (
        (CLIP, clip(pictures.images, pictures.texts), threshold),
        *((name, reward(pictures.images, pictures.texts), 0.5) for name, reward in rewards.items()),
    ):
        rows[name] = score.cpu().numpy().round(4)
        rows[f"{name} right"] = agreement(score.cpu(), truth, border).int().tolist()
    return rows


def pretraining_pictures(n: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """True pictures of the world's scenes with their captions, what the base was trained on: none has a count."""
    rng = random.Random(f"feedback pre-training {seed}")
    scenes = [world.sample_scene(rng, held_out=False) for _ in range(n)]
    return [render(scene) for scene in scenes], [caption(scene, rng) for scene in scenes]


def config_of(preset: Preset, arm: str, given: Mapping[str, Any]) -> FeedbackConfig:
    """An arm's settings: the preset's, those that are given, and its own."""
    return preset.settings("feedback", {**given, **ARMS[arm].settings})


def tune(
    model: TextToImage,
    arm: str,
    rated: Pictures,
    unrated: Pictures,
    reward: FeedbackReward,
    config: FeedbackConfig,
    folder: Path,
    seed: int,
    on_step: Callable[[Row], None] | None = None,
    name: str = "feedback",
) -> list[Row]:
    """Fine-tune `model` in place as an arm of `ARMS` does (another is a ParameterError), on rated and unrated pictures
    by the model before, all of which the learned reward weighs; a stopped training goes on from its checkpoints in
    `folder`.
    """
    if arm not in ARMS:
        raise ParameterError(f"There is no arm {arm!r} of feedback: choose from {', '.join(ARMS)}.")
    pictures = rated if arm == "labelled" else rated + unrated
    true, captions = pretraining_pictures(config.n_pretrain if config.pretrain_weight else 0, seed)
    weights = reward(list(pictures.images), pictures.texts).tolist()
    return feedback.train(
        model, pictures.images, pictures.texts, weights, replace(config, validate_every=0), folder, seed, true,
        captions, on_step=on_step, name=name,
    )  # fmt: skip


def best(pictures: Pictures, reward: FeedbackReward, keep: int) -> Pictures:
    """The best `keep` of each prompt's pictures by the reward; they are given the seeds of its first ones, so that both
    arms have a row for each.
    """
    n = len(set(pictures.seeds))
    kept = best_of(reward(list(pictures.images), pictures.texts).cpu().view(-1, n), keep)
    rows = [n * prompt + i for prompt, chosen in enumerate(kept.tolist()) for i in chosen]
    return replace(pictures.take(rows), seeds=[*pictures.seeds[:keep]] * len(kept))


@dataclass(frozen=True)
class Fidelity:
    """What pictures are compared with: true ones of prompts of the same kinds, as the decoder draws them."""

    dino: Dino
    true: torch.Tensor  # (N, D) embeddings

    @staticmethod
    def of(model: TextToImage, kinds: Sequence[Kind], n: int, seed: int) -> "Fidelity":
        """From `n` scenes of counts, colours and places in equal shares of the kinds."""
        rng = random.Random(f"feedback true pictures {seed}")
        counts = [None if kinds[i % len(kinds)] in ("count", "all") else 1 for i in range(n)]
        scenes = [world.sample_counted(rng, count=count) for count in counts]
        images = model.decode(model.encode_images([render(scene) for scene in scenes]))
        dino = make_scorer("dino", device=model.device)
        assert isinstance(dino, Dino)
        return Fidelity(dino, dino.embed(images).cpu())


def scores(arm: str, pictures: Pictures, reward: FeedbackReward, fidelity: Fidelity, seed: int | None) -> pd.DataFrame:
    """Rows of `feedback.csv`: what the counter sees, whether a picture is among true ones, how a prompt's differ. The
    seed is of reward and training; None for an arm that neither has a part in.
    """
    asked = [one.asked for one in pictures.prompts]
    rows = pd.DataFrame({
        "arm": arm, "seed": seed, "tune_seed": None, "subject": [one.noun for one in asked],
        "prompt_id": pictures.texts, "text": pictures.texts, "image_seed": pictures.seeds, "identifier": False,
        "seen": [p.subset == SEEN for p in pictures.prompts], "subset": [p.subset for p in pictures.prompts],
        "kind": [p.kind for p in pictures.prompts], "judge_text": [int(good) for good in pictures.truth],
    })  # fmt: skip
    for question in COUNTED:
        rows[f"right_{question}"] = [
            int(answers[question] == one.wanted[question]) if question in one.wanted else None
            for one, answers in zip(asked, pictures.answers, strict=True)
        ]
    z = fidelity.dino.embed(list(pictures.images)).cpu()
    rows["precision"] = precision(z, fidelity.true).int().tolist()
    rows["diversity"] = diversity(z, pictures.texts).numpy().round(4)
    rows["feedback"] = reward(list(pictures.images), pictures.texts).cpu().numpy().round(4)
    return rows
