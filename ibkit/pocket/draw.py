"""Draw a scene of the pocket world: 64x64 pixels, rendered four times larger and averaged down.

All shapes go through a `Pen`, which maps a figure's own coordinates to canvas pixels, so a pose is a handful of numbers
and rotation costs nothing extra. The same code draws the subject's true mask: a pen in mask mode paints the subject
white and all else black in the same order, so what hides the subject hides it in the mask too.

Coordinates of a figure: feet at y = 0, up is negative, a standing character is 1 high.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ibkit.pocket.world import COLOURS, IMAGE_PX, NO_ACTIVITY, PLACES, Scene, Subject

SUPERSAMPLE = 4
OUTLINE = (36, 32, 40)
Colour = tuple[int, int, int]
Point = tuple[float, float]

_ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(c * factor) for c in colour)
    return red, green, blue


class Pen:
    """Draws polygons through an affine map; knows whether it draws the subject (for masks)."""

    def __init__(self, canvas: ImageDraw.ImageDraw, matrix: np.ndarray, mask: bool, subject: bool = False):
        self.canvas, self.matrix, self.mask, self.subject = canvas, matrix, mask, subject
        self.unit_px = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))

    def at(self, x: float, y: float, scale: float = 1.0, angle: float = 0.0, flip: bool = False) -> "Pen":
        """A pen whose origin is (x, y), turned by `angle` degrees (clockwise on screen), scaled and mirrored."""
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        sx = -scale if flip else scale
        local = np.array([[c * sx, -s * scale, x], [s * sx, c * scale, y], [0, 0, 1]])
        return Pen(self.canvas, self.matrix @ local, self.mask, self.subject)

    def as_subject(self, subject: bool = True) -> "Pen":
        return Pen(self.canvas, self.matrix, self.mask, subject)

    def _colour(self, colour: Colour | None) -> Colour | int | None:
        return (255 if self.subject else 0) if self.mask and colour else colour

    def _on_canvas(self, points, width: float) -> tuple[np.ndarray, int]:
        xy = np.asarray(points, float) @ self.matrix[:, :2].T + self.matrix[:, 2]
        return xy, max(1, round(width * self.unit_px))

    def polygon(self, points, fill: Colour, outline: Colour | None = OUTLINE, width: float = 0.022):
        xy, px = self._on_canvas(points, width)
        self.canvas.polygon(xy.ravel().tolist(), self._colour(fill), self._colour(outline), px)

    def ellipse(self, x, y, rx, ry, fill: Colour, outline: Colour | None = OUTLINE, width: float = 0.022):
        self.polygon(_CIRCLE * (rx, ry) + (x, y), fill, outline, width)

    def box(self, x0, y0, x1, y1, fill: Colour, outline: Colour | None = OUTLINE, width: float = 0.022):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline, width)

    def line(self, points: Sequence[Point], colour: Colour, width: float):
        xy, px = self._on_canvas(points, width)
        self.canvas.line(xy.ravel().tolist(), fill=self._colour(colour), width=px, joint="curve")
        for x, y in (xy[0], xy[-1]):  # round caps
            self.canvas.ellipse((x - px / 2, y - px / 2, x + px / 2, y + px / 2), fill=self._colour(colour))

    def limb(self, points: Sequence[Point], colour: Colour, width: float = 0.11):
        self.line(points, OUTLINE, width + 0.035)
        self.line(points, colour, width)


def _band(polygon: np.ndarray, low: float, high: float) -> np.ndarray:
    """The part of a convex polygon with low <= y <= high (Sutherland-Hodgman on two half-planes)."""
    points = [tuple(p) for p in polygon]
    for limit, keep in ((low, lambda y: y >= low), (high, lambda y: y <= high)):
        clipped: list[Point] = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            if keep(a[1]):
                clipped.append(a)
            if keep(a[1]) != keep(b[1]):
                f = (limit - a[1]) / (b[1] - a[1])
                clipped.append((a[0] + f * (b[0] - a[0]), limit))
        points = clipped
    return np.array(points)


def _hull(shape: str, x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """Outline of a body: round, square (rounded corners) or triangular (wide foot, narrow top)."""
    if shape == "square":
        points = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** 0.45  # a superellipse: corners without a special case
    elif shape == "triangular":
        points = np.array([(-0.16, -1.25), (0.16, -1.25), (1.25, 0.9), (1.1, 1.0), (-1.1, 1.0), (-1.25, 0.9)])
    else:
        points = _CIRCLE
    return points * (rx, ry) + (x, y)


def _body(pen: Pen, hull: np.ndarray, subject: Subject):
    """Fill a convex hull with the subject's colours and pattern."""
    body, second = COLOURS[subject.body], COLOURS[subject.second]
    pen.polygon(hull, body, None)
    centre, top, bottom = hull.mean(0), hull[:, 1].min(), hull[:, 1].max()
    if subject.pattern == "striped":
        step = (bottom - top) / 7
        for i in (1, 3, 5):
            pen.polygon(_band(hull, top + i * step, top + (i + 1) * step), second, None)
    elif subject.pattern == "spotted":
        half = np.array([np.ptp(hull[:, 0]), np.ptp(hull[:, 1])]) / 2
        for u, v in ((-0.42, -0.3), (0.38, -0.42), (0.0, 0.12), (-0.45, 0.45), (0.48, 0.42)):
            x, y = centre + half * (u, v)
            pen.ellipse(x, y, 0.062, 0.062, second, None)
    elif subject.pattern == "patched":
        pen.polygon((hull - centre) * 0.62 + centre + (0, 0.04), second, None)
    pen.line([*map(tuple, hull), tuple(hull[0])], OUTLINE, 0.022)


# --- characters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stance:
    """How a character does something: where its parts are, where it stands in the figure's frame, and how tilted.

    Hands and feet, left before right, are end points with an optional joint before them.
    """

    hands: tuple[tuple[Point, ...], tuple[Point, ...]] = (((-0.32, -0.30),), ((0.32, -0.30),))
    feet: tuple[tuple[Point, ...], tuple[Point, ...]] = (((-0.15, -0.03),), ((0.15, -0.03),))
    head: Point = (0.0, -0.79)
    asleep: bool = False
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0
    hands_in_front: bool = False


def _character(pen: Pen, subject: Subject, accessory: str, stance: Stance):
    pen = pen.as_subject()
    body, second = COLOURS[subject.body], COLOURS[subject.second]
    limb, tall = _shade(body, 0.86), subject.long_ears
    kind = subject.class_noun

    if kind == "cat":
        pen.limb([(-0.12, -0.16), (-0.36, -0.14), (-0.42, -0.36 if not tall else -0.5)], limb, 0.07)
    elif kind == "dog":
        pen.limb([(-0.14, -0.2), (-0.32, -0.3)], limb, 0.08)
    for x, foot in zip((-0.1, 0.1), stance.feet, strict=True):
        pen.limb([(x, -0.2), *foot], limb, 0.12)
        pen.ellipse(foot[-1][0], foot[-1][1], 0.075, 0.055, second)

    def arms():
        for x, hand in zip((-0.16, 0.16), stance.hands, strict=True):
            pen.limb([(x, -0.5), *hand], limb, 0.1)

    if not stance.hands_in_front:
        arms()
    width = {"round": 0.235, "square": 0.225, "triangular": 0.26}[subject.shape]
    _body(pen, _hull(subject.shape, 0, -0.37, width, 0.25), subject)
    if stance.hands_in_front:
        arms()
    _head(pen.at(*stance.head), subject, accessory, stance.asleep)
    if accessory == "scarf":
        x, y = stance.head
        cloth = (226, 36, 60)
        pen.limb([(x * 0.6 - 0.16, y + 0.22), (x * 0.6 + 0.16, y + 0.22)], cloth, 0.085)
        pen.limb([(x * 0.6 + 0.1, y + 0.24), (x * 0.6 + 0.14, y + 0.44)], cloth, 0.075)


def _head(pen: Pen, subject: Subject, accessory: str, asleep: bool):
    body, second = COLOURS[subject.body], COLOURS[subject.second]
    kind, tall = subject.class_noun, subject.long_ears
    r = 0.215
    for side in (-1, 1):
        if kind == "cat":
            tip = -0.40 if tall else -0.29
            pen.polygon([(side * 0.2, -0.08), (side * 0.2, tip), (side * 0.03, -0.19)], second)
        elif kind == "teddy bear":
            size = 0.115 if tall else 0.085
            pen.ellipse(side * 0.18, -0.17, size, size, second)
        elif kind == "monster toy":
            pen.limb([(side * 0.08, -0.15), (side * 0.17, -0.40 if tall else -0.29)], second, 0.05)
    if kind == "monster toy":
        pen.polygon(_hull("square", 0, 0, r * 1.02, r * 0.92), body)
    else:
        pen.ellipse(0, 0, r * 1.05, r * 0.97, body)
    if kind == "dog":
        drop = 0.2 if tall else 0.08
        for side in (-1, 1):
            pen.polygon(
                [(side * 0.13, -0.2), (side * 0.27, -0.12), (side * 0.29, drop), (side * 0.19, drop - 0.02)], second
            )
        pen.ellipse(0, 0.09, 0.1, 0.085, (250, 240, 225))
        pen.ellipse(0, 0.05, 0.045, 0.035, OUTLINE, None)
    elif kind == "teddy bear":
        pen.ellipse(0, 0.08, 0.095, 0.075, (250, 236, 205))
        pen.ellipse(0, 0.05, 0.032, 0.026, OUTLINE, None)
    elif kind == "cat":
        pen.polygon([(-0.035, 0.04), (0.035, 0.04), (0, 0.085)], (250, 130, 140), None)
        for side in (-1, 1):
            for dy in (0.05, 0.1):
                pen.line([(side * 0.09, dy + 0.01), (side * 0.25, dy)], (250, 250, 250), 0.016)
    elif kind == "monster toy":
        pen.box(-0.11, 0.08, 0.11, 0.14, OUTLINE, None)
        pen.polygon([(-0.08, 0.08), (-0.03, 0.08), (-0.055, 0.13)], (255, 255, 255), None)
        pen.polygon([(0.03, 0.08), (0.08, 0.08), (0.055, 0.13)], (255, 255, 255), None)
    if accessory == "sunglasses":
        for side in (-1, 1):
            pen.box(side * 0.025, -0.095, side * 0.19, 0.025, (12, 12, 16), (245, 245, 245), 0.014)
    elif asleep:
        for side in (-1, 1):
            pen.line([(side * 0.05, -0.02), (side * 0.13, -0.02)], OUTLINE, 0.028)
    elif kind == "monster toy":
        pen.ellipse(0, -0.05, 0.1, 0.09, (255, 255, 255))
        pen.ellipse(0, -0.05, 0.042, 0.042, OUTLINE, None)
    else:
        for side in (-1, 1):
            pen.ellipse(side * 0.09, -0.03, 0.05, 0.055, (255, 255, 255), None)
            pen.ellipse(side * 0.085, -0.025, 0.03, 0.036, (20, 20, 24), None)
    if accessory == "top hat":
        pen.box(-0.13, -0.44, 0.13, -0.19, (24, 24, 30), (235, 235, 235), 0.014)
        pen.box(-0.13, -0.26, 0.13, -0.2, (214, 40, 48), None)
        pen.box(-0.22, -0.2, 0.22, -0.155, (24, 24, 30), (235, 235, 235), 0.014)
    elif accessory == "crown":
        pen.polygon(
            [(-0.17, -0.15), (-0.19, -0.37), (-0.09, -0.26), (0, -0.39), (0.09, -0.26), (0.19, -0.37), (0.17, -0.15)],
            (255, 206, 30),
        )
        pen.ellipse(0, -0.21, 0.032, 0.032, (220, 30, 60), None)
    elif accessory == "party hat":
        pen.polygon([(-0.14, -0.15), (0.14, -0.15), (0, -0.5)], (64, 208, 208))
        pen.polygon([(-0.1, -0.25), (0.1, -0.25), (0.066, -0.33), (-0.066, -0.33)], (245, 70, 170), None)
        pen.ellipse(0, -0.5, 0.048, 0.048, (255, 240, 90))


@dataclass(frozen=True)
class Things:
    """What lies around a character that does something, and the place of a character that does something else there."""

    behind: Callable[[Pen], None] = lambda pen: None
    before: Callable[[Pen], None] = lambda pen: None
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0


def _soccer_ball(pen: Pen):
    ball = pen.at(0.48, -0.15)
    ball.ellipse(0, 0, 0.155, 0.155, (255, 255, 255), width=0.03)
    ball.polygon(_CIRCLE[::4] * 0.07, (20, 20, 24), None)
    for a in range(0, 20, 4):
        x, y = _CIRCLE[a] * 0.13
        ball.ellipse(x, y, 0.03, 0.03, (20, 20, 24), None)


def _wheel(
    pen: Pen,
    x: float,
    y: float,
    r: float,
    tyre: Colour = (30, 30, 34),
    hub: Colour = (205, 208, 214),
    thick: float = 0.05,
):
    pen.ellipse(x, y, r, r, tyre)
    pen.ellipse(x, y, r - thick, r - thick, hub, None)
    for a in range(0, 10, 3):
        (dx, dy) = _CIRCLE[a] * (r - thick)
        pen.line([(x - dx, y - dy), (x + dx, y + dy)], (120, 124, 132), 0.012)
    pen.ellipse(x, y, 0.03, 0.03, OUTLINE, None)


_FRAME = (28, 150, 160)


def _bike_frame(pen: Pen):
    for x in (-0.34, 0.34):
        _wheel(pen, x, -0.19, 0.2)
    pen.limb([(-0.34, -0.19), (-0.12, -0.42), (0.2, -0.42), (0.34, -0.19)], _FRAME, 0.045)
    pen.limb([(-0.12, -0.42), (0.0, -0.19), (0.2, -0.42)], _FRAME, 0.045)


def _handlebar(pen: Pen):
    pen.limb([(0.34, -0.19), (0.27, -0.56), (0.36, -0.6)], _FRAME, 0.045)


def _stove(pen: Pen):
    pen.box(-0.56, -0.3, 0.56, 0.04, (196, 200, 208))
    pen.box(-0.42, -0.2, -0.02, 0.0, (60, 64, 74))
    for x in (0.12, 0.26, 0.4):
        pen.ellipse(x, -0.2, 0.035, 0.035, (200, 40, 40), None)
    pen.box(0.1, -0.41, 0.46, -0.3, (50, 52, 60))
    pen.line([(0.46, -0.38), (0.64, -0.44)], (50, 52, 60), 0.05)
    for x, c in ((0.18, (250, 210, 70)), (0.28, (220, 60, 50)), (0.38, (90, 180, 70))):
        pen.ellipse(x, -0.42, 0.055, 0.05, c, None)
    for x in (0.2, 0.36):
        pen.line([(x, -0.56), (x + 0.04, -0.64), (x - 0.02, -0.72), (x + 0.03, -0.8)], (250, 250, 250), 0.035)


def _book(pen: Pen):
    book = pen.at(0, -0.25)
    book.polygon([(-0.36, -0.16), (0, -0.09), (0.36, -0.16), (0.36, 0.17), (0, 0.23), (-0.36, 0.17)], (176, 40, 60))
    for side in (-1, 1):
        book.polygon(
            [(0, -0.07), (side * 0.32, -0.13), (side * 0.32, 0.13), (0, 0.19)], (252, 250, 240), (150, 140, 130), 0.014
        )
        for y in (-0.04, 0.03, 0.1):
            book.line([(side * 0.06, y), (side * 0.26, y - 0.03)], (120, 116, 120), 0.018)


def _racket_and_ball(pen: Pen):
    racket = pen.at(0.33, -0.72, angle=28)
    racket.limb([(0, 0.06), (0, -0.16)], (90, 60, 40), 0.045)
    racket.ellipse(0, -0.34, 0.16, 0.2, (240, 246, 240), (200, 30, 90), 0.05)
    for d in (-0.07, 0, 0.07):
        racket.line([(d, -0.5), (d, -0.18)], (140, 150, 150), 0.012)
        racket.line([(-0.13, -0.34 + d), (0.13, -0.34 + d)], (140, 150, 150), 0.012)
    pen.ellipse(0.56, -0.42, 0.085, 0.085, (206, 240, 50))


def _bed(pen: Pen):
    pen.polygon(_hull("square", 0, -0.05, 0.68, 0.14), (120, 150, 220))
    pen.polygon(_hull("square", -0.5, -0.24, 0.16, 0.13), (250, 250, 255))


def _snores(pen: Pen):
    for x, y, s in ((-0.24, -0.74, 0.07), (0.02, -0.9, 0.085), (0.32, -1.06, 0.1)):
        pen.line([(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)], (24, 24, 70), 0.062)
        pen.line([(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)], (250, 250, 255), 0.034)


def _guitar(pen: Pen):
    guitar = pen.at(-0.06, -0.28, angle=-32)
    guitar.limb([(0.1, 0), (0.62, 0)], (96, 60, 34), 0.055)
    guitar.box(0.6, -0.055, 0.74, 0.055, (60, 36, 22))
    guitar.ellipse(-0.16, 0, 0.18, 0.17, (206, 120, 44))
    guitar.ellipse(0.07, 0, 0.13, 0.125, (206, 120, 44))
    guitar.ellipse(0.02, 0, 0.065, 0.065, (40, 24, 16), None)
    guitar.line([(-0.24, 0), (0.6, 0)], (250, 240, 220), 0.016)
    pen.limb([(-0.3, -0.4), (-0.13, -0.24)], (90, 60, 40), 0.02)


def _breaker(pen: Pen):
    outer = [(0.72, 0.1), (0.8, -0.7), (0.56, -0.98), (0.3, -0.92)]
    curl = [*outer, (0.26, -0.72), (0.46, -0.74), (0.5, -0.4), (0.2, 0.1)]
    pen.polygon(curl, (60, 160, 226), (236, 250, 255), 0.04)


def _surfboard(pen: Pen):
    board = pen.at(-0.1, -0.13, angle=-10)
    board.polygon(_CIRCLE * (0.56, 0.075), (255, 232, 90))
    board.line([(-0.44, 0), (0.44, 0)], (226, 60, 60), 0.03)
    left_crest = [(-1.2, -0.03), (-0.8, 0.02), (-0.5, -0.04), (-0.2, 0.02)]
    right_crest = [(0.1, -0.04), (0.4, 0.02), (0.8, -0.04), (1.2, 0.0)]
    pen.polygon([*left_crest, *right_crest, (1.2, 0.3), (-1.2, 0.3)], (20, 104, 190), (236, 250, 255), 0.035)


def _music(pen: Pen):
    for x, y, c in ((-0.55, -0.72, (240, 60, 160)), (0.56, -0.8, (70, 80, 240)), (0.52, -0.3, (250, 160, 20))):
        pen.ellipse(x, y, 0.07, 0.055, c)
        pen.line([(x + 0.06, y), (x + 0.06, y - 0.22), (x + 0.16, y - 0.17)], c, 0.04)


_STANCES: dict[str, Stance] = {
    NO_ACTIVITY: Stance(),
    "playing soccer": Stance(
        hands=(((-0.36, -0.58),), ((0.36, -0.56),)),
        feet=(((-0.2, 0.02),), ((0.24, -0.1), (0.36, -0.12))),
        x=-0.1,
        y=-0.02,
        angle=-10,
    ),
    "riding a bike": Stance(
        hands=(((0.2, -0.36),), ((0.4, -0.38),)),
        feet=(((-0.04, 0.1),), ((0.22, -0.06), (0.16, 0.12))),
        x=-0.08,
        y=-0.24,
        scale=0.82,
        angle=8,
        hands_in_front=True,
    ),
    "cooking a gourmet meal": Stance(
        hands=(((-0.3, -0.42),), ((0.3, -0.5), (0.36, -0.46))), x=-0.08, y=-0.12, hands_in_front=True
    ),
    "reading a book": Stance(
        hands=(((-0.32, -0.32), (-0.24, -0.24)), ((0.32, -0.32), (0.24, -0.24))),
        feet=(((-0.36, -0.04),), ((0.36, -0.04),)),
        head=(0, -0.76),
    ),
    "playing tennis": Stance(
        hands=(((-0.36, -0.2),), ((0.32, -0.62), (0.36, -0.78))),
        feet=(((-0.26, -0.02),), ((0.26, -0.02),)),
        x=-0.12,
        angle=6,
    ),
    "sleeping": Stance(
        hands=(((-0.2, -0.3),), ((0.18, -0.26),)),
        feet=(((-0.08, -0.02),), ((0.1, -0.02),)),
        asleep=True,
        x=0.47,
        y=-0.3,
        scale=0.98,
        angle=-90,
    ),
    "playing the guitar": Stance(
        hands=(((-0.34, -0.34), (-0.16, -0.26)), ((0.36, -0.48), (0.42, -0.58))),
        feet=(((-0.22, -0.02),), ((0.2, -0.02),)),
    ),
    "surfing a wave": Stance(
        hands=(((-0.42, -0.5),), ((0.42, -0.54),)),
        feet=(((-0.28, -0.02),), ((0.28, -0.02),)),
        x=-0.14,
        y=-0.17,
        scale=0.88,
        angle=-12,
    ),
    "dancing": Stance(
        hands=(((-0.34, -0.66), (-0.28, -0.92)), ((0.34, -0.66), (0.3, -0.94))),
        feet=(((-0.3, -0.2), (-0.16, -0.3)), ((0.12, 0.04),)),
        x=0.02,
        y=-0.03,
        angle=9,
    ),
}
_THINGS: dict[str, Things] = {
    NO_ACTIVITY: Things(),
    "playing soccer": Things(before=_soccer_ball, x=-0.1),
    "riding a bike": Things(_bike_frame, _handlebar, -0.08, -0.24, 0.82),
    "cooking a gourmet meal": Things(before=_stove, x=-0.08, y=-0.12),
    "reading a book": Things(before=_book),
    "playing tennis": Things(before=_racket_and_ball, x=-0.12),
    "sleeping": Things(_bed, _snores, 0.14, -0.1, 0.9),
    "playing the guitar": Things(before=_guitar),
    "surfing a wave": Things(_breaker, _surfboard, -0.14, -0.17, 0.88),
    "dancing": Things(before=_music),
}


def _draw_character(pen: Pen, scene: Scene):
    stance, things = _STANCES[scene.pose], _THINGS[scene.things]
    if scene.pose == scene.things or scene.things == NO_ACTIVITY:
        place = pen.at(stance.x, stance.y, stance.scale, stance.angle)
    elif scene.pose == "sleeping":  # on its back, with the feet at its side and not below it
        place = pen.at(stance.x, stance.y + things.y, stance.scale * things.scale, stance.angle)
    else:
        place = pen.at(things.x, things.y, things.scale, stance.angle)
    things.behind(pen)
    _character(place, scene.subject, scene.accessory, stance)
    things.before(pen)


# --- containers ------------------------------------------------------------------------------------------------


def _container(pen: Pen, subject: Subject, contents: Callable[[Pen], None] | None = None):
    pen = pen.as_subject()
    second = COLOURS[subject.second]
    pot = subject.class_noun == "pot"
    rx, ry = (0.40, 0.30) if pot else (0.25, 0.36)
    top = -2 * ry
    hull = _hull(subject.shape, 0, -ry, rx, ry)
    if subject.shape == "triangular":
        hull = np.array([(-0.45, top), (0.45, top), (1.25, -0.04), (1.1, 0), (-1.1, 0), (-1.25, -0.04)]) * (rx, 1)
        rim = 0.5 * rx
    else:
        hull = _band(hull, top + 0.1, 0.0)
        top, rim = top + 0.1, (0.92 if subject.shape == "square" else 0.75) * rx
    if pot:
        reach = 0.17 if subject.long_ears else 0.1
        for side in (-1, 1):
            near, far = side * rx * 0.8, side * (rx + reach)
            pen.limb([(near, -0.42), (far, -0.42), (far, -0.28), (near, -0.28)], second, 0.055)
    else:
        near, far, high = rx * 0.6, rx + 0.19, top + 0.14
        low = high + (0.42 if subject.long_ears else 0.28)
        pen.limb([(near, high), (far, high), (far, low), (near, low)], second, 0.06)
    if contents is not None:
        contents(pen.at(0, top).as_subject(False))
    _body(pen, hull, subject)
    pen.limb([(-rim, top), (rim, top)], second, 0.06)


def _popcorn(pen: Pen):
    for x, y in (
        (-0.2, -0.02),
        (0.2, -0.02),
        (-0.1, -0.08),
        (0.1, -0.08),
        (0, -0.04),
        (-0.16, -0.17),
        (0.15, -0.17),
        (0.0, -0.2),
        (-0.07, -0.29),
        (0.08, -0.29),
    ):
        pen.ellipse(x, y, 0.09, 0.08, (255, 246, 206), (196, 150, 60), 0.02)
        pen.ellipse(x + 0.02, y, 0.03, 0.03, (250, 206, 80), None)


def _pens(pen: Pen):
    for x, lean, c in (
        (-0.15, -14, (230, 50, 50)),
        (-0.05, -4, (40, 90, 220)),
        (0.06, 6, (40, 160, 80)),
        (0.16, 16, (250, 190, 30)),
    ):
        stick = pen.at(x, 0.05, angle=lean)
        stick.box(-0.038, -0.44, 0.038, 0, c)
        stick.polygon([(-0.038, -0.44), (0.038, -0.44), (0, -0.54)], (250, 224, 180))


def _flowers(pen: Pen):
    for x, height, c in ((-0.2, 0.3, (250, 80, 150)), (0.02, 0.42, (255, 250, 250)), (0.22, 0.3, (170, 90, 240))):
        pen.limb([(x * 0.4, 0.05), (x, -height)], (50, 150, 60), 0.035)
        for a in range(0, 20, 4):
            dx, dy = _CIRCLE[a] * 0.085
            pen.ellipse(x + dx, -height + dy, 0.065, 0.065, c, (90, 60, 90), 0.014)
        pen.ellipse(x, -height, 0.05, 0.05, (255, 210, 50), None)


def _water(pen: Pen, level: float):
    """A pool in front of whatever floats: waves from edge to edge below `level`."""
    crest = [(x, level + (0.035 if i % 2 else -0.02)) for i, x in enumerate(np.linspace(-1.1, 1.1, 12))]
    pen.polygon([*crest, (1.1, 0.6), (-1.1, 0.6)], (48, 140, 214), (220, 244, 255), 0.03)
    for y in (level + 0.12, level + 0.22):
        for x in (-0.55, 0.0, 0.5):
            pen.line([(x - 0.12, y), (x, y - 0.03), (x + 0.12, y)], (190, 230, 250), 0.03)


_CONTENTS = {"with popcorn in it": _popcorn, "with pens in it": _pens, "with flowers in it": _flowers}


def _draw_container(pen: Pen, scene: Scene):
    pen, place = pen.at(0, 0, 1.12), pen.at(0, 0, 1.12)
    floats = scene.things == "floating on the water"
    if scene.pose == "lying on its side":
        pen.ellipse(0.46, -0.02, 0.3, 0.08, (120, 190, 235), (220, 244, 255), 0.02)
        place = pen.at(-0.42, -0.38, 0.95, angle=82)
    elif floats:
        place = pen.at(0, -0.02, angle=-9)
    _container(place, scene.subject, _CONTENTS.get(scene.things))
    if floats:
        _water(pen, -0.2)


# --- vehicles --------------------------------------------------------------------------------------------------


def _vehicle(pen: Pen, subject: Subject):
    pen = pen.as_subject()
    body, second = COLOURS[subject.body], COLOURS[subject.second]
    bar = -0.86 if subject.long_ears else -0.72
    if subject.class_noun == "bike":
        for x in (-0.4, 0.4):
            _wheel(pen, x, -0.26, 0.25, tyre=second, hub=(226, 228, 232), thick=0.065)
        pen.limb([(-0.4, -0.26), (-0.18, -0.6)], body, 0.055)
        pen.limb([(0.4, -0.26), (0.26, bar), (0.38, bar - 0.03)], body, 0.055)
        _body(pen, np.array([(-0.2, -0.62), (0.3, -0.62), (0.02, -0.16), (-0.06, -0.16)]), subject)
        pen.limb([(-0.3, -0.68), (-0.1, -0.68)], second, 0.075)
    else:
        for x in (-0.42, 0.42):
            _wheel(pen, x, -0.22, 0.22, hub=second, thick=0.095)
        pen.limb([(0.42, -0.22), (0.26, -0.6), (0.16, bar), (0.04, bar - 0.02)], (150, 154, 162), 0.065)
        pen.box(-0.2, -0.34, 0.16, -0.12, (110, 114, 122))
        pen.limb([(-0.16, -0.14), (-0.56, -0.1)], (170, 174, 180), 0.06)
        hull = np.array([(-0.46, -0.46), (-0.12, -0.6), (0.24, -0.66), (0.36, -0.48), (0.2, -0.26), (-0.3, -0.26)])
        _body(pen, hull, subject)
        pen.limb([(-0.5, -0.56), (-0.14, -0.6)], second, 0.1)
        pen.ellipse(0.36, -0.6, 0.08, 0.08, (255, 244, 170))


def _boxes(pen: Pen):
    for x0, y0, s in ((-0.62, -0.9, 0.3), (-0.3, -0.88, 0.26), (-0.5, -1.14, 0.25)):
        pen.box(x0, y0, x0 + s, y0 + s, (198, 150, 92))
        pen.line([(x0 + s / 2, y0 + 0.03), (x0 + s / 2, y0 + s - 0.03)], (240, 214, 150), 0.04)


def _bubbles(pen: Pen):
    for x, y, r in (
        (-0.5, -0.66, 0.13),
        (-0.22, -0.84, 0.1),
        (0.1, -0.8, 0.14),
        (0.46, -0.86, 0.11),
        (0.56, -0.5, 0.12),
        (-0.62, -0.36, 0.1),
        (-0.1, -0.12, 0.12),
        (0.24, -0.06, 0.1),
        (-0.4, -0.02, 0.11),
        (0.58, -0.06, 0.1),
    ):
        pen.ellipse(x, y, r, r, (222, 240, 252), (120, 180, 226), 0.02)
        pen.ellipse(x - r * 0.3, y - r * 0.35, r * 0.25, r * 0.22, (255, 255, 255), None)


def _ramp(pen: Pen):
    pen.polygon([(-0.8, 0.06), (0.1, 0.06), (0.1, -0.3)], (224, 150, 60))
    for x in (-0.45, -0.15):
        pen.line([(x, 0.04), (x, -0.3 * (x + 0.8) / 0.9 + 0.06)], (150, 90, 30), 0.03)


def _draw_vehicle(pen: Pen, scene: Scene):
    pen, place = pen.at(0, 0, 1.05), pen.at(0, 0, 1.05)
    floats = scene.things == "floating on the water"
    if scene.pose == "doing a wheelie":
        place = pen.at(-0.3, -0.02).at(0, 0, angle=-40).at(0.4, 0)
    elif scene.pose == "jumping off a ramp":
        place = pen.at(0.1, -0.42, 0.82, angle=-20)
    elif floats:
        place = pen.at(0, -0.02, angle=-8)
    if scene.things == "jumping off a ramp":
        _ramp(pen)
    _vehicle(place, scene.subject)
    if scene.pose == "doing a wheelie":
        for y in (-0.12, -0.26, -0.4):
            pen.line([(-0.86, y), (-0.7, y)], (250, 250, 250), 0.035)
    if scene.things == "carrying a stack of boxes":
        _boxes(pen if scene.pose == "doing a wheelie" else place)  # they slide off a wheelie
    elif scene.things == "covered in soap bubbles":
        _bubbles(pen)
    elif floats:
        _water(pen, -0.2)


# --- places ----------------------------------------------------------------------------------------------------
# Backdrops are drawn in the unit square, y down, horizon near 0.6; `shift` in [-1, 1] moves what can move.


def _sky(pen: Pen, sky: Colour, ground: Colour, horizon: float = 0.6):
    pen.box(0, 0, 1, horizon, sky, None)
    pen.box(0, horizon, 1, 1, ground, None)


def _park(pen: Pen, shift: float):
    _sky(pen, (150, 208, 250), (126, 200, 90))
    x = 0.84 + 0.08 * shift
    pen.box(x - 0.025, 0.4, x + 0.025, 0.64, (120, 80, 50), None)
    for dx, dy in ((0, -0.06), (-0.08, 0.0), (0.08, 0.0)):
        pen.ellipse(x + dx, 0.36 + dy, 0.1, 0.1, (70, 160, 70), None)
    pen.ellipse(0.16 - 0.06 * shift, 0.14, 0.12, 0.05, (255, 255, 255), None)
    for fx in (0.08, 0.3, 0.7, 0.93):
        pen.ellipse(fx, 0.93, 0.018, 0.018, (255, 250, 160), None)


def _beach(pen: Pen, shift: float):
    _sky(pen, (170, 226, 250), (246, 220, 160), 0.66)
    pen.box(0, 0.5, 1, 0.68, (50, 170, 200), None)
    pen.line([(0, 0.68), (0.3, 0.67), (0.6, 0.69), (1, 0.67)], (250, 252, 255), 0.02)
    pen.ellipse(0.14 + 0.05 * shift, 0.15, 0.09, 0.09, (255, 224, 90), None)
    x = 0.88 + 0.06 * shift
    pen.line([(x, 0.7), (x - 0.03, 0.36)], (140, 96, 60), 0.03)
    for dx, dy in ((-0.14, 0.02), (0.12, 0.02), (-0.08, -0.1), (0.08, -0.1)):
        pen.line([(x - 0.03, 0.36), (x - 0.03 + dx, 0.36 + dy)], (50, 150, 80), 0.035)


def _kitchen(pen: Pen, shift: float):
    _sky(pen, (250, 236, 206), (206, 170, 140), 0.7)
    for i in range(7):
        pen.line([(i / 6, 0), (i / 6, 0.7)], (232, 206, 170), 0.01)
    for y in (0.16, 0.34, 0.52):
        pen.line([(0, y), (1, y)], (232, 206, 170), 0.01)
    for i in range(1, 8, 2):
        left, right = i / 8, (i + 1) / 8
        tile = [(left, 0.7), (right, 0.7), (right + (i - 3) * 0.05, 1), (left + (i - 4) * 0.05, 1)]
        pen.polygon(tile, (236, 214, 190), None)
    x = 0.14 + 0.05 * shift
    pen.box(x - 0.13, 0.08, x + 0.13, 0.32, (150, 100, 70), None)
    pen.box(x - 0.1, 0.1, x + 0.1, 0.3, (176, 126, 90), None)
    pen.box(0.74, 0.3, 1.0, 0.34, (150, 100, 70), None)
    for jx, c in ((0.8, (220, 80, 70)), (0.88, (240, 200, 80)), (0.95, (90, 160, 120))):
        pen.box(jx - 0.025, 0.22, jx + 0.025, 0.3, c, None)


def _forest(pen: Pen, shift: float):
    _sky(pen, (34, 86, 62), (58, 74, 40), 0.7)
    for i, x in enumerate((0.06, 0.24, 0.44, 0.66, 0.86, 1.0)):
        x = x + 0.05 * shift
        pen.box(x - 0.03, 0.1, x + 0.03, 0.72 + 0.03 * (i % 2), (84, 58, 40), None)
        pen.polygon([(x - 0.14, 0.36), (x + 0.14, 0.36), (x, 0.02)], (22, 64, 46) if i % 2 else (46, 110, 72), None)


def _mountains(pen: Pen, shift: float):
    _sky(pen, (206, 224, 244), (250, 252, 255), 0.64)
    for x, w, top in ((0.2, 0.32, 0.2), (0.62, 0.4, 0.1), (0.95, 0.28, 0.26)):
        x = x + 0.05 * shift
        pen.polygon([(x - w, 0.64), (x + w, 0.64), (x, top)], (120, 136, 168), None)
        half, foot = w * 0.35, top + (0.64 - top) * 0.35
        pen.polygon([(x - half, foot), (x + half, foot), (x, top)], (250, 252, 255), None)
    for x, y in ((0.1, 0.1), (0.35, 0.3), (0.8, 0.06), (0.9, 0.4), (0.5, 0.05), (0.08, 0.5)):
        pen.ellipse(x, y, 0.012, 0.012, (255, 255, 255), None)


def _city(pen: Pen, shift: float):
    _sky(pen, (196, 200, 214), (104, 106, 114), 0.72)
    for i, (x, w, top, c) in enumerate(
        (
            (0.1, 0.11, 0.16, (150, 108, 104)),
            (0.34, 0.1, 0.3, (112, 124, 150)),
            (0.58, 0.12, 0.1, (138, 130, 120)),
            (0.84, 0.13, 0.24, (96, 110, 132)),
        )
    ):
        x = x + 0.04 * shift
        pen.box(x - w, top, x + w, 0.72, c, None)
        for row in range(4):
            for col in (-0.6, 0.0, 0.6):
                middle, y = x + col * w, top + 0.05 + row * 0.11
                light = (255, 236, 150) if (row + i) % 2 else (70, 80, 100)
                pen.box(middle - 0.018, y, middle + 0.018, y + 0.05, light, None)
    for x in (0.05, 0.4, 0.75):
        pen.box(x, 0.9, x + 0.2, 0.925, (250, 240, 200), None)


def _desert(pen: Pen, shift: float):
    _sky(pen, (252, 206, 140), (226, 160, 86), 0.62)
    pen.polygon([(0, 0.7), (0.3 + 0.1 * shift, 0.52), (0.7, 0.66), (1, 0.56), (1, 1), (0, 1)], (236, 178, 104), None)
    pen.ellipse(0.8 + 0.06 * shift, 0.16, 0.09, 0.09, (255, 244, 200), None)
    x = 0.12 + 0.05 * shift
    pen.line([(x, 0.74), (x, 0.36)], (60, 130, 74), 0.06)
    pen.line([(x, 0.58), (x + 0.1, 0.56), (x + 0.1, 0.46)], (60, 130, 74), 0.045)
    pen.line([(x, 0.62), (x - 0.08, 0.6), (x - 0.08, 0.52)], (60, 130, 74), 0.045)


def _moon(pen: Pen, shift: float):
    _sky(pen, (16, 14, 40), (150, 150, 160), 0.68)
    for x, y in (
        (0.08, 0.3),
        (0.22, 0.08),
        (0.4, 0.2),
        (0.52, 0.06),
        (0.62, 0.3),
        (0.95, 0.42),
        (0.1, 0.52),
        (0.88, 0.56),
        (0.33, 0.42),
    ):
        pen.ellipse(x, y, 0.012, 0.012, (255, 255, 230), None)
    x = 0.82 + 0.07 * shift
    pen.ellipse(x, 0.18, 0.11, 0.11, (70, 130, 220), None)
    pen.ellipse(x - 0.03, 0.16, 0.045, 0.06, (90, 190, 110), None)
    for cx, cy, r in ((0.15, 0.82, 0.07), (0.85, 0.88, 0.09), (0.55, 0.95, 0.06)):
        pen.ellipse(cx + 0.04 * shift, cy, r, r * 0.4, (120, 120, 132), None)


_BACKDROPS = (_park, _beach, _kitchen, _forest, _mountains, _city, _desert, _moon)
_PLACES: dict[str, Callable[[Pen, float], None]] = dict(zip(PLACES, _BACKDROPS, strict=True))
# group -> how it is drawn, and its height as a fraction of the picture, which keeps all props inside the frame
_GROUPS: dict[str, tuple[Callable[[Pen, Scene], None], float]] = {
    "character": (_draw_character, 0.64),
    "container": (_draw_container, 0.62),
    "vehicle": (_draw_vehicle, 0.62),
}

SEVERAL = 0.46  # size of each of several subjects
_SPOTS = {
    2: ((-0.22, 0.0), (0.22, 0.0)),
    3: ((0.0, -0.37), (-0.22, 0.04), (0.22, 0.04)),
    4: ((-0.22, -0.37), (0.22, -0.37), (-0.22, 0.04), (0.22, 0.04)),
}


def _paint(scene: Scene, mask: bool) -> Image.Image:
    size = IMAGE_PX * SUPERSAMPLE
    image = Image.new("L" if mask else "RGB", (size, size))
    pen = Pen(ImageDraw.Draw(image), np.array([[size, 0.0, 0.0], [0.0, size, 0.0], [0, 0, 1]])[:2], mask)
    if not mask:
        _PLACES[scene.place](pen, scene.view.backdrop)
    view = scene.view
    draw, height = _GROUPS[scene.subject.group]
    for dx, dy, scale, flip in _standing(scene):
        draw(pen.at(0.5 + view.dx + dx, 0.9 + view.dy + dy, height * view.scale * scale, flip=view.flip ^ flip), scene)
    return image.reduce(SUPERSAMPLE)


def _standing(scene: Scene) -> list[tuple[float, float, float, bool]]:
    """(dx, dy, scale, mirrored) of each subject, from the back to the front. Several are of one size whatever their
    count, so that the size does not tell it; each stands a little off its spot, as the view decides.
    """
    if scene.count == 1:
        return [(0.0, 0.0, 1.0, False)]
    rng, standing = random.Random(f"standing {scene.view} {scene.count}"), []
    for x, y in _SPOTS[scene.count]:
        dx, dy, scale = rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), rng.uniform(0.94, 1.06)
        standing.append((x + dx, y + dy, SEVERAL * scale, rng.random() < 0.5))
    return standing


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 64x64 RGB."""
    return _paint(scene, mask=False)


def subject_mask(scene: Scene) -> Image.Image:
    """The true mask of the subject (accessories included): 64x64, 8-bit grey, 255 where the subject is."""
    return _paint(scene, mask=True)
