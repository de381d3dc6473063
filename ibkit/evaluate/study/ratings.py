"""Files of ratings: one line of JSON for each click, written at once and never changed.

A rater's file is the raw record of a study, worth more than anything computed from it. So each answer is appended and
synced to the disk before the next question is shown; an undo is a line of its own; a line that cannot be read (the
last one of a computer that lost power, say) is reported with its number and costs no other. Readers never write.

A line: `{"schema": 1, "study": …, "rater": …, "question": …, "item": …, "answer": …, "shown": …, "time": …,
"seconds": …}`. `answer` is "yes" or "no", for the preference "a" or "b", or "undo": it takes the item's answer back.
`shown` is the order on the screen: "a" for one picture, "ab" or "ba" for two from left to right; `time` is when the
answer was given (UTC), `seconds` how long the item was looked at.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ibkit.errors import StudyError
from ibkit.evaluate.study.items import QUESTIONS, study_name
from ibkit.evaluate.study.votes import VOTE_COLUMNS, check_votes
from ibkit.runs import resolve

SCHEMA = 1
UNDO = "undo"
FIELDS = {
    "schema": int, "study": str, "rater": str, "question": str, "item": str, "answer": str, "shown": str, "time": str,
    "seconds": (int, float),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading


@dataclass
class Ratings:
    """What one file says.

    Attributes:
        path: the file.
        rater: whose it is; empty where no line could be read.
        answers: item -> the line that holds; a later answer to the same item replaces an earlier one;
            in the order of the answers.
        problems: a sentence for each line that could not be used, with file and line number.
    """

    path: Path
    rater: str = ""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_ratings(path: str | Path) -> Ratings:
    """Read a file of ratings; what cannot be read is reported, and everything else is kept.

    Raises:
        StudyError: the file cannot be opened, or holds lines of two raters.
    """
    ratings = Ratings(resolve(path))
    try:
        lines = ratings.path.read_bytes().split(b"\n")
    except OSError as error:
        raise StudyError(f"The ratings {ratings.path} cannot be read: {error.strerror}; check the path.") from error
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        place = f"{ratings.path}, line {number}"
        try:
            line = _checked(json.loads(raw.decode("utf-8")))
        except ValueError as error:
            ratings.problems.append(f"{place} is left out: {error}.")
            continue
        if same_rater(ratings.rater or line["rater"]) != same_rater(line["rater"]):
            raise StudyError(
                f"{place} is by {line['rater']!r} and the lines before are by {ratings.rater!r}: a file holds the "
                "ratings of one rater; take it apart by the field rater."
            )
        ratings.rater = line["rater"]
        known = ratings.answers.pop(line["item"], None)
        if line["answer"] == UNDO:
            if known is None:
                ratings.problems.append(f"{place} takes back an answer that is not there; it changes nothing.")
            continue
        if known is not None:
            ratings.problems.append(f"{place} answers item {line['item']} again; this later answer counts.")
        ratings.answers[line["item"]] = line
    return ratings


def _checked(line: Any) -> dict[str, Any]:
    """The line if it is a rating, else ValueError with what is wrong."""
    if not isinstance(line, dict):
        raise ValueError("it is no JSON object")
    if line.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {line.get('schema')!r}, and this ibkit reads {SCHEMA}")
    for name, kind in FIELDS.items():
        if not isinstance(line.get(name), kind) or isinstance(line[name], bool) or line[name] == "":
            raise ValueError(f"its field {name!r} is missing or of the wrong kind")
    if line["question"] not in QUESTIONS:
        raise ValueError(f"there is no question {line['question']!r}")
    if line["answer"] not in (*QUESTIONS[line["question"]].answers, UNDO):
        raise ValueError(f"{line['answer']!r} is no answer to the question {line['question']!r}")
    return line


def same_rater(name: str) -> str:
    """A rater's name as it is compared: "Ann " and "ann" are one person."""
    return " ".join(name.split()).casefold()


def merge_ratings(paths: Sequence[str | Path], items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Put the ratings of several people together. The files stay as they are.

    A file given twice counts once. Two files of one rater are taken when one continues the other (it begins with the
    same bytes: a copy from an earlier day); then the longer one counts. Otherwise they are refused, since two people
    may have chosen one name.

    Args:
        paths: files of ratings, one or more a rater.
        items: the study's, from `study.make_items`.

    Returns:
        The votes (`study.VOTE_COLUMNS`); a table with one row a rater: rater, file, votes, items (of the study), left
        (share of left answers to the preference: far from one half means that the side was chosen, not the picture),
        seconds (median of an answer); and a sentence for every line that was left out.

    Raises:
        StudyError: a file that cannot be opened or holds no rating, ratings of other pictures, or two different files
            of one rater.
    """
    known, asked = items.set_index("item"), [name for name in VOTE_COLUMNS if name in items and name != "item"]
    by_rater: dict[str, Ratings] = {}
    problems: list[str] = []
    for ratings in map(read_ratings, paths):
        if not ratings.answers:
            reasons = " ".join(ratings.problems[:1])
            raise StudyError(f"{ratings.path} holds no rating{': ' + reasons if reasons else '; leave it out.'}")
        strangers = [line for line in ratings.answers.values() if not _is_of(line, known)]
        if strangers:
            raise StudyError(
                f"{ratings.path} holds {len(strangers)} ratings of pictures that are not in this study, such as item "
                f"{strangers[0]['item']}: it was made with another run_evaluate, seed or n_items; give the same here."
            )
        name = same_rater(ratings.rater)
        if name in by_rater:
            shorter, longer = sorted([by_rater[name], ratings], key=lambda r: r.path.stat().st_size)
            if not longer.path.read_bytes().startswith(shorter.path.read_bytes()):
                raise StudyError(
                    f"{by_rater[name].path} and {ratings.path} are both by {ratings.rater!r} and neither continues the "
                    "other: name one of them, or give two people two names."
                )
            ratings = longer
        by_rater[name] = ratings
    for ratings in by_rater.values():
        problems += ratings.problems
    votes = [
        {"rater": ratings.rater, "simulated": False, "answer": line["answer"], "item": item}
        | known.loc[item, asked].to_dict()
        for ratings in by_rater.values()
        for item, line in ratings.answers.items()
    ]
    raters = pd.DataFrame(
        [
            {
                "rater": ratings.rater,
                "file": ratings.path.name,
                "votes": len(ratings.answers),
                "items": len(items),
                "left": _share_left(ratings),
                "seconds": statistics.median(line["seconds"] for line in ratings.answers.values()),
            }
            for ratings in by_rater.values()
        ],
        columns=["rater", "file", "votes", "items", "left", "seconds"],
    )
    return check_votes(pd.DataFrame(votes, columns=VOTE_COLUMNS)), raters, problems


def _is_of(line: dict[str, Any], known: pd.DataFrame) -> bool:
    return line["item"] in known.index and known.loc[line["item"], "question"] == line["question"]


def _share_left(ratings: Ratings) -> float:
    sides = [line["shown"][0] == line["answer"] for line in ratings.answers.values() if len(line["shown"]) == 2]
    return statistics.mean(sides) if sides else float("nan")


# ---------------------------------------------------------------------------------------------------- rating


@dataclass(frozen=True)
class Task:
    """One item as a rater sees it; which arm made a picture is not said.

    Attributes:
        item: its name.
        question: key of `study.QUESTIONS`.
        subject: whose reference photos stand beside it.
        text: the prompt without the identifier.
        shown: "a", "ab" or "ba", from left to right.
        images: paths of the pictures, from left to right.
    """

    item: str
    question: str
    subject: str
    text: str
    shown: str
    images: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, str]:
        """What the first and the second button mean: the answers of the question, or the pictures as they stand."""
        return tuple(self.shown) if len(self.shown) == 2 else QUESTIONS[self.question].answers


def tasks_of(items: pd.DataFrame, rater: str) -> list[Task]:
    """The items in the order, and with the sides, of one rater: a stream of its own from the study and the name.

    The three questions come one after the other, as in the paper; within each the order is random.
    """
    rng = random.Random(f"{study_name(items)} {same_rater(rater)}")
    tasks = []
    for question in QUESTIONS:
        rows = items[items["question"] == question].sort_values("item").to_dict("records")
        rng.shuffle(rows)
        for row in rows:
            shown = rng.choice(["ab", "ba"]) if row["image_b"] else "a"
            images = tuple(row[f"image_{side}"] for side in shown)
            tasks.append(Task(row["item"], question, row["subject"], row["text"], shown, images))
    return tasks


def ratings_file(folder: str | Path, rater: str) -> Path:
    """Where a rater's clicks are written.

    Raises:
        StudyError: a name without a letter or digit.
    """
    stem = re.sub(r"\W+", "-", same_rater(rater)).strip("-")
    if not stem:
        raise StudyError(f"The rater {rater!r} needs a name with a letter or a digit in it.")
    return Path(folder) / f"{stem}.jsonl"


class RatingSession:
    """One rater's way through the items, without anything on a screen; `page.RatingPage` shows it.

    It starts where the rater's file ends.

    Args:
        items: the study's, from `study.make_items`.
        rater: a name; what the rater sees, and in which order, follows from it.
        folder: where the rater's file is or will be.
        clock: seconds since any moment, to tell how long an item was looked at.

    Raises:
        StudyError: the file is of another rater or another study, or cannot be read.
    """

    def __init__(
        self, items: pd.DataFrame, rater: str, folder: str | Path, clock: Callable[[], float] = time.monotonic
    ):
        self.rater, self.study, self.path = rater, study_name(items), ratings_file(folder, rater)
        self.tasks, self._clock = tasks_of(items, rater), clock
        self.problems: list[str] = []
        self._answered: list[str] = []  # items, the newest last: what undo goes back through
        self._bytes = 0
        if self.path.exists():
            ratings = read_ratings(self.path)
            known = items.set_index("item")
            if any(not _is_of(line, known) for line in ratings.answers.values()):
                raise StudyError(
                    f"{self.path} holds ratings of other pictures than these: rate under another name, or move it away."
                )
            if ratings.rater and same_rater(ratings.rater) != same_rater(rater):
                raise StudyError(f"{self.path} is {ratings.rater!r}'s: {rater!r} needs another name.")
            self.problems, self._answered = ratings.problems, list(ratings.answers)
            self._bytes = self.path.stat().st_size
        self.restart_clock()

    @property
    def current(self) -> Task | None:
        """What is to be answered now; None when all is."""
        done = set(self._answered)
        return next((task for task in self.tasks if task.item not in done), None)

    @property
    def n_done(self) -> int:
        """How many items are answered."""
        return len(self._answered)

    def answer(self, choice: int) -> None:
        """Write down the answer to the current item: button 0 or button 1.

        Raises:
            StudyError: there is nothing left to answer, or the file was written to by another window.
        """
        task = self.current
        if task is None:
            raise StudyError("Every item of this study is answered.")
        self._write(task, task.choices[choice])
        self._answered.append(task.item)
        self.restart_clock()

    def undo(self) -> None:
        """Take the newest answer back, by a line that says so; its item is asked again.

        Raises:
            StudyError: there is no answer to take back, or the file was written to by another window.
        """
        if not self._answered:
            raise StudyError("There is no answer to take back.")
        task = next(task for task in self.tasks if task.item == self._answered[-1])
        self._write(task, UNDO)
        self._answered.pop()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the seconds of the current item from now: it is on the screen."""
        self._since = self._clock()

    def _write(self, task: Task, answer: str) -> None:
        line = {
            "schema": SCHEMA,
            "study": self.study,
            "rater": self.rater,
            "question": task.question,
            "item": task.item,
            "answer": answer,
            "shown": task.shown,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "seconds": round(self._clock() - self._since, 3),
        }
        self._bytes = append_line(self.path, json.dumps(line, ensure_ascii=False), self._bytes)


def append_line(path: Path, text: str, expected_bytes: int) -> int:
    """Append a line and sync it to the disk; returns the file's new size.

    A last line that was cut short stays as it is, and the new one begins on a line of its own.

    Args:
        expected_bytes: the size that the writer knows; another one means that somebody else wrote.

    Raises:
        StudyError: the file has another size, or the disk does not take the line.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size != expected_bytes:
                raise StudyError(f"{path} was written to by another window: close one, and run this cell again.")
            cut_short = size > 0 and (file.seek(size - 1), file.read(1))[1] != b"\n"
            file.write(b"\n" * cut_short + text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise StudyError(f"The answer could not be saved in {path}: {error.strerror}; free some space.") from error
