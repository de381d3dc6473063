"""Progress of a long loop: plain lines for a terminal and a log, one line that is written over in Jupyter."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

SESSION = "JPY_SESSION_NAME"  # Jupyter's server tells it to the kernels that it starts; a batch starts its own


class Progress:
    """Print one line about every ten seconds: `train 12/40  reward -0.21  clip 0.31  3 min 10 s left`.

    In a notebook that somebody looks at, each line takes the place of the one before, and they come every second.
    The time left is estimated from the speed since the first `update`, so it is right in a resumed loop too.

    Args:
        total: number of steps in all, including those before a resume.
        every_s: least seconds between two lines; the first and the last step are always printed.
        clock: gives seconds.
    """

    def __init__(self, label: str, total: int, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self.label = label
        self.total = total
        self._over = watched()
        self.every_s = min(every_s, 1.0) if self._over else every_s
        self._clock = clock
        self._started = clock()
        self._first: tuple[float, int] | None = None  # time of the first update, and how many steps were done by then
        self._printed: float | None = None
        self._length = 0

    def update(self, done: int, **numbers: Any) -> None:
        """Report that `done` steps are done.

        Args:
            numbers: to show beside it, in three digits, or texts; `_` in a name becomes a space.
        """
        now = self._clock()
        if self._first is None:
            self._first = now, done
        is_last = done >= self.total
        if self._printed is not None and now - self._printed < self.every_s and not is_last:
            return
        self._printed = now
        parts = [f"{self.label} {done}/{self.total}"]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in numbers.items()]
        first_s, first_done = self._first
        if is_last:
            parts.append(f"took {duration(now - self._started)}")
        elif done > first_done:
            parts.append(f"{duration((now - first_s) / (done - first_done) * (self.total - done))} left")
        line = "  ".join(parts)
        if self._over:  # spaces over what is left of a longer line before
            line, self._length = f"\r{line.ljust(self._length)}", len(line)
        print(line, end="\n" if is_last or not self._over else "", flush=True)


def watched() -> bool:
    """Whether this is the kernel of a notebook that is open in Jupyter."""
    return "ipykernel" in sys.modules and SESSION in os.environ


def duration(seconds: float) -> str:
    """Write a duration: 4.21 -> "4.2 s", 42 -> "42 s", 312 -> "5 min 12 s", 7500 -> "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _short(value: Any) -> str:
    return str(value) if isinstance(value, (int, str)) else f"{float(value):.3g}"
