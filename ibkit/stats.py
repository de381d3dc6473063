"""Means with honest intervals, from one row per image to one number per method.

Images of one prompt resemble each other, so images are not the units that vary: prompts (and subjects) are. An
interval here therefore resamples prompts, then the images within them. RL seeds are *crossed* with the images, not
nested: base model and DreamBooth are sampled once and compared with every RL seed, on the same prompts and noise.
Seeds get their own resampling, so that the shared images are not counted once per seed.

Few prompts or seeds make such an interval too narrow: in a simulation (`benchmarks/intervals.py`) a nominal 95 % held
the truth in 55 % with 2 prompts and 1 seed, in 68 % with 2 and 3, and in 86 % with 5 and 3.

Shape legend: S RL seeds, N units (an image seed of a prompt), R resamples.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError

# Numbers held at once by the resampling: 4 million float64 are 32 MB.
CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value, the bounds of its interval, and the number of images (or pairs of images) behind it."""

    value: float
    low: float
    high: float
    n: int


# --- intervals of plain arrays -------------------------------------------------------------------------------------


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | Sequence[Sequence[Hashable]] | None = None,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of scores with a percentile bootstrap interval that resamples groups, then the images within them.

    Args:
        values: scores, shape (N,), or (S, N) when the same N units were scored under each of S RL seeds.
        groups: the N group labels (prompts), or several such columns from the outermost in (subjects, prompts);
            None resamples images only.
        n_resamples: R.
        level: share of the resampled means inside the interval.
        seed: makes the interval repeatable.

    Returns:
        The mean over all values, its interval, and n = N·S.

    Raises:
        ScoreError: no values, a value that is not finite, or labels of another length.
    """
    matrix = _matrix(values, "values")
    if not np.isfinite(matrix).all():
        raise ScoreError(f"{(~np.isfinite(matrix)).sum()} of {matrix.size} scores are missing or not finite.")
    return bootstrap_statistic(
        {"values": matrix}, lambda values: values, groups, n_resamples=n_resamples, level=level, seed=seed
    )


def bootstrap_statistic(
    columns: Mapping[str, np.ndarray],
    statistic: Callable[..., np.ndarray],
    groups: Sequence[Hashable] | Sequence[Sequence[Hashable]] | None = None,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap any function of the means of paired columns.

    All columns are resampled with the same weights, so what they share (the prompt, the noise) cancels in a
    difference as it should. Units follow the group hierarchy (Davison and Hinkley 1997, §3.8: every level with
    replacement); RL seeds are resampled on their own (Owen 2007, the pigeonhole bootstrap). A unit's seeds are averaged
    first, so a subject that was trained with more seeds than others does not weigh more; a unit that a column lacks
    counts in no column.

    Args:
        columns: name -> scores of the same N units, shape (N,) or (S, N); NaN marks a cell that was not measured.
        statistic: takes the means as keyword arrays of shape (R,) by those names and returns shape (R,).
        groups: as in `bootstrap_mean`.
        n_resamples: R.
        level: share of the resampled statistics inside the interval.
        seed: makes the interval repeatable.

    Raises:
        ScoreError: empty columns, columns of different lengths, or labels of another length.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise ScoreError(f"A level between 0 and 1 and n_resamples ≥ 1 are needed, not {level} and {n_resamples}.")
    matrices = {name: _matrix(column, name) for name, column in columns.items()}
    lengths = {name: matrix.shape[1] for name, matrix in matrices.items()}
    n_units = next(iter(lengths.values()))
    if len(set(lengths.values())) > 1:
        raise ScoreError(f"The columns to compare have different lengths: {lengths}.")
    paths = _group_paths(groups, n_units)
    n_seeds = max(len(matrix) for matrix in matrices.values())
    rng = np.random.default_rng(seed)

    chunk = max(1, CHUNK // n_units)
    draws = []
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        unit_weights = _unit_weights(paths, n_units, size, rng)
        seed_weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=size).astype(float)
        means = _paired_means(matrices, seed_weights, unit_weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(statistic(**means))
        # A resample of unlucky seeds may hold no unit that all columns have: it says nothing and is left out below.
    drawn = np.concatenate(draws)
    drawn = drawn[np.isfinite(drawn)]
    as_measured = _paired_means(matrices, np.ones((1, n_seeds)), np.ones((1, n_units)))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(**as_measured)[0])
    if not len(drawn) or not np.isfinite(value):
        raise ScoreError("The statistic is not finite on these scores: is the quantity it divides by zero?")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    n = max(int(np.isfinite(matrix).sum()) for matrix in matrices.values())
    return Interval(value, float(low), float(high), n)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of one proportion: right also near 0 and 1, where a bootstrap has zero width.

    Source: Wilson 1927; `(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)`.

    Raises:
        ScoreError: n is 0, or successes lie outside 0…n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ScoreError(f"{successes} of {n} is not a proportion.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and n the bound is the value itself; rounding must not push it past.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Interval(share, low, high, n)


def newcombe_interval(a: Interval, b: Interval, n: int) -> Interval:
    """Interval of the difference a − b of two proportions from their Wilson intervals.

    Source: Newcombe 1998, method 10. Used where every pair agrees and a bootstrap would claim certainty.
    """
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    high = value + np.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, float(low), float(high), n)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | Sequence[Sequence[Hashable]] | None = None,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean with the interval that fits: Wilson for one proportion, else the bootstrap over groups.

    Wilson is taken for 0/1 scores of a single group and seed, and for 0/1 scores that are all equal (there the
    bootstrap has zero width); with several seeds it counts the N units once, because the seeds share their noise.
    """
    matrix = _matrix(values, "values")
    binary = bool(np.isin(matrix, (0, 1)).all())
    one_group = len(set(zip(*_group_paths(groups, matrix.shape[1]), strict=True))) <= 1
    if binary and (np.ptp(matrix) == 0 or (one_group and len(matrix) == 1)):
        n_units = matrix.shape[1]
        share = wilson_interval(round(float(matrix.mean()) * n_units), n_units, level)
        return Interval(share.value, share.low, share.high, matrix.size)
    return bootstrap_mean(matrix, groups, n_resamples=n_resamples, level=level, seed=seed)


def resample_weights(
    groups: Sequence[Hashable] | Sequence[Sequence[Hashable]], n_units: int, n_resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
    """How often each unit occurs in each resample, for statistics that are no function of means; shape (R, N).

    Groups are as in `bootstrap_mean`: they are drawn with replacement, then the units within them.
    """
    return _unit_weights(_group_paths(groups, n_units), n_units, n_resamples, np.random.default_rng(seed))


def _matrix(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    matrix = np.atleast_2d(np.asarray(values, dtype=float))
    if matrix.ndim != 2 or matrix.size == 0:
        raise ScoreError(f"{name} must be a non-empty list of scores, or a table (seeds, units).")
    return matrix


def _group_paths(groups: Sequence | None, n_units: int) -> list[np.ndarray]:
    """Return the label columns, outermost first, each as codes of shape (N,)."""
    if groups is None or len(groups) == 0:
        return []
    nested = isinstance(groups[0], Sequence | np.ndarray | pd.Series) and not isinstance(groups[0], str)
    columns = [list(column) for column in (groups if nested else [groups])]
    for column in columns:
        if len(column) != n_units:
            raise ScoreError(f"There are {n_units} scores but {len(column)} group labels.")
    return [pd.factorize(np.array(column, dtype=object))[0] for column in columns]


def _unit_weights(paths: list[np.ndarray], n_units: int, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how often each unit occurs in each resample, shape (R, N).

    A node drawn k times draws its children k times over, with replacement, independently: together that is one
    multinomial of k × (number of children).
    """
    weights = np.empty((n_resamples, n_units))

    def descend(units: np.ndarray, times: np.ndarray, level: int) -> None:
        is_leaf = level == len(paths)
        labels = np.arange(len(units)) if is_leaf else pd.factorize(paths[level][units])[0]
        n_children = labels.max() + 1
        drawn = rng.multinomial(times * n_children, np.full(n_children, 1 / n_children))
        if is_leaf:
            weights[:, units] = drawn
            return
        for child in range(n_children):
            descend(units[labels == child], drawn[:, child], level + 1)

    descend(np.arange(n_units), np.ones(n_resamples, dtype=np.int64), 0)
    return weights


def _paired_means(
    matrices: Mapping[str, np.ndarray], seed_weights: np.ndarray, unit_weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean of each column in each resample, (R,): over a unit's seeds first, then over the units that all columns
    have.
    """
    by_unit, weights = {}, unit_weights
    with np.errstate(invalid="ignore"):
        for name, matrix in matrices.items():
            if len(matrix) > 1:
                measured = np.isfinite(matrix)
                matrix = (seed_weights @ np.where(measured, matrix, 0.0)) / (seed_weights @ measured.astype(float))
            by_unit[name] = matrix  # (R, N), or (1, N) of a column without seeds
            weights = np.where(np.isfinite(matrix), weights, 0.0)
        return {name: (np.nan_to_num(m) * weights).sum(axis=1) / weights.sum(axis=1) for name, m in by_unit.items()}


# --- the tidy score table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How a column of the score table is called and read.

    Attributes:
        label: name for people, with the unit.
        kind: what it measures: "text" or "subject" fidelity, "text and subject" together, or the class noun's "drift".
        is_share: True for 0/1 answers, shown in per cent.
    """

    label: str
    kind: str
    is_share: bool = False

    def show(self, value: float, sign: bool = False) -> str:
        """Write a value the way tables show it: shares in per cent, scores with three digits."""
        text = (f"{100 * value:+.1f}" if self.is_share else f"{value:+.3f}").replace("-", "−")
        return (text if sign else text.lstrip("+")) + (" %" if self.is_share and not sign else "")


METRICS: dict[str, Metric] = {
    "judge_text": Metric("Prompt shown (simulated judge)", "text", is_share=True),
    "judge_activity": Metric("Activity shown (simulated judge)", "text", is_share=True),
    "judge_pose": Metric("Right pose (simulated judge)", "text", is_share=True),
    "judge_things": Metric("Right things (simulated judge)", "text", is_share=True),
    "judge_identity": Metric("Same subject (simulated judge)", "subject", is_share=True),
    "judge_shape": Metric("Right shape (simulated judge)", "subject", is_share=True),
    "judge_class": Metric("Right class (simulated judge)", "text", is_share=True),
    "judge_place": Metric("Right place (simulated judge)", "text", is_share=True),
    "judge_accessory": Metric("Right accessory (simulated judge)", "text", is_share=True),
    "image_reward": Metric("ImageReward", "text"),
    "clip_t": Metric("CLIP-T", "text"),
    "pick_score": Metric("PickScore", "text"),
    "align_t": Metric("ALIGN-T", "text"),
    "weak_reward": Metric("Weak reward", "text"),
    "clip_i": Metric("CLIP-I", "subject"),
    "dino": Metric("DINO", "subject"),
    "subject_score": Metric("Subject in any pose", "subject"),
    "align_i": Metric("ALIGN-I", "subject"),
    "harmonic": Metric("λ-harmonic mean of ALIGN-I and ALIGN-T", "text and subject"),
    "drift": Metric("Drift of the class prompt (1 − DINO to the base model)", "drift"),
}

KEYS = ("method", "rl_seed", "subject", "prompt_id", "identifier", "image_seed")
# A unit is one noise seed of one prompt of one subject: what two methods are compared on.
UNIT = ("subject", "prompt_id", "image_seed")
METHOD_LABELS = {
    "base": "Base model",
    "dreambooth": "DreamBooth",
    "instructbooth": "InstructBooth",
    "textual_inversion": "Textual Inversion",
    "custom_diffusion": "Custom Diffusion",
    "neti": "NeTI",
    "real": "Real photos",
}


def method_label(method: str) -> str:
    """Return the method's name as people write it."""
    return METHOD_LABELS.get(method, method.replace("_", " "))


def in_method_order(methods: Sequence[str]) -> list[str]:
    """Order methods as the story goes (base, DreamBooth, InstructBooth); unknown ones follow by name."""
    known = list(METHOD_LABELS)
    return sorted(set(methods), key=lambda method: (known.index(method) if method in known else len(known), method))


def check_scores(scores: pd.DataFrame, where: str = "the score table") -> pd.DataFrame:
    """Validate a tidy score table (one row per image) and drop rows that occur twice.

    Raises:
        ScoreError: a key column is missing, there are no rows, a judge's answer is not 0 or 1, or the same image of
            the same method stands there twice with different scores.
    """
    missing = [name for name in KEYS if name not in scores.columns]
    if missing:
        raise ScoreError(f"{where} lacks the columns {', '.join(missing)}: is it a scores.csv of notebook 03_evaluate?")
    if scores.empty:
        raise ScoreError(f"{where} has no rows: run notebook 03_evaluate to the end.")
    scores = scores.copy()
    metrics = [name for name in METRICS if name in scores.columns]
    for name in ("rl_seed", "image_seed", *metrics):
        try:
            scores[name] = pd.to_numeric(scores[name])
        except (ValueError, TypeError) as error:
            raise ScoreError(f"The column {name} of {where} holds something that is not a number ({error}).") from error
        if np.isinf(scores[name].to_numpy(dtype=float)).any():
            raise ScoreError(f"The column {name} of {where} holds an infinite value.")
        if name in METRICS and METRICS[name].is_share and not scores[name].dropna().isin((0, 1)).all():
            raise ScoreError(f"The column {name} of {where} must hold 0, 1 or nothing.")
    answers = scores["identifier"].astype(str).str.strip().str.lower()
    if not answers.isin(("true", "false")).all():
        raise ScoreError(f"The column identifier of {where} must hold True or False.")
    scores["identifier"] = answers == "true"
    if "seen" in scores.columns:
        answers = scores["seen"].map(lambda answer: "" if pd.isna(answer) else str(answer).strip().lower())
        if not answers.isin(("true", "false", "")).all():
            raise ScoreError(f"The column seen of {where} must hold True, False or nothing.")
        scores["seen"] = answers.map({"true": True, "false": False}).astype("boolean")
    # The same base images may be listed once per RL seed run; they are still one set of images.
    scores = scores.drop_duplicates(subset=[*KEYS, *metrics])
    twice = scores[scores.duplicated(subset=list(KEYS), keep=False)]
    if len(twice):
        row = twice.iloc[0]
        raise ScoreError(
            f"{where} lists {row['method']}, prompt {row['prompt_id']}, image seed {row['image_seed']} (RL seed "
            f"{row['rl_seed']}) more than once with different scores: keep one evaluation of each image."
        )
    return scores.reset_index(drop=True)


def as_compared(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows the paper compares: the base model with the class prompt, the others with the identifier."""
    return scores[scores["identifier"] == (scores["method"] != "base")]


def unit_matrix(rows: pd.DataFrame, column: str, by: Sequence[str] = UNIT) -> pd.DataFrame:
    """Lay the scores of one method out as seeds × units; cells that were not measured are NaN.

    Args:
        rows: one row per image of one method, with or without a column `rl_seed`.
        column: the score.
        by: what makes a unit, outermost first.

    Returns:
        Table of shape (S, N): index `rl_seed`, columns the units (a MultiIndex named as `by`).

    Raises:
        ScoreError: a unit stands there twice under one RL seed.
    """
    rows = rows.dropna(subset=[column])
    seeds = rows["rl_seed"] if "rl_seed" in rows.columns else pd.Series(0, index=rows.index, name="rl_seed")
    keyed = pd.Series(
        rows[column].to_numpy(dtype=float),
        index=pd.MultiIndex.from_arrays([seeds, *(rows[name] for name in by)], names=["rl_seed", *by]),
    )
    if keyed.index.has_duplicates:
        twice = keyed.index[keyed.index.duplicated()][0]
        raise ScoreError(
            f"{dict(zip(keyed.index.names, twice, strict=True))} occurs more than once: nothing to pair by."
        )
    return keyed.unstack(list(by)).sort_index(axis=0).sort_index(axis=1)


def pair_up(tables: Mapping[str, pd.DataFrame], column: str, by: Sequence[str] = UNIT) -> dict[str, pd.DataFrame]:
    """Lay several methods out on the units all of them have.

    A method with one RL seed (or none) is compared with every seed of the others; methods with several seeds are
    lined up by seed.

    Returns:
        name -> table (S or 1, N) with the same units in the same order; N may be 0.
    """
    matrices = {name: unit_matrix(rows, column, by) for name, rows in tables.items()}
    shared = None
    for matrix in matrices.values():
        shared = matrix.columns if shared is None else shared.intersection(matrix.columns, sort=None)
    shared = shared.sort_values()
    seeds = sorted({seed for matrix in matrices.values() if len(matrix) > 1 for seed in matrix.index})
    return {
        name: matrix[shared].reindex(seeds) if len(matrix) > 1 else matrix[shared] for name, matrix in matrices.items()
    }


def bootstrap_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    column: str,
    by: Sequence[str] = UNIT,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a − b over images of the same prompt and the same noise, with its interval.

    Args:
        a: one row per image of one method, with `column`, the columns `by`, and `rl_seed` if it has several.
        b: the same for the method to compare with.
        column: the score.
        by: what pairs two rows, outermost first; the last is the image, the others are the groups to resample.
        n_resamples: R.
        level: share of the resampled differences inside the interval.
        seed: makes the interval repeatable.

    Returns:
        The difference, its interval, and the number of pairs.

    Raises:
        ScoreError: no row of a has its pair in b.
    """
    pairs = pair_up({"a": a, "b": b}, column, by)
    if pairs["a"].size == 0:
        raise ScoreError(
            f"No image of the two methods shares {', '.join(by)}: evaluate both on the same prompts and seeds."
        )
    matrices = {name: matrix.to_numpy() for name, matrix in pairs.items()}
    interval = bootstrap_statistic(
        matrices,
        lambda a, b: a - b,
        unit_groups(pairs["a"]),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )
    binary = all(np.isin(matrix, (0, 1)).all() for matrix in matrices.values())
    if binary and interval.low == interval.high:
        n_units = matrices["a"].shape[1]
        shares = [wilson_interval(round(float(m.mean()) * n_units), n_units, level) for m in matrices.values()]
        return newcombe_interval(*shares, interval.n)
    return interval


def unit_groups(units: pd.DataFrame) -> list[np.ndarray]:
    """Return the group labels of a table's units, outermost first: every level of the unit except the image."""
    return [units.columns.get_level_values(level).to_numpy() for level in range(units.columns.nlevels - 1)]


def summarise(
    scores: pd.DataFrame,
    by: Sequence[str] = ("method",),
    metrics: Sequence[str] | None = None,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and interval of every metric for every method (or method × prompt).

    Args:
        scores: a checked score table, usually through `as_compared`.
        by: columns that make a cell; must contain "method".
        metrics: columns to summarise; default: those of `METRICS` that hold a number.

    Returns:
        Tidy table with the columns of `by`, then metric, value, low, high, n, seeds.
    """
    names = [name for name in metrics or METRICS if name in scores.columns and scores[name].notna().any()]
    rows = []
    for cell, part in scores.groupby(list(by), sort=False):
        for name in names:
            matrix = unit_matrix(part, name)
            if matrix.size == 0:
                continue
            # Seeds with gaps (a subject trained with fewer seeds) have no full table: resample what was measured.
            if matrix.isna().to_numpy().any():
                interval = bootstrap_statistic(
                    {"x": matrix.to_numpy()}, lambda x: x, unit_groups(matrix),
                    n_resamples=n_resamples, level=level, seed=seed,
                )  # fmt: skip
            else:
                interval = mean_interval(
                    matrix.to_numpy(), unit_groups(matrix), n_resamples=n_resamples, level=level, seed=seed
                )
            labels = dict(zip(by, cell, strict=True))
            rows.append(labels | {"metric": name, **vars(interval), "seeds": len(matrix)})
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "low", "high", "n", "seeds"])
