"""Prompts of both kinds, with and without the unique identifier (InstructBooth, section 2.2)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ibkit.errors import ParameterError

if TYPE_CHECKING:
    from ibkit.model.text_to_image import TextToImage


SLOT = "{subject}"  # the place of the subject in a template
# Words whose first sound is not that of their first letter: "a unicorn" (but "an unidentified"), "an hour".
CONSONANT_SOUND = re.compile(r"uni(?![dmn])|use|eu|one\b", re.IGNORECASE)
# How other tools' users begin a prompt; here the kit puts the subject in, and such a prompt needs its place.
PICTURE_OF = re.compile(
    r"^\s*(?:(?:an?|the|my|one)\s+(?:[\w-]+\s+){0,2}?)?(?:photo|photograph|picture|image|portrait|painting|drawing|"
    r"rendering|sketch|shot|close-?up)s?\s+of\b",
    re.IGNORECASE,
)
ARTICLE = re.compile(r"^\s*(?:an?|the|my)\s+(?=\S)", re.IGNORECASE)
# A word that can stand before a noun at the start of a prompt, as "[V]" or "red" do: no verb, and no preposition.
ADJECTIVE = r"(?!\w+ing\b|(?:in|on|at|with|as|by|near|next|under|over|behind|beside|like|and|to|for|of|from)\b)\S+"
VOWEL_SOUND = re.compile(r"[aeiou]|hour|honest|heir", re.IGNORECASE)


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
    """ "a" or "an", by the sound of the first word; quotes and brackets before it are skipped."""
    heard = re.sub(r"^\W+", "", words)
    return "an" if VOWEL_SOUND.match(heard) and not CONSONANT_SOUND.match(heard) else "a"


def subject_phrase(class_noun: str, identifier: str = "", description: str = "", alone: bool = False) -> str:
    """`a [identifier] [description] [class noun]` (InstructBooth, section 2.1), without the parts that are empty; with
    `alone`, the identifier stands for all of them."""
    words = identifier if alone else _subject_words(class_noun, identifier, description)
    return f"{article(words)} {words}"


def _subject_words(class_noun: str, identifier: str, description: str) -> str:
    return " ".join(w for w in (identifier, description, class_noun) if w)


def make_prompt(
    activity: str, class_noun: str, identifier: str = "", description: str = "", alone: bool = False
) -> Prompt:
    """One prompt of either kind. Its clean text is built from the same words without the identifier.

    Args:
        activity: what follows the subject, "playing soccer"; or a template with the place of the subject, such as
            "a red {subject} in the snow"; empty for the bare subject.
        alone: the identifier stands for the class noun and description too, as a learned word does.

    Raises:
        ParameterError: another word is the identifier, the activity repeats the class noun, or there are braces other
            than one {subject}.
    """
    noun = ARTICLE.sub("", PICTURE_OF.sub("", class_noun).strip()) or "dog"
    if noun != class_noun.strip():
        raise ParameterError(f"class noun {class_noun!r} must be a noun without an article, such as {noun!r}.")
    if ARTICLE.match(description) or re.search(_alone(class_noun), description, re.IGNORECASE):
        raise ParameterError(
            f"description {description!r} stands between identifier and class noun: leave out the article and the "
            f"{class_noun}, such as 'small brown'."
        )
    if activity.count(SLOT) > 1:
        raise ParameterError(f"prompt {activity!r} has {SLOT} more than once: name the subject once.")
    given = {"prompt": activity, "description": description, "class noun": class_noun, "identifier": identifier}
    for what, words in given.items():
        if re.search("[{}]", words.replace(SLOT, "") if what == "prompt" else words):
            mend = f"write {SLOT} where the subject stands, and no others" if what == "prompt" else "leave them out"
            raise ParameterError(f"{what} {words!r} has braces: {mend}.")
        # Files of other tools have underscores for blanks.
        if (
            identifier
            and what != "identifier"
            and re.search(_alone(identifier), words.replace("_", " "), re.IGNORECASE)
        ):
            raise ParameterError(
                f"{what} {words!r} holds the identifier {identifier!r}, which the kit puts in itself: leave it out, or "
                f"write a prompt with {SLOT} where the subject stands."
            )
    before, slot, after = activity.partition(SLOT)
    if not slot and PICTURE_OF.match(activity.replace("_", " ")):
        raise ParameterError(
            f"prompt {activity!r} is a whole sentence, and the kit puts the subject in itself: write {SLOT} in place "
            "of the subject and its words, such as 'a photo of {subject} in the snow', or only what follows it, "
            "such as 'in the snow'."
        )
    noun = _alone(class_noun)
    twice = (
        rf"{noun}\s*{re.escape(SLOT)}|{re.escape(SLOT)}\s*{noun}" if slot else rf"^\s*(?:{ADJECTIVE}\s+){{0,3}}{noun}"
    )
    if re.search(twice, activity, re.IGNORECASE):
        raise ParameterError(
            f"prompt {activity!r} names the {class_noun} twice, since the kit puts it in itself: give what follows it, "
            f"such as 'in the snow', or a template with {SLOT} in place of it."
        )

    def build(name: str) -> str:
        words = name if name and alone else _subject_words(class_noun, name, description)
        if slot:
            # a final "a" or "an" fits the word that now follows, and keeps its case and spaces
            fitting = re.sub(r"\b(a)n?(?=\s+$)", rf"\1{article(words)[1:]}", before, flags=re.IGNORECASE)
            return fitting + words + after
        return f"{article(words)} {words} {activity}".strip()

    return Prompt(build(identifier), build(""), activity, bool(identifier))


def _alone(words: str) -> str:
    """A pattern for whole words, also in quotes or brackets, possessive or plural; "v-neck" does not match "v"."""
    joined = r"\s+".join(map(re.escape, words.split()))
    return rf"(?<!\S)[^\w\s]*{joined}(?:['’]?s)?[^\w\s]*(?!\S)"


def training_prompts(
    activities: Sequence[str],
    class_noun: str,
    identifier: str,
    description: str = "",
    use_class_prompts: bool = True,
    alone: bool = False,
) -> list[Prompt]:
    """The RL prompts: each activity with the identifier and, by default, without it too."""
    if not activities:
        raise ParameterError("no activities to train on: give prompts such as ['playing soccer'].")
    return [
        make_prompt(activity, class_noun, identifier, description, alone)
        if named
        else make_prompt(activity, class_noun)
        for activity in dict.fromkeys(activities)
        for named in ((True, False) if use_class_prompts else (True,))
    ]


def check_identifier(model: TextToImage, identifier: str, class_noun: str) -> list[int]:
    """Token ids of the identifier; a ParameterError where it is empty, several words, a word of the class noun, or a
    common word.

    Warns:
        UserWarning: it is several tokens, which DreamBooth advises against (its section 3.2: a rare, short token).
    """
    if len(identifier.split()) != 1:
        raise ParameterError(f"identifier {identifier!r} must be one word: a rare one such as 'sks'.")
    if identifier.lower() in class_noun.lower().split():
        raise ParameterError(
            f"identifier {identifier!r} stands in the class noun {class_noun!r}, and the kit puts it before that: "
            "leave it out there, or choose another rare word."
        )
    if identifier.lower() in COMMON_WORDS:
        raise ParameterError(
            f"identifier {identifier!r} is a common word, whose meaning would be overwritten: "
            "choose a rare one such as 'sks'."
        )
    ids = model.token_ids(identifier)
    if len(ids) > 1:
        warnings.warn(
            f"identifier {identifier!r} is {len(ids)} tokens (ids {ids}) in {model.name}: "
            f"a single rare token such as 'sks' binds to the subject faster.",
            stacklevel=2,
        )
    return ids


# Words that an identifier must not be: the grammar of prompts, colours, and common subjects of pictures.
COMMON_WORDS = frozenset(
    """a an the of in on at with and or is are to from by for my your this that it its photo picture image painting
    drawing red orange yellow green blue purple pink brown white black gray grey cat dog bear teddy toy monster pot cup
    bike motorbike car person man woman boy girl child baby people house tree flower food water sky sun moon street city
    park beach forest kitchen playing riding reading cooking sleeping dancing wearing holding sitting standing running
    round square striped spotted plain new old big small good best beautiful dragon robot castle bird horse fish book
    chair table""".split()
)
