"""Simulated raters: judges of the pocket world answer the questions of the human study.

They are the judge that scores the evaluation and six smaller networks, each trained from a seed of its own
(`ibkit.pocket.build`, stage `raters`) and apart from everything that is optimised; like people they err, and not all in
the same places. What they say shows that the study works, and what people might say; it is not what people say, and
is called simulated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from ibkit.data.photos import read_rgb
from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import StudyError
from ibkit.evaluate.study.votes import VOTE_COLUMNS, check_votes
from ibkit.pocket.words import parts_in
from ibkit.pocket.world import Subject, line_up
from ibkit.scorers.judge import ANSWERS, RATERS, Judge


@dataclass(frozen=True)
class Sight:
    """What one rater sees in one picture.

    Attributes:
        text: whether all that the phrase names (activity, place, accessory) is the likeliest answer.
        subject: whether the individual is picked out of a line-up of eight.
        text_grade: log-probability of what the phrase names.
        subject_grade: cosine to the individual's photos less the largest cosine to another's in the line-up.
    """

    text: bool
    subject: bool
    text_grade: float
    subject_grade: float

    @property
    def grade(self) -> float:
        """What decides between two pictures that are alike in both answers: no network here judges naturalness, and
        so the surer picture wins.
        """
        return self.text_grade + self.subject_grade


def load_raters(device: str | torch.device = "cpu") -> dict[str, Judge]:
    """The seven by name; each has its own accuracy in `card["accuracy"]`."""
    return {name: Judge.load(device, name=name) for name in (*RATERS, "judge")}


def simulate(
    items: pd.DataFrame,
    subjects: Mapping[str, PersonalizedSubject],
    raters: Mapping[str, Judge],
    on_rater: Callable[[int], None] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Let every rater answer every item.

    Yes or no is what the rater sees (`Sight`). The preference follows the paper's priorities (appendix F): text, then
    subject, each where the two pictures differ in the answer; then the grade, in the place of naturalness. Two pictures
    that are equal in that too are decided by a coin.

    Args:
        items: the study's, from `study.make_items`.
        subjects: name -> subject; each one of the pocket world.
        raters: name -> judge, from `load_raters`.
        on_rater: called with the number of raters that are done.

    Returns:
        The votes (`study.VOTE_COLUMNS`), and for every vote on a preference what decided it: rater, item, decided_by
        ("text", "subject", "grade" or "coin").

    Raises:
        StudyError: a subject that is not of the pocket world, or a phrase that names nothing in it.
    """
    for name, subject in subjects.items():
        if subject.world is None:
            raise StudyError(
                f"{name!r} is not of the pocket world, and nobody can be simulated there: let people rate it (set "
                "rater), then name their files in ratings."
            )
    rows = items.to_dict("records")
    votes, reasons = [], []
    for n, (rater, judge) in enumerate(raters.items(), start=1):
        sights = _look(judge, items, subjects)
        for row in rows:
            a = sights[row["image_a"], row["activity"]]
            if row["question"] == "preference":
                answer, why = _prefer(a, sights[row["image_b"], row["activity"]], f"{rater} {row['item']}")
                reasons.append((rater, row["item"], why))
            else:
                answer = "yes" if getattr(a, row["question"]) else "no"
            votes.append(row | {"rater": rater, "simulated": True, "answer": answer})
        if on_rater:
            on_rater(n)
    table = check_votes(pd.DataFrame(votes)[VOTE_COLUMNS])
    return table, pd.DataFrame(reasons, columns=["rater", "item", "decided_by"])


def _prefer(a: Sight, b: Sight, coin: str) -> tuple[str, str]:
    """(the better one, what decided)."""
    for why, x, y in (("text", a.text, b.text), ("subject", a.subject, b.subject), ("grade", a.grade, b.grade)):
        if x != y:
            return "a" if x > y else "b", why
    return "ab"[hashlib.sha256(coin.encode()).digest()[0] % 2], "coin"


def _look(
    judge: Judge, items: pd.DataFrame, subjects: Mapping[str, PersonalizedSubject]
) -> dict[tuple[str, str], Sight]:
    """(picture, phrase) -> what the rater sees in it."""
    pictures = pd.concat(
        [items[["subject", "activity", side]].rename(columns={side: "path"}) for side in ("image_a", "image_b")]
    ).drop_duplicates()
    pictures = pictures[pictures["path"] != ""]
    sights = {}
    for name, rows in pictures.groupby("subject", sort=False):
        log_probs, vectors = judge.look([read_rgb(path) for path in rows["path"]])
        text, text_grades = _text(log_probs, list(rows["activity"]))
        subject, subject_grades = _subject(judge, vectors, subjects[name].world)
        keys = zip(rows["path"], rows["activity"], strict=True)
        facts = zip(text, subject, text_grades, subject_grades, strict=True)
        sights |= {key: Sight(*fact) for key, fact in zip(keys, facts, strict=True)}
    return sights


def _text(log_probs: Mapping[str, torch.Tensor], phrases: Sequence[str]) -> tuple[list[bool], list[float]]:
    right, grades = [], []
    for i, phrase in enumerate(phrases):
        named = parts_in(phrase)
        if not named:
            raise StudyError(f"{phrase!r} names nothing of the pocket world, so no simulated rater can look for it.")
        places = {question: ANSWERS[question].index(answer) for question, answer in named.items()}
        right.append(all(log_probs[question][i].argmax().item() == j for question, j in places.items()))
        grades.append(sum(log_probs[question][i, j].item() for question, j in places.items()))
    return right, grades


def _subject(judge: Judge, vectors: torch.Tensor, world: Subject) -> tuple[list[bool], list[float]]:
    likeness = vectors @ judge.centres(line_up(world)).T  # (N, 8); the subject comes first
    return judge.recognised(likeness).tolist(), (likeness[:, 0] - likeness[:, 1:].amax(1)).tolist()
