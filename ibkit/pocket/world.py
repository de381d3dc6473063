"""What exists in the pocket world, and how scenes are sampled.

A `Scene` is the ground truth of a picture: its `Subject`, pose, things, place, accessory and view. An activity has a
pose, things, or both; a picture shows it when every part that it has is right. `ibkit.pocket.draw` renders a scene, and
`ibkit.pocket.words` describes it. Everything is a pure function of its arguments: the same scene gives the same pixels,
the same seed the same scene.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TypedDict

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
# pattern -> its noun in a caption: "a red cat with blue stripes"
PATTERNS: dict[str, str] = {"plain": "", "striped": "stripes", "spotted": "spots", "patched": "belly"}

CHARACTERS = ("cat", "dog", "teddy bear", "monster toy")
CONTAINERS = ("pot", "cup")
VEHICLES = ("motorbike", "bike")
CLASSES = CHARACTERS + CONTAINERS + VEHICLES
GROUP_OF = dict.fromkeys(CHARACTERS, "character") | dict.fromkeys(CONTAINERS, "container")
GROUP_OF |= dict.fromkeys(VEHICLES, "vehicle")

# Body shapes by group. Characters are never triangular: the word is taught by pots and cups alone, so a triangular
# character is the rare subject (the paper's Phryge, section 2.1).
SHAPES = {"character": ("round", "square"), "container": ("round", "square", "triangular"), "vehicle": ("round",)}

# activity, its canonical phrase -> (groups that can do it, ways to say it with the canonical one first)
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

# What an activity consists of: a pose and things ("playing soccer": a kick and a ball), or one of them alone.
PARTS: dict[str, tuple[str, ...]] = dict.fromkeys(ACTIVITIES, ("pose", "things"))
PARTS |= dict.fromkeys(("lying on its side", "doing a wheelie"), ("pose",))
PARTS |= dict.fromkeys(("with popcorn in it", "with pens in it", "with flowers in it"), ("things",))
PARTS |= dict.fromkeys(("floating on the water", "carrying a stack of boxes", "covered in soap bubbles"), ("things",))

# Poses that look like rest behind the stove of "cooking a gourmet meal", which hides the legs and low hands.
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

COUNTS = (1, 2, 3, 4)  # subjects of a scene

# The "unseen" pairs: pre-training never showed them to the diffusion model, but to the scorers and the judge.
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

# The unique identifiers ("[V]" in DreamBooth): tokens of the vocabulary that no caption uses.
IDENTIFIERS = ("sks", "ohwx", "zwx")


def _require(found: str, known: Collection[str], wrong: str) -> None:
    if found not in known:
        raise ValueError(f"{wrong}: choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Subject:
    """One individual: the instance that a personalization method has to learn. An impossible one is a ValueError."""

    class_noun: str
    body: str
    second: str
    pattern: str
    shape: str = "round"
    long_ears: bool = False  # ears and limbs of a character, handle of a cup, handlebar of a bike: long or short

    def __post_init__(self):
        _require(self.class_noun, CLASSES, f"unknown class {self.class_noun!r}")
        if self.body not in COLOURS or self.second not in COLOURS or self.body == self.second:
            raise ValueError(
                f"body {self.body!r} and second colour {self.second!r} "
                f"must be two different colours of {', '.join(COLOURS)}"
            )
        _require(self.pattern, PATTERNS, f"unknown pattern {self.pattern!r}")

    @property
    def group(self) -> str:
        return GROUP_OF[self.class_noun]


@dataclass(frozen=True)
class View:
    """Nuisances of a picture: position, size and direction of the subject, and the shift of the backdrop."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    flip: bool = False
    backdrop: float = 0.0  # in [-1, 1]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `Scene(subject, **doing("playing soccer"))`. An impossible one is a ValueError.

    Attributes:
        pose: the activity whose pose the subject has, or none: at rest.
        things: the activity whose things are there, or none.
        count: how many there are of the subject, all looking alike; several are at rest and wear nothing.
    """

    subject: Subject
    pose: str = NO_ACTIVITY
    things: str = NO_ACTIVITY
    place: str = "park"
    accessory: str = NO_ACCESSORY
    view: View = field(default_factory=View)
    count: int = 1

    def __post_init__(self):
        noun = self.subject.class_noun
        for part, activity in (("pose", self.pose), ("things", self.things)):
            if activity == NO_ACTIVITY:
                continue
            _require(activity, activities_of(noun), f"a {noun} cannot be {activity!r}")
            if part not in PARTS[activity]:
                raise ValueError(f"{activity!r} has no {part} of its own: it is {' and '.join(PARTS[activity])} alone")
        _require(self.place, PLACES, f"unknown place {self.place!r}")
        _require(self.accessory, accessories_of(noun), f"a {noun} cannot wear {self.accessory!r}")
        if self.count not in COUNTS:
            raise ValueError(
                f"a scene cannot have {self.count!r} subjects: choose one of {', '.join(map(str, COUNTS))}"
            )
        if self.count > 1 and (self.pose, self.things, self.accessory) != (NO_ACTIVITY, NO_ACTIVITY, NO_ACCESSORY):
            raise ValueError("several subjects are at rest and wear nothing: leave out activity and accessory")

    @property
    def shown(self) -> tuple[str, ...]:
        """See `shown_by`."""
        return shown_by(self.pose, self.things)

    @property
    def activity(self) -> str:
        """The activity that is shown (the one of the pose, if there are two), or none."""
        return self.shown[0] if self.shown else NO_ACTIVITY


def shown_by(pose: str, things: str) -> tuple[str, ...]:
    """The activities of which a pose among things shows every part: none, one, or both of a wheelie with boxes."""
    facts = {"pose": pose, "things": things}
    return tuple(
        activity
        for activity in dict.fromkeys(facts.values())
        if activity != NO_ACTIVITY and all(facts[part] == activity for part in PARTS[activity])
    )


class Doing(TypedDict):
    """The parts of a scene that make its activity."""

    pose: str
    things: str


def doing(activity: str) -> Doing:
    """The parts of a whole activity, ValueError if there is none: `Scene(subject, **doing("dancing"))`."""
    if activity != NO_ACTIVITY:
        _require(activity, ACTIVITIES, f"unknown activity {activity!r}")
    pose, things = (activity if part in PARTS.get(activity, ()) else NO_ACTIVITY for part in ("pose", "things"))
    return Doing(pose=pose, things=things)


def keeping(scene: Scene, *parts: str) -> Scene:
    """The scene with only these parts of its activity: "pose", "things", or none for rest."""
    pose, things = (getattr(scene, part) if part in parts else NO_ACTIVITY for part in ("pose", "things"))
    return replace(scene, pose=pose, things=things)


def activities_of(class_noun: str, with_none: bool = False) -> tuple[str, ...]:
    """Activities and interactions that a class can do, in a fixed order."""
    able = tuple(name for name, (groups, _) in ACTIVITIES.items() if GROUP_OF[class_noun] in groups)
    return (NO_ACTIVITY, *able) if with_none else able


def accessories_of(class_noun: str) -> tuple[str, ...]:
    """Accessories that a class can wear ("none" included, first); only characters dress."""
    return (NO_ACCESSORY, *ACCESSORIES) if GROUP_OF[class_noun] == "character" else (NO_ACCESSORY,)


def sample_subject(rng: random.Random, class_noun: str | None = None) -> Subject:
    class_noun = class_noun or rng.choice(CLASSES)
    body, second = rng.sample(list(COLOURS), 2)
    pattern, shape = rng.choice(list(PATTERNS)), rng.choice(SHAPES[GROUP_OF[class_noun]])
    return Subject(class_noun, body, second, pattern, shape, long_ears=rng.random() < 0.5)


def sample_view(rng: random.Random) -> View:
    dx, dy, scale = rng.uniform(-0.07, 0.07), rng.uniform(-0.03, 0.02), rng.uniform(0.9, 1.06)
    return View(dx, dy, scale, flip=rng.random() < 0.5, backdrop=rng.uniform(-1, 1))


def sample_scene(
    rng: random.Random,
    subject: Subject | None = None,
    activity: str | None = None,
    place: str | None = None,
    accessory: str | None = None,
    held_out: bool = True,
) -> Scene:
    """Draw a scene: what is given is kept, the rest is random; without `held_out`, no pair of `HELD_OUT` is drawn."""
    subject = subject or sample_subject(rng)
    if activity is None:
        noun = subject.class_noun
        choices = [a for a in activities_of(noun) if held_out or (noun, a) not in HELD_OUT]
        activity = NO_ACTIVITY if rng.random() < 0.2 else rng.choice(choices)
    if accessory is None:
        worn = accessories_of(subject.class_noun)
        accessory = rng.choice(worn[1:]) if len(worn) > 1 and rng.random() < 0.3 else NO_ACCESSORY
    place = place or rng.choice(list(PLACES))
    return Scene(subject, **doing(activity), place=place, accessory=accessory, view=sample_view(rng))


def sample_counted(rng: random.Random, count: int | None = None) -> Scene:
    """Draw a scene of one to four subjects at rest that look alike; a count that is given is kept."""
    scene = sample_scene(rng, None, NO_ACTIVITY, None, NO_ACCESSORY)
    return replace(scene, count=count or rng.choice(COUNTS))


def mixtures_of(class_noun: str) -> dict[str, list[tuple[str, str]]]:
    """Every (pose, things) of a class that is neither one activity nor rest, by kind.

    The kinds are `pose without things`, `things at rest` (without the pose), and `another pose` (of one activity among
    the things of another). The first two leave out a pose or things that make a whole activity alone, the third a pose
    that the things would hide.
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

    `kind` is of `mixtures_of`; None draws one. A kind of which the class has no mixture is a ValueError.
    """
    subject = subject or sample_subject(rng)
    kinds = {name: pairs for name, pairs in mixtures_of(subject.class_noun).items() if pairs}
    kind = kind or rng.choice(list(kinds))
    _require(kind, kinds, f"a {subject.class_noun} has no mixture {kind!r}")
    pose, things = rng.choice(kinds[kind])
    return replace(sample_scene(rng, subject, NO_ACTIVITY, **given), pose=pose, things=things)


def line_up(subject: Subject, n: int = 8) -> list[Subject]:
    """The subject and `n - 1` others of its class for an identity parade; the subject comes first.

    Any two differ in at least one colour and in two of body colour, second colour, pattern and shape, since a book can
    hide a pattern. Two of the others share the subject's body colour, so that it alone does not settle the question.
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
