"""Notebook parameters: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import re

import pytest

from ibkit.errors import ParameterError
from ibkit.fields import fields_of
from ibkit.methods.records import METHODS
from ibkit.model.sample import Sampler
from ibkit.params import SCHEMAS, collect, make, schema
from ibkit.presets import POCKET, SD15
from ibkit.scorers import SCORERS


def cell(notebook: str, **changes) -> dict:
    """The namespace a notebook's parameters cell leaves, IPython's own names included."""
    ipython = {"In": ["", "model = 'pocket'"], "Out": {}, "exit": object(), "_dh": ["/"], "__name__": "__main__"}
    return ipython | {row.name: row.default for row in schema(notebook)} | changes


@pytest.mark.parametrize("notebook", SCHEMAS)
def test_the_cell_as_shipped_is_accepted(notebook):
    values = dataclasses.asdict(collect(notebook, cell(notebook)))
    shipped = {row.name: row.default for row in schema(notebook)}
    resolved = {  # what is empty there
        "01_personalize": {"method": POCKET.personalize, "class_noun": "cat"},
        "14_detailed_description": {"class_noun": "monster toy"},
    }.get(notebook, {})
    assert values == shipped | resolved
    assert {"model", "revision", "device", "seed", "run_out", "resume"} <= set(values)


@pytest.mark.parametrize("notebook", SCHEMAS)
def test_every_default_is_allowed_plain_and_explained(notebook):
    for row in schema(notebook):
        assert type(row.check(row.default)) is row.type
        assert row.type in (int, float, str, bool, list, dict)
        assert row.help and "\n" not in row.help


def test_what_a_help_text_says_of_a_value_can_be_given():
    """ "0 = the preset's", "empty = leave that out", of parameters, settings and options: such a value is allowed."""
    rows = [(notebook, row) for notebook in SCHEMAS for row in schema(notebook)]
    rows += [(name, row) for name, method in METHODS.items() for row in fields_of(method.settings)]
    rows += [(name, row) for name in METHODS for row in fields_of(POCKET.settings(name))]  # its defaults are others
    rows += [(name, row) for name, one in SCORERS.items() if one.options for row in fields_of(one.options)]
    n_said = 0
    for whose, row in rows:
        for said in re.findall(r"(?:^|[ ;,(])(empty|-?\d+(?:\.\d+)?) = ", row.help):
            value = row.type() if said == "empty" else row.type(float(said))
            assert row.check(value) == value, (whose, row.name)
            n_said += 1
    assert n_said > 100


def test_given_values_arrive():
    namespace = cell("02_rl_finetune", processes=7, prompts=["playing soccer"], use_class_prompts=False)
    parameters = collect("02_rl_finetune", namespace)
    assert (parameters.processes, parameters.prompts, parameters.use_class_prompts) == (7, ["playing soccer"], False)


def test_the_evaluation_takes_a_choice_of_scorers():
    assert collect("03_evaluate", cell("03_evaluate")).scorers == []
    assert collect("03_evaluate", cell("03_evaluate", scorers=["clip_t", "dino"])).scorers == ["clip_t", "dino"]
    with pytest.raises(ParameterError, match="'scorers' must be a list of texts"):
        collect("03_evaluate", cell("03_evaluate", scorers="clip_t"))


def test_a_list_holds_what_its_default_says():
    seeds = collect("06_prompt_ablation", cell("06_prompt_ablation", train_seeds=[2, 0])).train_seeds
    assert seeds == [2, 0]
    allowed = "'train_seeds' must be a list of one or more whole numbers from 0 to 2147483647"
    for wrong in ([], [-1], ["0"], [0.0], [True], 0):
        with pytest.raises(ParameterError, match=allowed):
            collect("06_prompt_ablation", cell("06_prompt_ablation", train_seeds=wrong))
    with pytest.raises(ParameterError, match="'class_nouns' must be a list of one or more texts that are not empty"):
        collect("06_prompt_ablation", cell("06_prompt_ablation", class_nouns=[]))


def test_a_float_written_as_text_is_read_as_a_number():
    assert POCKET.settings("dreambooth", {"learning_rate": "1e-4"}).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [("setings", "settings"), ("metod", "method"), ("classnoun", "class_noun"), ("Seed", "seed")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(mistyped, nearest):
    with pytest.raises(ParameterError, match=f"'{mistyped}'; did you mean '{nearest}'"):
        collect("01_personalize", cell("01_personalize", **{mistyped: 3}))


def test_an_unknown_name_like_no_other_is_refused_with_the_list():
    with pytest.raises(ParameterError, match="it is one of model, revision, .*settings"):
        collect("01_personalize", cell("01_personalize", zzz=1))


@pytest.mark.parametrize("value", [1, 1.5, "x", True, [1], {"a": 1}, None])
def test_every_plain_literal_counts_as_a_parameter(value):
    with pytest.raises(ParameterError, match="'setings'"):
        collect("01_personalize", cell("01_personalize", setings=value))


def test_modules_functions_and_private_names_do_not_count():
    collect("01_personalize", cell("01_personalize", np=dataclasses, show=print, _scratch=3, pair=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"processes": 2.0}, "a whole number from 1"),
        ({"processes": True}, "a whole number from 1"),
        ({"processes": "3"}, "a whole number from 1"),
        ({"processes": None}, "a whole number from 1"),
        ({"processes": 0}, "a whole number from 1"),
        ({"seed": 2**31}, "a whole number from 0 to 2147483647"),
        ({"use_class_prompts": 1}, "True or False"),
        ({"use_class_prompts": "True"}, "True or False"),
        ({"prompts": "playing soccer"}, "a list of texts"),
        ({"prompts": ["playing soccer", ""]}, "a list of texts that are not empty"),
        ({"prompts": ["playing soccer", 3]}, "a list of texts"),
        ({"run_in": None}, "a text"),
        ({"model": " "}, "a text that is not empty"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_what_is_allowed(changes, allowed):
    (name,) = changes
    with pytest.raises(ParameterError, match=f"'{name}' must be {allowed}"):
        collect("02_rl_finetune", cell("02_rl_finetune", **changes))


@pytest.mark.parametrize("notebook", ["01_personalize", "03_evaluate"])
def test_the_sampler_is_the_presets_but_for_what_is_given_and_zero_is_a_value(notebook):
    as_shipped, given = make(notebook, {}), {"n_inference_steps": 4, "guidance": 0, "eta": 0.0}
    assert POCKET.drawing(vars(as_shipped)) == POCKET
    changed = POCKET.drawing(vars(make(notebook, given)))
    assert changed.sampler == changed.class_sampler == Sampler(4, 0.0, 0.0)
    only_eta = POCKET.drawing(vars(make(notebook, {"eta": 0.5})))
    assert only_eta.class_sampler == dataclasses.replace(POCKET.class_sampler, eta=0.5)
    assert dataclasses.replace(only_eta, sampler=POCKET.sampler, class_sampler=POCKET.class_sampler) == POCKET


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": -0.5}, "The sampler: setting 'guidance' must be a number from 0.0 to 50.0, not -0.5"),
        ({"eta": -0.1}, "The sampler: setting 'eta' must be a number from 0.0 to 1.0, not -0.1"),
        ({"eta": 1.5}, "'eta' must be a number from -1.0 to 1.0"),
        ({"n_inference_steps": -1}, "'n_inference_steps' must be a whole number from 0 to 1000"),
        ({"n_inference_step": 3}, "did you mean 'n_inference_steps'"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(changes, said):
    for notebook in ("01_personalize", "03_evaluate"):
        with pytest.raises(ParameterError, match=re.escape(said)):
            make(notebook, changes)


@pytest.mark.parametrize(("name", "value"), [("reward", "image_rewad"), ("subject_reward", "image-reward")])
def test_a_reward_that_does_not_exist_is_refused_with_the_nearest(name, value):
    with pytest.raises(ParameterError, match=f"no reward '{value}'; did you mean 'image_reward'"):
        collect("02_rl_finetune", cell("02_rl_finetune", **{name: value}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_epoch": 3}, "Method ddpo has no setting 'n_epoch'; did you mean 'n_epochs'"),
        ({"sampler.steps": 3}, "no setting 'sampler.steps'; did you mean 'sampler.n_steps'"),
        ({"n_epochs": 2.0}, "Method ddpo: setting 'n_epochs' must be a whole number from 1"),
        ({"n_epochs": 0}, "'n_epochs' must be a whole number from 1"),
        ({"clip_range": 1.5}, "'clip_range' must be a number from 0.0 to 1.0, not 1.5"),
        ({"ema_decay": 1.0}, "'ema_decay' must be a number from 0.0 to 0.9999"),
        ({"lora_rank": -1}, "'lora_rank' must be a whole number from 1 to 1024"),
        ({"betas": [0.9]}, "'betas' must be a list of 2 numbers from 0.0 to 1.0"),
        ({"betas": [0.9, "x"]}, "'betas' must be a list of 2 numbers"),
        ({"time_aware": 1}, "'time_aware' must be True or False"),
        ({"combine": "product"}, "'combine' must be one of 'synergy', 'sum', 'harmonic'"),
        ({"learning_rate": "fast"}, "'learning_rate' must be a number"),
        ({"learning_rate": float("nan")}, "'learning_rate' must be a number"),
        ({"learning_rate": 10**400}, "'learning_rate' must be a number"),
        ("n_epochs=3", "'settings' must be a table of names and values"),
        ({3: 4}, "'settings' must be a table of names and values"),
    ],
)
def test_a_setting_is_checked_by_the_methods_record(settings, said):
    with pytest.raises(ParameterError, match=re.escape(said)):
        collect("02_rl_finetune", cell("02_rl_finetune", settings=settings))


def test_settings_can_be_text_as_papermill_passes_it_and_zero_is_a_value():
    parameters = collect("02_rl_finetune", cell("02_rl_finetune", settings="{'kl_weight': 0, 'sampler.n_steps': 5}"))
    settings = POCKET.settings("ddpo", parameters.settings)
    assert (settings.kl_weight, settings.sampler.n_steps, settings.sampler.guidance) == (0.0, 5, 2.0)
    assert POCKET.settings("ddpo", {"ema_decay": 0, "betas": [0.5, 0.6]}).betas == (0.5, 0.6)
    assert POCKET.settings("ddpo").ema_decay == 0.9 and SD15.settings("ddpo").ema_decay == 0.0


def test_the_guard_is_changed_by_name_too():
    parameters = collect("02_rl_finetune", cell("02_rl_finetune", guard={"patience": 3}))
    assert parameters.guard == {"patience": 3}
    with pytest.raises(ParameterError, match="The guard has no setting 'patient'; did you mean 'patience'"):
        collect("02_rl_finetune", cell("02_rl_finetune", guard={"patient": 3}))


@pytest.mark.parametrize(
    ("notebook", "method", "said"),
    [
        ("01_personalize", "dreambouth", "no method 'dreambouth'; did you mean 'dreambooth'"),
        (
            "01_personalize",
            "ddpo",
            "ddpo is a method to tune: to personalize, choose one of dreambooth, lora",
        ),
        ("02_rl_finetune", "dreambooth", "dreambooth is a method to personalize: to tune, choose one of ddpo"),
    ],
)
def test_a_method_of_another_stage_or_none_is_refused(notebook, method, said):
    with pytest.raises(ParameterError, match=said):
        collect(notebook, cell(notebook, method=method))


def test_the_dino_metric_is_of_the_pocket_world():
    with pytest.raises(ParameterError, match="pictures of the pocket world, and model is 'sd15': leave it at 'pocket'"):
        collect("05_dino_metric", cell("05_dino_metric", model="sd15"))


def test_a_number_for_a_text_is_refused_with_papermills_way_out():
    with pytest.raises(ParameterError, match="-r instead of -p"):
        collect("01_personalize", cell("01_personalize", identifier=123))


def test_a_cell_that_lost_a_line_is_refused():
    namespace = cell("01_personalize")
    del namespace["method"]
    with pytest.raises(ParameterError, match="does not set method"):
        collect("01_personalize", namespace)


def test_run_again_by_hand_only_the_parameters_cell_is_looked_at():
    namespace = cell("01_personalize")
    collect("01_personalize", namespace)
    shipped = "\n".join(f"{row.name} = {row.default!r}" for row in schema("01_personalize"))
    namespace |= {"step_count": 3, "In": ["", shipped, "step_count = 3\nseed_used = seed"]}
    collect("01_personalize", namespace)
    namespace |= {"n_step": 5, "In": [*namespace["In"], shipped + "\nn_step = 5"]}
    with pytest.raises(ParameterError, match="'n_step'"):
        collect("01_personalize", namespace)


def test_parameters_share_no_list_with_the_schema_or_the_notebook():
    prompts = ["swimming"]
    parameters = make("02_rl_finetune", {"prompts": prompts})
    prompts.append("flying")
    assert parameters.prompts == ["swimming"]
    make("02_rl_finetune", {}).prompts.append("flying")
    assert make("02_rl_finetune", {}).prompts == []


def test_an_unknown_notebook_is_refused_with_the_nearest_one():
    with pytest.raises(ParameterError, match="did you mean '01_personalize'"):
        schema("01_personalise")


@pytest.mark.parametrize(
    "method, asked, says",
    [
        ("dpok", {"subject_reward": "subject"}, "optimises one reward: leave subject_reward empty, or use ddpo"),
        ("draft", {"subject_reward": "subject"}, "is that of one reward"),
        ("draft", {"processes": 2}, "followed by one process"),
        ("refl", {"reward": "dino"}, "dino has no gradient .*choose one of clip_t, image_reward"),
        ("feedback", {"subject_reward": "subject"}, "follows one reward"),
        ("feedback", {"processes": 2}, "trains in one process"),
        ("feedback", {"guard": {"patience": 3}}, "no frontier to stop by: leave guard.patience at 0"),
    ],
)
def test_what_a_tuning_cannot_have_is_refused_before_anything_runs(method, asked, says):
    with pytest.raises(ParameterError, match=says):
        make("02_rl_finetune", {"method": method} | asked)
