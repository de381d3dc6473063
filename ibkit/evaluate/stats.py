"""The tidy score table: from one row an image to one number an arm, with its interval (`evaluate.intervals`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError
from ibkit.evaluate.arms import BASE
from ibkit.evaluate.columns import ANSWER, NUMBER, OR_NOTHING, SHARE, TEXT, WHOLE, check_columns, place
from ibkit.evaluate.intervals import Interval, difference_interval, mean_interval
from ibkit.registry import Registry


@dataclass(frozen=True)
class Metric:
    """A column of the score table.

    Attributes:
        label: name for people, with the unit.
        kind: what it measures: "text" or "subject" fidelity, "text and subject" together, or the class noun's "drift".
        is_share: True for 0/1 answers, shown in per cent.
    """

    label: str
    kind: str
    is_share: bool = False

    def show(self, value: float, sign: bool = False) -> str:
        """Format a value for tables: shares in per cent, scores with three decimals, NaN as –."""
        if math.isnan(value):
            return "–"
        text = (f"{100 * value:+.1f}" if self.is_share else f"{value:+.3f}").replace("-", "−")
        return (text if sign else text.lstrip("+")) + (" %" if self.is_share and not sign else "")


METRICS: Registry[Metric] = Registry("ibkit.metrics", "metric", {
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
    "feedback": Metric("Reward learned from feedback", "text"),
    "agreement": Metric("Feedback predicted", "text", is_share=True),
    "precision": Metric("Among true pictures (DINO, k = 3)", "quality", is_share=True),
    "clip_i": Metric("CLIP-I", "subject"),
    "dino": Metric("DINO", "subject"),
    "subject_score": Metric("Subject in any pose", "subject"),
    "align_i": Metric("ALIGN-I", "subject"),
    "harmonic": Metric("λ-harmonic mean of ALIGN-I and ALIGN-T", "text and subject"),
    "drift": Metric("Drift of the class prompt (1 − DINO to the base model)", "drift"),
})  # fmt: skip

SEEDS = ("seed", "tune_seed")  # of the personalization and of the tuning; empty where there is none
KEYS = ("arm", *SEEDS, "subject", "prompt_id", "identifier", "image_seed")
# The unit that pairs two arms: one noise seed of one prompt of one subject.
UNIT = ("subject", "prompt_id", "image_seed")
SAME = 1e-4  # two scores of one picture differ by no more, relative or absolute
NO_SEED = -1  # stands for a missing seed in an index of integers

# Use the first available metric of an axis, in this order: the judge (ground truth), then others; ImageReward last,
# since RL usually optimizes it. The order is fixed, so that no metric is chosen by its result.
PRIMARY = {
    "text": ("judge_text", "pick_score", "clip_t", "image_reward"),
    "subject": ("judge_identity", "dino", "clip_i"),
}


def metrics_in(scores: pd.DataFrame, names: Iterable[str] = METRICS) -> list[str]:
    """Those of the metrics that hold a number."""
    return [name for name in names if name in scores.columns and scores[name].notna().any()]


def primary_metrics(scores: pd.DataFrame) -> dict[str, str]:
    """Axis -> the one metric of it that claims read; an axis that was not measured is left out."""
    found = {axis: metrics_in(scores, names) for axis, names in PRIMARY.items()}
    return {axis: there[0] for axis, there in found.items() if there}


def check_scores(scores: pd.DataFrame, where: str = "the score table") -> pd.DataFrame:
    """Validate a tidy score table (one row per image) and drop rows that occur twice. A key column that is missing, no
    rows, a value that is not of its column's kind, and the same image of the same arm with different scores are each a
    ScoreError.
    """
    missing = [name for name in KEYS if name not in scores.columns]
    if missing:
        raise ScoreError(f"{where} lacks the columns {', '.join(missing)}: is it a scores.csv of notebook 03_evaluate?")
    if scores.empty:
        raise ScoreError(f"{where} has no rows: run notebook 03_evaluate to the end.")
    metrics = [name for name in METRICS if name in scores.columns]
    kinds = {"arm": TEXT, "subject": TEXT, "prompt_id": TEXT, "image_seed": WHOLE, "identifier": ANSWER}
    kinds |= {"seen": ANSWER + OR_NOTHING} | dict.fromkeys(SEEDS, WHOLE + OR_NOTHING)
    kinds |= {name: (SHARE if METRICS[name].is_share else NUMBER) + OR_NOTHING for name in metrics}
    scores = check_columns(scores, kinds, where).astype(dict.fromkeys(SEEDS, "Int64"))
    # Several evaluations may list the same images of the base model; the last bits of a score may depend on a batch.
    scores = scores.drop_duplicates(subset=[*KEYS, *metrics])
    twice = scores.duplicated(subset=list(KEYS), keep=False)
    again = scores[twice]
    first = again.groupby(list(KEYS), dropna=False, sort=False)[metrics].transform("first").to_numpy(dtype=float)
    twice[twice] = ~np.isclose(again[metrics].to_numpy(dtype=float), first, SAME, SAME, equal_nan=True).all(axis=1)
    if twice.any():
        row = scores[twice].iloc[0]
        raise ScoreError(
            f"{place(where, scores, twice)} lists {row['arm']} ({in_words(row)}), prompt {row['prompt_id']}, image "
            f"seed {row['image_seed']} more than once with different scores: keep one evaluation of each image."
        )
    scores = scores.drop_duplicates(subset=list(KEYS))
    return scores.reset_index(drop=True)


def as_compared(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows the paper compares: the base model with the class prompt, the others with the identifier."""
    return scores[scores["identifier"] == (scores["arm"] != BASE)]


def in_words(row: pd.Series) -> str:
    """The seeds of a row, for messages: "seed 0, tune_seed 3"."""
    said = [f"{name} {int(row[name])}" for name in SEEDS if name in row and pd.notna(row[name])]
    return ", ".join(said) or "untrained"


def one_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep one training of each arm, that with the smallest seeds; of one personalization where all arms share one."""
    numbers = _seed_numbers(rows)
    of_arm = numbers["seed"].groupby(rows["arm"]).agg(lambda seeds: set(seeds) - {NO_SEED})
    shared = set.intersection(*filter(None, of_arm)) if of_arm.any() else set()
    if shared:
        kept = numbers["seed"].isin((NO_SEED, min(shared)))
        rows, numbers = rows[kept], numbers[kept]
    ranks = pd.Series(numbers.groupby(list(SEEDS)).ngroup().to_numpy(), index=rows.index)
    return rows[ranks == ranks.groupby(rows["arm"]).transform("min")]


def _seed_numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """Both seeds of each row as integers, `NO_SEED` where there is none."""
    empty = pd.Series(NO_SEED, index=rows.index)
    columns = {name: rows[name].astype("Int64").fillna(NO_SEED) if name in rows else empty for name in SEEDS}
    return pd.DataFrame(columns).astype(int)


def unit_matrix(rows: pd.DataFrame, column: str, by: Sequence[str] = UNIT) -> pd.DataFrame:
    """Arrange the scores of one arm as trainings × units; cells that were not measured are NaN.

    Args:
        rows: one row per image of one arm, with or without columns `SEEDS`.
        column: the score.
        by: what makes a unit, outermost first.

    Returns:
        Table of shape (S, N): index `SEEDS` (`NO_SEED` for none), columns the units (a MultiIndex named as `by`); a
        ScoreError where a training has two rows of one unit.
    """
    rows = rows.dropna(subset=[column])
    keyed = rows.assign(**_seed_numbers(rows)).set_index([*SEEDS, *by])[column].astype(float)
    if keyed.index.has_duplicates:
        twice = dict(zip(keyed.index.names, keyed.index[keyed.index.duplicated()][0], strict=True))
        raise ScoreError(f"{twice} occurs more than once: nothing to pair by.")
    return keyed.unstack(list(by)).sort_index(axis=0).sort_index(axis=1)


def pair_up(tables: Mapping[str, pd.DataFrame], column: str, by: Sequence[str] = UNIT) -> dict[str, pd.DataFrame]:
    """Arrange several arms on the units and the personalizations that all of them have: name -> table (S or 1, N), with
    the same units in the same order; S or N may be 0.

    The base model, which has no seed, is paired with every personalization, and a personalization with every tuning of
    it. Tunings of one personalization are paired by seed; where an arm has a single one, it is paired with all others.
    """
    matrices = {name: unit_matrix(rows, column, by) for name, rows in tables.items()}
    shared = reduce(pd.Index.intersection, [matrix.columns for matrix in matrices.values()]).sort_values()
    of_arm = {name: {s: m.loc[[s]].index for s in m.index.unique(level=0)} for name, m in matrices.items()}
    trained = [set(seeds) for seeds in of_arm.values() if set(seeds) != {NO_SEED}]
    trainings = []
    for seed in sorted(set.intersection(*trained)) if trained else [NO_SEED]:
        tunings = [seeds[seed] for seeds in of_arm.values() if seed in seeds]
        lined_up = [found for found in tunings if len(found) > 1] or [max(tunings, key=max)] if tunings else []
        trainings += sorted(set().union(*lined_up))

    def on(matrix: pd.DataFrame, seeds: Mapping[int, pd.Index]) -> pd.DataFrame:
        places = []
        for training in trainings:
            there = seeds.get(training[0], seeds.get(NO_SEED))
            places.append(there[0] if len(there) == 1 else training)
        if len(set(places)) == 1:  # broadcasts
            return matrix.loc[places[:1]]
        return matrix.reindex(pd.MultiIndex.from_tuples(places, names=SEEDS)).set_axis(
            pd.MultiIndex.from_tuples(trainings, names=SEEDS)
        )

    return {
        name: on(matrix[shared], of_arm[name]) if trainings else matrix[shared].iloc[:0]
        for name, matrix in matrices.items()
    }


def n_trainings(pairs: Mapping[str, pd.DataFrame]) -> int:
    """Number of trainings behind a comparison; 0 where no trained arm takes part."""
    return max(int((matrix.index.get_level_values("seed") != NO_SEED).sum()) for matrix in pairs.values())


def bootstrap_difference(
    a: pd.DataFrame, b: pd.DataFrame, column: str, by: Sequence[str] = UNIT, level: float = 0.95
) -> Interval:
    """Mean of a − b over images of the same prompt and the same noise, its interval, and the number of pairs; a
    ScoreError where no row of a has its pair in b.

    Args:
        a, b: one row per image of one arm, with `column`, the columns `by`, and `SEEDS` if it was trained.
        column: the score.
        by: what pairs two rows, outermost first; the last is the image, the others are the groups to resample.
        level: nominal coverage of the interval.
    """
    pairs = pair_up({"a": a, "b": b}, column, by)
    if pairs["a"].size == 0:
        raise ScoreError(
            f"No image of the two arms shares {', '.join(by)}: evaluate both on the same prompts and seeds."
        )
    one, other = (table.to_numpy() for table in pairs.values())
    return difference_interval(one, other, unit_groups(pairs["a"]), seeds=seed_groups(*pairs.values()), level=level)


def unit_groups(units: pd.DataFrame) -> list[np.ndarray]:
    """Group labels of a table's units, outermost first: every level of the unit except the image."""
    return [units.columns.get_level_values(level).to_numpy() for level in range(units.columns.nlevels - 1)]


def seed_groups(*tables: pd.DataFrame) -> list[np.ndarray]:
    """Labels of the trainings of the table with the most: personalizations, and the tunings within them."""
    index = max((table.index for table in tables), key=len)
    return [index.get_level_values("seed").to_numpy(), index.map(str).to_numpy()]


def summarise(scores: pd.DataFrame, by: Sequence[str] = ("arm",), metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Mean and 95 % interval of every metric for every arm (or arm × prompt).

    Args:
        scores: a checked score table, usually through `as_compared`.
        by: columns that make a cell; must contain "arm".
        metrics: columns to summarise; default: those of `METRICS` that hold a number.

    Returns:
        Tidy table with the columns of `by`, then metric, value, low, high, n, seeds.
    """
    rows = []
    for cell, part in scores.groupby(list(by), sort=False):
        labels = dict(zip(by, cell, strict=True))
        for name in metrics_in(scores, metrics or METRICS):
            matrix = unit_matrix(part, name)
            if matrix.size:
                interval = mean_interval(matrix.to_numpy(), unit_groups(matrix), seeds=seed_groups(matrix))
                rows.append(labels | {"metric": name, **vars(interval), "seeds": len(matrix)})
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "low", "high", "n", "seeds"])
