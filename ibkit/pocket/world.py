"""What there is in the pocket world, how a scene is sampled, and how it is said in words.

A `Scene` is the ground truth of a picture: who (a `Subject`), in which pose, among which things, where, wearing what,
seen how. An activity has a pose, things, or both; a picture shows it when every part that it has is right.
`ibkit.pocket.draw` turns it into pixels; `caption` turns it into text with varied wording.
Everything is a pure function of its arguments: the same scene gives the same pixels, the same seed the same scene.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

IMAGE_PX = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 44, 52),
    "orange": (243, 140, 34),
    "yellow": (250, 214, 62),
    "green": (64, 170, 82),
    "blue": (52, 98, 216),
    "purple": (142, 68, 190),
    "pink": (248, 150, 192),
    "brown": (132, 82, 46),
    "white": (246, 246, 244),
    "black": (44, 44, 52),
}
# pattern -> the noun that says it: "a red cat with blue stripes"
PATTERNS: dict[str, str] = {"plain": "", "striped": "stripes", "spotted": "spots", "patched": "belly"}

CHARACTERS = ("cat", "dog", "teddy bear", "monster toy")
CONTAINERS = ("pot", "cup")
VEHICLES = ("motorbike", "bike")
CLASSES = CHARACTERS + CONTAINERS + VEHICLES
GROUP_OF = (
    {c: "character" for c in CHARACTERS} | {c: "container" for c in CONTAINERS} | {c: "vehicle" for c in VEHICLES}
)

# Body shapes by group. Characters are never triangular: the word is taught by pots and cups alone, so a triangular
# character is the rare subject (the paper's Phryge, section 2.1).
SHAPES = {"character": ("round", "square"), "container": ("round", "square", "triangular"), "vehicle": ("round",)}

# activity -> (groups that can do it, ways to say it, the first being the canonical phrase)
ACTIVITIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "playing soccer": (("character",), ("playing soccer", "kicking a soccer ball")),
    "riding a bike": (("character",), ("riding a bike", "cycling on a bike")),
    "cooking a gourmet meal": (("character",), ("cooking a gourmet meal", "cooking at a stove")),
    "reading a book": (("character",), ("reading a book", "holding an open book")),
    "playing tennis": (("character",), ("playing tennis", "swinging a tennis racket")),
    "sleeping": (("character",), ("sleeping", "lying asleep")),
    "playing the guitar": (("character",), ("playing the guitar", "strumming a guitar")),
    "surfing a wave": (("character",), ("surfing a wave", "riding a surfboard")),
    "dancing": (("character",), ("dancing", "dancing to music")),
    "with popcorn in it": (("container",), ("with popcorn in it", "full of popcorn")),
    "with pens in it": (("container",), ("with pens in it", "holding some pens")),
    "with flowers in it": (("container",), ("with flowers in it", "full of flowers")),
    "lying on its side": (("container",), ("lying on its side", "tipped over")),
    "floating on the water": (("container", "vehicle"), ("floating on the water", "floating in water")),
    "doing a wheelie": (("vehicle",), ("doing a wheelie", "on its back wheel")),
    "jumping off a ramp": (("vehicle",), ("jumping off a ramp", "flying off a ramp")),
    "carrying a stack of boxes": (("vehicle",), ("carrying a stack of boxes", "loaded with boxes")),
    "covered in soap bubbles": (("vehicle",), ("covered in soap bubbles", "washed with soap bubbles")),
}
NO_ACTIVITY = "none"

# What an activity consists of where it is not both, a pose and things ("playing soccer": a kick and a ball).
_POSE_ALONE = frozenset({"lying on its side", "doing a wheelie"})
_THINGS_ALONE = frozenset(
    {
        "with popcorn in it",
        "with pens in it",
        "with flowers in it",
        "floating on the water",
        "carrying a stack of boxes",
        "covered in soap bubbles",
    }
)
PARTS: dict[str, tuple[str, ...]] = {
    activity: ("pose",) * (activity not in _THINGS_ALONE) + ("things",) * (activity not in _POSE_ALONE)
    for activity in ACTIVITIES
}

# Poses that cannot be told from rest behind the stove of "cooking a gourmet meal": it hides the legs and low hands.
_BEHIND_THE_STOVE = ("playing soccer", "riding a bike", "reading a book", "playing the guitar", "surfing a wave")

PLACES: dict[str, tuple[str, ...]] = {
    "park": ("in the park", "on the grass in a park"),
    "beach": ("at the beach", "on a sandy beach"),
    "kitchen": ("in the kitchen", "in a tiled kitchen"),
    "forest": ("in the forest", "among the trees of a forest"),
    "mountains": ("in the snowy mountains", "in the snow"),
    "city": ("in the city", "on a city street"),
    "desert": ("in the desert", "on a desert dune"),
    "moon": ("on the moon", "in space on the moon"),
}

ACCESSORIES: dict[str, tuple[str, ...]] = {
    "top hat": ("wearing a top hat",),
    "crown": ("wearing a crown", "wearing a golden crown"),
    "scarf": ("wearing a scarf",),
    "sunglasses": ("wearing sunglasses",),
    "party hat": ("wearing a party hat",),
}
NO_ACCESSORY = "none"

# Pairs the diffusion model never saw in pre-training (the scorers and the judge did): what "unseen" means here.
HELD_OUT = frozenset(
    {
        ("cat", "playing tennis"),
        ("dog", "reading a book"),
        ("teddy bear", "riding a bike"),
        ("monster toy", "cooking a gourmet meal"),
        ("pot", "with pens in it"),
        ("cup", "with flowers in it"),
        ("motorbike", "carrying a stack of boxes"),
        ("bike", "doing a wheelie"),
    }
)

# Tokens of the vocabulary that no caption ever uses: the unique identifiers ("[V]" in DreamBooth).
IDENTIFIERS = ("sks", "ohwx", "zwx")


@dataclass(frozen=True)
class Subject:
    """One individual: the instance that a personalization method has to learn."""

    class_noun: str
    body: str
    second: str
    pattern: str
    shape: str = "round"
    long_ears: bool = False  # ears and limbs of a character, handle of a cup, handlebar of a bike: long or short

    def __post_init__(self):
        if self.class_noun not in CLASSES:
            raise ValueError(f"unknown class {self.class_noun!r}: choose one of {', '.join(CLASSES)}")
        if self.body not in COLOURS or self.second not in COLOURS or self.body == self.second:
            raise ValueError(
                f"body {self.body!r} and second colour {self.second!r} "
                f"must be two different colours of {', '.join(COLOURS)}"
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {self.pattern!r}: choose one of {', '.join(PATTERNS)}")

    @property
    def group(self) -> str:
        return GROUP_OF[self.class_noun]


@dataclass(frozen=True)
class View:
    """Nuisances of a picture: where the subject stands, how large, which way it faces, and the backdrop's shift."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    flip: bool = False
    backdrop: float = 0.0  # in [-1, 1]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `Scene(subject, **doing("playing soccer"))` has both parts of an activity.

    Attributes:
        pose: the activity whose pose the subject has, or none: at rest.
        things: the activity whose things are there, or none.
    """

    subject: Subject
    pose: str = NO_ACTIVITY
    things: str = NO_ACTIVITY
    place: str = "park"
    accessory: str = NO_ACCESSORY
    view: View = field(default_factory=View)

    def __post_init__(self):
        possible = activities_of(self.subject.class_noun)
        for part, activity in (("pose", self.pose), ("things", self.things)):
            if activity == NO_ACTIVITY:
                continue
            if activity not in possible:
                raise ValueError(
                    f"a {self.subject.class_noun} cannot be {activity!r}: choose one of {', '.join(possible)}"
                )
            if part not in PARTS[activity]:
                raise ValueError(f"{activity!r} has no {part} of its own: it is {' and '.join(PARTS[activity])} alone")
        if self.place not in PLACES:
            raise ValueError(f"unknown place {self.place!r}: choose one of {', '.join(PLACES)}")
        if self.accessory not in accessories_of(self.subject.class_noun):
            raise ValueError(f"a {self.subject.class_noun} cannot wear {self.accessory!r}")

    @property
    def shown(self) -> tuple[str, ...]:
        """The activities of which every part is there, see `shown_by`."""
        return shown_by(self.pose, self.things)

    @property
    def activity(self) -> str:
        """The activity that is shown (the one of the pose, if there are two), or none."""
        return self.shown[0] if self.shown else NO_ACTIVITY

    @property
    def is_mixture(self) -> bool:
        """Whether pose and things are neither of one activity nor both absent."""
        return (self.pose, self.things) != tuple(doing(self.activity).values())


def shown_by(pose: str, things: str) -> tuple[str, ...]:
    """The activities that a pose among things shows whole: none, one, or both of a wheelie with boxes."""
    facts = {"pose": pose, "things": things}
    return tuple(
        activity
        for activity in dict.fromkeys(facts.values())
        if activity != NO_ACTIVITY and all(facts[part] == activity for part in PARTS[activity])
    )


def doing(activity: str) -> dict[str, str]:
    """The facts of a scene in which a whole activity goes on: `Scene(subject, **doing("dancing"))`."""
    parts = PARTS.get(activity, ())
    if not parts and activity != NO_ACTIVITY:
        raise ValueError(f"unknown activity {activity!r}: choose one of {', '.join(ACTIVITIES)}")
    return {part: activity if part in parts else NO_ACTIVITY for part in ("pose", "things")}


def activities_of(class_noun: str, with_none: bool = False) -> tuple[str, ...]:
    """Activities and interactions that a class can do, in a fixed order."""
    group = GROUP_OF[class_noun]
    found = tuple(name for name, (groups, _) in ACTIVITIES.items() if group in groups)
    return ((NO_ACTIVITY,) if with_none else ()) + found


def accessories_of(class_noun: str) -> tuple[str, ...]:
    """Accessories that a class can wear ("none" included, first); only characters dress."""
    return (NO_ACCESSORY, *ACCESSORIES) if GROUP_OF[class_noun] == "character" else (NO_ACCESSORY,)


def sample_subject(rng: random.Random, class_noun: str | None = None) -> Subject:
    class_noun = class_noun or rng.choice(CLASSES)
    body, second = rng.sample(list(COLOURS), 2)
    return Subject(
        class_noun,
        body,
        second,
        rng.choice(list(PATTERNS)),
        rng.choice(SHAPES[GROUP_OF[class_noun]]),
        rng.random() < 0.5,
    )


def sample_view(rng: random.Random) -> View:
    return View(
        rng.uniform(-0.07, 0.07),
        rng.uniform(-0.03, 0.02),
        rng.uniform(0.9, 1.06),
        rng.random() < 0.5,
        rng.uniform(-1, 1),
    )


def sample_scene(
    rng: random.Random,
    subject: Subject | None = None,
    activity: str | None = None,
    place: str | None = None,
    accessory: str | None = None,
    held_out: bool = True,
) -> Scene:
    """Draw a scene; what is given is kept, the rest is random.

    Args:
        held_out: whether the held-out (class, activity) pairs may appear (False for the diffusion model's pre-
            training).
    """
    subject = subject or sample_subject(rng)
    if activity is None:
        choices = activities_of(subject.class_noun)
        choices = [a for a in choices if held_out or (subject.class_noun, a) not in HELD_OUT]
        activity = NO_ACTIVITY if rng.random() < 0.2 else rng.choice(choices)
    if accessory is None:
        worn = accessories_of(subject.class_noun)
        accessory = rng.choice(worn[1:]) if len(worn) > 1 and rng.random() < 0.3 else NO_ACCESSORY
    place = place or rng.choice(list(PLACES))
    return Scene(subject, **doing(activity), place=place, accessory=accessory, view=sample_view(rng))


def mixtures_of(class_noun: str) -> dict[str, list[tuple[str, str]]]:
    """Every (pose, things) of a class that is neither one activity nor rest, by kind.

    The kinds are `pose without things`, `things at rest` (without the pose), and `another pose` (of one activity among
    the things of another). A pose or things that make a whole activity alone are in no mixture of the first two kinds;
    a pose that things would hide is in none with them.
    """
    able = activities_of(class_noun)
    poses, things = ([a for a in able if part in PARTS[a]] for part in ("pose", "things"))
    both = [a for a in able if len(PARTS[a]) == 2]
    hidden = {(pose, "cooking a gourmet meal") for pose in _BEHIND_THE_STOVE}
    return {
        "pose without things": [(a, NO_ACTIVITY) for a in both],
        "things at rest": [(NO_ACTIVITY, a) for a in both],
        "another pose": [(a, b) for a in poses for b in things if a != b and (a, b) not in hidden],
    }


def sample_mixture(rng: random.Random, subject: Subject | None = None, kind: str | None = None, **given) -> Scene:
    """Draw a scene whose pose and things do not belong together; what is given is kept (see `sample_scene`).

    Args:
        kind: of `mixtures_of`; None draws one that the class has. Containers have no pose with things of its own.
    """
    subject = subject or sample_subject(rng)
    kinds = {name: pairs for name, pairs in mixtures_of(subject.class_noun).items() if pairs}
    if kind is not None and kind not in kinds:
        raise ValueError(f"a {subject.class_noun} has no mixture {kind!r}: choose one of {', '.join(kinds)}")
    pose, things = rng.choice(kinds[kind or rng.choice(list(kinds))])
    return replace(sample_scene(rng, subject, NO_ACTIVITY, **given), pose=pose, things=things)


def line_up(subject: Subject, n: int = 8) -> list[Subject]:
    """The subject and `n - 1` others of its class for an identity parade; the subject comes first.

    Any two of them differ in at least two of body colour, second colour, pattern and shape, one of the two being a
    colour (a book can hide a pattern);
    two of the others share the subject's body colour, so that this colour alone does not settle the question.
    Deterministic in the subject.
    """
    rng = random.Random(f"line-up {subject}")
    chosen = [subject]

    def distinct(a: Subject, b: Subject) -> bool:
        colours = (a.body != b.body) + (a.second != b.second)
        return colours >= 1 and colours + (a.pattern != b.pattern) + (a.shape != b.shape) >= 2

    while len(chosen) < n:
        other = sample_subject(rng, subject.class_noun)
        if len(chosen) <= 2:
            if other.second == subject.body:
                continue
            other = replace(other, body=subject.body)
        if all(distinct(other, c) for c in chosen):
            chosen.append(other)
    return chosen


RARE_SUBJECT = Subject("monster toy", "red", "white", "patched", "triangular", long_ears=False)
RARE_DESCRIPTION = "triangular"

# The evaluation's own eight individuals, one of each class (InstructBooth, appendix C).
DEMO_SUBJECTS: dict[str, Subject] = {
    "cat": Subject("cat", "orange", "purple", "striped", "round", True),
    "dog": Subject("dog", "brown", "white", "spotted", "square", False),
    "teddy bear": Subject("teddy bear", "pink", "blue", "patched", "round", False),
    "monster toy": Subject("monster toy", "green", "red", "spotted", "square", True),
    "pot": Subject("pot", "blue", "yellow", "striped", "round", False),
    "cup": Subject("cup", "red", "white", "spotted", "square", True),
    "motorbike": Subject("motorbike", "purple", "yellow", "striped", "round", True),
    "bike": Subject("bike", "yellow", "black", "plain", "round", False),
}


def reference_scenes(subject: Subject, n: int = 5, seed: int = 0) -> list[Scene]:
    """Scenes of the few photos that a user has of a subject: at rest, in two places, nothing worn."""
    rng = random.Random(f"references {subject} {seed}")
    places = rng.sample(list(PLACES), 2)
    return [sample_scene(rng, subject, NO_ACTIVITY, places[i % 2], NO_ACCESSORY) for i in range(n)]
