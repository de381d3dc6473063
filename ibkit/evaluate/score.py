"""The images of the evaluation: which ones, making them, scoring them (InstructBooth, section 3.3 and appendix C).

All arms draw the same prompts from the same noise, so that the two pictures of a pair differ by the arm alone. The
table has one row an image: `jobs` lists the rows, `generate` makes the pictures, `score` adds a column for each metric.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ibkit.adapt import Adapted
from ibkit.data.photos import read_rgb
from ibkit.data.subject import PersonalizedSubject, choose_activities, personalization_of
from ibkit.device import generator
from ibkit.errors import ModelError, ParameterError, ScoreError
from ibkit.evaluate.arms import BASE, REAL, arms_of
from ibkit.evaluate.drawing import Key
from ibkit.evaluate.drawing import generate as generate
from ibkit.evaluate.stats import METRICS, SEEDS
from ibkit.methods.records import named
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.words import parts_in, said_in
from ibkit.pocket.world import Subject
from ibkit.runs import CompletedRun, resolve
from ibkit.scorers import SCORERS, Scorer, column_of, make_scorer
from ibkit.scorers.base import batches
from ibkit.scorers.dino import Dino
from ibkit.scorers.judge import Judge, things_taken
from ibkit.scorers.subject import PatchMatch, SubjectFidelity

DEFAULT_SCORERS = ("clip_t", "image_reward", "clip_i", "dino", "subject")
RUN_KINDS = ("01_personalize", "02_rl_finetune")  # runs whose models can be evaluated
JUDGED = ("class", "activity", "pose", "things", "place", "accessory", "identity")
SAID = ("activity", "place", "accessory")  # what `judge_text` joins


@dataclass(frozen=True)
class Inputs:
    """What is evaluated.

    Attributes:
        subject: of all runs; personalized: a run of 01 that holds its photos.
        models: `Key` -> model, base model first; a seed is None where a chain has no such stage.
        tunings: runs of 02.
    """

    subject: PersonalizedSubject
    personalized: CompletedRun
    models: Mapping[Key, Adapted]
    tunings: Sequence[CompletedRun]

    @property
    def references(self) -> list[Image.Image]:
        """The subject's photos, as the models were trained on them."""
        return [read_rgb(path) for path in sorted(self.personalized.path("photos").glob("*.png"))]

    @property
    def rewards(self) -> dict[str, set[str]]:
        """The rewards of each tuned arm, as columns of the scores."""
        found: dict[str, set[str]] = {}
        for run in self.tunings:
            names = filter(None, (run.parameters["reward"], run.parameters["subject_reward"]))
            found.setdefault(Adapted.read(run).arm, set()).update(map(column_of, names))
        return found

    def activities(self, asked: Sequence[str], usual: Sequence[str]) -> list[str]:
        """The activities asked for, else those that RL was trained on, else the usual ones (the preset's); a
        ParameterError for one that the subject's class does not have in the pocket world.
        """
        return choose_activities(self.subject, asked or self.trained(usual), usual)

    def trained(self, usual: Sequence[str]) -> list[str]:
        """The activities that RL was trained on; `usual` is what the preset trains on. Without RL, none."""
        prompts = [run.parameters["prompts"] for run in self.tunings]
        chosen = [activity for given in prompts for activity in choose_activities(self.subject, given, usual)]
        return list(dict.fromkeys(chosen))

    def load_arm(self, key: Key, device: torch.device | str) -> TextToImage:
        """Load the model of an arm and its seeds."""
        return self.models[key].build(device)


def read_inputs(runs: Sequence[CompletedRun], model: str, revision: str = "") -> Inputs:
    """Read the runs to evaluate, each with the models that it started from, and check that they belong together.

    Args:
        runs: of 01 and 02, of any methods and seeds.
        model, revision: the base model that the user named; it must be the one that was trained.

    Raises:
        ArtifactError: the 01 run of a tuning is gone.
        ParameterError: runs of different subjects or base models, or two models of one name and seed.
    """
    subject, first = None, None
    models: dict[Key, Adapted] = {}
    made_by: dict[Key, Path] = {}
    for run in runs:
        personalized = personalization_of(run)
        whose = PersonalizedSubject.read(personalized)
        if whose.base_model not in (model, str(resolve(model))) or (revision and revision != whose.base_revision):
            raise ParameterError(
                f"{personalized.folder} personalized the model {whose.base_model!r} (revision "
                f"{whose.base_revision or 'not pinned'}), not {model!r}: give the same model and revision here."
            )
        subject, first = subject or whose, first or personalized
        if whose != subject or _photos(personalized) != _photos(first):
            raise ParameterError(
                f"{first.folder} and {personalized.folder} are about different subjects, photos or words for them "
                f"({subject.instance_prompt!r}, {whose.instance_prompt!r}): evaluate each in a run of its own."
            )
        adapted = Adapted.read(run)
        for n in range(len(adapted.deltas) + 1):
            chain = replace(adapted, deltas=adapted.deltas[:n])
            seeds = [delta.seed for delta in chain.deltas]
            key = (chain.arm, seeds[0] if seeds else None, seeds[-1] if n > 1 else None)
            if key in models and models[key].key != chain.key:
                raise ParameterError(
                    f"{made_by[key]} and {run.folder} have different models that are both {chain.arm} with the seeds "
                    f"{seeds}: name one of them."
                )
            models[key], made_by[key] = models.get(key, chain), made_by.get(key, run.folder)
    if subject is None or first is None:
        raise ParameterError("There is nothing to evaluate: name finished runs of 01 or 02 in runs.")
    order = arms_of(arm for arm, _, _ in models)
    keys = sorted(models, key=lambda key: (order[key[0]].order, *(-1 if seed is None else seed for seed in key[1:])))
    return Inputs(subject, first, {key: models[key] for key in keys}, [run for run in runs if run.kind == RUN_KINDS[1]])


def _photos(run: CompletedRun) -> dict[str, str]:
    """Name and hash of the photos in a run of 01."""
    return {n: entry["sha256"] for n, entry in run.manifest["outputs"].items() if n.startswith("photos/")}


def image_seeds(seed: int, n_images: int) -> list[int]:
    """Noise seeds of the evaluation, from a random stream of their own: no training picture has the same noise."""
    return [int(torch.randint(2**31, (), generator=generator(seed, "evaluation image", i))) for i in range(n_images)]


def jobs(
    subject: PersonalizedSubject,
    activities: Sequence[str],
    n_images: int,
    models: Iterable[Key],
    seed: int = 0,
    trained: Sequence[str] | None = None,
) -> pd.DataFrame:
    """List the images of the evaluation, one row each, without scores.

    The base model draws the class prompt ("a cat …"); every other arm the prompt with the identifier ("a sks
    cat …") and, for language drift, the class prompt too.

    Args:
        activities: such as "playing soccer"; one named twice counts once.
        n_images: noise seeds for each prompt and model.
        models: as in `Inputs.models`.
        seed: the notebook's, from which the noise seeds are derived.
        trained: activities that RL was trained on; the others are unseen (paper, figures 6-9). None: there was no RL.

    Returns:
        Table with arm, seed and tune_seed (of the personalization and the tuning; missing where there is none),
        subject, class_noun, prompt_id, prompt (what the model reads), text (what scorers read), activity, seen (whether
        RL was trained on it; missing without RL), identifier, image (path below the run folder), image_seed. Batches
        are cut in its order.

    No activity, or no image, is a ParameterError.
    """
    if not activities or n_images < 1:
        raise ParameterError("An evaluation needs at least one activity and one image: give prompts and n_images.")
    seeds, ids, rows = image_seeds(seed, n_images), prompt_ids(activities), []
    for arm, personal, tuning in models:
        who = named(subject, arm)
        folder = arm + f"-seed{personal}" * (personal is not None) + f"-tune{tuning}" * (tuning is not None)
        for identifier in (False,) if arm == BASE else (True, False):
            for activity, prompt_id in ids.items():
                prompt, name = who.prompt(activity, identifier), "identifier" if identifier else "class"
                row = {
                    "arm": arm,
                    "seed": personal,
                    "tune_seed": tuning,
                    "subject": subject.name,
                    "class_noun": subject.class_noun,
                    "prompt_id": prompt_id,
                    "prompt": prompt.text,
                    "text": prompt.clean,
                    "activity": activity,
                    "seen": None if trained is None else activity in trained,
                    "identifier": identifier,
                }
                stem = f"images/{folder}/{prompt_id}-{name}"
                rows += [row | {"image": f"{stem}-{i:03d}.png", "image_seed": s} for i, s in enumerate(seeds)]
    return pd.DataFrame(rows).astype({"seed": "Int64", "tune_seed": "Int64", "seen": "boolean"})


def prompt_ids(activities: Sequence[str]) -> dict[str, str]:
    """Activity -> a name for tables and files, such as "playing-soccer"; different activities get different names."""
    ids: dict[str, str] = {}
    for activity in dict.fromkeys(activities):
        stem = re.sub(r"\W+", "-", activity.lower()).strip("-")[:60] or "prompt"
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        ids[activity] = next(name for name in names if name not in ids.values())
    return ids


def make_scorers(
    names: Sequence[str], weights: str | Path, device: torch.device | str, judged: bool
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """Make the scorers of the evaluation; one whose weights are missing leaves a gap and does not end it.

    Args:
        names: as in `ibkit.scorers.SCORERS`; empty = `DEFAULT_SCORERS`.
        weights: the preset's `scorers`, see `ibkit.scorers.make_scorer`.
        judged: whether the judge scores too; without it, both text and subject fidelity need a scorer.

    Returns:
        The scorers by column (`column_of`), and for each that could not be made a sentence with the reason and the
        remedy.

    Raises:
        ParameterError: an unknown name (the nearest one is named), or no scorer for one of the axes.
        ModelError: no scorer is left, or none that measures one of the axes.
    """
    for name in names:
        SCORERS.find(name)
    names = list(dict.fromkeys(names or DEFAULT_SCORERS))
    axes = () if judged else ("text", "subject")
    for kind in axes:
        if not any(METRICS[column_of(name)].kind == kind for name in names):
            raise ParameterError(f"None of the scorers {', '.join(names)} measures {kind} fidelity: add one that does.")
    scorers, gaps = {}, {}
    for name in names:
        try:
            scorer = make_scorer(name, weights, device)
            if isinstance(scorer, SubjectFidelity) and not judged:  # its head knows only the pocket world's individuals
                scorer = PatchMatch(scorer.dino)
            scorers[column_of(name)] = scorer
        except ModelError as error:
            gaps[column_of(name)] = str(error)
    for kind in axes:
        if not any(METRICS[name].kind == kind for name in scorers):
            raise ModelError(f"Nothing is left that measures {kind} fidelity. {' '.join(gaps.values())}")
    if not scorers:
        raise ModelError(f"No scorer is left. {' '.join(gaps.values())}")
    return scorers, gaps


def score(
    rows: pd.DataFrame,
    folder: str | Path,
    references: Sequence[Image.Image],
    subject: PersonalizedSubject,
    scorers: Mapping[str, Scorer],
    judge: Judge | None = None,
    batch_size: int = 64,
    on_image: Callable[[int], None] = lambda scored: None,
) -> pd.DataFrame:
    """Add a column for each scorer and, where the truth is known, the judge's answers.

    Args:
        rows: from `jobs`, their pictures made.
        folder: what the column `image` is relative to.
        scorers: column -> scorer, from `make_scorers`.
        judge: used only for a subject of the pocket world (`subject.world`).
        batch_size: pictures in memory at once.
        on_image: called with the number of pictures scored.

    Returns:
        A copy of `rows` with scores; judge_* are 1, 0, or missing where the prompt does not ask for it.

    Raises:
        ScoreError: rows of another subject than the references', or a scorer refuses its input.
    """
    if others := set(rows["subject"]) - {subject.name}:
        raise ScoreError(f"The references show {subject.name}, but there are pictures of {', '.join(sorted(others))}.")
    parts = []
    for part in batches(rows, batch_size):
        images, texts = [read_rgb(Path(folder) / path) for path in part["image"]], list(part["text"])
        columns = {name: scorer(images, texts, references).double().numpy() for name, scorer in scorers.items()}
        if judge is not None and subject.world is not None:
            columns |= _judge(judge, images, subject.world, part["activity"])
        parts.append(part.assign(**columns))
        on_image(sum(map(len, parts)))
    return pd.concat(parts)


def drift(scores: pd.DataFrame, folder: str | Path, dino: Dino, batch_size: int = 64) -> pd.Series:
    """Language drift: 1 − cosine of DINO's embeddings of a class prompt's picture and of the base model's picture from
    the same noise, for each row of a personalized model without the identifier, NaN for the others. 0 where
    personalization left the class noun as it was.
    """
    key = ["prompt_id", "image_seed"]
    base = scores[(scores["arm"] == BASE) & ~scores["identifier"]].set_index(key)["image"]
    asked = scores[(scores["arm"] != BASE) & ~scores["identifier"]]
    embedded: dict[str, torch.Tensor] = {}
    for part in batches(list(dict.fromkeys([*base, *asked["image"]])), batch_size):
        pictures = [read_rgb(Path(folder) / path) for path in part]
        with torch.inference_mode():
            embedded |= dict(zip(part, dino.embed(pictures).double().cpu(), strict=True))
    values = [
        1 - float(embedded[row.image] @ embedded[base[row.prompt_id, row.image_seed]]) for row in asked.itertuples()
    ]
    return pd.Series(values, index=asked.index, dtype=float).reindex(scores.index)


def real_photos(
    photos: Sequence[Image.Image], subject: PersonalizedSubject, scorers: Mapping[str, Scorer]
) -> pd.DataFrame:
    """Rows of the arm "real": each photo of the subject scored against the others, the ceiling of a subject metric;
    with the columns of the metrics that read references alone, and none for a single photo.

    The R cosines of a photo with all photos, itself included, have the mean m; without itself it is (R·m − 1)/(R − 1).
    """
    n = len(photos)
    columns = {
        name: (n * scorer(photos, references=photos).double().numpy() - 1) / (n - 1)
        for name, scorer in scorers.items()
        if n > 1 and scorer.needs == {"references"}
    }
    keys = {
        "arm": REAL,
        "seed": None,
        "tune_seed": None,
        "subject": subject.name,
        "class_noun": subject.class_noun,
        "prompt_id": "photo",
        "identifier": True,
    }
    rows = [keys | {"image_seed": i} | {k: v[i] for k, v in columns.items()} for i in range(n) if columns]
    return pd.DataFrame(rows, columns=[*keys, "image_seed", *columns]).astype(dict.fromkeys(SEEDS, "Int64"))


def _judge(judge: Judge, images: list[Image.Image], world: Subject, phrases: Iterable[str]) -> dict[str, np.ndarray]:
    """The judge's answers, 1 right and 0 wrong: judge_text is right where all that the phrase names is shown."""
    expected = [
        {"class": world.class_noun, "activity": said_in(phrase)["activity"], **parts_in(phrase)} for phrase in phrases
    ]
    columns = {f"judge_{question}": np.full(len(images), np.nan) for question in ("text", *JUDGED)}
    for question in JUDGED[:-1]:
        known = [i for i, answers in enumerate(expected) if answers.get(question)]
        if known:
            right = judge.agrees([images[i] for i in known], question, [expected[i][question] for i in known])
            columns[f"judge_{question}"][known] = right.numpy()
    said = np.stack([columns[f"judge_{question}"] for question in SAID])
    named = ~np.isnan(said).all(axis=0)
    columns["judge_text"][named] = np.nanmin(said[:, named], axis=0)
    columns["judge_identity"][:] = judge.identifies(images, world).numpy()
    return columns


def evaluators(scorers: Mapping[str, Scorer], judge: Judge | None = None) -> dict[str, str]:
    """Column -> the evaluator to name beside its numbers; of the judge, with its own accuracy."""
    words = {name: scorer.evaluator for name, scorer in scorers.items()}
    if judge is None:
        return words
    accuracy = judge.card["accuracy"]
    for question in JUDGED:
        words[f"judge_{question}"] = (
            "pocket judge (simulated rater), itself right on {renders:.1%} of held-out renders and "
            "{reconstructions:.1%} of their reconstructions (n = {n})"
        ).format(**accuracy[question])
    each = (f"{name} {{renders:.1%}} / {{reconstructions:.1%}} (n = {{n}})".format(**accuracy[name]) for name in SAID)
    taken, n = things_taken()
    words["judge_text"] = (
        "pocket judge (simulated rater): all that the prompt names, by the judge's answers to three questions, itself "
        f"right on held-out renders / their reconstructions: {', '.join(each)}; of subjects at rest among an "
        f"activity's things it takes {taken:.1%} for the activity (n = {n})"
    )
    return words
