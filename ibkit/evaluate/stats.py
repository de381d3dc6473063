"""The tidy score table: from one row an image to one number a method, with its interval (`evaluate.intervals`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError
from ibkit.evaluate.intervals import Interval, difference_interval, mean_interval


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
        """Write a value the way tables show it: shares in per cent, scores with three digits, – for an unknown one."""
        if math.isnan(value):
            return "–"
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
        level: how often the interval shall hold the truth.
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
    return difference_interval(
        pairs["a"].to_numpy(),
        pairs["b"].to_numpy(),
        unit_groups(pairs["a"]),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )


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
            interval = mean_interval(
                matrix.to_numpy(), unit_groups(matrix), n_resamples=n_resamples, level=level, seed=seed
            )
            labels = dict(zip(by, cell, strict=True))
            rows.append(labels | {"metric": name, **vars(interval), "seeds": len(matrix)})
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "low", "high", "n", "seeds"])
