"""How united the raters of a study were, and one scale from many pairs: Fleiss' κ, and Bradley and Terry's strengths.

Shape legend: N items, M arms, R resamples.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError, StudyError
from ibkit.evaluate.arms import arms_of
from ibkit.evaluate.intervals import ROUNDING, bootstrap_statistic
from ibkit.evaluate.stats import UNIT, pair_up, seed_groups, unit_groups
from ibkit.evaluate.study.votes import check_votes, majority


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
    """Fleiss' κ for every question, and for every pair of arms of the preference, with 95 % intervals.

    κ wants the same number of raters on each item, so only items that every rater of the table voted on count.
    Intervals resample subjects and prompts; of a single prompt, its noises.

    Returns:
        Table: question, arms ("" = all, or "a – b"), kappa, low, high (NaN where κ is not defined), observed (share
        of agreeing pairs of raters), expected (by chance), n (items), raters. Empty for a single rater, who agrees with
        nobody.
    """
    votes = check_votes(votes)
    n_raters = votes["rater"].nunique()
    decided = majority(votes)
    decided = decided[(decided["n_raters"] == n_raters) & (n_raters > 1)]
    decided = decided.assign(arms=[f"{a} – {b}" if a else "" for a, b in decided[["arm_a", "arm_b"]].to_numpy()])
    rows = []
    for (question, arms), part in decided.groupby(["question", "arms"], sort=False):
        counts = np.stack([part["n_first"], part["n_raters"] - part["n_first"]], axis=1)
        columns, _ = _agreement(counts.astype(float))
        expected = float(sum(column.mean() ** 2 for name, column in columns.items() if name != "agree"))
        row = {"question": question, "arms": arms, "kappa": np.nan, "low": np.nan, "high": np.nan}
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
    names = ["question", "arms", "kappa", "low", "high", "observed", "expected", "n", "raters"]
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


def bradley_terry(wins: np.ndarray, n_iterations: int = 2000, tolerance: float = 1e-10) -> np.ndarray:
    """Strengths of arms from who beat whom: arm i beats j with probability `p_i / (p_i + p_j)`.

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
    """Groups of arms with no way back and forth between them by wins; one group where strengths are finite.

    If all arms of one group beat, or never meet, those of another, the likelihood has no maximum: the one's
    strength could always be larger yet (Ford 1957).

    Args:
        wins: as in `bradley_terry`, shape (M, M).
    """
    n = len(wins)
    reaches = np.linalg.matrix_power(np.eye(n) + (np.asarray(wins) > 0), n) > 0  # by a chain of at most n wins
    both_ways = reaches & reaches.T
    return [np.flatnonzero(row).tolist() for i, row in enumerate(both_ways) if not row[:i].any()]


def win_matrix(decided: pd.DataFrame) -> pd.DataFrame:
    """How many items each arm (row) won against each other one (column) by majority; a tie is half a win each."""
    asked = decided[decided["question"] == "preference"]
    arms = arms_of([*asked["arm_a"], *asked["arm_b"]])
    wins = pd.DataFrame(0.0, index=list(arms), columns=list(arms))
    for (a, b), part in asked.groupby(["arm_a", "arm_b"]):
        wins.loc[a, b], wins.loc[b, a] = part["value"].sum(), (1 - part["value"]).sum()
    return wins


def strengths(decided: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Bradley–Terry strengths of all arms, with 95 % intervals by resampling prompts, noise and trainings.

    Args:
        decided: from `majority`.

    Returns:
        Table: arm, value, low, high, n (comparisons of the arm). Strengths sum to 1.

    Raises:
        StudyError: fewer than two arms, or a group of arms that no chain of wins ties to the rest: then there are
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
    tables = {f"{a}|{b}": part for (a, b), part in asked.groupby(["arm_a", "arm_b"], sort=False)}
    pairs = pair_up(tables, "value")
    shared = next(iter(pairs.values()))
    place = {arm: i for i, arm in enumerate(wins.index)}
    ends = {name: [place[arm] for arm in name.split("|")] for name in pairs}
    n_pairs = {name: len(tables[name]) for name in pairs}

    def fitted(means: dict[str, np.ndarray]) -> np.ndarray:
        matrix = np.zeros((len(next(iter(means.values()))), len(wins), len(wins)))
        for name, mean in means.items():
            a, b = ends[name]
            matrix[:, a, b], matrix[:, b, a] = n_pairs[name] * mean, n_pairs[name] * (1 - mean)
        return bradley_terry(matrix, n_iterations=300)  # enough for an interval; most resamples need fewer

    # The same seed gives every arm the same resamples.
    columns, value, rows = {name: pair.to_numpy() for name, pair in pairs.items()}, bradley_terry(wins.to_numpy()), []
    for arm, i in place.items():
        interval = bootstrap_statistic(
            columns,
            lambda i=i, **means: fitted(means)[:, i],
            unit_groups(shared),
            seeds=seed_groups(*pairs.values()),
            n_resamples=n_resamples,
            seed=seed,
        )
        n = int((wins.loc[arm] + wins[arm]).sum())
        low, high = np.fmax(interval.low, 0.0), np.fmin(interval.high, 1.0)  # of a single item: 0 and 1
        rows.append({"arm": arm, "value": value[i], "low": float(low), "high": float(high), "n": n})
    return pd.DataFrame(rows)
