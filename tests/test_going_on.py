"""A job can always go on: what a resume may change, and what becomes of runs that their stage cannot go on with."""

import pytest

from ibkit.errors import ArtifactError
from ibkit.job import run as main_job
from ibkit.job.notebook import SET_ASIDE, is_done, make_room
from ibkit.job.stages import defaults, plan
from ibkit.runs import Run, read_run


def stages_of(folder, **changes):
    return plan(defaults() | changes, folder / "job", resume=True)


def made(stage, text="1", finish=True):
    """The run of a stage, as its notebook would make it from the runs before."""
    given = stage.parameters
    inputs = {"run_in": given["run_in"]} if "run_in" in given else {}
    inputs |= {f"run{i}": one for i, one in enumerate(given.get("runs", []))}
    run = Run.open(stage.folder, stage.notebook.stem, given, inputs, resume=True)
    run.write_text("weights", text)
    if finish:
        run.finish()
    else:
        run.fail("there is no such reward")
    return stage


def changed(folder, before, after):
    main_job._require_equal_where_finished(
        folder / "job", defaults() | before, defaults() | after, stages_of(folder, **after)
    )


LATER = [
    {"02_rl_finetune.reward": "clip_t"},
    {"02_rl_finetune.prompts": ["dancing"]},
    {"03_evaluate.scorers": ["clip_t"]},
    {"set.ddpo.n_epochs": 3},
]


@pytest.mark.parametrize("after", LATER, ids=str)
def test_a_resume_may_change_what_no_finished_stage_depended_on(tmp_path, after):
    made(stages_of(tmp_path)[0])
    changed(tmp_path, {}, after)
    with pytest.raises(ArtifactError, match="01_personalize is finished with others: 01_personalize.class_noun was"):
        changed(tmp_path, {}, after | {"01_personalize.class_noun": "dog"})


@pytest.mark.parametrize("after", LATER[:2] + LATER[3:], ids=str)
def test_what_a_finished_stage_depended_on_stays(tmp_path, after):
    for stage in stages_of(tmp_path)[:2]:
        made(stage)
    with pytest.raises(ArtifactError, match="02_rl_finetune is finished .* was .* and is .*another --name"):
        changed(tmp_path, {}, after)
    changed(tmp_path, {}, {"03_evaluate.n_images": 4})


@pytest.mark.parametrize(
    "how", [{"set.ddpo.micro_batch": 1}, {"02_rl_finetune.processes": 2}, {"01_personalize.device": "cpu"}], ids=str
)
def test_how_it_runs_may_change_always(tmp_path, how):
    for stage in stages_of(tmp_path):
        made(stage)
    changed(tmp_path, {}, how)
    assert all(map(is_done, stages_of(tmp_path, **how)))


def test_other_chains_are_refused_when_a_stage_is_finished(tmp_path):
    changed(tmp_path, {}, {"seeds": [0, 1]})
    made(stages_of(tmp_path)[0])
    with pytest.raises(ArtifactError, match="stages of other names are finished"):
        changed(tmp_path, {}, {"seeds": [0, 1]})


def test_an_unfinished_run_of_other_values_is_set_aside_and_a_finished_one_is_not(tmp_path, capsys):
    first, second = stages_of(tmp_path)[:2]
    made(first)
    made(second, finish=False)
    make_room(second)
    assert second.folder.exists() and capsys.readouterr().out == ""  # equal values: it is gone on with
    other = stages_of(tmp_path, **{"02_rl_finetune.reward": "clip_t"})[1]
    make_room(other)
    (aside,) = (tmp_path / "job" / SET_ASIDE).iterdir()
    assert not other.folder.exists() and (aside / "weights").read_text() == "1"
    assert "reward was 'image_reward' and is 'clip_t'" in capsys.readouterr().out
    made(other)
    make_room(second)
    assert read_run(second.folder).parameters["reward"] == "clip_t"


def test_an_evaluation_of_models_that_were_made_anew_is_made_anew(tmp_path):
    first, second, third = stages_of(tmp_path)
    for stage in (first, second, third):
        made(stage)
    assert is_done(third)
    (second.folder / "weights").unlink()  # lost, and trained again on another machine: other bits
    made(second, text="2")
    assert not is_done(third)
    make_room(third)
    assert not third.folder.exists() and len(list((tmp_path / "job" / SET_ASIDE).iterdir())) == 1
    made(third)
    assert all(map(is_done, (first, second, third)))


def test_the_jobs_own_run_takes_the_new_values(tmp_path):
    Run.open(tmp_path / "run", "run", {"a": 1}).fail("no")
    with pytest.raises(ArtifactError, match="a was 1 and is 2"):
        Run.open(tmp_path / "run", "run", {"a": 2}, resume=True)
    Run.open(tmp_path / "run", "run", {"a": 2}, resume=True, other_values=True).finish()
    assert read_run(tmp_path / "run").parameters == {"a": 2}
