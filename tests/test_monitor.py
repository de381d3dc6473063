"""The monitor, and who the subject is."""

import json

import pytest
import torch
from PIL import Image

from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject, world_photos
from ibkit.errors import ArtifactError, ParameterError
from ibkit.pocket.world import DEMO_SUBJECTS
from ibkit.runs import Run, read_run
from ibkit.train.monitor import SubjectMonitor

CAT = PersonalizedSubject("orange cat", "cat", "sks", "", "pocket", "", DEMO_SUBJECTS["cat"])
MINE = PersonalizedSubject("my cat", "cat", "sks", "", "sd15", "", None)
POT = PersonalizedSubject("blue pot", "pot", "sks", "", "pocket", "", DEMO_SUBJECTS["pot"])


class Likeness:
    """Similarity 1 for a red picture, 0 for any other."""

    def __call__(self, images, texts=None, references=None):
        assert references and texts is None
        return torch.tensor([float(i.getpixel((0, 0)) == (255, 0, 0)) for i in images])


class Answers:
    """A judge that sees soccer in red pictures and the subject in none."""

    def agrees(self, images, question, expected):
        assert question == "activity"
        sees = ["playing soccer" if i.getpixel((0, 0)) == (255, 0, 0) else "none" for i in images]
        return torch.tensor([float(a == b) for a, b in zip(sees, expected, strict=True)])

    def identifies(self, images, subject):
        assert subject == CAT.world
        return torch.zeros(len(images))


RED, BLUE = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))


def test_the_monitor_separates_the_two_kinds_of_prompts():
    monitor = SubjectMonitor(CAT, [RED], Likeness(), Answers())
    prompts = [
        CAT.prompt("playing soccer"),
        CAT.prompt("playing soccer"),
        CAT.prompt("playing soccer", identifier=False),
    ]
    assert monitor([RED, BLUE, BLUE], prompts) == {
        "monitor": 0.5,
        "judge_activity": 0.5,
        "judge_identity": 0.0,
        "judge_activity_class": 0.0,
    }
    assert monitor([RED], prompts[2:]) == {"judge_activity_class": 1.0}


def test_only_prompts_that_name_an_activity_count_in_its_share():
    monitor = SubjectMonitor(CAT, [RED], Likeness(), Answers())
    prompts = [CAT.prompt("playing soccer at the beach"), CAT.prompt("in the park"), CAT.prompt("in the park", False)]
    assert monitor([RED, RED, RED], prompts) == {"monitor": 1.0, "judge_activity": 1.0, "judge_identity": 0.0}
    assert "judge_activity" not in monitor([RED], prompts[1:2])


def test_a_second_text_scorer_reads_the_prompt_without_the_identifier():
    def scorer(images, texts=None, references=None):
        assert references is None and texts == ["a cat playing soccer"] * len(images)
        return torch.arange(1.0, len(images) + 1)

    prompts = [
        CAT.prompt("playing soccer"),
        CAT.prompt("playing soccer", identifier=False),
        CAT.prompt("playing soccer"),
    ]
    numbers = SubjectMonitor(CAT, [RED], Likeness(), None, scorer)([RED, BLUE, BLUE], prompts)
    assert numbers == {"monitor": 0.5, "text_monitor": 1.5}


def test_a_users_photos_have_no_judge():
    assert SubjectMonitor(MINE, [RED], Likeness(), Answers())([RED], [MINE.prompt("sleeping")]) == {"monitor": 1.0}


def test_prompts_of_a_subject():
    assert CAT.instance_prompt == "a sks cat" and CAT.class_prompt == "a cat"
    assert CAT.prompt("sleeping").text == "a sks cat sleeping"
    assert CAT.prompt("sleeping", identifier=False).text == CAT.prompt("sleeping").clean == "a cat sleeping"


def test_activities_are_those_of_the_class():
    usual = ("playing soccer", "riding a bike")
    assert choose_activities(CAT, [], usual) == list(usual)
    assert choose_activities(CAT, ["sleeping", "sleeping"], usual) == ["sleeping"]
    assert choose_activities(POT, [], usual) == ["with popcorn in it", "with pens in it"]
    assert choose_activities(MINE, ["on a roof"], usual) == ["on a roof"]
    with pytest.raises(ParameterError, match="knows no pot 'sleeping'.*with popcorn in it"):
        choose_activities(POT, ["sleeping"], usual)


def test_a_class_the_world_lacks_is_refused():
    assert len(world_photos(demo_subject("dog"))) == 5
    with pytest.raises(ParameterError, match="no 'horse'.*folder of photos"):
        demo_subject("horse")


@pytest.mark.parametrize("subject", [CAT, MINE])
def test_a_subject_comes_back_from_its_run(tmp_path, subject):
    run = Run.open(tmp_path / "run", "01_personalize", {})
    subject.save(run)
    run.finish()
    assert PersonalizedSubject.read(read_run(tmp_path / "run")) == subject


def test_a_damaged_subject_is_refused(tmp_path):
    run = Run.open(tmp_path / "run", "01_personalize", {})
    run.write_text("subject.json", json.dumps({"name": "x"}))
    run.finish()
    with pytest.raises(ArtifactError, match="does not describe a subject"):
        PersonalizedSubject.read(read_run(tmp_path / "run"))
