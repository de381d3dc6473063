"""The pocket world: deterministic, complete, and true to what it says."""

import hashlib
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ibkit.pocket.build.data import GROUP, contradicts, scene_group
from ibkit.pocket.draw import render, render_at_rest, subject_mask
from ibkit.pocket.world import (
    ACCESSORIES,
    ACTIVITIES,
    CHARACTERS,
    CLASSES,
    COLOURS,
    DEMO_SUBJECTS,
    HELD_OUT,
    IDENTIFIERS,
    NO_ACTIVITY,
    PLACES,
    RARE_SUBJECT,
    SHAPES,
    Scene,
    Subject,
    View,
    activities_of,
    caption,
    check_phrase,
    line_up,
    reference_scenes,
    said_in,
    sample_scene,
    sample_subject,
    vocabulary,
)

DIGEST = """
import hashlib, random
from ibkit.pocket.draw import render
from ibkit.pocket.world import sample_scene
rng = random.Random(7)
print(hashlib.sha256(b"".join(render(sample_scene(rng)).tobytes() for _ in range(40))).hexdigest())
"""


def test_same_seed_same_pixels_in_another_process():
    rng = random.Random(7)
    here = hashlib.sha256(b"".join(render(sample_scene(rng)).tobytes() for _ in range(40))).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123"}
    ).stdout.strip()
    assert here == there


def test_the_world_is_as_large_as_it_says():
    assert len(CLASSES) == 8 and len(ACTIVITIES) >= 10 and len(PLACES) >= 6 and len(ACCESSORIES) >= 3
    assert {c for c, _ in HELD_OUT} == set(CLASSES)
    assert all(a in activities_of(c) for c, a in HELD_OUT)


def test_every_thing_that_can_be_drawn_is_drawn_differently():
    for class_noun in CLASSES:
        pictures = [
            render(Scene(DEMO_SUBJECTS[class_noun], a)).tobytes() for a in activities_of(class_noun, with_none=True)
        ]
        assert len(set(pictures)) == len(pictures)
    assert len({render(Scene(DEMO_SUBJECTS["cat"], place=p)).tobytes() for p in PLACES}) == len(PLACES)
    assert (
        len({render(Scene(DEMO_SUBJECTS["cat"], accessory=a)).tobytes() for a in ("none", *ACCESSORIES)})
        == len(ACCESSORIES) + 1
    )


def test_captions_use_the_vocabulary_and_never_an_identifier():
    rng, words = random.Random(0), set(vocabulary()) - set(IDENTIFIERS)
    seen = set()
    for _ in range(3000):
        seen |= set(caption(sample_scene(rng), rng).replace(",", " ,").split())
    assert seen <= words
    assert set(IDENTIFIERS) <= set(vocabulary())


def test_captions_tell_the_activity_and_vary():
    rng = random.Random(1)
    scene = sample_scene(rng, DEMO_SUBJECTS["cat"], "playing soccer")
    texts = {caption(scene, rng) for _ in range(200)}
    assert len(texts) > 50
    assert all(any(way in text for way in ACTIVITIES["playing soccer"][1]) for text in texts)


def test_held_out_pairs_are_left_out_when_asked():
    rng = random.Random(2)
    scenes = [sample_scene(rng, held_out=False) for _ in range(3000)]
    assert not {(s.subject.class_noun, s.activity) for s in scenes} & HELD_OUT


def test_the_rare_subject_has_a_shape_that_only_containers_teach():
    rng = random.Random(3)
    assert RARE_SUBJECT.shape == "triangular" and RARE_SUBJECT.class_noun in CHARACTERS
    shapes = {(s.group, s.shape) for s in (sample_subject(rng) for _ in range(3000))}
    assert ("character", "triangular") not in shapes and ("container", "triangular") in shapes
    assert "triangular" not in SHAPES["character"]


def test_a_line_up_can_be_told_apart():
    for subject in (*DEMO_SUBJECTS.values(), RARE_SUBJECT):
        parade = line_up(subject)
        assert parade[0] == subject and len(parade) == 8 and parade == line_up(subject)
        for i, a in enumerate(parade):
            for b in parade[:i]:
                colours = (a.body != b.body) + (a.second != b.second)
                assert colours >= 1 and colours + (a.pattern != b.pattern) + (a.shape != b.shape) >= 2
        assert sum(p.body == subject.body for p in parade) >= 3


def test_reference_photos_show_the_subject_at_rest_in_two_places():
    scenes = reference_scenes(DEMO_SUBJECTS["cat"])
    assert len(scenes) == 5 and {s.activity for s in scenes} == {NO_ACTIVITY} and len({s.place for s in scenes}) == 2


def test_a_character_at_rest_among_the_things_of_its_activity():
    scene = Scene(Subject("cat", "red", "blue", "plain"), "playing soccer", "park")
    at_rest, posed, without = (
        np.asarray(x, int) for x in (render_at_rest(scene), render(scene), render(resting(scene)))
    )
    ball = np.s_[44:, 48:]  # right of the feet
    assert (at_rest[ball] == posed[ball]).mean() > 0.9 > (at_rest[ball] == without[ball]).mean()
    assert (at_rest[:44] != posed[:44]).any()
    assert render_at_rest(resting(scene)).tobytes() == render(resting(scene)).tobytes()


def resting(scene: Scene) -> Scene:
    return replace(scene, activity=NO_ACTIVITY)


def test_the_mask_is_where_another_subject_would_change_the_picture():
    scene = Scene(
        Subject("cat", "red", "blue", "plain"),
        "cooking a gourmet meal",
        "kitchen",
        view=View(0.02, 0.0, 1.0, True, 0.3),
    )
    other = Scene(Subject("cat", "green", "yellow", "plain"), "cooking a gourmet meal", "kitchen", view=scene.view)
    changed = np.abs(np.asarray(render(scene), int) - np.asarray(render(other), int)).max(2) > 0
    mask = np.asarray(subject_mask(scene))
    assert not changed[mask == 0].any()
    stove = np.asarray(render(Scene(scene.subject, NO_ACTIVITY, "kitchen", view=scene.view)))
    assert (mask > 0).sum() < (
        np.asarray(subject_mask(Scene(scene.subject, NO_ACTIVITY, "kitchen", view=scene.view))) > 0
    ).sum()  # the stove hides the legs
    assert stove.shape == (64, 64, 3)


def test_groups_hold_one_difference_each_and_captions_that_contradict_it():
    for index in range(50):
        base, activity, setting, one = scene_group(5, index)
        assert activity.activity != base.activity and activity.subject == base.subject and activity.place == base.place
        assert (
            setting.activity == base.activity
            and (setting.place != base.place) + (setting.accessory != base.accessory) == 1
        )
        assert one.subject.body != base.subject.body and one.activity == base.activity and one.place == base.place
    assert GROUP == 4
    scene = Scene(DEMO_SUBJECTS["cat"], "dancing", "park")
    assert contradicts("a cat dancing", scene, Scene(DEMO_SUBJECTS["cat"], "sleeping", "park"))
    assert not contradicts("a cat dancing", scene, Scene(DEMO_SUBJECTS["cat"], "dancing", "moon"))
    assert contradicts("a cat dancing in the park", scene, Scene(DEMO_SUBJECTS["cat"], "dancing", "moon"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Subject("horse", "red", "blue", "plain"), "unknown class 'horse'"),
        (lambda: Subject("cat", "red", "red", "plain"), "two different colours"),
        (lambda: Subject("cat", "red", "blue", "tartan"), "unknown pattern"),
        (lambda: Scene(DEMO_SUBJECTS["cup"], "playing soccer"), "a cup cannot be 'playing soccer'"),
        (lambda: Scene(DEMO_SUBJECTS["cat"], place="office"), "unknown place"),
        (lambda: Scene(DEMO_SUBJECTS["pot"], accessory="crown"), "cannot wear"),
    ],
)
def test_impossible_scenes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_colours_are_far_apart():
    values = np.array(list(COLOURS.values()), float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=2) + 1e9 * np.eye(len(values))
    assert distances.min() > 60


def test_what_a_phrase_names():
    nothing = {"activity": "", "place": "", "accessory": ""}
    assert said_in("playing soccer") == nothing | {"activity": "playing soccer"}
    both = said_in("Kicking a soccer ball, at the beach")
    assert both == nothing | {"activity": "playing soccer", "place": "beach"}
    assert said_in("wearing a golden crown on the moon") == nothing | {"place": "moon", "accessory": "crown"}
    assert said_in("playing chess") == nothing
    assert said_in("sleeping or dancing in the snow") == nothing | {"place": "mountains"}


def test_a_phrase_that_no_judge_could_answer_for_is_refused():
    for noun, phrase in (("cat", "dancing and wearing a crown at the beach"), ("pot", "tipped over in the snow")):
        check_phrase(noun, phrase)
    wrong = {
        "cat": [
            "",
            "playing chess",
            "dancing with a dragon",
            "sleeping dancing",
            "with popcorn in it",
            "in the park on the moon",
        ],  # fmt: skip
        "pot": ["wearing a crown", "sleeping"],
    }
    for noun, phrases in wrong.items():
        for phrase in phrases:
            with pytest.raises(ValueError, match=f"knows no {noun} '{phrase}': choose prompts of .*in the park"):
                check_phrase(noun, phrase)
