"""The reward guard: it watches what the reward does not see, warns, stops in time, and keeps the best policy.

RL raises the number that it is given. Two others tell whether the pictures got better: subject fidelity, and a text
scorer that nobody optimises. Both are cosines, so RPO's λ-harmonic mean can hold them together (arXiv 2407.12164):

    frontier = 1 / (λ / I + (1 - λ) / T),  I = (subject cosine + 1) / 2,  T = (text cosine + 1) / 2

Single epochs are noisy; everything here compares means over a window of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

SUBJECT, TEXT = "monitor", "text_monitor"  # columns of the history: cosines, see `ibkit.monitor.SubjectMonitor`


def harmonic(subject: float, text: float, weight: float) -> float:
    """λ-harmonic mean of two numbers in (0, 1], `weight` = λ on the subject; 0 where one of them is not positive."""
    if min(subject, text) <= 0:
        return 0.0
    return 1.0 / (weight / subject + (1.0 - weight) / text)


def change(before: Sequence[float], after: Sequence[float]) -> float:
    """By how many standard errors the mean of `after` lies above that of `before` (Welch's t); each at least two."""
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    difference = fmean(after) - fmean(before)
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


@dataclass(frozen=True)
class Guard:
    """Settings of the guard.

    Attributes:
        weight: λ, the subject's weight in the frontier; RPO validates with 0.3, 0.5 and 0.7.
        window: epochs in a mean.
        patience: epochs without a better frontier before the training stops and returns the best policy, the one
            that drew the last pictures of the best window; 0 = never, and the training returns its last.
        certainty: standard errors by which a mean must have moved before the alarm believes it.
    """

    weight: float = 0.5
    window: int = 8
    patience: int = 0
    certainty: float = 3.0

    def look(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """What to add to the newest row of the history.

        Returns:
            `frontier` of the newest window, once it is full, where both cosines are watched; and `alarm`: 1 when,
            between the first window and the newest, the reward has risen and a watched number has fallen; else 0.
        """
        numbers = {}
        subject, text = (_values(history[-self.window :], column) for column in (SUBJECT, TEXT))
        if subject and text and len(history) >= self.window:
            numbers["frontier"] = harmonic((fmean(subject) + 1) / 2, (fmean(text) + 1) / 2, self.weight)
        return numbers | {"alarm": float(bool(self.fallen(history)))}

    def fallen(self, history: Sequence[dict[str, float]]) -> list[str]:
        """The watched columns that have fallen while the reward has risen; none before two windows are full."""
        if len(history) < 2 * self.window or self._moved(history, "reward") < self.certainty:
            return []
        return [column for column in (SUBJECT, TEXT) if self._moved(history, column) < -self.certainty]

    def best(self, history: Sequence[dict[str, float]]) -> int:
        """Index of the row with the best frontier; of the newest row while there is none."""
        rows = [i for i, row in enumerate(history) if "frontier" in row]
        return max(rows, key=lambda i: history[i]["frontier"], default=len(history) - 1)

    def gives_up(self, history: Sequence[dict[str, float]]) -> bool:
        """Whether patience has run out."""
        return self.patience > 0 and len(history) - 1 - self.best(history) >= self.patience

    def _moved(self, history: Sequence[dict[str, float]], column: str) -> float:
        before, after = (_values(rows, column) for rows in (history[: self.window], history[-self.window :]))
        return change(before, after) if min(len(before), len(after)) > 1 else 0.0


def _values(rows: Sequence[dict[str, float]], column: str) -> list[float]:
    """A column's numbers; an epoch without a picture of the subject has none."""
    return [row[column] for row in rows if column in row]
