"""Feedback in the pocket world: prompts of count, colour, background or all three, who answers, simulated raters.

The kinds of prompt and their rule-made alternatives are those of Lee et al. 2023 (section 4.1), with one to four
subjects (there: six), ten colours (nine) and eight places (eight backgrounds).
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from ibkit.errors import ParameterError
from ibkit.pocket.words import NUMBERS, article, counted
from ibkit.pocket.world import CLASSES, COLOURS, COUNTS, PLACES

Kind = Literal["count", "colour", "place", "all"]
KINDS: tuple[Kind, ...] = ("count", "colour", "place", "all")
HELD_OUT_CLASSES = ("dog", "cup")  # neither rated nor trained on: Lee's five held-out objects of 25


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for; 0 and empty where it does not say. A ValueError for something that the world does not
    have.
    """

    noun: str
    count: int = 0
    colour: str = ""
    place: str = ""

    def __post_init__(self):
        known = {"noun": CLASSES, "count": (0, *COUNTS), "colour": ("", *COLOURS), "place": ("", *PLACES)}
        for name, values in known.items():
            if (found := getattr(self, name)) not in values:
                raise ValueError(f"no prompt has the {name} {found!r}: choose one of {', '.join(map(str, values))}")

    @property
    def text(self) -> str:
        """ "two red cats in the park"; without a count "a red cat", or "an orange cat"."""
        if self.count:
            words = counted(self.count, self.noun, self.colour)
        else:
            words = " ".join(filter(None, [self.colour, self.noun]))
            words = article(words) + words
        return f"{words} {PLACES[self.place][0]}" if self.place else words

    @property
    def wanted(self) -> dict[str, str]:
        """The right answer to each of the counter's questions that the prompt decides."""
        said = {"class": self.noun, "count": NUMBERS.get(self.count, ""), "colour": self.colour, "place": self.place}
        return {question: value for question, value in said.items() if value}

    def fulfilled(self, answers: Mapping[str, str]) -> bool:
        """Whether a picture with these answers (`class`, `count`, `colour`, `place`) shows all that is asked."""
        return all(answers[question] == value for question, value in self.wanted.items())


def prompts(kind: Kind, classes: Sequence[str] = CLASSES) -> list[Asked]:
    """Every prompt of a kind, in a fixed order."""
    counts = COUNTS if kind in ("count", "all") else (0,)
    colours = tuple(COLOURS) if kind in ("colour", "all") else ("",)
    places = tuple(PLACES) if kind in ("place", "all") else ("",)
    return [Asked(*one) for one in product(classes, counts, colours, places)]


def split(kind: Kind, n: int, unseen_share: float = 0.2, seed: int = 0) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """(seen, unseen combinations, unseen objects): disjoint prompts of a kind, up to `n` each; a ParameterError where
    the share leaves nothing on one side.

    The first two are of the same objects; of their combinations a share is held out. The third are of
    `HELD_OUT_CLASSES`.
    """
    rng = random.Random(f"feedback prompts {kind} {seed}")
    rated = prompts(kind, [c for c in CLASSES if c not in HELD_OUT_CLASSES])
    rng.shuffle(rated)
    held_out = round(unseen_share * len(rated))
    if not 0 < held_out < len(rated):
        raise ParameterError(f"unseen_share={unseen_share:g} leaves no {kind} prompt on one side: choose about 0.2.")
    others = prompts(kind, HELD_OUT_CLASSES)
    rng.shuffle(others)
    return rated[held_out:][:n], rated[:held_out][:n], others[:n]


def alternatives(asked: Asked, n: int, rng: random.Random, unseen: Collection[Asked] = ()) -> list[Asked]:
    """`n` different prompts that differ from one in exactly one respect that it names, its object among them; a
    ParameterError where there are not so many.

    None is one of `unseen`; where there are any, none has another object of `HELD_OUT_CLASSES` either.
    """
    choices: dict[str, Sequence[Any]] = {
        "noun": CLASSES,
        "count": COUNTS,
        "colour": tuple(COLOURS),
        "place": tuple(PLACES),
    }
    named = [name for name in choices if getattr(asked, name)]
    pairs: list[dict[str, Any]] = [{name: value} for name in named for value in choices[name]]
    held_out = set(HELD_OUT_CLASSES) - {asked.noun} if unseen else set()
    other = [replace(asked, **pair) for pair in pairs]
    other = [one for one in other if one != asked and one not in unseen and one.noun not in held_out]
    if n > len(other):
        raise ParameterError(f"{asked.text!r} has {len(other)} alternatives, not {n}: ask for fewer.")
    return rng.sample(other, n)


def simulated_labels(
    truth: Sequence[bool], error_rate: float, skip_rate: float, stream: torch.Generator
) -> list[float | None]:
    """What a simulated rater says of pictures: 1 good, 0 bad, None skipped. An answer is wrong at `error_rate`. A rate
    that is none, or errors that make answers worse than a coin, are a ParameterError.

    The paper's raters skipped 5 %, and called 46.5 % good and 48.5 % bad.
    """
    if not (0 <= error_rate <= 0.5 and 0 <= skip_rate < 1):
        raise ParameterError(
            f"error_rate={error_rate:g} must lie in 0 to 0.5 and skip_rate={skip_rate:g} in 0 to 1 (without 1)."
        )
    wrong, skipped = torch.rand((2, len(truth)), generator=stream)
    return [
        None if s < skip_rate else float(bool(good) != (w < error_rate))
        for good, w, s in zip(truth, wrong.tolist(), skipped.tolist(), strict=True)
    ]
