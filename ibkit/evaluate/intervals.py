"""Intervals of means, differences and ratios, right also for few prompts, subjects and RL seeds.

Images of one prompt resemble each other, so prompts and subjects are resampled, not images. RL seeds are *crossed* with
them: base model and DreamBooth are sampled once and compared with every RL seed, on the same prompts and noise. Every
crossed factor (subjects, prompts, seeds) is resampled on its own with all else fixed. A factor nested in another one
with two levels or more is not resampled: the levels of the outer one already differ by all that varies within them
(Davison and Hinkley 1997, §3.8; Field and Welsh 2007). The labels tell nested from crossed: a prompt that two subjects
share is crossed with them. Seeds are crossed with subjects, too, although each subject has trainings of its own: a
seed's number gives all of them the same initial weights and noise, and it shows (in `outputs/reference/methods` NeTI's
seed 1 holds each of four subjects better than seed 0). So two seeds decide little over any number of subjects.

With G levels the variance of a resample is (G − 1)/G of what it should be, and its tails are normal. So each resample's
deviation is multiplied by √(G/(G − 1)) · √((G − 1)/χ²), χ² drawn with G − 1 degrees of freedom. For a mean that makes
Student's t interval. The sum over crossed factors makes the Behrens–Fisher interval (Fisher 1935), whose coverage is at
least nominal; with Satterthwaite's pooled degrees of freedom it was 87 % for 40 prompts and 2 seeds. A share near 0 or
1, where all resamples may be alike, gets Wilson's interval, and a difference of shares that of Bonett and Price, both
at the number of independent images that the resampling implies (Korn and Graubard 1998). `benchmarks/intervals.py`
shows the coverage. Bounds are NaN where nothing varies that could be resampled, such as for one image.

Shape legend: S RL seeds, N units (an image seed of a prompt), G levels of a factor, R resamples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from ibkit.errors import ScoreError

MAX_NOT_FINITE = 0.01  # share of resamples; a statistic that is not finite in more has no interval
ROUNDING = 1e-9  # smaller differences come from the rounding of float64

Groups = ArrayLike  # N labels, or several columns of N labels, outermost first


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its interval (NaN: unknown), and the number of images (or pairs of images) behind it."""

    value: float
    low: float
    high: float
    n: int

    def side(self, threshold: float = 0.0) -> int:
        """1 where the whole interval lies above the threshold, −1 where it lies below, else 0."""
        return int(self.low > threshold + ROUNDING) - int(self.high < threshold - ROUNDING)


def mean_interval(
    values: ArrayLike,
    groups: Groups | None = None,
    *,
    seeds: Groups | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of scores, with the interval that fits: Wilson's for shares, else the bootstrap's.

    A unit's seeds are averaged first, so that a subject trained with more seeds than others does not weigh more.

    Args:
        values: scores, shape (N,), or (S, N) when the same N units were scored under each of S RL seeds; NaN marks a
            cell that was not measured. Shares are scores that are all 0, ½ or 1.
        groups: group labels of the N units, such as prompts, or subjects and prompts; None resamples images.
        seeds: labels of the S rows, such as personalizations and tunings; None: every row is a seed.
        n_resamples: R.
        level: nominal coverage.
        seed: makes the interval repeatable.

    Returns:
        The mean, its interval, and the number of scores.

    Raises:
        ScoreError: no values, an infinite value, or labels of another length.
    """
    data = _Data({"values": values}, groups, seeds)
    interval = data.interval(lambda values: values, n_resamples, level, seed)
    if not data.are_shares:
        return interval
    scores = data.matrices["values"]
    are_plain_units = not data.seed_factors and data.n_groups == data.n_units  # nothing but images of one prompt varies
    if are_plain_units and not (scores == 0.5).any():
        n: float = data.n_units
    else:
        # Prompts that are not like the others are few where the share is near 0 or 1, and may be missing here. So the n
        # images of a prompt count as √n independent ones at the most; with n, coverage near 1 fell to 85 %.
        most = np.sqrt(data.n_units * data.n_groups)
        n = data.effective_n(interval, interval.value * (1 - interval.value), most, level)
    share = wilson_interval(interval.value * n, n, level)
    return Interval(interval.value, share.low, share.high, interval.n)


def difference_interval(
    a: ArrayLike,
    b: ArrayLike,
    groups: Groups | None = None,
    *,
    seeds: Groups | None = None,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of a − b over paired scores; see `mean_interval` for the arguments.

    Differences of shares get Bonett and Price's interval (2012), which adds one pair in favour of a and one of b, so
    that pairs which all agree do not claim certainty.
    """
    data = _Data({"a": a, "b": b}, groups, seeds)
    interval = data.interval(lambda a, b: a - b, n_resamples, level)
    if not data.are_shares:
        return interval
    pairs = data.matrices["a"] - data.matrices["b"]
    variance = float(pairs[np.isfinite(pairs)].var())
    z, value = NormalDist().inv_cdf((1 + level) / 2), interval.value
    n = data.effective_n(interval, variance, data.n_units, level)
    centre = n * value / (n + 2)
    variance = (n * (variance + value**2) + 2) / (n + 2) - centre**2
    half = z * np.sqrt(variance / (n + 2))
    low, high = max(-1.0, min(centre - half, value)), min(1.0, max(centre + half, value))
    return Interval(value, float(low), float(high), interval.n)


def bootstrap_statistic(
    columns: Mapping[str, ArrayLike],
    statistic: Callable[..., np.ndarray],
    groups: Groups | None = None,
    *,
    seeds: Groups | None = None,
    n_resamples: int = 10_000,
) -> Interval:
    """Interval of any function of the means of paired columns.

    All columns are resampled with the same weights, so that what they share (the prompt, the noise) cancels in a
    difference. A unit that a column lacks counts in no column.

    Args:
        columns: name -> scores of the same N units, shape (N,) or (S, N); NaN marks a cell that was not measured.
        statistic: takes the means as keyword arrays of shape (R,) by those names and returns shape (R,); not finite
            where the statistic has no value.
        groups, seeds, n_resamples: as in `mean_interval`.

    Raises:
        ScoreError: empty columns, columns or labels of different lengths, or a statistic that is not finite on the
            scores or in more than `MAX_NOT_FINITE` of their resamples.
    """
    return _Data(columns, groups, seeds).interval(statistic, n_resamples)


def bootstrap_weighted(
    statistic: Callable[[np.ndarray], np.ndarray], groups: Groups | None, n_units: int, *, n_resamples: int = 2000
) -> Interval:
    """Interval of a statistic that is no function of means, such as an AUC or a rank correlation.

    Args:
        statistic: from how often each unit occurs in each resample, integers of shape (R, N), to shape (R,).
        groups, n_resamples: as in `mean_interval`.
        n_units: N.
    """
    rng = np.random.default_rng(0)
    value = float(statistic(np.ones((1, n_units), dtype=np.int64))[0])
    factors = _crossed(_label_codes(groups, n_units), n_units)
    drawn = _resampled(factors, lambda codes, weights: statistic(weights[:, codes]), n_resamples, rng)
    return _combined(value, drawn, n_units, 0.95, rng)


def wilson_interval(successes: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's score interval of one proportion: right also near 0 and 1, where a bootstrap has zero width. `successes`
    of n may be fractions, where n is an effective number; outside 0…n they are a ScoreError.

    Source: Wilson 1927; `(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)`.
    """
    share = successes / n if n > 0 else -1
    if not -1e-9 <= share <= 1 + 1e-9:
        raise ScoreError(f"{successes} of {n} is not a proportion.")
    share = min(max(share, 0.0), 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and n one bound is the value itself; rounding must not push it past.
    return Interval(share, float(min(centre - half, share)), float(max(centre + half, share)), round(n))


# --- resampling ----------------------------------------------------------------------------------------------------


class _Data:
    """Paired columns, and the crossed factors of their units and of their seeds.

    Attributes:
        matrices: name -> scores of the units that all columns have, (S or 1, N).
        n_units: N.
        n_scores: cells of the column that has the most.
        unit_factors, seed_factors: codes of the units, (N,), and of the rows, (S,), one array for each factor.
        n_groups: levels of the unit factor that has the fewest.
    """

    def __init__(self, columns: Mapping[str, ArrayLike], groups: Groups | None, seeds: Groups | None = None):
        matrices = {name: _matrix(column, name) for name, column in columns.items()}
        lengths = {name: matrix.shape[1] for name, matrix in matrices.items()}
        if len(set(lengths.values())) > 1:
            raise ScoreError(f"The columns to compare have different lengths: {lengths}.")
        labels = _label_codes(groups, next(iter(lengths.values())))
        valid = np.logical_and.reduce([np.isfinite(m).any(axis=0) for m in matrices.values()])
        self.matrices = {name: matrix[:, valid] for name, matrix in matrices.items()}
        self.n_units = int(valid.sum())
        self.n_scores = max(int(np.isfinite(matrix).sum()) for matrix in matrices.values())
        self.unit_factors = _crossed([pd.factorize(codes[valid])[0] for codes in labels], self.n_units)
        self.n_seeds = max(map(len, matrices.values()))
        self.seed_factors = _crossed(_label_codes(seeds, self.n_seeds), self.n_seeds)
        self.n_groups = min((codes.max() + 1 for codes in self.unit_factors), default=self.n_units)

    def interval(
        self, statistic: Callable[..., np.ndarray], n_resamples: int, level: float = 0.95, seed: int = 0
    ) -> Interval:
        """See `bootstrap_statistic`."""
        if not 0 < level < 1 or n_resamples < 1:
            raise ScoreError(f"A level between 0 and 1 and n_resamples ≥ 1 are needed, not {level} and {n_resamples}.")

        def by_unit(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
            return statistic(**self._means_by_group(codes, weights))

        def by_seed(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
            return statistic(**self._means_by_seed(weights[:, codes]))

        rng = np.random.default_rng(seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(**self._means_by_seed(np.ones((1, self.n_seeds))))[0])
            drawn = _resampled(self.unit_factors, by_unit, n_resamples, rng)
            drawn += _resampled(self.seed_factors, by_seed, n_resamples, rng)
        return _combined(value, drawn, self.n_scores, level, rng)

    @property
    def are_shares(self) -> bool:
        """Whether all scores are 0, ½ or 1."""
        return all(np.isin(scores[np.isfinite(scores)], (0, 0.5, 1)).all() for scores in self.matrices.values())

    def effective_n(self, interval: Interval, variance: float, most: float, level: float) -> float:
        """Number of independent images whose mean would be as uncertain as the interval is wide.

        Where images hardly differ the width says little: there it is `most`, corrected for the number of groups by the
        ratio of normal to Student quantiles, squared (Korn and Graubard 1998).
        """
        z = NormalDist().inv_cdf((1 + level) / 2)
        if self.n_groups > 1:
            most *= (z / stdtrit(self.n_groups - 1, (1 + level) / 2)) ** 2
        half = (interval.high - interval.low) / 2
        return float(min(most, z**2 * variance / half**2)) if half > ROUNDING else float(most)

    def _means_by_group(self, codes: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Mean of each column when the groups count by `weights`, (R, G): name -> (R,)."""
        counts = weights @ np.bincount(codes).astype(float)
        means = {}
        for name, scores in self.matrices.items():
            by_unit = np.nansum(scores, axis=0) / np.isfinite(scores).sum(axis=0)
            means[name] = (weights @ np.bincount(codes, by_unit)) / counts
        return means

    def _means_by_seed(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Mean of each column when the seeds count by `weights`, (R, S): over a unit's seeds first, then over the units
        that all columns have.

        Units with the same gaps have the same weights in every resample, so they are summed up beforehand.
        """
        measured = np.concatenate([np.isfinite(scores) for scores in self.matrices.values()])
        _, first, kinds = np.unique(measured, axis=1, return_index=True, return_inverse=True)
        members = np.eye(len(first))[kinds.ravel()]  # (N, K): which of K kinds a unit is
        counts, sums = members.sum(axis=0), {}
        for name, scores in self.matrices.items():
            weight = weights if len(scores) > 1 else np.ones((len(weights), 1))
            seen = weight @ np.isfinite(scores[:, first])  # (R, K)
            sums[name] = np.where(seen > 0, (weight @ (np.nan_to_num(scores) @ members)) / seen, np.nan)
        there = np.logical_and.reduce([np.isfinite(of_kind) for of_kind in sums.values()])
        total = there @ counts
        return {name: np.where(there, of_kind, 0.0).sum(axis=1) / total for name, of_kind in sums.items()}


def _matrix(values: ArrayLike, name: str) -> np.ndarray:
    matrix = np.atleast_2d(np.asarray(values, dtype=float))
    if matrix.ndim != 2 or matrix.size == 0:
        raise ScoreError(f"{name} must be a non-empty list of scores, or a table (seeds, units).")
    if np.isinf(matrix).any() or np.isnan(matrix).all():
        raise ScoreError(f"{name} holds an infinite score, or none that was measured.")
    return matrix


def _label_codes(labels: Groups | None, n: int) -> list[np.ndarray]:
    """The label columns, outermost first, each as codes of shape (n,)."""
    columns = np.atleast_2d(np.asarray([] if labels is None else labels, dtype=object))
    if columns.size and columns.shape[1] != n:
        raise ScoreError(f"There are {n} scores but {columns.shape[1]} group labels.")
    return [pd.factorize(column)[0] for column in columns if column.size]


def _crossed(columns: list[np.ndarray], n: int) -> list[np.ndarray]:
    """Keep the factors that are resampled: two levels or more, and not nested in one kept before.

    Where none is left, each of the n units is a level of its own; of a single unit nothing can be resampled.
    """
    kept: list[np.ndarray] = []
    for codes in columns:
        n_levels = codes.max(initial=-1) + 1
        if n_levels > 1 and all(len(np.unique(codes * n + outer)) > n_levels for outer in kept):
            kept.append(codes)
    return kept or ([np.arange(n)] if n > 1 else [])


def _resampled(
    factors: list[np.ndarray], statistic: Callable[..., np.ndarray], n_resamples: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, int]]:
    """For each factor the statistic, (R,), of its codes and of how often each level is drawn, (R, G); and G."""
    drawn = []
    for codes in factors:
        n_levels = int(codes.max()) + 1
        weights = rng.multinomial(n_levels, np.full(n_levels, 1 / n_levels), size=n_resamples)
        drawn.append((statistic(codes, weights), n_levels))
    return drawn


def _combined(
    value: float, drawn: list[tuple[np.ndarray, int]], n: int, level: float, rng: np.random.Generator
) -> Interval:
    """Add up the factors' deviations, each corrected for its number of levels; their size gives a symmetric interval.

    Symmetric, because a curved statistic deviates to one side only when few levels are resampled; and because the
    coverage of symmetric intervals is closer to nominal (Hall 1988).

    Args:
        value: the statistic on the scores themselves.
        drawn: for each factor the resampled statistic, (R,), and its number of levels.
        n: as in `Interval`.
    """
    if not np.isfinite(value):
        raise ScoreError("The statistic is not finite on these scores: is the quantity it divides by zero?")
    if not drawn:
        return Interval(value, float("nan"), float("nan"), n)
    deviations = np.zeros(len(drawn[0][0]))
    for statistics, n_levels in drawn:
        # √(G/(G−1)) for the variance, √((G−1)/χ²) for Student's tails.
        factor = np.sqrt(n_levels / rng.chisquare(n_levels - 1, len(statistics)))
        deviations += (statistics - value) * factor
    finite = np.isfinite(deviations)
    if (~finite).mean() > MAX_NOT_FINITE:
        raise ScoreError(
            f"The statistic is not finite in {(~finite).sum()} of {len(finite)} resamples: what it divides by is not "
            "clearly different from zero. More prompts, subjects or seeds are needed."
        )
    half = float(np.quantile(np.abs(deviations[finite]), level))
    return Interval(value, value - half, value + half, n)
