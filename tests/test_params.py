"""Notebook parameters: what is accepted, what is refused, and what the refusal says."""

import dataclasses
from dataclasses import replace

import pytest

from ibkit.errors import ParameterError
from ibkit.methods.engine.objectives import COMBINATIONS
from ibkit.params import SCHEMAS, collect, make, schema
from ibkit.presets import POCKET, ZERO_IS_A_VALUE, override


def cell(notebook: str, **changes) -> dict:
    """The namespace a notebook's parameters cell leaves, IPython's own names included."""
    ipython = {"In": ["", "model = 'pocket'"], "Out": {}, "exit": object(), "_dh": ["/"], "__name__": "__main__"}
    return ipython | {row.name: row.default for row in schema(notebook)} | changes


@pytest.mark.parametrize("notebook", SCHEMAS)
def test_the_cell_as_shipped_is_accepted(notebook):
    values = dataclasses.asdict(collect(notebook, cell(notebook)))
    assert values == {row.name: row.default for row in schema(notebook)}
    assert {"model", "revision", "device", "seed", "run_out", "resume"} <= set(values)


@pytest.mark.parametrize("notebook", SCHEMAS)
def test_every_default_is_allowed_plain_and_explained(notebook):
    for row in schema(notebook):
        assert type(row.check(row.default)) is row.type
        assert row.type in (int, float, str, bool, list)
        assert row.help and "\n" not in row.help


def test_given_values_arrive():
    namespace = cell("02_rl_finetune", n_epochs=7, prompts=["playing soccer"], guidance=5, use_class_prompts=False)
    parameters = collect("02_rl_finetune", namespace)
    assert (parameters.n_epochs, parameters.prompts, parameters.use_class_prompts) == (7, ["playing soccer"], False)
    assert parameters.guidance == 5.0 and type(parameters.guidance) is float


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
    parameters = collect("01_personalize", cell("01_personalize", learning_rate="1e-4"))
    assert parameters.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [("n_step", "n_steps"), ("learnig_rate", "learning_rate"), ("classnoun", "class_noun"), ("Seed", "seed")],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(mistyped, nearest):
    with pytest.raises(ParameterError, match=f"'{mistyped}'; did you mean '{nearest}'"):
        collect("01_personalize", cell("01_personalize", **{mistyped: 3}))


def test_an_unknown_name_like_no_other_is_refused_with_the_list():
    with pytest.raises(ParameterError, match="it is one of model, revision, .*n_class_images"):
        collect("01_personalize", cell("01_personalize", zzz=1))


@pytest.mark.parametrize("value", [1, 1.5, "x", True, [1], {"a": 1}, None])
def test_every_plain_literal_counts_as_a_parameter(value):
    with pytest.raises(ParameterError, match="'n_step'"):
        collect("01_personalize", cell("01_personalize", n_step=value))


def test_modules_functions_and_private_names_do_not_count():
    collect("01_personalize", cell("01_personalize", np=dataclasses, show=print, _scratch=3, settings=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"n_epochs": 2.0}, "a whole number from 0"),
        ({"n_epochs": True}, "a whole number from 0"),
        ({"n_epochs": "3"}, "a whole number from 0"),
        ({"n_epochs": None}, "a whole number from 0"),
        ({"n_epochs": -1}, "a whole number from 0"),
        ({"seed": 2**31}, "a whole number from 0 to 2147483647"),
        ({"clip_range": 1.5}, "a number from 0.0 to 1.0"),
        ({"kl_weight": -0.5}, "a number from 0.0 to 1000000.0, or -1.0, not -0.5"),
        ({"ema_decay": 1.0}, "a number from 0.0 to 0.9999, or -1.0"),
        ({"patience": -2}, "a whole number from 0 to 100000, or -1"),
        ({"lora_rank": -1}, "a whole number from 0 to 1024, not"),
        ({"clip_range": -0.1}, "a number from 0.0 to 1.0"),
        ({"learning_rate": "fast"}, "a number from"),
        ({"learning_rate": float("nan")}, "a number from"),
        ({"learning_rate": "inf"}, "a number from"),
        ({"learning_rate": 10**400}, "a number from"),
        ({"learning_rate": True}, "a number from"),
        ({"use_class_prompts": 1}, "True or False"),
        ({"use_class_prompts": "True"}, "True or False"),
        ({"prompts": "playing soccer"}, "a list of texts"),
        ({"prompts": ["playing soccer", ""]}, "a list of texts that are not empty"),
        ({"prompts": ["playing soccer", 3]}, "a list of texts"),
        ({"run_in": None}, "a text"),
        ({"model": " "}, "a text that is not empty"),
        ({"combine": "product"}, "one of 'synergy', 'sum', 'harmonic'"),
        ({"text_weight": 1.5}, "a number from 0.0 to 1.0"),
        ({"synergy": -0.4}, "a number from 0.0 to"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_what_is_allowed(changes, allowed):
    (name,) = changes
    with pytest.raises(ParameterError, match=f"'{name}' must be {allowed}"):
        collect("02_rl_finetune", cell("02_rl_finetune", **changes))


@pytest.mark.parametrize(("name", "value"), [("reward", "image_rewad"), ("subject_reward", "image-reward")])
def test_a_reward_that_does_not_exist_is_refused_with_the_nearest(name, value):
    with pytest.raises(ParameterError, match=f"no reward '{value}'; did you mean 'image_reward'"):
        collect("02_rl_finetune", cell("02_rl_finetune", **{name: value}))


def test_minus_one_is_the_presets_where_zero_is_a_value():
    unset = {row.name for notebook in SCHEMAS for row in schema(notebook) if row.default == -1}
    assert unset == ZERO_IS_A_VALUE
    config, guard = replace(POCKET.ddpo, kl_weight=0.5), replace(POCKET.guard, patience=7)
    for value, kl_weight, ema_decay, patience in ((-1, 0.5, 0.9, 7), (0, 0.0, 0.0, 0)):
        parameters = make("02_rl_finetune", dict.fromkeys(("kl_weight", "ema_decay", "patience"), value))
        chosen = override(config, kl_weight=parameters.kl_weight, ema_decay=parameters.ema_decay)
        assert (chosen.kl_weight, chosen.ema_decay) == (kl_weight, ema_decay)
        assert override(guard, patience=parameters.patience).patience == patience
    assert override(config, lora_rank=0, kl_weight=-1.0) == config


def test_the_dino_metric_is_of_the_pocket_world():
    with pytest.raises(ParameterError, match="pictures of the pocket world, and model is 'sd15': leave it at 'pocket'"):
        collect("05_dino_metric", cell("05_dino_metric", model="sd15"))


def test_the_combinations_are_those_that_training_knows():
    (row,) = [row for row in schema("02_rl_finetune") if row.name == "combine"]
    assert row.choices == COMBINATIONS


def test_a_number_for_a_text_is_refused_with_papermills_way_out():
    with pytest.raises(ParameterError, match="-r instead of -p"):
        collect("01_personalize", cell("01_personalize", identifier=123))


def test_a_cell_that_lost_a_line_is_refused():
    namespace = cell("01_personalize")
    del namespace["n_steps"]
    with pytest.raises(ParameterError, match="does not set n_steps"):
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
