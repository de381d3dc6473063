"""Controlled changes of a picture: what subject metrics say when exactly one thing about it differs.

Subject, activity, place, accessory and view of a pocket world's scene are independent, so two pictures can differ in
one of them alone. This turns into an experiment what InstructBooth's appendix E shows on seven pictures: DINO falls
when the pose changes, although the subject is the same.

An activity is more than a pose: it brings things (a ball, a stove) that may hide a part of the subject.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import permutations, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from ibkit.data.photos import load_subject_photos
from ibkit.data.subject import demo_subject, world_photos
from ibkit.errors import ParameterError, ScoreError
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket import world
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import NO_ACTIVITY, Scene, Subject, doing, line_up, sample_view
from ibkit.scorers.base import Scorer, batches
from ibkit.scorers.judge import Judge

SAME_SUBJECT = ("view", "place", "accessory", "pose", "everything but identity")
OTHER_SUBJECT = ("identity", "identity and pose", "identity and place", "everything")
CHANGES = SAME_SUBJECT + OTHER_SUBJECT
# The same individual against another one, all else changed alike.
CONTRASTS = {
    "pose": ("pose", "identity and pose"),
    "place": ("place", "identity and place"),
    "everything": ("everything but identity", "everything"),
}
PAIRS_PER_SUBJECT = 4
N_TESTED = 24  # individuals of a class for testing subject metrics; no shipped metric was trained on them
N_FOLDS = 2
VISIBLE_DIFFERENCE = 25  # of 255, in any colour channel
PHOTO_PX = 256  # what DINO's own evaluation resizes to
CROP = 0.85  # side of the central part of a photo that is kept


@dataclass(frozen=True)
class Pair:
    """Two scenes that differ in what `change` says.

    Attributes:
        subject: name of the reference's individual in tables, unique within a set of pairs.
        fold: all activities in the subject's pairs come from this fold (`fold_of`).
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
    return list(world.ACTIVITIES).index(activity) % N_FOLDS


def check_classes(class_nouns: Sequence[str]) -> list[str]:
    """The classes, each once; all of the pocket world's where none is named. A ParameterError where it has no such
    class.
    """
    if unknown := [noun for noun in class_nouns if noun not in world.CLASSES]:
        raise ParameterError(
            f"the pocket world has no class {unknown[0]!r}: choose class_nouns of {', '.join(world.CLASSES)}, "
            "or leave them empty for all."
        )
    return list(dict.fromkeys(class_nouns)) or list(world.CLASSES)


def controlled_pairs(class_nouns: Sequence[str], n_pairs: int, seed: int = 0) -> list[Pair]:
    """Draw pairs of scenes for every class and change.

    Up to four references show one individual: those with an even number at rest, as a user's photos and the paper's
    figure 11 do, the others in an activity. The changed values are drawn once per reference, so that all of its pairs
    share them. Another individual comes from the subject's line-up; for half of the references it has the subject's
    own body colour. Containers and vehicles wear nothing: they have no pair that changes the accessory.

    Args:
        class_nouns: see `check_classes`.
        n_pairs: references of a class, and so pairs for each of its changes.
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
            name = f"{individuals[which].body} {noun} {which + 1}"
            rng = random.Random(f"controlled changes {seed} {noun} {i}")
            pairs += _pairs_of(individuals[which], name, which % N_FOLDS, number, rng)
    return pairs


def _pairs_of(subject: Subject, name: str, fold: int, number: int, rng: random.Random) -> list[Pair]:
    """The pairs of one reference."""
    noun = subject.class_noun
    before, after = rng.sample([a for a in world.activities_of(noun) if fold_of(a) == fold], 2)
    place, other_place = rng.sample(list(world.PLACES), 2)
    reference = Scene(subject, **doing(before if number % 2 else NO_ACTIVITY), place=place, view=sample_view(rng))
    identity: dict[str, Any] = {"subject": line_up(subject)[1 + number]}
    changes: dict[str, dict[str, Any]] = {"view": {"view": sample_view(rng)}, "place": {"place": other_place}}
    if len(world.accessories_of(noun)) > 1:
        changes["accessory"] = {"accessory": rng.choice(world.accessories_of(noun)[1:])}
    changes["pose"] = dict(doing(after))
    changes["everything but identity"] = {k: v for values in changes.values() for k, v in values.items()}
    changes |= {"identity": identity}
    for same, other in CONTRASTS.values():
        changes[other] = identity | changes[same]
    return [Pair(name, fold, number, change, reference, replace(reference, **v)) for change, v in changes.items()]


def _everybody(class_noun: str) -> list[Subject]:
    """Every individual of a class, in a fixed random order."""
    shapes, colours = world.SHAPES[world.GROUP_OF[class_noun]], permutations(world.COLOURS, 2)
    looks = product(colours, world.PATTERNS, shapes, (False, True))
    everybody = [Subject(class_noun, *two, pattern, shape, ears) for two, pattern, shape, ears in looks]
    random.Random(f"individuals 0 {class_noun}").shuffle(everybody)
    return everybody


def tested_individuals(class_noun: str) -> list[Subject]:
    """The individuals of a class for testing subject metrics, in a fixed order."""
    return _everybody(class_noun)[:N_TESTED]


def training_individuals(class_nouns: Sequence[str], n: int = 0) -> list[Subject]:
    """Individuals to train a subject metric on, of the classes in turn.

    None of them is tested, is one that users personalize, or stands in the line-up of one of these.

    `n` is how many; 0 = all; a ParameterError where the classes have fewer.
    """
    nouns = check_classes(class_nouns)
    tested = [who for noun in nouns for who in tested_individuals(noun)]
    kept = [world.RARE_SUBJECT, *world.DEMO_SUBJECTS.values(), *tested]
    shown = {individual for subject in kept for individual in line_up(subject)}
    free = {noun: [who for who in _everybody(noun) if who not in shown] for noun in nouns}
    share = -(-n // len(free))
    if share > (fewest := min(map(len, free.values()))):
        raise ParameterError(
            f"{n} individuals to train on are {share} of each class, and beside those that are kept for tests the "
            f"pocket world has {fewest} of one: choose n_individuals up to {fewest * len(free)}."
        )
    return [who for turn in zip_longest(*free.values()) for who in turn if who][: n or None]


# --- pictures --------------------------------------------------------------------------------------------------


def draw(pairs: Iterable[Pair]) -> dict[Scene, Image.Image]:
    """The picture of every scene of the pairs."""
    scenes = dict.fromkeys(scene for pair in pairs for scene in (pair.reference, pair.changed))
    return {scene: render(scene) for scene in scenes}


def reconstruct(pictures: Mapping[Scene, Image.Image], model: TextToImage) -> dict[Scene, Image.Image]:
    """The pictures as a model's autoencoder reconstructs them, which is how a generated picture looks at its best."""
    parts = batches(list(pictures.values()), 32)
    rebuilt = [picture for part in parts for picture in model.decode(model.encode_images(part))]
    return dict(zip(pictures, rebuilt, strict=True))


def mask_iou(a: Scene, b: Scene) -> float:
    """Intersection over union of two scenes' true subject masks."""
    first, second = (np.asarray(subject_mask(scene)) > 127 for scene in (a, b))
    return float((first & second).sum() / max((first | second).sum(), 1))


def changed_outside(a: Scene, b: Scene) -> float:
    """Share of the pixels outside both scenes' subjects that look different. Where place and view are the same, these
    are the things that an activity brings.
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
        on_pair: called with the number of pairs done.

    Returns:
        One row a pair: class_noun, subject, pair, change, same_identity, same_colour (body colours), fold,
        reference_activity, activity, mask_iou, changed_outside, judge_identity (1 where the judge takes the changed
        picture for the reference's subject), and a column for each scorer.
    """
    table = pd.DataFrame(
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
        }
        for pair in pairs
    )
    for rows in table.groupby("subject").groups.values():
        same = judge.identifies([pictures[pairs[i].changed] for i in rows], pairs[rows[0]].reference.subject)
        table.loc[rows, "judge_identity"] = same.numpy()
    done = 0
    for rows in table.groupby(["subject", "pair"], sort=False).groups.values():
        images = [pictures[pairs[i].changed] for i in rows]
        for name, scorer in scorers.items():
            scores = scorer(images, references=[pictures[pairs[rows[0]].reference]])
            table.loc[rows, name] = scores.double().numpy()
        done += len(rows)
        on_pair(done)
    return table.astype({"judge_identity": int})


# --- photos without truth --------------------------------------------------------------------------------------


def photos_to_compare(folder: Path | None, class_noun: str) -> tuple[list[Image.Image], list[str]]:
    """A user's photos (see `load_subject_photos`) and their names; without a folder, those of the pocket world's own
    individual of the class. Fewer than two are a ScoreError.
    """
    if folder is None:
        photos = world_photos(demo_subject(class_noun))
        return photos, [f"{class_noun} {i + 1}" for i in range(len(photos))]
    loaded = load_subject_photos(folder, PHOTO_PX)
    _require_two(loaded)
    return [photo.image for photo in loaded], [photo.name for photo in loaded]


def _require_two(photos: Sized) -> None:
    if len(photos) < 2:
        raise ScoreError(
            f"There is {len(photos)} photo of the subject, and photos are compared with each other here: "
            "give a folder with two or more."
        )


def score_photos(photos: Sequence[Image.Image], names: Sequence[str], scorers: Mapping[str, Scorer]) -> pd.DataFrame:
    """Score a user's photos against each other, and each against itself mirrored and cropped.

    Two photos differ in pose, place and light at once, and nobody recorded how: there is no column for it.

    Args:
        photos, names: of one subject; fewer than two are a ScoreError.
        scorers: column name -> scorer that needs references.

    Returns:
        One row a comparison: reference, photo, change ("mirrored", "cropped", "other photo"), a column a scorer.
    """
    _require_two(photos)
    parts = []
    for i, (photo, name) in enumerate(zip(photos, names, strict=True)):
        x, y = (round(side * (1 - CROP) / 2) for side in photo.size)
        others = [j for j in range(len(photos)) if j != i]
        cropped = photo.crop((x, y, photo.width - x, photo.height - y))
        images = [ImageOps.mirror(photo), cropped, *(photos[j] for j in others)]
        what = {"reference": name, "photo": [name, name, *(names[j] for j in others)]}
        what["change"] = ["mirrored", "cropped", *["other photo"] * len(others)]
        scores = {column: scorer(images, references=[photo]).numpy() for column, scorer in scorers.items()}
        parts.append(pd.DataFrame(what | scores))
    return pd.concat(parts, ignore_index=True)
