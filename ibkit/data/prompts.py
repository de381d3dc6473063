"""Prompts of both kinds, with and without the unique identifier (InstructBooth, section 2.2)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ibkit.errors import ParameterError

if TYPE_CHECKING:
    from ibkit.models import TextToImage


SLOT = "{subject}"  # where the subject stands in a template
# The first sound, where it is not that of the first letter: "a unicorn" but "an unidentified", "an hour".
CONSONANT_SOUND = re.compile(r"uni(?![dmn])|use|eu|one\b", re.IGNORECASE)
VOWEL_SOUND = re.compile(r"[aeiou]|hour|honest|heir", re.IGNORECASE)
MARK = "\0"  # in place of an identifier while its surroundings are mended
PAIRS = ('""', "''", "“”", "‘’", "()", "[]", "{}", "<>")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the model is given, "a sks cat playing soccer".
        clean: the same without the identifier, what every reward and metric reads: "a cat playing soccer".
        activity: "playing soccer"; empty for the bare subject.
        identifier: whether `text` has the identifier.
    """

    text: str
    clean: str
    activity: str
    identifier: bool


def article(words: str) -> str:
    """ "a" or "an", as the first word sounds; quotes and brackets before it make no sound."""
    heard = re.sub(r"^\W+", "", words)
    return "an" if VOWEL_SOUND.match(heard) and not CONSONANT_SOUND.match(heard) else "a"


def subject_phrase(class_noun: str, identifier: str = "", description: str = "") -> str:
    """ "a [identifier] [description] [class noun]" (InstructBooth, section 2.1), parts left out where empty."""
    words = " ".join(w for w in (identifier, description, class_noun) if w)
    return f"{article(words)} {words}"


def make_prompt(activity: str, class_noun: str, identifier: str = "", description: str = "") -> Prompt:
    """One prompt of either kind.

    Args:
        activity: what follows the subject, "playing soccer"; or a template that says where the subject stands, such as
            "a red {subject} in the snow"; empty for the bare subject.

    Raises:
        ParameterError: a template with the subject twice.
    """
    if activity.count(SLOT) > 1:
        raise ParameterError(f"prompt {activity!r} has {SLOT} more than once: name the subject once.")
    if SLOT in activity:
        words = " ".join(w for w in (identifier, description, class_noun) if w)
        before, _, after = activity.partition(SLOT)
        text = _fix_article(before, words) + words + after
    else:
        text = f"{subject_phrase(class_noun, identifier, description)} {activity}".strip()
    clean = without_identifier(text, identifier) if identifier else text
    return Prompt(text, clean, activity, bool(identifier))


def without_identifier(text: str, identifier: str) -> str:
    """The text as scorers and rewards read it: the identifier taken out wherever it stands, the article mended.

    The identifier is matched literally ("[V]" and "<sks>" are no patterns), in any case, with any spaces between the
    words of one that has several. Where it begins or ends with a letter or digit, a word must begin or end there ("sks"
    is no part of "tasks"); "[V]" is found in "[V]cat" too. A hyphen to it goes with it, and so do quotes and brackets
    that hold nothing else.

    Args:
        text: "an [V] cat next to an [V] cup".
        identifier: "[V]"; one or more words.

    Raises:
        ParameterError: nothing is left of the text.
    """
    words = r"\s+".join(map(re.escape, identifier.split()))
    start, end = (r"\b" if edge.isalnum() else "" for edge in (identifier.strip()[0], identifier.strip()[-1]))
    marked = re.sub(rf"-?{start}{words}{end}(?:['’]s\b)?-?", MARK, text, flags=re.IGNORECASE)
    emptied = re.compile("|".join(rf"{re.escape(left)}\s*{MARK}\s*{re.escape(right)}" for left, right in PAIRS))
    while (shorter := emptied.sub(MARK, marked)) != marked:
        marked = shorter

    def mend(match: re.Match) -> str:
        if not match["next"]:
            return match["opening"]
        return _fix_article(match["article"] or "", match["next"]) + match["opening"] + match["next"]

    clean = re.sub(rf"(?<=\w){MARK}", f" {MARK}", marked)
    around = rf"(?P<article>\ban?\s+)?(?P<opening>[\"'“‘(\[{{<]*)(?:{MARK}\s*)+(?P<next>\S*)"
    clean = re.sub(around, mend, clean, flags=re.IGNORECASE)
    clean = re.sub(r"\s+([,.;:!?)\]}])", r"\1", " ".join(clean.split()))
    if not clean:
        raise ParameterError(f"prompt {text!r} is nothing but the identifier {identifier!r}: add what it is.")
    return clean


def _fix_article(before: str, word: str) -> str:
    """`before`, its last word "a" or "an" made to fit the word that now follows; with its case and spaces."""

    def fitting(match: re.Match) -> str:
        right = article(word)
        return (right.capitalize() if match[1][0].isupper() else right) + match[2]

    return re.sub(r"\b(an?)(\s+)$", fitting, before, flags=re.IGNORECASE)


def training_prompts(
    activities: Sequence[str], class_noun: str, identifier: str, description: str = "", use_class_prompts: bool = True
) -> list[Prompt]:
    """The RL prompts: each activity with the identifier and, by default, without it too."""
    if not activities:
        raise ParameterError("no activities to train on: give prompts such as ['playing soccer'].")
    prompts = []
    for activity in dict.fromkeys(activities):
        prompts.append(make_prompt(activity, class_noun, identifier, description))
        if use_class_prompts:
            prompts.append(make_prompt(activity, class_noun))
    return prompts


def check_identifier(model: TextToImage, identifier: str, class_noun: str) -> list[int]:
    """Token ids of the identifier; says so when it is a poor one.

    Raises:
        ParameterError: empty, several words, a word of the class noun, or a common word of the model's language.

    Warns:
        UserWarning: it is several tokens, which DreamBooth advises against (its section 3.2: a rare, short token).
    """
    if not identifier or len(identifier.split()) != 1:
        raise ParameterError(f"identifier {identifier!r} must be one word: a rare one such as 'sks'.")
    if identifier.lower() in class_noun.lower().split() or identifier.lower() in COMMON_WORDS:
        raise ParameterError(
            f"identifier {identifier!r} is a common word, whose meaning "
            f"would be overwritten: choose a rare one such as 'sks'."
        )
    ids = model.token_ids(identifier)
    if len(ids) > 1:
        warnings.warn(
            f"identifier {identifier!r} is {len(ids)} tokens (ids {ids}) in {model.name}: "
            f"a single rare token such as 'sks' binds to the subject faster.",
            stacklevel=2,
        )
    return ids


# Words that an identifier must not be: the grammar of prompts, colours, and what pictures are usually of.
COMMON_WORDS = frozenset(
    """a an the of in on at with and or is are to from by for my your this that it its photo picture image painting
    drawing
    red orange yellow green blue purple pink brown white black gray grey cat dog bear teddy toy monster pot cup bike
    motorbike car
    person man woman boy girl child baby people house tree flower food water sky sun moon street city park beach
    forest kitchen
    playing riding reading cooking sleeping dancing wearing holding sitting standing running round square striped
    spotted plain
    new old big small good best beautiful dragon robot castle bird horse fish book chair table""".split()
)
