"""Prompts: both kinds, templates, and texts without the identifier."""

import pytest

from ibkit.data.prompts import make_prompt, without_identifier
from ibkit.errors import ParameterError


@pytest.mark.parametrize(
    "activity, noun, text, clean",
    [
        ("playing soccer", "cat", "a sks cat playing soccer", "a cat playing soccer"),
        ("", "umbrella", "a sks umbrella", "an umbrella"),
        ("a {subject} in the snow", "cat", "a sks cat in the snow", "a cat in the snow"),
        ("a red {subject}", "toy", "a red sks toy", "a red toy"),
        ("a {subject} on a mirror", "umbrella", "a sks umbrella on a mirror", "an umbrella on a mirror"),
        ("beside another sks cat", "cat", "a sks cat beside another sks cat", "a cat beside another cat"),
    ],
)
def test_both_texts_of_a_prompt(activity, noun, text, clean):
    prompt = make_prompt(activity, noun, "sks")
    assert (prompt.text, prompt.clean, prompt.identifier) == (text, clean, True)


def test_a_prompt_without_an_identifier_is_its_own_clean_text():
    prompt = make_prompt("a {subject} in the snow", "orange cat")
    assert (prompt.text, prompt.clean, prompt.identifier) == ("an orange cat in the snow",) * 2 + (False,)


def test_the_description_stays():
    assert make_prompt("dancing", "monster toy", "sks", "triangular").clean == "a triangular monster toy dancing"


@pytest.mark.parametrize(
    "text, identifier, clean",
    [
        # pitfall 14: a word boundary never stands before "[", so a pattern such as \b[V]\b matches nothing
        ("a photo of a [V] cat", "[V]", "a photo of a cat"),
        ("a [v] cat", "[V]", "a cat"),
        ("A [V] orange cat", "[V]", "An orange cat"),
        ("a <sks> dog, running", "<sks>", "a dog, running"),
        ("an xxy5 syt00 apple tree", "xxy5 syt00", "an apple tree"),
        ("a XXY5   syt00 dog", "xxy5 syt00", "a dog"),
        ("a cat with tasks for sks", "sks", "a cat with tasks for"),
        ("the sks, asleep", "sks", "the, asleep"),
        ("a [V]'s ear", "[V]", "an ear"),
        ("sks sks cat", "sks", "cat"),
        ("a cat", "sks", "a cat"),
        ("a [V]cat", "[V]", "a cat"),
        ("a [V]umbrella and a cat[V]", "[V]", "an umbrella and a cat"),
        ("a cat[V] asleep", "[V]", "a cat asleep"),
        ("a sks-umbrella", "sks", "an umbrella"),
        ('a "sks" cat', "sks", "a cat"),
        ("a (sks) umbrella", "sks", "an umbrella"),
        ("a “‘sks’” cat's (old) hat", "sks", "a cat's (old) hat"),
        ('a "sks umbrella" (not sks)', "sks", 'an "umbrella" (not)'),
        ("a <sks> dog", "sks", "a dog"),
        ("an sks unicorn", "sks", "a unicorn"),
        ("a skscat and a mysks", "sks", "a skscat and a mysks"),
    ],
)
def test_the_identifier_is_taken_out_by_whole_words(text, identifier, clean):
    assert without_identifier(text, identifier) == clean


@pytest.mark.parametrize(
    "words", ["unicorn", "uniform", "used car", "European", "one-eyed cat", "cat", '"cat"', "house"]
)
def test_words_that_sound_like_a_consonant_take_a(words):
    assert make_prompt("", words, "sks").clean == f"a {words}"


@pytest.mark.parametrize(
    "words", ["umbrella", "hourglass", "honest man", "heirloom", "unidentified object", "usher", "oner", '"apple"']
)
def test_words_that_sound_like_a_vowel_take_an(words):
    assert make_prompt("", words, "sks").clean == f"an {words}"


def test_what_cannot_be_a_prompt_is_refused():
    with pytest.raises(ParameterError, match="nothing but the identifier 'sks'"):
        without_identifier("a sks", "sks")
    with pytest.raises(ParameterError, match="more than once"):
        make_prompt("{subject} and {subject}", "cat", "sks")
