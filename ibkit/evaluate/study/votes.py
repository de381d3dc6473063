"""The votes of a study: several raters answer each item, and the majority counts.

Votes are a tidy table, one row a vote, with the columns `VOTE_COLUMNS`. Nothing here needs a widget or a network.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError, StudyError
from ibkit.evaluate.arms import arms_of
from ibkit.evaluate.columns import ANSWER, OR_NOTHING, TEXT, WHOLE, check_columns, check_unique, place, read_table
from ibkit.evaluate.intervals import Interval, mean_interval
from ibkit.evaluate.stats import SEEDS, seed_groups, unit_groups, unit_matrix
from ibkit.evaluate.study.items import QUESTIONS
from ibkit.runs import resolve

VOTE_COLUMNS = [
    "rater", "simulated", "question", "subject", "prompt_id", "image_seed", "seed", "tune_seed",
    "arm", "arm_a", "arm_b", "answer", "item",
]  # fmt: skip


def check_votes(votes: pd.DataFrame, where: str = "the table of votes") -> pd.DataFrame:
    """Validate a table of votes (one row a vote), as it was made or as it was read from a votes.csv. A missing column,
    no rows, a value that is not of its column's kind, an answer that the question does not have, and a rater who voted
    twice on one item are each a StudyError.
    """
    if missing := [name for name in VOTE_COLUMNS if name not in votes.columns]:
        raise StudyError(
            f"{where} lacks the columns {', '.join(missing)}: is it a votes.csv of notebook 07_human_study?"
        )
    if votes.empty:
        raise StudyError(f"{where} has no votes: rate some pictures first.")
    empty = {name: votes[name].astype("str").fillna("") for name in ("arm", "arm_a", "arm_b")}
    kinds = dict.fromkeys(("rater", "question", "subject", "prompt_id", "answer", "item"), TEXT)
    kinds |= {"simulated": ANSWER, "image_seed": WHOLE} | dict.fromkeys(SEEDS, WHOLE + OR_NOTHING)
    try:
        votes = check_columns(votes[VOTE_COLUMNS].assign(**empty), kinds, where).astype(dict.fromkeys(SEEDS, "Int64"))
        check_unique(votes, ["rater", "item"], where)
    except ScoreError as error:
        raise StudyError(str(error)) from error
    allowed = {(question, answer) for question, asked in QUESTIONS.items() for answer in asked.answers}
    given = zip(votes["question"], votes["answer"], strict=True)
    wrong = pd.Series([pair not in allowed for pair in given], index=votes.index)
    if wrong.any():
        row = votes[wrong].iloc[0]
        raise StudyError(
            f"{place(where, votes, wrong)}: {row['answer']!r} is no answer to the question {row['question']!r}: "
            "restore the table, or run notebook 07_human_study again."
        )
    return votes.reset_index(drop=True)


def load_votes(path: str | Path) -> pd.DataFrame:
    """Read and check a votes.csv; a StudyError where there is none, or it is no table of votes."""
    path = resolve(path)
    try:
        table = read_table(path)
    except ScoreError as error:
        raise StudyError(str(error)) from error
    return check_votes(table, str(path))


def majority(votes: pd.DataFrame) -> pd.DataFrame:
    """Aggregate the raters' votes on each item.

    With an even number of raters a vote can end in a tie. A tie counts half for each answer in every share below.

    Returns:
        Table with one row an item: question, subject, prompt_id, image_seed, seed, tune_seed, arm, arm_a, arm_b, item,
        then n_raters, n_first (votes for "yes", or for arm_a), answer (of the majority, or "tie"), and value: 1 for
        "yes" or arm_a, 0 for "no" or arm_b, 0.5 for a tie.
    """
    votes = check_votes(votes)
    columns = [name for name in VOTE_COLUMNS if name not in ("rater", "simulated", "answer")]
    first = votes.assign(first=votes["answer"].isin([asked.answers[0] for asked in QUESTIONS.values()]))
    items = first.groupby(columns, sort=False, dropna=False)["first"].agg(n_raters="size", n_first="sum").reset_index()
    value = np.sign(2 * items["n_first"] - items["n_raters"]) / 2 + 0.5
    answers = [
        "tie" if v == 0.5 else QUESTIONS[question].answers[int(v == 0)]
        for question, v in zip(items["question"], value, strict=True)
    ]
    return items.assign(answer=answers, value=value)


def shares(decided: pd.DataFrame) -> pd.DataFrame:
    """Share of pictures that the majority (`majority`) says yes to, by question and arm, with 95 % intervals (table 1).

    Returns:
        Tidy table: question, arm, value, low, high, n (pictures), ties, seeds. Prompts, pictures within them and
        trainings are resampled (`ibkit.evaluate.intervals`).
    """
    rows = []
    asked = decided[decided["question"] != "preference"]
    for question, arm in itertools.product(QUESTIONS, arms_of(asked["arm"])):
        part = asked[(asked["question"] == question) & (asked["arm"] == arm)]
        if len(part):
            row = {"question": question, "arm": arm, **vars(_interval(part, "value"))}
            rows.append(row | {"ties": int((part["answer"] == "tie").sum()), "seeds": _n_trainings(part)})
    return pd.DataFrame(rows, columns=["question", "arm", "value", "low", "high", "n", "ties", "seeds"])


def preferences(decided: pd.DataFrame) -> pd.DataFrame:
    """For every pair of arms, how often the majority prefers the one or the other, or the vote is a tie (figure 4):
    three rows a pair, arm_a, arm_b, outcome ("a", "b", "tie"), value, low, high, n, seeds.
    """
    rows = []
    asked = decided[decided["question"] == "preference"]
    for (a, b), part in asked.groupby(["arm_a", "arm_b"], sort=False):
        for outcome in ("a", "tie", "b"):
            interval = _interval(part.assign(share=(part["answer"] == outcome).astype(float)), "share")
            row = {"arm_a": a, "arm_b": b, "outcome": outcome, **vars(interval)}
            rows.append(row | {"seeds": _n_trainings(part)})
    return pd.DataFrame(rows, columns=["arm_a", "arm_b", "outcome", "value", "low", "high", "n", "seeds"])


def preference_rate(votes: pd.DataFrame, better: str, worse: str) -> Interval:
    """How often the majority of raters prefers `better` to `worse` (0.5 is no difference, a tie counts half), with its
    95 % interval over prompts, noise and trainings and the number of pairs of pictures; a StudyError where nobody
    compared the two.

    The paper says that InstructBooth is preferred at least twice as often as each baseline (section 3.3): 2/3.
    """
    decided = majority(compared_votes(votes, better, worse))
    value = decided["value"].where(decided["arm_a"] == better, 1 - decided["value"])
    return _interval(decided.assign(value=value), "value")


def compared_votes(votes: pd.DataFrame, better: str, worse: str) -> pd.DataFrame:
    """The votes that compare two arms; a StudyError where there are none."""
    asked = votes[votes["question"] == "preference"]
    pair = asked[[{a, b} == {better, worse} for a, b in zip(asked["arm_a"], asked["arm_b"], strict=True)]]
    if pair.empty:
        raise StudyError(f"No vote compares {better} with {worse}: choose two arms that raters saw side by side.")
    return pair


def _n_trainings(rows: pd.DataFrame) -> int:
    return len(rows[list(SEEDS)].drop_duplicates())


def _interval(rows: pd.DataFrame, column: str) -> Interval:
    """Mean of a column over items, with its interval; items that nobody rated leave gaps."""
    matrix = unit_matrix(rows, column)
    return mean_interval(matrix.to_numpy(), unit_groups(matrix), seeds=seed_groups(matrix))
