"""The questions of the human study, and the items (pictures, and pairs of them) that they are asked about.

Three questions, as in InstructBooth, section 3.3 and appendix F: *subject* (does it closely resemble the photos'?) and
*text* (does the picture show what the text says?), both answered by yes or no about one picture; and *preference*
(which of two pictures of the same prompt and the same noise is better?).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.data.subject import PersonalizedSubject, personalization_of
from ibkit.errors import ParameterError, StudyError
from ibkit.evaluate.arms import REAL, arms_of
from ibkit.evaluate.stats import SEEDS, UNIT, as_compared, check_scores, in_words
from ibkit.runs import CompletedRun, hash_json, input_of, resolve


@dataclass(frozen=True)
class Question:
    """A question to raters.

    Attributes:
        ask: the question.
        guide: the instruction before it: what to look at and what to ignore.
        answers: the two answers as they are recorded; shares count the first.
        labels: of the buttons.
    """

    ask: str
    guide: str
    answers: tuple[str, str]
    labels: tuple[str, str]


# In the order of the paper's three parts (appendix F).
QUESTIONS: dict[str, Question] = {
    "subject": Question(
        "Does the subject closely resemble the one in the reference photos?",
        "Compare looks: colours, pattern, proportions. Pose, place and what it is doing do not count, and neither does "
        "how beautiful the picture is.",
        ("yes", "no"),
        ("Yes", "No"),
    ),
    "text": Question(
        "Does the picture show what the text says?",
        "Read the text, then look whether all of it is there. Which individual it is does not count here.",
        ("yes", "no"),
        ("Yes", "No"),
    ),
    "preference": Question(
        "Which of the two pictures is better, all in all?",
        "First: which shows better what the text says? If both do, or neither: which shows the individual of the "
        "reference photos better? If that is equal too: which looks more natural?",
        ("a", "b"),
        ("Left", "Right"),
    ),
}
ITEM_COLUMNS = [
    "item", "question", "subject", "prompt_id", "text", "activity", "image_seed", "seed", "tune_seed",
    "arm", "arm_a", "arm_b", "image_a", "image_b",
]  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation, the 01 run that its subject comes from, and the subject."""

    run: CompletedRun
    personalized: CompletedRun
    subject: PersonalizedSubject

    @property
    def references(self) -> list[Image.Image]:
        """The subject's photos."""
        return [read_rgb(path) for path in sorted(self.personalized.path("photos").glob("*.png"))]


def read_evaluated(run: CompletedRun, model: str, revision: str = "") -> Evaluated:
    """Read a finished 03 run and the 01 run that holds its subject's photos.

    Args:
        run: of 03.
        model, revision: the base model that the user named; it must be the one that was evaluated.

    Raises:
        ArtifactError: the 01 run is not to be found, or not finished.
        ParameterError: another base model.
    """
    personalized = personalization_of(input_of(run, "run0", "01_personalize", "02_rl_finetune"))
    subject = PersonalizedSubject.read(personalized)
    named = subject.base_model in (model, str(resolve(model)))
    if not named or (revision and revision != subject.base_revision):
        raise ParameterError(
            f"{run.folder} evaluated the model {subject.base_model!r} (revision "
            f"{subject.base_revision or 'not pinned'}), not {model!r}: give the same model and revision here."
        )
    return Evaluated(run, personalized, subject)


def make_items(evaluated: Sequence[Evaluated], n_items: int = 0, seed: int = 0) -> pd.DataFrame:
    """List the items: each picture for both yes-or-no questions, each pair of pictures for the preference.

    Pictures are those that the paper compares (base model with the class prompt, the others with the identifier). A
    pair shares the prompt and the noise. An arm is paired with all that was trained from it: the base model with every
    personalization, a personalization with its tunings.

    Args:
        evaluated: finished evaluations, of different subjects or different seeds.
        n_items: items for each question and arm, or pair of arms, spread evenly over prompts and seeds (and so
            rounded up); 0 = all.
        seed: of the choice of items, if not all.

    Returns:
        Table with `ITEM_COLUMNS`, one row an item. `item` is a hash of the question and the pictures; image_a and
        image_b are paths; the yes-or-no questions set arm, the preference arm_a and arm_b.

    Raises:
        StudyError: two different pictures of one arm, prompt and noise.
        ScoreError: a score table is malformed.
    """
    pictures = pd.concat([_pictures(one) for one in evaluated], ignore_index=True)
    keys = ["arm", *SEEDS, *UNIT]
    pictures = pictures.drop_duplicates([*keys, "sha256"])
    if len(twice := pictures[pictures.duplicated(keys)]):
        row = twice.iloc[0]
        raise StudyError(
            f"Two evaluations have different pictures of {row['subject']!r} by {row['arm']} ({in_words(row)}, prompt "
            f"{row['prompt_id']}): name one of them in run_evaluate."
        )
    order = _unit_order(pictures, seed)
    arms = arms_of(pictures["arm"])
    by_arm = {arm: pictures[pictures["arm"] == arm] for arm in arms}
    parts = []
    for rows in by_arm.values():
        part = _first_units(rows, order, n_items).rename(columns={"path": "image_a"})
        for question in ("subject", "text"):
            parts.append(part.assign(question=question, arm_a="", arm_b="", image_b="", sha256_b=""))
    for a, b in itertools.combinations(arms, 2):
        pair = by_arm[a].merge(by_arm[b], on=list(UNIT), suffixes=("", "_b"))
        for name in SEEDS:
            one, other = pair[name], pair[f"{name}_b"]
            pair = pair.assign(**{name: one.fillna(other)})[((one == other) | one.isna() | other.isna()).astype(bool)]
        pair = pair.assign(question="preference", arm="", arm_a=a, arm_b=b)
        parts.append(_first_units(pair.rename(columns={"path": "image_a", "path_b": "image_b"}), order, n_items))
    items = pd.concat(parts, ignore_index=True)
    items = items.sort_values("question", kind="stable", key=lambda names: names.map(list(QUESTIONS).index))
    named = ["question", "subject", "prompt_id", "image_seed", *SEEDS, "arm", "arm_a", "arm_b"]
    facts = items[[*named, "sha256", "sha256_b"]].astype({name: object for name in SEEDS})
    facts = facts.where(facts.notna(), None).to_dict("records")
    return items.assign(item=[hash_json(fact)[:12] for fact in facts])[ITEM_COLUMNS].reset_index(drop=True)


def study_name(items: pd.DataFrame) -> str:
    """A name for the study, made from its items, so that ratings of other pictures are told apart."""
    return hash_json(sorted(items["item"]))[:12]


def _pictures(one: Evaluated) -> pd.DataFrame:
    rows = as_compared(check_scores(one.run.table("scores.csv"), str(one.run.folder / "scores.csv")))
    rows = rows[rows["arm"] != REAL]  # the photos themselves: nothing a model drew
    outputs = one.run.manifest["outputs"]
    return rows[["arm", *SEEDS, *UNIT, "text", "activity"]].assign(
        path=[str(one.run.path(image)) for image in rows["image"]],
        sha256=[outputs[image]["sha256"] for image in rows["image"]],
    )


def _unit_order(pictures: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every unit once, each prompt's noises shuffled and prompts in turns, so that the first few cover all prompts."""
    units = pictures[list(UNIT)].drop_duplicates().sort_values(list(UNIT))
    rng = np.random.default_rng(seed)
    of_prompt = units.groupby(["subject", "prompt_id"], sort=False)["image_seed"]
    turn = of_prompt.transform(lambda seeds: rng.permutation(len(seeds)))
    return units.assign(turn=turn).sort_values(["turn", *UNIT], ignore_index=True).drop(columns="turn")


def _first_units(rows: pd.DataFrame, order: pd.DataFrame, n_items: int) -> pd.DataFrame:
    """The rows of the first units, the same ones for every training, so that seeds stay crossed with units."""
    there = order.merge(rows[list(UNIT)].drop_duplicates(), on=list(UNIT))
    if n_items:
        there = there.head(-(-n_items // len(rows[list(SEEDS)].drop_duplicates())))
    return there.merge(rows, on=list(UNIT))
