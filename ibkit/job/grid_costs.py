"""What a grid will cost: time and disk of its cells, with what they share counted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibkit.job.cells import Cell
from ibkit.job.costs import Costs, PocketCosts, count
from ibkit.job.fit import disk_bytes
from ibkit.methods.records import METHODS, Work
from ibkit.presets import preset_of
from ibkit.runs import compared, hash_json

NOTEBOOK_BYTES = 2 * 2**20  # executed, with its figures, beside pictures and weights (measured: 0.4 to 2.3 MiB)
PIXEL_BYTES = 2  # of a PNG


@dataclass(frozen=True)
class Predicted:
    """Of the cells that are to be run.

    Attributes:
        seconds: cell -> seconds.
        longest: seconds of the longest chain of cells that need each other.
        bytes: that will be written.
        shared: a sentence about what is made once.
    """

    seconds: dict[str, float]
    longest: float
    bytes: int
    shared: str


def predicted(cells: Sequence[Cell], todo: Sequence[Cell], cost: Costs) -> Predicted:
    """Count the work of cells by their parameters; cells are in an order in which each comes after its needs."""
    names = {cell.name for cell in todo}
    seconds: dict[str, float] = {}
    ends: dict[str, float] = {}
    counted: dict[str, Work] = {}
    drawn: set[tuple[str, str]] = set()  # (subject, run) of models whose pictures there are; "" for the base model
    classes: set[tuple] = set()
    saved, size, n_pictures = 0, 0.0, 0
    pixels = (64 if isinstance(cost, PocketCosts) else 512) ** 2
    for cell in cells:
        subject, given = cell.name.partition("/")[0], cell.stage.parameters
        models = {(subject, run) for run in given["runs"]} | {(subject, "")} if "runs" in given else set()
        old = models & drawn
        sets = sum(1 if run == "" else 2 for _, run in old)
        key_of_classes = _class_pictures(cell)
        again = bool(key_of_classes) and (subject, *key_of_classes) in classes
        drawn |= models
        classes |= {(subject, *key_of_classes)} if key_of_classes else set()
        if cell.name not in names:
            continue
        kept = {name: value for name, value in compared(given).items() if name != "seed"}
        key = hash_json([cell.stage.notebook.stem, kept, len(models), sets, again])
        if key not in counted:
            counted[key] = count(cell.stage, sets, again)
        work = counted[key]
        seconds[cell.name] = cost.seconds(work)
        ends[cell.name] = seconds[cell.name] + max((ends.get(need, 0.0) for need in cell.needs), default=0.0)
        saved += len(old)
        n_pictures += work.pictures
        size += NOTEBOOK_BYTES + work.pictures / 2 * pixels * PIXEL_BYTES
        if isinstance(cost, PocketCosts) and work.trained:
            size += cost.weights
    if not isinstance(cost, PocketCosts):
        size += disk_bytes([cell.stage for cell in todo])
    shared = (
        f"made once and shared: {len(classes)} sets of class pictures, pictures of {len(drawn)} models in "
        f"{sum('runs' in cell.stage.parameters for cell in cells)} evaluations ({saved} sets of them not drawn again)"
    )
    return Predicted(seconds, max(ends.values(), default=0.0), int(size), shared)


def _class_pictures(cell: Cell) -> tuple:
    """What decides a personalization's class pictures beside its subject; () where it has none."""
    given = cell.stage.parameters
    if cell.stage.notebook.stem != "01_personalize":
        return ()
    n = METHODS[given["method"]].class_pictures(preset_of(given["model"]).settings(given["method"], given["settings"]))
    return (n, given["seed"]) if n else ()
