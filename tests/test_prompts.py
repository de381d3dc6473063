"""Prompts: both kinds, templates, and texts without the identifier."""

import pytest

from ibkit.data.prompts import make_prompt
from ibkit.errors import ParameterError


@pytest.mark.parametrize(
    "activity, noun, text, clean",
    [
        ("playing soccer", "cat", "a sks cat playing soccer", "a cat playing soccer"),
        ("", "umbrella", "a sks umbrella", "an umbrella"),
        ("a {subject} in the snow", "cat", "a sks cat in the snow", "a cat in the snow"),
        ("a red {subject}", "toy", "a red sks toy", "a red toy"),
        ("a {subject} on a mirror", "umbrella", "a sks umbrella on a mirror", "an umbrella on a mirror"),
        ("An {subject}, asleep", "cat", "A sks cat, asleep", "A cat, asleep"),
        ("beside another cat", "cat", "a sks cat beside another cat", "a cat beside another cat"),
        ("cat-napping", "cat", "a sks cat cat-napping", "a cat cat-napping"),
        ("a {subject}'s ear", "umbrella", "a sks umbrella's ear", "an umbrella's ear"),
        ("with tasks for mysks", "cat", "a sks cat with tasks for mysks", "a cat with tasks for mysks"),
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
    "activity, identifier",
    [
        ("on a 5*5 grid", "5"),
        ("in a v-neck", "v"),
        ("in a V-neck, v-shaped", "v"),
        ("making a V sign", "[V]"),
        ("at sks.example", "sks"),
        ('beside a "<sks2>"', "<sks>"),
    ],
)
def test_words_that_contain_the_identifier_survive(activity, identifier):
    prompt = make_prompt(activity, "umbrella", identifier)
    assert (prompt.text, prompt.clean) == (f"a {identifier} umbrella {activity}", f"an umbrella {activity}")


@pytest.mark.parametrize(
    "activity, noun, identifier, sentence",
    [
        ("beside another sks cat", "cat", "sks", "holds the identifier 'sks'"),
        ("a SKS cat asleep", "cat", "sks", "holds the identifier 'sks'"),
        ("beside a (sks) cat", "cat", "sks", "holds the identifier 'sks'"),
        ("in the “sks’s” bed", "cat", "sks", "holds the identifier 'sks'"),
        ("a [v] cat, asleep", "cat", "[V]", r"holds the identifier '\[V\]'"),
        ("a xxy5   SYT00 dog", "dog", "xxy5 syt00", "holds the identifier 'xxy5 syt00'"),
        ("a {subject} cat in the snow", "cat", "sks", "names the cat twice"),
        ("a monster toy {subject}", "monster toy", "", "names the monster toy twice"),
        ("a cat in the snow", "cat", "sks", "names the cat twice"),
        ("Cat, asleep", "cat", "", "names the cat twice"),
        ("a {class_noun} in the snow", "cat", "sks", "has braces"),
        ("a {subject} in {place}", "cat", "", "has braces"),
        ("in the snow}", "cat", "sks", "has braces"),
        ("{subject} and {subject}", "cat", "sks", "more than once"),
    ],
)
def test_what_would_not_be_read_as_meant_is_refused(activity, noun, identifier, sentence):
    with pytest.raises(ParameterError, match=sentence) as caught:
        make_prompt(activity, noun, identifier)
    assert str(caught.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize(
    "noun, description, sentence",
    [
        ("cat", "sks striped", "description 'sks striped' holds the identifier"),
        ("sks cat", "", "class noun 'sks cat' holds the identifier"),
        ("cat", "{subject}", "description '{subject}' has braces"),
    ],
)
def test_the_identifier_is_refused_in_the_other_words_too(noun, description, sentence):
    with pytest.raises(ParameterError, match=sentence):
        make_prompt("asleep", noun, "sks", description)


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
