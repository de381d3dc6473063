"""Protocols: the numbers of their prompts, what they are made of, and what the main job does with one."""

import argparse
from functools import partial

import pytest

from ibkit.data import protocols
from ibkit.data.protocols import class_nouns, names, read_protocol
from ibkit.errors import ParameterError
from ibkit.job import run as main_job
from ibkit.job.stages import given
from ibkit.pocket.words import check_phrase
from ibkit.pocket.world import CLASSES, HELD_OUT
from tests.test_dreambench import folder  # noqa: F401, a fixture
from tests.test_photos import DREAMBENCH


@pytest.mark.parametrize(
    "name, n_subjects, n_prompts, n_images",
    [("actions", 8, 40, 10), ("pocket_actions", 8, 40, 10), ("pocket_bench", 8, 200, 4)],
)
def test_the_numbers_of_subjects_prompts_and_images(name, n_subjects, n_prompts, n_images):
    protocols = [read_protocol(name, noun) for noun in class_nouns(name)]
    assert len(protocols) == len(set(class_nouns(name))) == n_subjects
    assert sum(len(set(p.evaluate)) for p in protocols) == n_prompts
    assert {p.images_per_prompt for p in protocols} == {n_images}
    assert all(len(set(p.train)) == 2 for p in protocols)


def test_the_action_sets_train_on_two_of_the_five_and_the_bench_on_none_of_its_own():
    for name in ("actions", "pocket_actions"):
        assert all(
            set(read_protocol(name, noun).train) < set(read_protocol(name, noun).evaluate) for noun in class_nouns(name)
        )
    for noun in CLASSES:
        bench = read_protocol("pocket_bench", noun)
        assert not any(trained in prompt for trained in bench.train for prompt in bench.evaluate)


def test_two_similar_subjects_share_their_phrases():
    by_phrases = {}
    for noun in class_nouns("actions"):
        by_phrases.setdefault(read_protocol("actions", noun).evaluate, []).append(noun)
    assert sorted(map(len, by_phrases.values())) == [2, 2, 2, 2]


def test_the_pocket_world_can_judge_every_prompt_of_its_own():
    for name in ("pocket_actions", "pocket_bench"):
        assert sorted(class_nouns(name)) == sorted(CLASSES)
        for noun in CLASSES:
            protocol = read_protocol(name, noun)
            for phrase in (*protocol.train, *protocol.evaluate):
                check_phrase(noun, phrase)
            assert not {(noun, phrase) for phrase in protocol.train} & HELD_OUT


def overlap(protocol):
    """Training phrases that stand in a benchmark template."""
    return [phrase for phrase in protocol.train for template in protocol.evaluate if phrase in template]


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the real prompts in ../shared are not here")
@pytest.mark.parametrize("subject, live", [("cat", True), ("vase", False)])
def test_no_training_phrase_stands_in_a_template_of_dreambench(subject, live, monkeypatch):
    read = partial(read_protocol, "dreambench", photos=DREAMBENCH / subject)
    assert len(read().train) == 2 and not overlap(read())
    monkeypatch.setitem(protocols.DREAMBENCH_TRAIN, live, ("in a library", "in the snow"))  # "a {subject} in the snow"
    assert overlap(read()) == ["in the snow"]


def test_dreambench_is_read_from_the_folder_of_the_subject(folder):  # noqa: F811
    protocol = read_protocol("dreambench", photos=folder / "dataset" / "cat")
    assert len(protocol.evaluate) == 25 and protocol.images_per_prompt == 4
    assert protocol.evaluate[3] == "a {subject} in place 3" and not overlap(protocol)
    with pytest.raises(ParameterError, match="not one of DreamBench's subjects"):
        read_protocol("dreambench", photos=folder / "dataset" / "mine")
    with pytest.raises(ParameterError, match="needs a subject: .*--subject"):
        read_protocol("dreambench")


def test_what_is_not_there_is_named():
    with pytest.raises(ParameterError, match="no protocol 'acts': choose one of actions, pocket_actions, pocket_bench"):
        read_protocol("acts", "cat")
    with pytest.raises(ParameterError, match="no prompts for 'horse': it knows cat, dog"):
        read_protocol("actions", "horse")
    assert names() == ["actions", "pocket_actions", "pocket_bench", "dreambench"]


def settings(*words):
    parser = argparse.ArgumentParser()
    main_job.add_settings(parser)
    return given(parser.parse_args(words))


@pytest.mark.parametrize(("subject", "noun"), [("cat", "cat"), ("thing3", "toy")])
def test_the_protocol_knows_what_its_subject_is(folder, subject, noun):  # noqa: F811
    words = ["--protocol", "dreambench", "--subject", str(folder / "dataset" / subject)]
    found = settings(*words)
    assert found["01_personalize.class_noun"] == noun and found["03_evaluate.n_images"] == 4
    assert len(found["03_evaluate.prompts"]) == 25 and len(found["02_rl_finetune.prompts"]) == 2
    assert settings(*words, "--class-noun", "thing")["01_personalize.class_noun"] == "thing"  # the user's word wins


def test_the_main_job_trains_and_evaluates_on_a_protocol():
    found = settings("--protocol", "pocket_actions", "--class-noun", "dog", "-p", "03_evaluate.n_images=3")
    assert found["02_rl_finetune.prompts"] == ["playing soccer", "dancing"]
    assert len(found["03_evaluate.prompts"]) == 5 and found["03_evaluate.n_images"] == 3
    with pytest.raises(ParameterError, match="no prompts for 'horse'"):
        settings("--protocol", "actions", "--class-noun", "horse")
