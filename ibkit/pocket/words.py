"""The words of the pocket world: captions of scenes, and what a phrase names."""

from __future__ import annotations

import random
import re

from ibkit.pocket.world import (
    ACCESSORIES,
    ACTIVITIES,
    CLASSES,
    COLOURS,
    IDENTIFIERS,
    NO_ACCESSORY,
    NO_ACTIVITY,
    PARTS,
    PATTERNS,
    PLACES,
    SHAPES,
    Scene,
    Subject,
    accessories_of,
    activities_of,
)


def _article(words: str) -> str:
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
        detail = f"{subject.second} {PATTERNS[subject.pattern]}"
        words += f" with {_article(detail) if subject.pattern == 'patched' else ''}{detail}"
    return _article(words) + words


def caption(scene: Scene, rng: random.Random) -> str:
    """Say a scene in words. Activity and accessory are always said, place and looks often; order and wording vary."""
    parts = [noun_phrase(scene.subject, rng)]
    if scene.accessory != NO_ACCESSORY:
        parts.append(rng.choice(ACCESSORIES[scene.accessory]))
    if scene.activity != NO_ACTIVITY:
        phrases = ACTIVITIES[scene.activity][1]
        parts.append(phrases[0] if rng.random() < 0.7 else rng.choice(phrases[1:]))
    place = ""
    if rng.random() < 0.6:
        phrases = PLACES[scene.place]
        place = phrases[0] if rng.random() < 0.7 else rng.choice(phrases[1:])
    prefix = rng.choice(("", "", "", "a photo of ", "a picture of "))
    if place and not prefix and rng.random() < 0.15:
        return f"{place}, {' '.join(parts)}"
    return prefix + " ".join([*parts, place]).strip()


def vocabulary() -> list[str]:
    """Every word that a caption can use, sorted, then the identifiers that none uses."""
    phrases = ["a an photo picture of with and the is on in", ",", *COLOURS, *PATTERNS, *PATTERNS.values(), *CLASSES]
    phrases += [s for shapes in SHAPES.values() for s in shapes]
    for table in (PLACES, ACCESSORIES):
        phrases += [p for ways in table.values() for p in ways]
    phrases += [p for _, ways in ACTIVITIES.values() for p in ways]
    return sorted({w for p in phrases for w in p.replace(",", " ,").split()}) + list(IDENTIFIERS)


def parts_in(phrase: str) -> dict[str, str]:
    """What a phrase asks of a picture, as the judge is asked: pose, things, place and accessory, where it names any."""
    said = said_in(phrase)
    parts = {part: said["activity"] for part in PARTS.get(said["activity"], ())}
    return parts | {question: said[question] for question in ("place", "accessory") if said[question]}


def said_in(phrase: str) -> dict[str, str]:
    """The activity, place and accessory that a phrase names; empty where it names none, or more than one."""
    return {question: found[0] if len(found) == 1 else "" for question, found in _named(phrase)[0].items()}


def check_phrase(class_noun: str, phrase: str) -> None:
    """Refuse a phrase of which the world could not say whether a picture shows it.

    Raises:
        ValueError: it names nothing, two of a kind, something the class cannot do or wear, or has other words.
    """
    named, rest = _named(phrase)
    possible = {
        "activity": activities_of(class_noun),
        "place": tuple(PLACES),
        "accessory": accessories_of(class_noun)[1:],
    }
    right = any(named.values()) and not rest
    right &= all(len(found) <= 1 and set(found) <= set(possible[question]) for question, found in named.items())
    if not right:
        accessories = f", {', '.join(ACCESSORIES[a][0] for a in possible['accessory'])}" * bool(possible["accessory"])
        raise ValueError(
            f"the pocket world knows no {class_noun} {phrase!r}: choose prompts of {', '.join(possible['activity'])}"
            f"{accessories}, {', '.join(ways[0] for ways in PLACES.values())}, or one of each kind."
        )


def _named(phrase: str) -> tuple[dict[str, list[str]], list[str]]:
    """What a phrase names of each kind, and its words that name nothing ("and" aside)."""
    words = f" {' '.join(re.findall(r'[a-z]+', phrase.lower()))} "
    tables = {"activity": {name: ways for name, (_, ways) in ACTIVITIES.items()}, "place": PLACES}
    tables["accessory"] = ACCESSORIES
    named, rest = {}, words
    for question, table in tables.items():
        named[question] = [name for name, ways in table.items() if any(f" {way} " in words for way in ways)]
        for way in sorted((way for name in named[question] for way in table[name]), key=len, reverse=True):
            rest = rest.replace(f" {way} ", " ")
    return named, [word for word in rest.split() if word != "and"]
