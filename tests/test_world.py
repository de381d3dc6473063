"""The pocket world: deterministic, complete, and true to what it says."""

import hashlib
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ibkit.pocket.build.data import GROUP, MIXED_GROUP, grades, is_better, mixed_group, scene_group
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.words import caption, check_phrase, parts_in, said_in, vocabulary
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
    PARTS,
    PLACES,
    RARE_SUBJECT,
    SHAPES,
    Scene,
    Subject,
    View,
    activities_of,
    doing,
    line_up,
    mixtures_of,
    reference_scenes,
    sample_counted,
    sample_mixture,
    sample_scene,
    sample_subject,
)

DIGEST = """
import hashlib, random
from ibkit.pocket.draw import render
from ibkit.pocket.world import sample_scene
rng = random.Random(7)
print(hashlib.sha256(b"".join(render(sample_scene(rng)).tobytes() for _ in range(40))).hexdigest())
"""


def is_mixture(scene):
    """Whether pose and things are neither of one activity nor both absent."""
    return (scene.pose, scene.things) != tuple(doing(scene.activity).values())


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
            render(Scene(DEMO_SUBJECTS[class_noun], **doing(a))).tobytes()
            for a in activities_of(class_noun, with_none=True)
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


def test_the_scenes_of_earlier_versions_keep_every_pixel_and_word():
    pixels, words, rng = hashlib.sha256(), hashlib.sha256(), random.Random("pinned scenes")
    for i in range(1500):
        scene = sample_scene(rng, held_out=i % 2 == 0)
        pixels.update(render(scene).tobytes())
        if i % 5 == 0:
            pixels.update(subject_mask(scene).tobytes())
        facts = f"{scene.activity}|{scene.place}|{scene.accessory}|{scene.view}|{scene.subject}"
        words.update(f"{caption(scene, rng)}|{facts}\n".encode())
    for subject in DEMO_SUBJECTS.values():
        for scene in reference_scenes(subject):
            pixels.update(render(scene).tobytes())
    assert pixels.hexdigest() == "ff801eac9bc0ef74fd7f7072911545df2b047df0287191ae2356cf177a1cbaab"
    assert words.hexdigest() == "0821b2ca31b2c8ba565cc4e0a02c101b0cc8eeaccf7f29a50825a55adf10849b"


def test_activities_have_a_pose_things_or_both():
    assert PARTS["playing soccer"] == ("pose", "things") and PARTS["doing a wheelie"] == ("pose",)
    assert PARTS["with popcorn in it"] == ("things",) and all(PARTS.values()) and set(PARTS) == set(ACTIVITIES)


def test_pose_and_things_are_drawn_apart():
    subject = Subject("cat", "red", "blue", "plain")
    soccer, rest = doing("playing soccer"), doing(NO_ACTIVITY)
    whole, things, pose, nothing = (
        np.asarray(render(Scene(subject, **facts)), int)
        for facts in (soccer, soccer | {"pose": NO_ACTIVITY}, soccer | {"things": NO_ACTIVITY}, rest)
    )
    ball = np.s_[44:, 54:]  # right of the kicking foot
    assert (things[ball] == whole[ball]).mean() > 0.9 > (things[ball] == nothing[ball]).mean()
    assert (pose[ball] == nothing[ball]).mean() > 0.9
    body = np.s_[10:60, :52]
    assert (pose[body] == whole[body]).mean() > 0.95 > (things[body] == whole[body]).mean()


def test_every_mixture_is_drawn_and_differs_from_every_whole_scene():
    for noun in CLASSES:
        seen = {render(Scene(DEMO_SUBJECTS[noun], **doing(a))).tobytes() for a in activities_of(noun, with_none=True)}
        pairs = [pair for kind in mixtures_of(noun).values() for pair in kind]
        scenes = [Scene(DEMO_SUBJECTS[noun], *pair) for pair in pairs]
        assert all(is_mixture(scene) for scene in scenes) and len(set(pairs)) == len(pairs)
        assert len({render(s).tobytes() for s in scenes} | seen) == len(scenes) + len(seen)


@pytest.mark.parametrize(
    "noun, pose, things, shown",
    [
        ("cat", "playing soccer", "playing soccer", ("playing soccer",)),
        ("cat", "playing soccer", NO_ACTIVITY, ()),
        ("cat", NO_ACTIVITY, "playing soccer", ()),
        ("cat", "dancing", "playing soccer", ()),
        ("bike", "doing a wheelie", NO_ACTIVITY, ("doing a wheelie",)),
        ("bike", "doing a wheelie", "carrying a stack of boxes", ("doing a wheelie", "carrying a stack of boxes")),
        ("pot", "lying on its side", "with pens in it", ("lying on its side", "with pens in it")),
        ("cat", NO_ACTIVITY, NO_ACTIVITY, ()),
    ],
)
def test_a_scene_shows_an_activity_when_every_part_of_it_is_there(noun, pose, things, shown):
    scene = Scene(DEMO_SUBJECTS[noun], pose, things)
    assert scene.shown == shown and scene.activity == (shown or (NO_ACTIVITY,))[0]


def test_mixtures_can_be_drawn_by_kind():
    rng = random.Random(4)
    for kind in mixtures_of("cat"):
        scene = sample_mixture(rng, DEMO_SUBJECTS["cat"], kind, place="moon")
        assert (scene.pose, scene.things) in mixtures_of("cat")[kind] and scene.place == "moon"
    with pytest.raises(ValueError, match="a cup has no mixture 'things at rest': choose one of another pose"):
        sample_mixture(rng, DEMO_SUBJECTS["cup"], "things at rest")


def test_the_mask_is_where_another_subject_would_change_the_picture():
    scene = Scene(
        Subject("cat", "red", "blue", "plain"),
        **doing("cooking a gourmet meal"),
        place="kitchen",
        view=View(0.02, 0.0, 1.0, True, 0.3),
    )
    other = replace(scene, subject=Subject("cat", "green", "yellow", "plain"))
    changed = np.abs(np.asarray(render(scene), int) - np.asarray(render(other), int)).max(2) > 0
    mask = np.asarray(subject_mask(scene))
    assert not changed[mask == 0].any()
    at_rest = np.asarray(subject_mask(replace(scene, **doing(NO_ACTIVITY))))
    assert (mask > 0).sum() < (at_rest > 0).sum()  # the stove hides the legs


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


def test_mixed_groups_hold_the_parts_of_their_base():
    assert MIXED_GROUP == len(mixed_group(0, 0))
    for index in range(60):
        base, *others = mixed_group(5, index)
        assert [base, *others][:GROUP] == scene_group(5, index)
        rest, things, pose, other = others[GROUP - 1 :]
        assert is_mixture(other) and {s.subject for s in (rest, things, pose, other)} == {base.subject}
        if len(PARTS.get(base.activity, ())) == 2:
            assert (rest.pose, rest.things) == (NO_ACTIVITY, NO_ACTIVITY)
            assert (things.pose, things.things) == (NO_ACTIVITY, base.things)
            assert (pose.pose, pose.things) == (base.pose, NO_ACTIVITY)


def test_a_text_grades_the_scenes_of_a_group():
    cat = DEMO_SUBJECTS["cat"]
    dance = Scene(cat, **doing("dancing"))
    moon, sleep = replace(dance, place="moon"), replace(dance, **doing("sleeping"))
    music, rest = replace(dance, pose=NO_ACTIVITY), replace(dance, **doing(NO_ACTIVITY))

    def better(text: str, first: Scene, second: Scene) -> bool:
        return is_better(grades(text, dance, first), grades(text, dance, second))

    assert better("a cat dancing", dance, sleep) and not better("a cat dancing", dance, moon)
    assert better("a cat dancing", dance, music) and better("a cat dancing", music, rest)
    assert better("a cat dancing in the park", dance, moon) and not better("a cat dancing in the park", moon, music)
    assert not better("a cat", dance, rest) and not better("a cat dancing", rest, music)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Subject("horse", "red", "blue", "plain"), "unknown class 'horse'"),
        (lambda: Subject("cat", "red", "red", "plain"), "two different colours"),
        (lambda: Subject("cat", "red", "blue", "tartan"), "unknown pattern"),
        (lambda: Scene(DEMO_SUBJECTS["cup"], **doing("playing soccer")), "a cup cannot be 'playing soccer'"),
        (lambda: Scene(DEMO_SUBJECTS["cup"], pose="with pens in it"), "has no pose of its own"),
        (lambda: Scene(DEMO_SUBJECTS["bike"], things="doing a wheelie"), "has no things of its own"),
        (lambda: doing("playing chess"), "unknown activity 'playing chess'"),
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


def test_what_a_phrase_asks_the_judge():
    assert parts_in("playing soccer in the snow") == {
        "pose": "playing soccer",
        "things": "playing soccer",
        "place": "mountains",
    }
    assert parts_in("doing a wheelie") == {"pose": "doing a wheelie"} and parts_in("playing chess") == {}


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


@pytest.mark.parametrize("class_noun", CLASSES)
def test_several_subjects_are_as_many_as_the_count(class_noun):
    """As many pieces of the mask as subjects, of about one size; neighbouring vehicles, which are wide, may touch."""
    from scipy.ndimage import label

    sizes = []
    for count in (2, 3, 4):
        scene = Scene(DEMO_SUBJECTS[class_noun], place="park", count=count)
        assert render(scene).tobytes() == render(replace(scene)).tobytes()
        mask = np.asarray(subject_mask(scene)) > 127
        pieces, n = label(mask, np.ones((3, 3)))
        large = [size for i in range(1, n + 1) if (size := int((pieces == i).sum())) > 25]
        sizes.append(mask.sum() / count)
        assert len(large) == count or (scene.subject.group == "vehicle" and len(large) < count), (count, large)
    assert max(sizes) < 1.25 * min(sizes)


def test_counts_are_said_and_fit_the_text_encoder(tokenizer):
    rng = random.Random(4)
    for _ in range(300):
        scene = sample_counted(rng)
        text = caption(scene, rng)
        assert len(tokenizer(text)["input_ids"]) <= tokenizer.model_max_length, text
        if scene.count > 1:
            assert {2: "two", 3: "three", 4: "four"}[scene.count] in text.split()
            assert f"{scene.subject.class_noun}s" in text
    with pytest.raises(ValueError, match="choose one of 1, 2, 3, 4"):
        Scene(DEMO_SUBJECTS["cat"], count=5)
    with pytest.raises(ValueError, match="at rest and wear nothing"):
        Scene(DEMO_SUBJECTS["cat"], **doing("dancing"), count=2)
