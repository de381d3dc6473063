"""The pictures of a report: every arm on the same noise, which of them are shown, and those that look worst."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ibkit.data.photos import read_rgb
from ibkit.errors import ParameterError
from ibkit.evaluate.arms import BASE, REAL, arms_of, label_of
from ibkit.evaluate.figures import picture_grid
from ibkit.evaluate.stats import METRICS, as_compared, metrics_in, one_seed, primary_metrics

LEAST_PX, MOST_STORED_PX = 96, 384  # a side as it is shown at least, and as it is stored at most
FIRST, BEST, WORST = "first", "best", "worst"
PER_PROMPT, PER_FOLD, MOST_PROMPTS = 2, 8, 12
MOST_BYTES, MOST_PICTURES = 12 * 2**20, 360  # of a page, so that it is small and opens at once


@dataclass(frozen=True)
class Picture:
    """One picture of a report: a data URI, its words, and its side in CSS px."""

    uri: str
    alt: str
    note: str
    side: int


@dataclass(frozen=True)
class Wall:
    """The pictures of one subject, prompt by prompt.

    Attributes:
        title: the subject's name.
        rows: (prompt, for each arm that has some: its label and its pictures).
        choice: a sentence that says which pictures these are.
    """

    title: str
    rows: list[tuple[str, list[tuple[str, list[Picture]]]]]
    choice: str


def check_choice(choice: str) -> str:
    """The choice of pictures, if it is one: first, best, worst, or seeds such as "0,3".

    Raises:
        ParameterError: it is none.
    """
    if choice in (FIRST, BEST, WORST) or all(seed.strip().isdecimal() for seed in choice.split(",")):
        return choice
    raise ParameterError(f"--pictures {choice!r} is none of first, best, worst, or image seeds such as 0,3.")


def walls(scores: pd.DataFrame, choice: str = FIRST) -> list[Wall]:
    """For each subject its pictures: all arms on the same prompt and the same noise, of one training each.

    Args:
        scores: checked, with a column `file` (`Gathered.scores`).
        choice: "first" noise seeds, the "best" or "worst" of the last arm, or seeds such as "0,3".

    Raises:
        ParameterError: no picture has such a seed.
    """
    found, drawn = [], _drawn(scores)
    subjects, n_prompts, per_prompt = _room(drawn)
    for subject, rows in drawn[drawn["subject"].isin(subjects)].groupby("subject", sort=False):
        rows = one_seed(rows)
        arms = list(arms_of(rows["arm"].unique()))
        of_prompt = rows.groupby("prompt_id")["arm"].transform("nunique")
        shared = rows[rows.groupby(["prompt_id", "image_seed"])["arm"].transform("nunique") == of_prompt]
        seeds = _chosen(shared, arms[-1], choice)
        table = []
        for prompt, of in list(shared.groupby("prompt_id", sort=False))[:n_prompts]:
            made = ((arm, _pictures(of[of["arm"] == arm], seeds[prompt][:per_prompt])) for arm in arms)
            if cells := [(label_of(arm), pictures) for arm, pictures in made if pictures]:
                table.append((str(of["text"].iloc[0] if "text" in of else prompt), cells))
        if not table:
            there = ", ".join(map(str, sorted(shared["image_seed"].unique())[:12]))
            raise ParameterError(f"--pictures {choice}: no picture of {subject} has that seed; there are {there}.")
        n_left_out = shared["prompt_id"].nunique() - n_prompts
        more = f" The first {n_prompts} prompts; {n_left_out} more are in the run." if n_left_out > 0 else ""
        if len(subjects) < drawn["subject"].nunique():
            more += f" A sample of {len(subjects)} of {drawn['subject'].nunique()} subjects, evenly along their list."
        found.append(Wall(str(subject), table, _sentence(choice, arms[-1], scores) + more))
    return found


def _room(drawn: pd.DataFrame) -> tuple[list[str], int, int]:
    """Which subjects a page has room for, how many prompts of each, and how many pictures of a prompt and arm."""
    if drawn.empty:
        return [], MOST_PROMPTS, PER_PROMPT
    subjects = list(drawn["subject"].unique())
    room = min(MOST_PICTURES, MOST_BYTES // len(_picture(next(drawn.itertuples())).uri))
    of_subject = drawn.groupby("subject")
    arms, prompts = of_subject["arm"].nunique().max(), min(MOST_PROMPTS, of_subject["prompt_id"].nunique().max())
    per_prompt = PER_PROMPT if len(subjects) * arms * prompts * PER_PROMPT <= room else 1
    prompts = MOST_PROMPTS if len(subjects) * arms * prompts * per_prompt <= room else room // (len(subjects) * arms)
    n = min(len(subjects), max(1, room // (arms * per_prompt)))
    if prompts < 1:  # one prompt each, of some subjects
        subjects = [subjects[i * len(subjects) // n] for i in range(n)]
    return subjects, max(1, prompts), per_prompt


def grids(scores: pd.DataFrame, choice: str, titles: bool) -> Iterator[tuple[str, Figure, pd.DataFrame, str]]:
    """The same pictures as figures: for each subject a name for files, the figure, its table, and the choice."""
    for subject, rows in _drawn(scores).groupby("subject", sort=False):
        rows = one_seed(rows)
        last = list(arms_of(rows["arm"].unique()))[-1]
        seeds = _chosen(rows[rows["arm"] == last], last, choice)
        chosen = [
            seed in seeds.get(prompt, ()) for prompt, seed in zip(rows["prompt_id"], rows["image_seed"], strict=True)
        ]
        rows = rows[chosen]
        rows = rows[rows["prompt_id"].isin(rows["prompt_id"].unique()[:MOST_PROMPTS])]
        if rows.empty:
            continue
        title = f"{subject}: same prompt, same noise" * titles
        figure, table = picture_grid(rows.assign(image=rows["file"]), "", PER_PROMPT, title)
        table["image"] = [Path(path).name for path in table["image"]]
        name = re.sub(r"[^A-Za-z0-9]+", "-", str(subject)).strip("-") or "subject"
        yield name, figure, table, _sentence(choice, last, scores)


def goodness(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.Series:
    """How good each picture is among `rows`, in [0, 1]: the mean of its ranks by the primary metrics of `scores`."""
    names = [name for name in primary_metrics(scores).values() if rows[name].notna().any()]
    return rows[names].rank(pct=True).mean(axis=1) if names else pd.Series(0.5, index=rows.index)


def worst(scores: pd.DataFrame) -> list[Picture]:
    """The lowest by the primary metrics among the pictures of the last arm of each subject."""
    return [_picture(row) for row in _extreme(scores, lambda rows: goodness(rows, scores))]


def hacked(scores: pd.DataFrame, reward: str) -> list[Picture]:
    """Pictures that the reward praises and the primary metrics do not: the greatest rank by the reward over theirs.

    Args:
        reward: the column that RL optimized; where the scores have no such column, or it is a primary metric, there
            are none.
    """
    if reward not in metrics_in(scores) or reward in primary_metrics(scores).values():
        return []
    gap = _extreme(scores, lambda rows: goodness(rows, scores) - rows[reward].rank(pct=True), below=-0.25)
    return [_picture(row, (reward,)) for row in gap]


def _drawn(scores: pd.DataFrame) -> pd.DataFrame:
    rows = as_compared(scores)
    return rows[(rows["file"] != "") & (rows["arm"] != REAL)]


def _extreme(scores: pd.DataFrame, key: Callable[[pd.DataFrame], pd.Series], below: float = 2.0) -> list:
    rows = _drawn(scores)
    kept = []
    for _, part in rows.groupby("subject", sort=False):
        last = list(arms_of(part["arm"].unique()))[-1]
        part = part[part["arm"] == last]
        if last != BASE:
            kept.append(part.assign(key=key(part)))
    table = pd.concat(kept) if kept else rows.assign(key=0.0).iloc[:0]
    table = table[table["key"] < below].sort_values(["key", "prompt_id", "image_seed"], kind="stable")
    return list(table.head(PER_FOLD).itertuples())


def _chosen(rows: pd.DataFrame, arm: str, choice: str) -> dict[str, list[int]]:
    """prompt_id -> the noise seeds to show."""
    if choice not in (FIRST, BEST, WORST):
        return dict.fromkeys(rows["prompt_id"].unique(), [int(seed) for seed in choice.split(",")])
    of = rows[rows["arm"] == arm]
    # "First" is the order of the score table, which is that of the pictures' numbers.
    order = of if choice == FIRST else of.assign(good=goodness(of, rows)).sort_values(
        "good", ascending=choice == WORST, kind="stable"
    )  # fmt: skip
    return {prompt: list(part["image_seed"].head(PER_PROMPT)) for prompt, part in order.groupby("prompt_id")}


def _pictures(rows: pd.DataFrame, seeds: list[int]) -> list[Picture]:
    by_seed = {row.image_seed: row for row in rows.itertuples()}
    return [_picture(by_seed[seed]) for seed in seeds if seed in by_seed]


def _picture(row, more: tuple[str, ...] = ()) -> Picture:
    picture = read_rgb(row.file)
    picture.thumbnail((MOST_STORED_PX, MOST_STORED_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    shown = [name for name in (*more, *primary_metrics(pd.DataFrame([row._asdict()])).values())]
    numbers = [f"{METRICS[name].label}: {METRICS[name].show(getattr(row, name))}" for name in shown]
    note = f"{label_of(row.arm)}, noise seed {row.image_seed}. {'; '.join(numbers)}"
    alt = f"{getattr(row, 'text', row.prompt_id)}, by {note}"
    side = max(LEAST_PX, min(max(picture.size), 200))
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), alt, note, side)


def _sentence(choice: str, arm: str, scores: pd.DataFrame) -> str:
    if choice == FIRST:
        return "For each prompt the pictures of its first noise seeds, chosen before anybody looked."
    if choice in (BEST, WORST):
        names = " and ".join(METRICS[name].label for name in primary_metrics(scores).values())
        return (
            f"Chosen by result: the noise seeds on which {label_of(arm)} is {choice} by {names}. No measure of how "
            "well a method does."
        )
    return f"The noise seeds that were asked for: {choice}."
