"""How far the raters of a study agreed, and one scale from many pairs: Fleiss' κ, and Bradley and Terry's strengths.

Shape legend: N items, M arms, R resamples.
"""

import math
from contextlib import suppress

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

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
        counts: how many raters put item i into category j, shape (N, categories); every row has the same sum ≥ 2, or it
            is a StudyError.

    Returns:
        κ; NaN where all votes are in one category: then there is nothing that chance could have got wrong.
    """
    return float(_kappa(**{name: column.mean() for name, column in _agreement(counts).items()}))


def kappas(votes: pd.DataFrame) -> pd.DataFrame:
    """Fleiss' κ for every question, and for every pair of arms of the preference, with 95 % intervals.

    κ needs the same number of raters for each item, so only items that every rater of the table voted on count.
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
        columns = _agreement(np.stack([part["n_first"], part["n_raters"] - part["n_first"]], axis=1))
        means = {name: float(column.mean()) for name, column in columns.items()}
        row = {"question": question, "arms": arms, "kappa": float(_kappa(**means)), "low": np.nan, "high": np.nan}
        if not math.isnan(row["kappa"]):
            noises = part.groupby(list(UNIT)).ngroup()  # the same seed is another noise under another prompt
            groups = [*(part[name].to_numpy() for name in UNIT[:-1]), noises.to_numpy()]
            row |= {"low": -1.0, "high": 1.0}
            # κ is not defined on prompts whose votes are all alike; where many resamples hold only these, no bound is.
            with suppress(ScoreError):
                interval = bootstrap_statistic(columns, _kappa, groups)
                row |= {"low": max(interval.low, -1.0), "high": min(interval.high, 1.0)}
        observed = means.pop("agree")
        expected = sum(share**2 for share in means.values())
        rows.append(row | {"observed": observed, "expected": expected, "n": len(part), "raters": n_raters})
    names = ["question", "arms", "kappa", "low", "high", "observed", "expected", "n", "raters"]
    return pd.DataFrame(rows, columns=names)


def _agreement(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Per item: the share of pairs of raters that agree, and the share of votes in each category."""
    counts = np.asarray(counts, dtype=float)
    n_raters = counts.sum(axis=1)
    if counts.ndim != 2 or not len(counts) or n_raters.min() < 2 or np.ptp(n_raters) > 0:
        raise StudyError("Fleiss' κ needs the same number of raters, two or more, for every item.")
    n = n_raters[0]
    agree = ((counts**2).sum(axis=1) - n) / (n * (n - 1))
    return {"agree": agree} | {f"share{j}": column / n for j, column in enumerate(counts.T)}


def _kappa(agree: np.ndarray | float, **shares: np.ndarray | float) -> np.ndarray:
    """κ from means over items, (R,) or scalars; NaN where all votes are in one category."""
    expected = np.asarray(sum(share**2 for share in shares.values()))
    return (agree - expected) / np.where(expected < 1 - ROUNDING, 1 - expected, np.nan)


def bradley_terry(wins: np.ndarray, n_iterations: int = 2000, tolerance: float = 1e-10) -> np.ndarray:
    """Strengths of arms from who beat whom: arm i beats j with probability `p_i / (p_i + p_j)`.

    Maximum likelihood by Hunter's MM steps, `p_i ← W_i / Σ_j n_ij / (p_i + p_j)`, then p is scaled to sum 1 (Hunter
    2004, "MM algorithms for generalized Bradley–Terry models", equation 3).

    Args:
        wins: how often i beat j, shape (..., M, M) with a zero diagonal; a tie is half a win for each.
        n_iterations: the largest number of steps.
        tolerance: stop when no strength moves by more.

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
    """The strongly connected components of the graph of wins (M, M), see `bradley_terry`; one where strengths are
    finite.

    If all arms of one group beat, or never meet, those of another, the likelihood has no maximum: it grows with the
    strength of the one without end (Ford 1957).
    """
    _, labels = connected_components(np.asarray(wins) > 0, connection="strong")
    return [np.flatnonzero(labels == label).tolist() for label in pd.unique(labels)]


def win_matrix(decided: pd.DataFrame) -> pd.DataFrame:
    """How many items each arm (row) won against each other one (column) by majority; a tie is half a win each."""
    asked = decided[decided["question"] == "preference"]
    arms = arms_of([*asked["arm_a"], *asked["arm_b"]])
    wins = pd.DataFrame(0.0, index=list(arms), columns=list(arms))
    for (a, b), part in asked.groupby(["arm_a", "arm_b"]):
        wins.loc[a, b], wins.loc[b, a] = part["value"].sum(), (1 - part["value"]).sum()
    return wins


def strengths(decided: pd.DataFrame, n_resamples: int = 2000) -> pd.DataFrame:
    """Bradley–Terry strengths of all arms (of the items of `majority`), with 95 % intervals by resampling prompts,
    noise and trainings. Fewer than two arms, or more than one of `separated_groups`, are a StudyError.

    Returns:
        Table: arm, value, low, high, n (comparisons of the arm). Strengths sum to 1.
    """
    wins = win_matrix(decided)
    apart = separated_groups(wins.to_numpy())
    if len(apart) != 1 or len(wins) < 2:
        names = " | ".join(", ".join(wins.index[group]) for group in apart) or "none"
        raise StudyError(
            f"There are no finite Bradley–Terry strengths: no chain of wins leads back and forth between {names}; "
            "read the preference rates instead, or collect more votes."
        )
    asked = decided[decided["question"] == "preference"]
    tables = {f"{a}|{b}": part for (a, b), part in asked.groupby(["arm_a", "arm_b"], sort=False)}
    pairs = pair_up(tables, "value")
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
    groups, seeds = unit_groups(next(iter(pairs.values()))), seed_groups(*pairs.values())
    for arm, i in place.items():
        interval = bootstrap_statistic(
            columns, lambda i=i, **means: fitted(means)[:, i], groups, seeds=seeds, n_resamples=n_resamples
        )
        n = int((wins.loc[arm] + wins[arm]).sum())
        low, high = np.fmax(interval.low, 0.0), np.fmin(interval.high, 1.0)  # of a single item: 0 and 1
        rows.append({"arm": arm, "value": value[i], "low": float(low), "high": float(high), "n": n})
    return pd.DataFrame(rows)
