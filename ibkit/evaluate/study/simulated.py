"""Simulated raters: judges of the pocket world answer the questions of the human study.

They are the judge that scores the evaluation and six smaller networks, each trained from a seed of its own
(`ibkit.pocket.build`, stage `raters`) and apart from everything that is optimized. Like people they err, and not all on
the same pictures. Their votes show that the study works; they are not people's, and are called simulated.
"""

import hashlib
from collections.abc import Callable, Mapping
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
        """Decides between two pictures with equal answers: nothing here judges naturalness, so the surer one wins."""
        return self.text_grade + self.subject_grade


def load_raters(device: str | torch.device = "cpu") -> dict[str, Judge]:
    """The seven raters by name; the accuracy of each is in `card["accuracy"]`."""
    return {name: Judge.load(device, name=name) for name in (*RATERS, "judge")}


def simulate(
    items: pd.DataFrame,
    subjects: Mapping[str, PersonalizedSubject],
    raters: Mapping[str, Judge],
    on_rater: Callable[[int], None] = lambda done: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Let every rater answer every item.

    A rater answers yes or no by what it sees (`Sight`). Its preference follows the paper's priorities (appendix F):
    text, then subject, where the two pictures differ in that answer; then the grade, in place of naturalness. A coin
    decides between pictures that are equal in that too.

    Args:
        items: from `items.make_items`.
        subjects: name -> subject; one that is not of the pocket world, as a phrase that names nothing in it, is a
            StudyError.
        raters: name -> judge, from `load_raters`.
        on_rater: called with the number of raters that are done.

    Returns:
        The votes (`VOTE_COLUMNS`), and what decided each vote on a preference: rater, item, decided_by ("text",
        "subject", "grade" or "coin").
    """
    worlds = {}
    for name, subject in subjects.items():
        if subject.world is None:
            raise StudyError(
                f"{name!r} is not of the pocket world, and nobody can be simulated there: let people rate it (set "
                "rater), then name their files in ratings."
            )
        worlds[name] = subject.world
    rows = items.to_dict("records")
    votes, reasons = [], []
    for n, (rater, judge) in enumerate(raters.items(), start=1):
        sights = _look(judge, items, worlds)
        for row in rows:
            a = sights[row["image_a"], row["activity"]]
            if row["question"] == "preference":
                answer, why = _prefer(a, sights[row["image_b"], row["activity"]], f"{rater} {row['item']}")
                reasons.append((rater, row["item"], why))
            else:
                answer = "yes" if getattr(a, row["question"]) else "no"
            votes.append(row | {"rater": rater, "simulated": True, "answer": answer})
        on_rater(n)
    table = check_votes(pd.DataFrame(votes)[VOTE_COLUMNS])
    return table, pd.DataFrame(reasons, columns=["rater", "item", "decided_by"])


def _prefer(a: Sight, b: Sight, coin: str) -> tuple[str, str]:
    """(the better one, what decided)."""
    for why, x, y in (("text", a.text, b.text), ("subject", a.subject, b.subject), ("grade", a.grade, b.grade)):
        if x != y:
            return "a" if x > y else "b", why
    return "ab"[hashlib.sha256(coin.encode()).digest()[0] % 2], "coin"


def _look(judge: Judge, items: pd.DataFrame, worlds: Mapping[str, Subject]) -> dict[tuple[str, str], Sight]:
    """(picture, phrase) -> what the rater sees in it."""
    names = ["subject", "activity", "path"]
    sides = [items[["subject", "activity", image]].set_axis(names, axis=1) for image in ("image_a", "image_b")]
    pictures = pd.concat(sides).drop_duplicates()
    sights = {}
    for name, rows in pictures[pictures["path"] != ""].groupby("subject", sort=False):
        log_probs, vectors = judge.look([read_rgb(path) for path in rows["path"]])
        likeness = vectors @ judge.centres(line_up(worlds[str(name)])).T  # (N, 8); the subject comes first
        recognised, margin = judge.recognised(likeness), likeness[:, 0] - likeness[:, 1:].amax(1)
        for i, (path, phrase) in enumerate(zip(rows["path"], rows["activity"], strict=True)):
            named = [(log_probs[question][i], ANSWERS[question].index(a)) for question, a in parts_in(phrase).items()]
            if not named:
                raise StudyError(
                    f"{phrase!r} names nothing of the pocket world, so no simulated rater can look for it."
                )
            sights[path, phrase] = Sight(
                text=all(of_answers.argmax().item() == j for of_answers, j in named),
                subject=bool(recognised[i]),
                text_grade=sum(of_answers[j].item() for of_answers, j in named),
                subject_grade=margin[i].item(),
            )
    return sights
