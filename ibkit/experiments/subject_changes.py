"""Controlled changes of a picture: what subject metrics say when exactly one thing about it differs.

A scene of the pocket world holds subject, activity, place, accessory and view apart, so two pictures can differ in one
of them and be equal in all others. That makes an experiment of what InstructBooth's appendix E shows on seven pictures:
DINO falls when the pose changes, although the subject is the same.

An activity is more than a pose: it brings things (a ball, a stove) that may hide a part of the subject.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ibkit.data.photos import load_subject_photos
from ibkit.data.subject import demo_subject, world_photos
from ibkit.errors import ParameterError, ScoreError
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import (
    ACTIVITIES,
    CLASSES,
    COLOURS,
    DEMO_SUBJECTS,
    GROUP_OF,
    NO_ACTIVITY,
    PATTERNS,
    PLACES,
    RARE_SUBJECT,
    SHAPES,
    Scene,
    Subject,
    accessories_of,
    activities_of,
    doing,
    line_up,
    sample_view,
)
from ibkit.scorers.base import Scorer, batches
from ibkit.scorers.judge import Judge

SAME_SUBJECT = ("view", "place", "accessory", "pose", "everything but identity")
OTHER_SUBJECT = ("identity", "identity and pose", "identity and place", "everything")
CHANGES = SAME_SUBJECT + OTHER_SUBJECT
# What is asked of a subject metric: same individual against other individual, all else changed alike.
CONTRASTS = {
    "pose": ("pose", "identity and pose"),
    "place": ("place", "identity and place"),
    "everything": ("everything but identity", "everything"),
}
PAIRS_PER_SUBJECT = 4
N_TESTED = 24  # individuals of a class that subject metrics are tested on, and that no shipped one was trained on
N_FOLDS = 2
VISIBLE_DIFFERENCE = 25  # of 255, in any colour channel


@dataclass(frozen=True)
class Pair:
    """Two scenes that differ in what `change` says.

    Attributes:
        subject: name of the reference's individual in tables, unique among all of a set of pairs.
        fold: of the subject's activities (`fold_of`): all that its pairs show come from this fold.
        number: counts the references of a subject; the pairs of one reference share it.
        change: one of `CHANGES`.
    """

    subject: str
    fold: int
    number: int
    change: str
    reference: Scene
    changed: Scene

    @property
    def same_identity(self) -> bool:
        return self.reference.subject == self.changed.subject


def fold_of(activity: str) -> int:
    """Which half of the activities this one belongs to, for training on one half and testing on the other."""
    return list(ACTIVITIES).index(activity) % N_FOLDS


def check_classes(class_nouns: Sequence[str]) -> list[str]:
    """The classes asked for, each once; all of the pocket world's when none is.

    Raises:
        ParameterError: the pocket world has no such class.
    """
    if unknown := [noun for noun in class_nouns if noun not in CLASSES]:
        raise ParameterError(
            f"the pocket world has no class {unknown[0]!r}: choose class_nouns of {', '.join(CLASSES)}, "
            "or leave them empty for all."
        )
    return list(dict.fromkeys(class_nouns)) or list(CLASSES)


def controlled_pairs(class_nouns: Sequence[str], n_pairs: int, seed: int = 0) -> list[Pair]:
    """Draw pairs of scenes for every class and change.

    Up to four references show one individual. Those with an even number show it at rest, as a user's photos do (and as
    the paper's figure 11), the others in an activity; what is changed to is drawn once for a reference, so that all of
    its pairs share it. Another individual comes from the subject's line-up; for half of the references it has the
    subject's own body colour. Containers and vehicles wear nothing: they have no pair that changes the accessory.

    Args:
        class_nouns: classes, see `check_classes`.
        n_pairs: references, and so pairs for each change, of a class.
        seed: decides poses, places, things and views. The individuals are always those of `tested_individuals`.

    Raises:
        ParameterError: the pocket world has no such class, or the pairs need more individuals than are kept for tests.
    """
    if n_pairs > (most := PAIRS_PER_SUBJECT * N_TESTED):
        raise ParameterError(f"{N_TESTED} individuals of a class are kept for tests: choose n_pairs up to {most}.")
    pairs = []
    for noun in check_classes(class_nouns):
        individuals = tested_individuals(noun)
        for i in range(n_pairs):
            which, number = divmod(i, PAIRS_PER_SUBJECT)
            individual, fold = individuals[which], which % N_FOLDS
            rng = random.Random(f"controlled changes {seed} {noun} {i}")
            name = f"{individual.body} {noun} {which + 1}"
            for change, (reference, changed) in _changes(individual, fold, number, rng).items():
                pairs.append(Pair(name, fold, number, change, reference, changed))
    return pairs


def _changes(subject: Subject, fold: int, number: int, rng: random.Random) -> dict[str, tuple[Scene, Scene]]:
    """change -> (reference, changed) of one reference."""
    noun = subject.class_noun
    before, after = rng.sample([a for a in activities_of(noun) if fold_of(a) == fold], 2)
    place, other_place = rng.sample(list(PLACES), 2)
    reference = Scene(subject, **doing(before if number % 2 else NO_ACTIVITY), place=place, view=sample_view(rng))
    pose, other = doing(after), {"subject": line_up(subject)[1 + number]}
    looks = {"view": sample_view(rng)}
    worn = {"accessory": rng.choice(accessories_of(noun)[1:])} if len(accessories_of(noun)) > 1 else {}
    all_but_identity = looks | {"place": other_place} | worn | pose
    differences = {
        "view": looks,
        "place": {"place": other_place},
        "accessory": worn,
        "pose": pose,
        "everything but identity": all_but_identity,
        "identity": other,
        "identity and pose": other | pose,
        "identity and place": other | {"place": other_place},
        "everything": other | all_but_identity,
    }
    return {change: (reference, replace(reference, **what)) for change, what in differences.items() if what}


def _everybody(class_noun: str) -> list[Subject]:
    """Every individual that a class of the pocket world has, in a fixed order without a pattern."""
    looks = product(COLOURS, COLOURS, PATTERNS, SHAPES[GROUP_OF[class_noun]], (False, True))
    everybody = [Subject(class_noun, *look) for look in looks if look[0] != look[1]]
    random.Random(f"individuals 0 {class_noun}").shuffle(everybody)
    return everybody


def tested_individuals(class_noun: str) -> list[Subject]:
    """The individuals of a class that subject metrics are tested on, in a fixed order."""
    return _everybody(class_noun)[:N_TESTED]


def training_individuals(class_nouns: Sequence[str], n: int = 0) -> list[Subject]:
    """Individuals to train a subject metric on, of the classes in turn.

    None of them is tested, is one that users personalize, or stands in the line-up of one of these.

    Args:
        class_nouns: classes, see `check_classes`.
        n: how many; 0 = all.

    Raises:
        ParameterError: the classes have fewer than `n` of them.
    """
    nouns = check_classes(class_nouns)
    kept = [RARE_SUBJECT, *DEMO_SUBJECTS.values(), *(who for noun in nouns for who in tested_individuals(noun))]
    shown = {individual for subject in kept for individual in line_up(subject)}
    free = {noun: [who for who in _everybody(noun) if who not in shown] for noun in nouns}
    share = -(-n // len(free))
    if share > (fewest := min(map(len, free.values()))):
        raise ParameterError(
            f"{n} individuals to train on are {share} of each class, and beside those that are kept for tests the "
            f"pocket world has {fewest} of one: choose n_individuals up to {fewest * len(free)}."
        )
    in_turn = [who for turn in zip_longest(*free.values()) for who in turn if who]
    return in_turn[:n] if n else in_turn


# --- pictures --------------------------------------------------------------------------------------------------


def draw(pairs: Iterable[Pair]) -> dict[Scene, Image.Image]:
    """The picture of every scene of the pairs."""
    scenes = dict.fromkeys(scene for pair in pairs for scene in (pair.reference, pair.changed))
    return {scene: render(scene) for scene in scenes}


def reconstruct(
    pictures: Mapping[Scene, Image.Image], model: TextToImage, batch_size: int = 32
) -> dict[Scene, Image.Image]:
    """The same pictures as a model's autoencoder gives them back: what a generated picture looks like at its best."""
    back: list[Image.Image] = []
    for batch in batches(list(pictures.values()), batch_size):
        back += model.decode(model.encode_images(batch))
    return dict(zip(pictures, back, strict=True))


def mask_iou(a: Scene, b: Scene) -> float:
    """How much of two scenes' subjects lies on the same pixels: intersection over union of the true masks."""
    first, second = (np.asarray(subject_mask(scene)) > 127 for scene in (a, b))
    return float((first & second).sum() / max((first | second).sum(), 1))


def changed_outside(a: Scene, b: Scene) -> float:
    """Share of the pixels outside both scenes' subjects that look different: the things that an activity brings, where
    place and view are the same.
    """
    outside = np.logical_and(*(np.asarray(subject_mask(scene)) == 0 for scene in (a, b)))
    first, second = (np.asarray(render(scene), dtype=int) for scene in (a, b))
    different = np.abs(first - second).max(axis=2) > VISIBLE_DIFFERENCE
    return float((different & outside).sum() / max(outside.sum(), 1))


# --- the table -------------------------------------------------------------------------------------------------


def score_pairs(
    pairs: Sequence[Pair],
    pictures: Mapping[Scene, Image.Image],
    scorers: Mapping[str, Scorer],
    judge: Judge,
    on_pair: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Score every changed picture against its reference, which is the only photo of the subject.

    Args:
        pairs: of `controlled_pairs`.
        pictures: of `draw` or `reconstruct`.
        scorers: column name -> scorer that needs references.
        judge: picks the individual out of a line-up of eight (simulated).
        on_pair: called with the number of pairs that are done.

    Returns:
        One row a pair: class_noun, subject, pair, change, same_identity, same_colour (body colours), fold,
        reference_activity, activity, mask_iou, changed_outside, judge_identity (1 where the judge takes the changed
        picture for the reference's subject), and a column for each scorer.
    """
    by_reference: dict[tuple, list[Pair]] = {}
    by_subject: dict[Subject, list[Pair]] = {}
    for pair in pairs:
        by_reference.setdefault((pair.subject, pair.number), []).append(pair)
        by_subject.setdefault(pair.reference.subject, []).append(pair)
    values: dict[Pair, dict[str, float]] = {pair: {} for pair in pairs}
    for subject, group in by_subject.items():
        same = judge.identifies([pictures[pair.changed] for pair in group], subject)
        for pair, answer in zip(group, same.tolist(), strict=True):
            values[pair]["judge_identity"] = int(answer)
    done = 0
    for group in by_reference.values():
        images = [pictures[pair.changed] for pair in group]
        for name, scorer in scorers.items():
            scores = scorer(images, references=[pictures[group[0].reference]])
            for pair, score in zip(group, scores.tolist(), strict=True):
                values[pair][name] = score
        done += len(group)
        on_pair(done)
    rows = [
        {
            "class_noun": pair.reference.subject.class_noun,
            "subject": pair.subject,
            "pair": pair.number,
            "change": pair.change,
            "same_identity": pair.same_identity,
            "same_colour": pair.reference.subject.body == pair.changed.subject.body,
            "fold": pair.fold,
            "reference_activity": pair.reference.activity,
            "activity": pair.changed.activity,
            "mask_iou": mask_iou(pair.reference, pair.changed),
            "changed_outside": changed_outside(pair.reference, pair.changed),
            **values[pair],
        }
        for pair in pairs
    ]
    return pd.DataFrame(rows)


# --- photos without truth --------------------------------------------------------------------------------------


PHOTO_PX = 256  # what DINO's own evaluation resizes to


def photos_to_compare(folder: Path | None, class_noun: str) -> tuple[list[Image.Image], list[str]]:
    """A user's photos and their names; without a folder those of the pocket world's own individual of a class.

    Raises:
        PhotoError: see `load_subject_photos`.
        ScoreError: fewer than two photos.
    """
    if folder is None:
        photos = world_photos(demo_subject(class_noun))
        return photos, [f"{class_noun} {i + 1}" for i in range(len(photos))]
    loaded = load_subject_photos(folder, PHOTO_PX)
    _require_two(loaded)
    return [photo.image for photo in loaded], [photo.name for photo in loaded]


def _require_two(photos: Sequence) -> None:
    if len(photos) < 2:
        raise ScoreError(
            f"There is {len(photos)} photo of the subject, and photos are compared with each other here: "
            "give a folder with two or more."
        )


def score_photos(
    photos: Sequence[Image.Image], names: Sequence[str], scorers: Mapping[str, Scorer], crop: float = 0.85
) -> pd.DataFrame:
    """Score a user's photos against each other, and each against itself mirrored and cropped.

    Pose, place and light of two photos differ all at once and nobody wrote down how, so this has no column for it.

    Args:
        photos: at least two photos of one subject.
        names: one a photo.
        scorers: column name -> scorer that needs references.
        crop: side of the central part that is kept, as a share of the photo's.

    Returns:
        One row a comparison: reference, photo, change ("mirrored", "cropped", "other photo"), a column a scorer.

    Raises:
        ScoreError: fewer than two photos.
    """
    _require_two(photos)
    parts = []
    for i, (photo, name) in enumerate(zip(photos, names, strict=True)):
        margin = [round(side * (1 - crop) / 2) for side in photo.size]
        box = (*margin, photo.width - margin[0], photo.height - margin[1])
        others = [j for j in range(len(photos)) if j != i]
        images = [ImageOps.mirror(photo), photo.crop(box), *(photos[j] for j in others)]
        part = pd.DataFrame({"reference": name, "photo": [name, name, *(names[j] for j in others)]})
        part["change"] = ["mirrored", "cropped", *["other photo"] * len(others)]
        for column, scorer in scorers.items():
            part[column] = scorer(images, references=[photo]).numpy()
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
