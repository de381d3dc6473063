"""A study of the methods' pictures by people: what is asked, and what the votes say.

Three questions, as in InstructBooth, section 3.3 and appendix F: *subject* (does it closely resemble the photos'?) and
*text* (does the picture show what the text says?), both answered by yes or no about one picture; and *preference*
(which of two pictures of the same prompt and the same noise is better?). Several raters answer each item, and the
majority counts.

Votes are a tidy table, one row a vote, with the columns `VOTE_COLUMNS`. Beside this file `ratings` reads and writes
files, `page` is the rating page, `simulated` has raters of the pocket world; nothing here needs a widget or a network.

Shape legend: N items, M methods, R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import ArtifactError, ParameterError, ScoreError, StudyError
from ibkit.evaluate.intervals import ROUNDING, Interval, bootstrap_statistic, mean_interval
from ibkit.evaluate.stats import (
    UNIT,
    as_compared,
    check_scores,
    in_method_order,
    pair_up,
    unit_groups,
    unit_matrix,
)
from ibkit.runs import CompletedRun, hash_json, identify, read_run, resolve


@dataclass(frozen=True)
class Question:
    """What raters are asked.

    Attributes:
        ask: the question.
        guide: the instruction before it, with what to look at and what to leave out of account.
        answers: the two answers as they are written down; the first is the one that is counted.
        labels: what stands on the buttons.
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
    "item", "question", "subject", "prompt_id", "text", "activity", "image_seed", "rl_seed",
    "method", "method_a", "method_b", "image_a", "image_b",
]  # fmt: skip
VOTE_COLUMNS = [
    "rater", "simulated", "question", "subject", "prompt_id", "image_seed", "rl_seed",
    "method", "method_a", "method_b", "answer", "item",
]  # fmt: skip
NO_RL_SEED = -1  # as in ibkit.evaluate.score: a method without RL, which is compared with every RL seed


# ---------------------------------------------------------------------------------------------------- what is asked


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
    """Read a finished 03 run and the 01 run that its manifest names.

    That run is looked for at its noted path and, for runs that were moved together, beside the 03 run; whichever is
    found must have the hash that the manifest gives.

    Args:
        run: of 03.
        model, revision: the base model that the user named; it must be the one that was evaluated.

    Raises:
        ArtifactError: the 01 run is not to be found, or not finished.
        ParameterError: another base model.
    """
    source = run.manifest["inputs"]["run_dreambooth"]
    places = [resolve(source["path"]), run.folder.parent / Path(source["path"]).name]
    for place in places:
        if (place / "manifest.json").is_file() and identify(place)["sha256"] == source["sha256"]:
            personalized = read_run(place, "01_personalize")
            subject = PersonalizedSubject.read(personalized)
            named = subject.base_model in (model, str(resolve(model)))
            if not named or (revision and revision != subject.base_revision):
                raise ParameterError(
                    f"{run.folder} evaluated the model {subject.base_model!r} (revision "
                    f"{subject.base_revision or 'not pinned'}), not {model!r}: give the same model and revision here."
                )
            return Evaluated(run, personalized, subject)
    raise ArtifactError(
        f"The 01 run that {run.folder} evaluated is neither in {places[0]} nor in {places[1]}: put it back beside the "
        "03 run; it holds the subject's photos."
    )


def make_items(evaluated: Sequence[Evaluated], n_items: int = 0, seed: int = 0) -> pd.DataFrame:
    """List what raters are asked: each picture for both yes-or-no questions, each pair of methods for the preference.

    Pictures are those that the paper compares (base model with the class prompt, the others with the identifier). A
    pair shares the prompt and the noise; a method without RL is paired with every RL seed of one that has it.

    Args:
        evaluated: finished evaluations, of different subjects or different RL seeds.
        n_items: items for each question and method, or pair of methods, spread evenly over prompts and RL seeds (and so
            rounded up); 0 = all.
        seed: which ones, if not all.

    Returns:
        Table with `ITEM_COLUMNS`, one row an item. `item` is a name made from what is asked and the pictures' hashes;
        image_a and image_b are paths; method holds for yes or no, method_a and method_b for the preference.

    Raises:
        StudyError: two different pictures of one method, prompt and noise.
        ScoreError: a score table is malformed.
    """
    pictures = pd.concat([_pictures(one) for one in evaluated], ignore_index=True)
    keys = ["method", "rl_seed", *UNIT]
    pictures = pictures.drop_duplicates([*keys, "sha256"])
    if len(twice := pictures[pictures.duplicated(keys)]):
        row = twice.iloc[0]
        raise StudyError(
            f"Two evaluations have different pictures of {row['subject']!r} by {row['method']} (RL seed "
            f"{row['rl_seed']}, prompt {row['prompt_id']}): name one of them in run_evaluate."
        )
    order = _unit_order(pictures, seed)
    methods = in_method_order(pictures["method"])
    by_method = {method: pictures[pictures["method"] == method] for method in methods}
    parts = []
    for method in methods:
        part = _first_units(by_method[method], order, n_items).rename(columns={"path": "image_a"})
        for question in ("subject", "text"):
            parts.append(part.assign(question=question, method_a="", method_b="", image_b="", sha256_b=""))
    for a, b in itertools.combinations(methods, 2):
        pair = by_method[a].merge(by_method[b], on=list(UNIT), suffixes=("", "_b"))
        same = pair["rl_seed"] == pair["rl_seed_b"]
        pair = pair[same | (pair["rl_seed"] == NO_RL_SEED) | (pair["rl_seed_b"] == NO_RL_SEED)]
        pair = pair.assign(rl_seed=pair[["rl_seed", "rl_seed_b"]].max(axis=1), question="preference", method="")
        pair = pair.assign(method_a=a, method_b=b).rename(columns={"path": "image_a", "path_b": "image_b"})
        parts.append(_first_units(pair, order, n_items))
    items = pd.concat(parts, ignore_index=True)
    items = items.sort_values("question", kind="stable", key=lambda names: names.map(list(QUESTIONS).index))
    named = ["question", "subject", "prompt_id", "image_seed", "rl_seed", "method", "method_a", "method_b"]
    facts = items[[*named, "sha256", "sha256_b"]].to_dict("records")
    return items.assign(item=[hash_json(fact)[:12] for fact in facts])[ITEM_COLUMNS].reset_index(drop=True)


def study_name(items: pd.DataFrame) -> str:
    """A name for the study, made from its items: ratings of another one are not of these pictures."""
    return hash_json(sorted(items["item"]))[:12]


def _pictures(one: Evaluated) -> pd.DataFrame:
    rows = as_compared(check_scores(one.run.table("scores.csv"), str(one.run.folder / "scores.csv")))
    rows = rows[rows["method"] != "real"]  # the photos themselves: nothing a model drew
    outputs = one.run.manifest["outputs"]
    return rows[["method", "rl_seed", *UNIT, "text", "activity"]].assign(
        path=[str(one.run.path(image)) for image in rows["image"]],
        sha256=[outputs[image]["sha256"] for image in rows["image"]],
    )


def _unit_order(pictures: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every unit once, each prompt's noises shuffled, prompts taking turns: any first few are spread over prompts."""
    units = pictures[list(UNIT)].drop_duplicates().sort_values(list(UNIT))
    rng = np.random.default_rng(seed)
    turn = units.groupby(["subject", "prompt_id"], sort=False)["image_seed"].transform(
        lambda s: rng.permutation(len(s))
    )
    return units.assign(turn=turn).sort_values(["turn", *UNIT]).drop(columns="turn").reset_index(drop=True)


def _first_units(rows: pd.DataFrame, order: pd.DataFrame, n_items: int) -> pd.DataFrame:
    """The rows of the first units; every RL seed keeps the same ones, so that seeds stay crossed with units."""
    there = order.merge(rows[list(UNIT)].drop_duplicates(), on=list(UNIT))
    if n_items:
        there = there.head(-(-n_items // rows["rl_seed"].nunique()))
    return there.merge(rows, on=list(UNIT))


# ---------------------------------------------------------------------------------------------------- votes


def check_votes(votes: pd.DataFrame, where: str = "the table of votes") -> pd.DataFrame:
    """Validate a table of votes (one row a vote), as it was made or as it was read from a votes.csv.

    Raises:
        StudyError: a column is missing, there are no rows, an answer that the question does not have, or a rater who
            voted twice on one item.
    """
    if missing := [name for name in VOTE_COLUMNS if name not in votes.columns]:
        raise StudyError(
            f"{where} lacks the columns {', '.join(missing)}: is it a votes.csv of notebook 07_human_study?"
        )
    if votes.empty:
        raise StudyError(f"{where} has no votes: rate some pictures first.")
    votes = votes[VOTE_COLUMNS].assign(
        **{name: votes[name].astype("str").fillna("") for name in ("method", "method_a", "method_b")}
    )
    allowed = {(question, answer) for question, asked in QUESTIONS.items() for answer in asked.answers}
    given = list(zip(votes["question"], votes["answer"], strict=True))
    if wrong := [pair for pair in given if pair not in allowed]:
        raise StudyError(f"{where} holds {wrong[0][1]!r}, which is no answer to the question {wrong[0][0]!r}.")
    if len(twice := votes[votes.duplicated(["rater", "item"])]):
        row = twice.iloc[0]
        raise StudyError(f"{where} has two votes of {row['rater']!r} on item {row['item']}: keep one.")
    return votes.reset_index(drop=True)


def load_votes(path: str | Path) -> pd.DataFrame:
    """Read and check a votes.csv.

    Raises:
        StudyError: there is no such file, or it is no table of votes.
    """
    path = resolve(path)
    try:
        return check_votes(pd.read_csv(path, dtype={"rater": str, "item": str}), str(path))
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read as a table of votes ({error}).") from error


def majority(votes: pd.DataFrame) -> pd.DataFrame:
    """Put the raters' votes on each item together.

    With an even number of raters a vote can end in a tie: then nobody has the majority. A tie counts half, for the
    first answer and for the second, in every share below; how many there were is reported.

    Args:
        votes: one row a vote.

    Returns:
        Table with one row an item: question, subject, prompt_id, image_seed, rl_seed, method, method_a, method_b, item,
        then n_raters, n_first (votes for "yes", or for method_a), answer (of the majority, or "tie"), and value: 1 for
        "yes" or method_a, 0 for "no" or method_b, 0.5 for a tie.
    """
    votes = check_votes(votes)
    columns = [name for name in VOTE_COLUMNS if name not in ("rater", "simulated", "answer")]
    first = votes.assign(first=votes["answer"].isin([asked.answers[0] for asked in QUESTIONS.values()]))
    items = first.groupby(columns, sort=False)["first"].agg(n_raters="size", n_first="sum").reset_index()
    value = np.sign(2 * items["n_first"] - items["n_raters"]) / 2 + 0.5
    answers = [
        "tie" if v == 0.5 else QUESTIONS[question].answers[int(v == 0)]
        for question, v in zip(items["question"], value, strict=True)
    ]
    return items.assign(answer=answers, value=value)


# ---------------------------------------------------------------------------------------------------- shares


def shares(decided: pd.DataFrame) -> pd.DataFrame:
    """Share of pictures that the majority says yes to, by question and method, with 95 % intervals (table 1).

    Args:
        decided: from `majority`.

    Returns:
        Tidy table: question, method, value, low, high, n (pictures), ties, seeds. Prompts, pictures within them and RL
        seeds are resampled (`ibkit.evaluate.intervals`).
    """
    rows = []
    asked = decided[decided["question"] != "preference"]
    cells = {cell: part for cell, part in asked.groupby(["question", "method"])}
    order = [(question, method) for question in QUESTIONS for method in in_method_order(asked["method"])]
    for question, method in [cell for cell in order if cell in cells]:
        part = cells[question, method]
        interval = _interval(part, "value")
        rows.append(
            {"question": question, "method": method, **vars(interval)}
            | {"ties": int((part["answer"] == "tie").sum()), "seeds": part["rl_seed"].nunique()}
        )
    return pd.DataFrame(rows, columns=["question", "method", "value", "low", "high", "n", "ties", "seeds"])


def preferences(decided: pd.DataFrame) -> pd.DataFrame:
    """How often the majority prefers the one, the other, or has no majority, for every pair of methods (figure 4).

    Returns:
        Tidy table with three rows a pair: method_a, method_b, outcome ("a", "b", "tie"), value, low, high, n, seeds.
    """
    rows = []
    asked = decided[decided["question"] == "preference"]
    for (a, b), part in asked.groupby(["method_a", "method_b"], sort=False):
        for outcome in ("a", "tie", "b"):
            interval = _interval(part.assign(share=(part["answer"] == outcome).astype(float)), "share")
            rows.append({"method_a": a, "method_b": b, "outcome": outcome, **vars(interval)})
            rows[-1]["seeds"] = part["rl_seed"].nunique()
    return pd.DataFrame(rows, columns=["method_a", "method_b", "outcome", "value", "low", "high", "n", "seeds"])


def preference_rate(votes: pd.DataFrame, better: str = "instructbooth", worse: str = "dreambooth") -> Interval:
    """How often the majority of raters prefers one method to another: 0.5 is no difference, a tie counts half.

    The paper says that InstructBooth is preferred at least twice as often as each baseline (section 3.3): 2/3.

    Args:
        votes: one row a vote.
        better, worse: the methods; the rate is that of `better`.

    Returns:
        The rate, its 95 % interval over prompts, noise and RL seeds, and the number of pairs of pictures.

    Raises:
        StudyError: nobody compared the two.
    """
    asked = votes[votes["question"] == "preference"]
    pair = asked[[{a, b} == {better, worse} for a, b in zip(asked["method_a"], asked["method_b"], strict=True)]]
    if pair.empty:
        raise StudyError(f"No vote compares {better} with {worse}: choose two methods that raters saw side by side.")
    decided = majority(pair)
    value = decided["value"].where(decided["method_a"] == better, 1 - decided["value"])
    return _interval(decided.assign(value=value), "value")


def _interval(rows: pd.DataFrame, column: str) -> Interval:
    """Mean of a column over items, with the interval that fits; items that nobody rated leave gaps."""
    matrix = unit_matrix(rows, column)
    return mean_interval(matrix.to_numpy(), unit_groups(matrix))


# ---------------------------------------------------------------------------------------------------- agreement


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of several raters beyond chance: 1 is perfect, 0 what guessing with the same shares would give.

    `κ = (P̄ − P̄e)/(1 − P̄e)`; P̄ is the share of pairs of raters that agree, P̄e the sum of the squared shares of the
    categories (Fleiss 1971, equations 1 to 7).

    Args:
        counts: how many raters put item i into category j, shape (N, categories); every row has the same sum ≥ 2.

    Returns:
        κ; NaN where all votes are in one category: then there is nothing that chance could have got wrong.

    Raises:
        StudyError: fewer than two raters, or not as many for each item.
    """
    columns, n_raters = _agreement(np.asarray(counts, dtype=float))
    observed, shares = columns.pop("agree").mean(), np.array([column.mean() for column in columns.values()])
    expected = (shares**2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def kappas(votes: pd.DataFrame) -> pd.DataFrame:
    """Fleiss' κ for every question, and for every pair of methods of the preference, with 95 % intervals.

    κ wants the same number of raters on each item, so only items that every rater of the table voted on count.
    Intervals resample subjects and prompts; of a single prompt, its noises.

    Returns:
        Table: question, methods ("" = all, or "a – b"), kappa, low, high (NaN where κ is not defined), observed (share
        of agreeing pairs of raters), expected (by chance), n (items), raters. Empty for a single rater, who agrees with
        nobody.
    """
    votes = check_votes(votes)
    n_raters = votes["rater"].nunique()
    decided = majority(votes)
    decided = decided[(decided["n_raters"] == n_raters) & (n_raters > 1)]
    decided = decided.assign(
        methods=[f"{a} – {b}" if a else "" for a, b in decided[["method_a", "method_b"]].to_numpy()]
    )
    rows = []
    for (question, methods), part in decided.groupby(["question", "methods"], sort=False):
        counts = np.stack([part["n_first"], part["n_raters"] - part["n_first"]], axis=1)
        columns, _ = _agreement(counts.astype(float))
        expected = float(sum(column.mean() ** 2 for name, column in columns.items() if name != "agree"))
        row = {"question": question, "methods": methods, "kappa": np.nan, "low": np.nan, "high": np.nan}
        if expected < 1:
            noises = part.groupby(list(UNIT)).ngroup()  # the same seed is another noise under another prompt
            groups = [*(part[name].to_numpy() for name in UNIT[:-1]), noises.to_numpy()]
            row |= {"kappa": (float(columns["agree"].mean()) - expected) / (1 - expected), "low": -1.0, "high": 1.0}
            # κ is not defined on prompts whose votes are all alike; where many resamples hold only these, no bound is.
            with suppress(ScoreError):
                interval = bootstrap_statistic(columns, _kappa_of_means, groups)
                row |= {"low": max(interval.low, -1.0), "high": min(interval.high, 1.0)}
        observed = float(columns["agree"].mean())
        rows.append(row | {"observed": observed, "expected": expected, "n": len(part), "raters": n_raters})
    names = ["question", "methods", "kappa", "low", "high", "observed", "expected", "n", "raters"]
    return pd.DataFrame(rows, columns=names)


def _agreement(counts: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Per item: the share of pairs of raters that agree, and the share of votes in each category."""
    n_raters = counts.sum(axis=1)
    if counts.ndim != 2 or not len(counts) or n_raters.min() < 2 or np.ptp(n_raters) > 0:
        raise StudyError("Fleiss' κ needs the same number of raters, two or more, for every item.")
    n = n_raters[0]
    agree = ((counts**2).sum(axis=1) - n) / (n * (n - 1))
    return {"agree": agree} | {f"share{j}": column / n for j, column in enumerate(counts.T)}, int(n)


def _kappa_of_means(agree: np.ndarray, **shares: np.ndarray) -> np.ndarray:
    expected = sum(share**2 for share in shares.values())
    return (agree - expected) / np.where(expected < 1 - ROUNDING, 1 - expected, np.nan)


# ---------------------------------------------------------------------------------------------------- Bradley–Terry


def bradley_terry(wins: np.ndarray, n_iterations: int = 2000, tolerance: float = 1e-10) -> np.ndarray:
    """Strengths of methods from who beat whom: method i beats j with probability `p_i / (p_i + p_j)`.

    Maximum likelihood by Hunter's MM steps, `p_i ← W_i / Σ_j n_ij / (p_i + p_j)`, then p is scaled to sum 1 (Hunter
    2004, "MM algorithms for generalized Bradley–Terry models", equation 3).

    Args:
        wins: how often i beat j, shape (..., M, M) with a zero diagonal; a tie is half a win for each.
        n_iterations: at most so many steps.
        tolerance: steps end when no strength moves by more.

    Returns:
        Strengths, shape (..., M). They are finite and unique where `separated_groups` finds one group; else the limit
        has zeros in it.
    """
    wins = np.asarray(wins, dtype=float)
    compared, won = wins + wins.swapaxes(-1, -2), wins.sum(axis=-1)
    p = np.full(won.shape, 1 / won.shape[-1])
    for _ in range(n_iterations):
        together = p[..., :, None] + p[..., None, :]
        rate = np.divide(compared, together, out=np.zeros_like(compared), where=together > 0).sum(axis=-1)
        step = np.divide(won, rate, out=np.zeros_like(won), where=rate > 0)
        step /= step.sum(axis=-1, keepdims=True)
        moved = np.abs(step - p).max()
        p = step
        if moved <= tolerance:
            break
    return p


def separated_groups(wins: np.ndarray) -> list[list[int]]:
    """Groups of methods with no way back and forth between them by wins; one group where strengths are finite.

    If all methods of one group beat, or never meet, those of another, the likelihood has no maximum: the one's
    strength could always be larger yet (Ford 1957).

    Args:
        wins: as in `bradley_terry`, shape (M, M).
    """
    n = len(wins)
    reaches = np.linalg.matrix_power(np.eye(n) + (np.asarray(wins) > 0), n) > 0  # by a chain of at most n wins
    both_ways = reaches & reaches.T
    return [np.flatnonzero(row).tolist() for i, row in enumerate(both_ways) if not row[:i].any()]


def win_matrix(decided: pd.DataFrame) -> pd.DataFrame:
    """How many items each method (row) won against each other one (column) by majority; a tie is half a win each."""
    asked = decided[decided["question"] == "preference"]
    methods = in_method_order([*asked["method_a"], *asked["method_b"]])
    wins = pd.DataFrame(0.0, index=methods, columns=methods)
    for (a, b), part in asked.groupby(["method_a", "method_b"]):
        wins.loc[a, b], wins.loc[b, a] = part["value"].sum(), (1 - part["value"]).sum()
    return wins


def strengths(decided: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Bradley–Terry strengths of all methods, with 95 % intervals by resampling prompts, noise and RL seeds.

    Args:
        decided: from `majority`.

    Returns:
        Table: method, value, low, high, n (comparisons of the method). Strengths sum to 1.

    Raises:
        StudyError: fewer than two methods, or a group of methods that no chain of wins ties to the rest: then there are
            no finite strengths.
    """
    wins = win_matrix(decided)
    groups = [[wins.index[i] for i in group] for group in separated_groups(wins.to_numpy())]
    if len(groups) != 1 or len(wins) < 2:
        names = " | ".join(", ".join(group) for group in groups) or "none"
        raise StudyError(
            f"There are no finite Bradley–Terry strengths: no chain of wins leads back and forth between {names}; "
            "read the preference rates instead, or collect more votes."
        )
    asked = decided[decided["question"] == "preference"]
    tables = {f"{a}|{b}": part for (a, b), part in asked.groupby(["method_a", "method_b"], sort=False)}
    pairs = pair_up(tables, "value")
    shared = next(iter(pairs.values()))
    place = {method: i for i, method in enumerate(wins.index)}
    ends = {name: [place[method] for method in name.split("|")] for name in pairs}
    n_pairs = {name: len(tables[name]) for name in pairs}

    def fitted(means: dict[str, np.ndarray]) -> np.ndarray:
        matrix = np.zeros((len(next(iter(means.values()))), len(wins), len(wins)))
        for name, mean in means.items():
            a, b = ends[name]
            matrix[:, a, b], matrix[:, b, a] = n_pairs[name] * mean, n_pairs[name] * (1 - mean)
        return bradley_terry(matrix, n_iterations=300)  # enough for an interval; most resamples need fewer

    # The same seed gives every method the same resamples.
    columns, value, rows = {name: pair.to_numpy() for name, pair in pairs.items()}, bradley_terry(wins.to_numpy()), []
    for method, i in place.items():
        interval = bootstrap_statistic(
            columns, lambda i=i, **means: fitted(means)[:, i], unit_groups(shared), n_resamples=n_resamples, seed=seed
        )
        n = int((wins.loc[method] + wins[method]).sum())
        low, high = np.fmax(interval.low, 0.0), np.fmin(interval.high, 1.0)  # of a single item: 0 and 1
        rows.append({"method": method, "value": value[i], "low": float(low), "high": float(high), "n": n})
    return pd.DataFrame(rows)
