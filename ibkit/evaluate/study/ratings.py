"""Files of ratings: one line of JSON for each click, written at once and never changed.

A rater's file is the raw record of a study. So each answer is appended and synced to the disk before the next question
is shown; an undo is a line of its own; a line that cannot be read (the last one before a power cut, say) is reported
with its number and costs no other. Readers never write.

A line: `{"schema": 1, "study": …, "rater": …, "question": …, "item": …, "answer": …, "shown": …, "time": …,
"seconds": …}`. `answer` is "yes" or "no", for the preference "a" or "b", or "undo": it takes the item's answer back.
`shown` is the order on the screen: "a" for one picture, "ab" or "ba" for two from left to right; `time` is that of the
answer (UTC), `seconds` how long the item was on the screen.
"""

import codecs
import datetime
import json
import math
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
from ibkit.runs import parse_json, resolve

SCHEMA = 1
UNDO = "undo"
LONGEST_S = 1e9  # of an item on the screen; a larger whole number may be no float
NAME = re.compile(r"[^\W_][^\x00-\x1f<>]{0,99}")  # of a rater: no markup, and no formula of a spreadsheet
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int, "study": str, "rater": str, "question": str, "item": str, "answer": str, "shown": str, "time": str,
    "seconds": (int, float),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading


@dataclass
class Ratings:
    """The contents of one file.

    Attributes:
        path: the file.
        rater: empty where no line could be read.
        answers: item -> the line of its latest answer, in the order of the answers.
        problems: a sentence for each line that could not be used, with file and line number.
    """

    path: Path
    rater: str = ""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_ratings(path: str | Path) -> Ratings:
    """Read a file of ratings; lines that cannot be read are reported, all others kept. A StudyError where the file
    cannot be opened, or holds lines of two raters.
    """
    ratings = Ratings(resolve(path))
    try:
        lines = ratings.path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # a BOM: some editors write one
    except OSError as error:
        raise StudyError(f"The ratings {ratings.path} cannot be read: {error.strerror}; check the path.") from error
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        place = f"{ratings.path}, line {number}"
        try:
            line = _checked(parse_json(raw.decode("utf-8")))
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
    """Return the line if it is a rating, else raise a ValueError that says what is wrong."""
    if not isinstance(line, dict):
        raise ValueError("it is no JSON object")
    if line.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {line.get('schema')!r}, and this ibkit reads {SCHEMA}")
    for name, kind in FIELDS.items():
        if not isinstance(line.get(name), kind) or isinstance(line[name], bool) or line[name] == "":
            raise ValueError(f"its field {name!r} is missing or of the wrong kind")
        if isinstance(line[name], str):
            line[name].encode()  # half of a surrogate pair could be written nowhere
    if not NAME.fullmatch(same_rater(line["rater"])):
        raise ValueError("its rater's name has characters that no name has, or is too long")
    if not 0 <= line["seconds"] < LONGEST_S:
        raise ValueError(f"its seconds are {line['seconds']}")
    if line["question"] not in QUESTIONS:
        raise ValueError(f"there is no question {line['question']!r}")
    if line["answer"] not in (*QUESTIONS[line["question"]].answers, UNDO):
        raise ValueError(f"{line['answer']!r} is no answer to the question {line['question']!r}")
    if line["shown"] not in (("ab", "ba") if line["question"] == "preference" else ("a",)):
        raise ValueError(f"{line['shown']!r} is no order of pictures for the question {line['question']!r}")
    return line


def same_rater(name: str) -> str:
    """Normalize a rater's name: "Ann " and "ann" are one person."""
    return " ".join(name.split()).casefold()


def merge_ratings(paths: Sequence[str | Path], items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Merge the ratings of several people. The files stay as they are.

    A file given twice counts once. Of two files of one rater, one must continue the other (begin with the same bytes: a
    copy from an earlier day), and the longer one counts. Otherwise they are refused, since two people may have chosen
    one name.

    Args:
        paths: files of ratings, one or more a rater.
        items: from `items.make_items`.

    Returns:
        The votes (`VOTE_COLUMNS`); a table with one row a rater: rater, file, votes, items (of the study), left (share
        of left answers to the preference: far from one half means that the rater chose sides, not pictures), seconds
        (median of an answer); and a sentence for every line that was left out.

    Raises:
        StudyError: a file that cannot be opened or holds no rating, ratings of other pictures, or two different files
            of one rater.
    """
    known, asked = items.set_index("item"), [name for name in VOTE_COLUMNS if name in items and name != "item"]
    by_rater: dict[str, Ratings] = {}
    for ratings in map(read_ratings, paths):
        if not ratings.answers:
            reasons = " ".join(ratings.problems[:1])
            raise StudyError(f"{ratings.path} holds no rating{': ' + reasons if reasons else '; leave it out.'}")
        if strangers := [line for line in ratings.answers.values() if not _is_of(line, known)]:
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
    merged = by_rater.values()
    votes = [
        {"rater": ratings.rater, "simulated": False, "answer": line["answer"], "item": item}
        | known.loc[item, asked].to_dict()
        for ratings in merged
        for item, line in ratings.answers.items()
    ]
    rows = []
    for ratings in merged:
        seconds = statistics.median(line["seconds"] for line in ratings.answers.values())
        pairs = [line for line in ratings.answers.values() if len(line["shown"]) == 2]
        left = statistics.mean(line["shown"][0] == line["answer"] for line in pairs) if pairs else math.nan
        rows.append((ratings.rater, ratings.path.name, len(ratings.answers), len(items), left, seconds))
    raters = pd.DataFrame(rows, columns=["rater", "file", "votes", "items", "left", "seconds"])
    problems = [sentence for ratings in merged for sentence in ratings.problems]
    return check_votes(pd.DataFrame(votes, columns=VOTE_COLUMNS)), raters, problems


def _is_of(line: dict[str, Any], known: pd.DataFrame) -> bool:
    return line["item"] in known.index and known.loc[line["item"], "question"] == line["question"]


# ---------------------------------------------------------------------------------------------------- rating


@dataclass(frozen=True)
class Task:
    """One item as a rater sees it, without the arms that made the pictures.

    Attributes:
        item: its name.
        question: key of `QUESTIONS`.
        subject: whose reference photos are shown beside it.
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
        """The answers of the first and the second button; of two pictures, the left and the right one."""
        return (self.shown[0], self.shown[1]) if len(self.shown) == 2 else QUESTIONS[self.question].answers


def tasks_of(items: pd.DataFrame, rater: str) -> list[Task]:
    """The items in one rater's order and with that rater's sides, both drawn from the study and the rater's name.

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
    """The file of a rater's clicks; a StudyError for a name that `NAME` does not allow."""
    stem = re.sub(r"\W+", "-", same_rater(rater)).strip("-")
    if not NAME.fullmatch(same_rater(rater)):
        raise StudyError(
            f"The rater {rater!r} needs a name that begins with a letter or a digit, has no < or >, and is no longer "
            "than 100 characters."
        )
    return Path(folder) / f"{stem}.jsonl"


class RatingSession:
    """One rater's way through the items, resumed where the rater's file ends; `page.RatingPage` shows it.

    Args:
        items: from `items.make_items`.
        rater: a name, which sets the order of items and sides (`tasks_of`).
        folder: of the rater's file.
        clock: seconds since any moment, to time the answers.

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
        """The next item to answer; None when all are."""
        done = set(self._answered)
        return next((task for task in self.tasks if task.item not in done), None)

    @property
    def n_done(self) -> int:
        """Number of answered items."""
        return len(self._answered)

    def answer(self, choice: int) -> None:
        """Record the answer to the current item: button 0 or button 1. A StudyError where every item is answered, or
        another window has written to the file.
        """
        task = self.current
        if task is None:
            raise StudyError("Every item of this study is answered.")
        self._write(task, task.choices[choice])
        self._answered.append(task.item)
        self.restart_clock()

    def undo(self) -> None:
        """Append a line that takes the newest answer back; its item is asked again. A StudyError where there is none,
        or another window has written to the file.
        """
        if not self._answered:
            raise StudyError("There is no answer to take back.")
        task = next(task for task in self.tasks if task.item == self._answered[-1])
        self._write(task, UNDO)
        self._answered.pop()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time the current item from now."""
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

    After a last line that was cut short, the new one begins on a line of its own.

    A file that is not of `expected_bytes`, its size after this writer's last line, has another writer: that, and a file
    that cannot be written, is a StudyError.
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
