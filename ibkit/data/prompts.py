"""Prompts of both kinds, with and without the unique identifier (InstructBooth, section 2.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ibkit.errors import ParameterError

if TYPE_CHECKING:
    from ibkit.models import TextToImage


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
    return "an" if words[:1].lower() in "aeiou" else "a"


def subject_phrase(class_noun: str, identifier: str = "", description: str = "") -> str:
    """ "a [identifier] [description] [class noun]" (InstructBooth, section 2.1), parts left out where empty."""
    words = " ".join(w for w in (identifier, description, class_noun) if w)
    return f"{article(words)} {words}"


def make_prompt(activity: str, class_noun: str, identifier: str = "", description: str = "") -> Prompt:
    """One prompt of either kind; the clean text is built without the identifier rather than by removing it."""
    phrase, clean = subject_phrase(class_noun, identifier, description), subject_phrase(class_noun, "", description)
    tail = f" {activity}" if activity else ""
    return Prompt(phrase + tail, clean + tail, activity, bool(identifier))


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
