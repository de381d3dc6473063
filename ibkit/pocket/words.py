"""The words of the pocket world: captions of scenes, and the meaning of a phrase."""

import random
import re
from itertools import chain

from ibkit.pocket import world
from ibkit.pocket.world import NO_ACCESSORY, NO_ACTIVITY, Scene, Subject

# question -> name -> the ways to say it
_WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "activity": {name: ways for name, (_, ways) in world.ACTIVITIES.items()},
    "place": world.PLACES,
    "accessory": world.ACCESSORIES,
}

# The tokenizer, which is older, spells these and plurals with several tokens; no caption of one subject has them.
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


def article(words: str) -> str:
    return "an " if words[0] in "aeiou" else "a "


def noun_phrase(subject: Subject, rng: random.Random) -> str:
    """The subject in words, from the bare class noun to a full description."""
    adjectives = []
    if rng.random() < 0.25 or (subject.shape == "triangular" and rng.random() < 0.5):
        adjectives.append(subject.shape)
    full = rng.random() < 0.35
    if full or rng.random() < 0.3:
        adjectives.append(subject.body)
    if subject.pattern != "plain" and not full and rng.random() < 0.15:
        adjectives.insert(0, subject.pattern)
    words = " ".join([*adjectives, subject.class_noun])
    if full and subject.pattern != "plain":
        detail = f"{subject.second} {world.PATTERNS[subject.pattern]}"
        words += f" with {article(detail) if subject.pattern == 'patched' else ''}{detail}"
    return article(words) + words


def counted(count: int, noun: str, colour: str = "") -> str:
    """ "two red cats"; "one cat"."""
    return " ".join(filter(None, [NUMBERS[count], colour, noun + "s" * (count > 1)]))


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene, always with activity and accessory, often with place and looks; order and wording vary."""

    def said(ways: tuple[str, ...]) -> str:
        return ways[0] if rng.random() < 0.7 else rng.choice(ways[1:])

    if scene.count == 1:
        parts = [noun_phrase(scene.subject, rng)]
    else:
        parts = [counted(scene.count, scene.subject.class_noun, scene.subject.body if rng.random() < 0.5 else "")]
    if scene.accessory != NO_ACCESSORY:
        parts.append(rng.choice(world.ACCESSORIES[scene.accessory]))
    if scene.activity != NO_ACTIVITY:
        parts.append(said(world.ACTIVITIES[scene.activity][1]))
    place = said(world.PLACES[scene.place]) if rng.random() < 0.6 else ""
    prefix = rng.choice(("", "", "", "a photo of ", "a picture of "))
    if place and not prefix and rng.random() < 0.15:
        return f"{place}, {' '.join(parts)}"
    return prefix + " ".join([*parts, place]).strip()


def vocabulary() -> list[str]:
    """Every word that a caption can use, sorted, then the identifiers that none uses."""
    phrases = ["a an photo picture of with and the is on in ,", *world.COLOURS, *world.CLASSES, *world.PATTERNS]
    ways = chain(*(table.values() for table in _WAYS.values()))
    phrases += chain(world.PATTERNS.values(), *world.SHAPES.values(), *ways)
    return sorted(set(" ".join(phrases).split())) + list(world.IDENTIFIERS)


def parts_in(phrase: str) -> dict[str, str]:
    """What a phrase asks of a picture, as the judge's questions: pose, things, place, accessory, where it names any."""
    said = said_in(phrase)
    parts = {part: said["activity"] for part in world.PARTS.get(said["activity"], ())}
    return parts | {question: said[question] for question in ("place", "accessory") if said[question]}


def said_in(phrase: str) -> dict[str, str]:
    """The activity, place and accessory that a phrase names; empty where it names none, or more than one."""
    return {question: found[0] if len(found) == 1 else "" for question, found in _named(phrase)[0].items()}


def check_phrase(class_noun: str, phrase: str) -> None:
    """Refuse (ValueError) a phrase that the world cannot check a picture for: it names nothing, two of a kind,
    something the class cannot do or wear, or has other words.
    """
    named, rest = _named(phrase)
    accessories = world.accessories_of(class_noun)[1:]
    possible = {"activity": world.activities_of(class_noun), "accessory": accessories, "place": tuple(world.PLACES)}
    right = any(named.values()) and not rest
    right &= all(len(found) <= 1 and set(found) <= set(possible[question]) for question, found in named.items())
    if not right:
        known = ", ".join(_WAYS[question][name][0] for question, names in possible.items() for name in names)
        raise ValueError(
            f"the pocket world knows no {class_noun} {phrase!r}: choose prompts of {known}, or one of each kind."
        )


def _named(phrase: str) -> tuple[dict[str, list[str]], list[str]]:
    """What a phrase names of each kind, and its words that name nothing ("and" aside)."""
    words = f" {' '.join(re.findall(r'[a-z]+', phrase.lower()))} "
    named, rest = {}, words
    for question, table in _WAYS.items():
        named[question] = [name for name, ways in table.items() if any(f" {way} " in words for way in ways)]
        for way in sorted((way for name in named[question] for way in table[name]), key=len, reverse=True):
            rest = rest.replace(f" {way} ", " ")
    return named, [word for word in rest.split() if word != "and"]
