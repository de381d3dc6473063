"""Arms of a comparison, their labels and looks: an arm is a chain of methods, such as "dreambooth+ddpo".

"base" is the base model alone, "real" the subject's own photos.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

BASE, REAL = "base", "real"
# Labels that no record of `METHODS` has: of the base model and the photos, the paper's name for a chain.
LABELS = {
    BASE: "Base model",
    "dreambooth+ddpo": "InstructBooth",
    "lora_dreambooth+ddpo": "InstructBooth (LoRA)",
    REAL: "Real photos",
}
# Okabe and Ito's palette, a grey for the base model first, brown for black (which is the ink of the text). Any two
# differ by at least 15 (CIELAB) under each of the three colour blindnesses; a test computes it.
COLOURS = ("#5b5f66", "#d55e00", "#0072b2", "#cc79a7", "#009e73", "#e69f00", "#56b4e9", "#602000")
MARKERS = ("s", "^", "o", "D", "P", "X", "v", "p")
HATCHES = ("", "///", "...", "xx")
GREY, ORANGE, BLUE, PINK, GREEN = COLOURS[:5]  # for figures that compare other things than arms
FIXED = (BASE, "dreambooth", "dreambooth+ddpo", "textual_inversion", "custom_diffusion", "neti")  # keep their place


@dataclass(frozen=True)
class Arm:
    """An arm as tables and figures show it.

    Attributes:
        name: the chain of methods, joined by "+".
        label: for people.
        order: its place among the others.
        colour, marker: of points and lines; no two arms of a figure share both.
        hatch: of bars, which have no marker.
    """

    name: str
    label: str
    order: int
    colour: str
    marker: str
    hatch: str


def label_of(name: str) -> str:
    """The label of an arm, or of one method of a chain."""
    from ibkit.methods.records import METHODS  # imports PyTorch, which a rating page does without

    if name in LABELS:
        return LABELS[name]
    if "+" in name:
        return " + ".join(map(label_of, name.split("+")))
    return METHODS[name].label if name in METHODS else name.replace("_", " ")


def arms_of(names: Iterable[str]) -> dict[str, Arm]:
    """The arms of a figure or table by name, in order: the base model, each chain after what it started from, photos.

    Colours and markers go by place: arms of `FIXED` keep theirs everywhere; the others take, in order, what is left.
    """
    from ibkit.methods.records import METHODS

    known = [BASE, *METHODS, *LABELS]

    def place(name: str) -> tuple:
        stages = [(known.index(stage) if stage in known else len(known), stage) for stage in name.split("+")]
        return name == REAL, stages

    ordered = sorted(set(names), key=place)
    looks = itertools.count()
    free = (i for i in looks if i >= len(FIXED) or FIXED[i] not in ordered)
    found = {}
    for order, name in enumerate(ordered):
        look = FIXED.index(name) if name in FIXED else next(free)
        turn, colour = divmod(look, len(COLOURS))
        # Each turn through the colours shifts the markers by one, so that no pair of both comes twice.
        marker = MARKERS[(colour + turn) % len(MARKERS)]
        found[name] = Arm(name, label_of(name), order, COLOURS[colour], marker, HATCHES[turn % len(HATCHES)])
    return found
