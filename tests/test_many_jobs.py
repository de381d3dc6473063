"""`ibkit list`, several subjects in one call, names of failed starts, reused personalizations, own prompt files."""

import json
import os

import pytest

from ibkit import cli
from ibkit.data.protocols import OWN_IMAGES, read_protocol
from ibkit.errors import ParameterError
from ibkit.job import reuse
from ibkit.job.listing import runs_in
from ibkit.job.stages import defaults, plan
from ibkit.runs import Run, read_run
from tests.test_main_job import job, places  # noqa: F401  (a fixture)

ONE = "[[group]]\nclass_nouns = ['cat']\ntrain = ['dancing']\nevaluate = ['dancing', 'in the snow']\n"


def personalized(outputs, name, **parameters):
    """A finished job's personalization, as its notebook would leave it; returns its stage."""
    stage = plan(defaults() | parameters, outputs / name)[0]
    run = Run.open(stage.folder, "01_personalize", stage.parameters)
    run.write_text("weights.txt", name)
    run.finish()
    return stage


@pytest.fixture
def old_code(monkeypatch):
    monkeypatch.setattr(reuse, "_changed", lambda notebook: 0.0)


def test_a_personalization_is_used_again_with_other_tuning_settings(tmp_path, old_code, capsys):
    personalized(tmp_path, "first")
    stages = plan(defaults() | {"set.ddpo.n_epochs": 3}, tmp_path / "second")
    reuse.reuse(stages, tmp_path)
    assert "01_personalize: that of first" in capsys.readouterr().out
    taken = read_run(stages[0].folder)
    assert taken.path("weights.txt").read_text() == "first"
    assert reuse.is_done(stages[0]) and not stages[1].folder.exists()
    # Writing the new one leaves the old one as it is.
    again = Run.open(stages[0].folder, "01_personalize", stages[0].parameters, resume=True)
    again.write_text("weights.txt", "changed")
    again.finish()
    assert read_run(tmp_path / "first/01_personalize").path("weights.txt").read_text() == "first"


@pytest.mark.parametrize(
    "other", [{"seeds": [5]}, {"set.lora_dreambooth.n_steps": 7}, {"01_personalize.class_noun": "dog"}]
)
def test_one_of_other_settings_is_not(tmp_path, old_code, other):
    personalized(tmp_path, "first")
    stages = plan(defaults() | other, tmp_path / "second")
    reuse.reuse(stages, tmp_path)
    assert not stages[0].folder.exists()


def test_one_of_other_code_or_versions_or_edited_is_not(tmp_path, monkeypatch):
    stage = personalized(tmp_path, "first")
    new = plan(defaults(), tmp_path / "second")[0]
    assert reuse._same(new, stage.folder) == (reuse._changed(new.notebook) < os.path.getmtime(stage.folder))
    monkeypatch.setattr(reuse, "_changed", lambda notebook: 4e9)
    assert not reuse._same(new, stage.folder)
    monkeypatch.setattr(reuse, "_changed", lambda notebook: 0.0)
    assert reuse._same(new, stage.folder)
    monkeypatch.setattr(reuse, "versions", lambda: {"torch": "0.1"})
    assert not reuse._same(new, stage.folder)


def test_a_failed_start_does_not_take_the_name(tmp_path, capsys):
    folder = tmp_path / "mine"
    Run.open(folder, "run", {"seeds": [0]}).fail("01_personalize: no photos.")
    Run.open(folder / "01_personalize", "01_personalize", {}).fail("no photos.")
    reuse.free_name(folder)
    assert not folder.exists() and "no photos." in capsys.readouterr().out


def test_a_failed_run_that_made_something_keeps_its_folder(tmp_path):
    for name, made in (("done", None), ("training", "step-000005")):
        Run.open(tmp_path / name, "run", {}).fail("late")
        first = Run.open(tmp_path / name / "01_personalize", "01_personalize", {})
        if made:
            (first.folder / "checkpoints" / made).mkdir(parents=True)
            first.fail("late")
        else:
            first.finish()
        reuse.free_name(tmp_path / name)
        assert (tmp_path / name / "manifest.json").exists(), name
    Run.open(tmp_path / "whole", "run", {}).finish()
    reuse.free_name(tmp_path / "whole")
    assert (tmp_path / "whole").exists()


def test_list_names_status_methods_and_time(tmp_path, capsys):
    settings = {"personalize": ["dreambooth"], "tune": ["ddpo"], "01_personalize.class_noun": "cat"}
    Run.open(tmp_path / "good", "run", settings).finish()
    Run.open(tmp_path / "bad", "run", settings).fail("stopped for the test")
    going = Run.open(tmp_path / "going", "run", settings)
    Run.open(tmp_path / "cut", "run", settings)._close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    found = {row["name"]: row["status"] for row in runs_in(tmp_path)}
    assert found == {
        "good": "complete", "bad": "failed", "going": "running", "cut": "interrupted", "broken": "damaged",
    }  # fmt: skip
    assert cli.main(["list", str(tmp_path)]) == 0
    good = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("good"))
    assert "complete" in good and "DreamBooth, InstructBooth" in good
    assert cli.main(["list", str(tmp_path), "--json"]) == 0
    assert {row["subject"] for row in json.loads(capsys.readouterr().out)} == {"cat", ""}
    going.finish()


def test_several_subjects_are_a_run_each(places, monkeypatch, capsys):  # noqa: F811
    from ibkit.job import run as main_job

    started = []

    def one(arguments, launched):
        started.append((arguments.name, arguments.class_noun))
        return 1 if arguments.class_noun == "dog" else 0

    reported = []

    def build_report(folders, path):
        reported.append(([folder.name for folder in folders], path.name))
        return path

    monkeypatch.setattr(main_job, "_one", one)
    monkeypatch.setattr("ibkit.report.build_report", build_report)
    assert job("--name", "x", "--class-nouns", "dog", "teddy bear") == 1
    assert started == [("x-dog", "dog"), ("x-teddy-bear", "teddy bear")]  # the second in spite of the first
    for folder in ("a", "b"):
        (places / folder).mkdir()
    photos = [str(places / "a"), str(places / "b")]
    started.clear()
    assert job("--name", "y", "--subjects", *photos, "--class-nouns", "cat") == 0
    assert started == [("y-a", "cat"), ("y-b", "cat")] and reported == [(["y-a", "y-b"], "y.html")]
    started.clear()
    assert job("--subjects", *photos, "--class-nouns", "cat", "dog", "pot") == 2
    assert job("--class-nouns", "cat", "cat") == 2
    assert job("--class-nouns", "cat", "--set", "ddpo.nonsense=1") == 2
    assert started == []  # all are checked before one starts
    assert "one each" in (told := capsys.readouterr().err) and "have one name" in told and "nonsense" in told


def test_own_protocol_files(tmp_path):
    own, plain = tmp_path / "mine.toml", tmp_path / "mine.txt"
    own.write_text("images_per_prompt = 7\n" + ONE)
    protocol = read_protocol(str(own), "cat")
    assert (protocol.train, protocol.evaluate) == (("dancing",), ("dancing", "in the snow"))
    assert protocol.images_per_prompt == 7
    plain.write_text("# of the thesis\ndancing\n\n  in the snow \ndancing\n")
    protocol = read_protocol(str(plain), "dog")
    assert protocol.evaluate == protocol.train == ("dancing", "in the snow")
    assert (protocol.class_noun, protocol.images_per_prompt) == ("dog", OWN_IMAGES)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.toml", "group = 3\n", "no \\[\\[group\\]\\]"),
        ("a.toml", ONE + "evaluated = ['x']\n[more]\n", "has more"),
        ("a.toml", ONE.replace("train = ['dancing']", "train = 'dancing'"), "train of group 1"),
        ("a.toml", "images_per_prompt = 0\n" + ONE, "at least 1"),
        ("a.toml", "not toml", "is no TOML file"),
        ("a.toml", ONE, "no prompts for 'dog'"),
        ("a.txt", "# nothing\n\n", "has no prompts"),
        ("missing.txt", None, "Cannot read the prompts"),
        ("missing.toml", None, "Cannot read the prompts"),
    ],
)
def test_bad_protocol_files(tmp_path, name, text, told):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError, match=told):
        read_protocol(str(tmp_path / name), "dog")
