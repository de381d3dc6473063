"""Both kinds of prompts against the identifier alone: the arms, their models, sample efficiency, the notebook."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ibkit.adapt import state, without
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.errors import ArtifactError, ParameterError, ScoreError
from ibkit.experiments.prompt_ablation import (
    ARMS,
    Case,
    FixedNoise,
    arm_rows,
    explained_share,
    images_per_prompt,
    load_arm,
    load_personalized,
    make_cases,
    on_fixed_noise,
    personalize,
    train_arm,
    train_arms,
)
from ibkit.experiments.prompt_curves import (
    efficiency,
    images_to_reach,
    kept_by_class,
    learning_curves,
    mean_gain,
    pair_runs,
    reward_spread,
)
from ibkit.methods import dreambooth
from ibkit.methods.ddpo import DDPOConfig, epoch_prompts
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.model.sample import Sampler, sample
from ibkit.presets import POCKET
from ibkit.runs import Run, read_run
from tests.test_chain import papermill

ACTIVITIES = ["playing soccer", "dancing"]
CAT = PersonalizedSubject("orange cat", "cat", "sks", "", "pocket", "", demo_subject("cat"))
SAMPLER = Sampler(2, 2.0, 1.0)
SMALL = DDPOConfig(
    n_epochs=2, images_per_epoch=8, sampler=SAMPLER, learning_rate=1e-2, micro_batch=8, checkpoint_every=1
)


@pytest.fixture
def case():
    return Case(CAT, [photo.resize((16, 16)) for photo in world_photos(CAT.world, 2)], ACTIVITIES)


@pytest.fixture
def run(tmp_path):
    run = Run.open(tmp_path / "run", "test", {})
    yield run
    run.finish()


def brightness(images, prompts):
    return torch.tensor([np.asarray(image).mean() / 255 for image in images])


# --- arms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm, identifier, of_class, batch",
    [("both", 24, 24, 24), ("identifier_equal_identifier", 24, 0, 12), ("identifier_equal_totals", 48, 0, 24)],
)
def test_an_arm_of_the_pocket_preset(arm, identifier, of_class, batch):
    per_prompt = images_per_prompt(POCKET.settings("ddpo").images_per_epoch, 2 * len(ACTIVITIES))
    assert per_prompt == 12
    config = ARMS[arm].config(POCKET.settings("ddpo"), per_prompt, len(ACTIVITIES))
    assert (config.images_per_epoch, config.batch) == (identifier + of_class, batch)
    assert replace(config, images_per_epoch=48, batch=24) == POCKET.settings(
        "ddpo"
    )  # nothing else differs between arms
    prompts = ARMS[arm].prompts(CAT, ACTIVITIES)
    for epoch in range(3):
        drawn = epoch_prompts(prompts, config.images_per_epoch, seed=1, epoch=epoch)
        assert sum(p.identifier for p in drawn) == identifier
        assert {sum(p == q for q in drawn) for p in prompts} == {config.images_per_epoch // len(prompts)}


def test_images_of_a_prompt():
    assert [images_per_prompt(n, 6) for n in (1, 16, 18, 21)] == [1, 3, 3, 4]
    assert ARMS["identifier_equal_identifier"].config(DDPOConfig(), 1, 3).batch == 2  # half of three, rounded up


def test_the_fixed_noise_is_the_same_for_every_prompt():
    prompts = ARMS["both"].prompts(CAT, ACTIVITIES)
    asked, seeds = on_fixed_noise(prompts, 10, seed=3)
    assert asked == [p for p in prompts for _ in range(2)] and seeds == seeds[:2] * 4
    assert on_fixed_noise(prompts, 10, seed=4)[1] != seeds


def test_cases_are_demonstration_subjects():
    cat, cup = make_cases(["cat", "cup", "cat"], [], ("playing soccer", "dancing"), "pocket", "", 32)
    assert cat.subject.instance_prompt == "a sks cat" and cat.activities == ACTIVITIES
    assert cup.activities == ["with popcorn in it", "with pens in it"]  # a cup plays no soccer
    assert {photo.size for photo in cat.photos} == {(32, 32)}
    with pytest.raises(ParameterError, match="has no 'horse'"):
        make_cases(["horse"], [], ACTIVITIES, "pocket", "", 64)


# --- personalized models -------------------------------------------------------------------------------------------


def test_fewer_steps_are_the_same_training_stopped_earlier(run, case, tiny):
    config = DreamBoothConfig(batch=2, learning_rate=1e-3, checkpoint_every=2, ema_decay=0.9)
    before = {k: v.clone() for k, v in tiny.unet.state_dict().items()}
    personalize(run, tiny, case, case.photos, config, [5, 3], seed=7)
    assert all(torch.equal(v, before[k]) for k, v in tiny.unet.state_dict().items())  # the base model stays itself
    for n in (3, 5):
        alone = tiny.copy()
        own = replace(config, n_steps=n)
        words = CAT.instance_prompt, CAT.class_prompt
        dreambooth.train(alone, case.photos, *words, case.photos, own, run.folder / f"alone-{n}", 7)
        kept = load_personalized(run, tiny, case, n).unet.state_dict()
        assert all(torch.equal(v, kept[k]) for k, v in alone.unet.state_dict().items())
    seen = []
    personalize(run, tiny, case, case.photos, config, [3, 5], seed=7, on_step=seen.append)
    assert not seen  # all there: nothing is trained again


def test_an_interrupted_personalization_goes_on(tmp_path, case, tiny):
    config = DreamBoothConfig(batch=2, learning_rate=1e-3, checkpoint_every=2)

    def stop_at_4(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    whole, stopped = (Run.open(tmp_path / name, "test", {}) for name in ("whole", "stopped"))
    personalize(whole, tiny, case, case.photos, config, [3, 6], seed=7)
    with pytest.raises(KeyboardInterrupt):
        personalize(stopped, tiny, case, case.photos, config, [3, 6], seed=7, on_step=stop_at_4)
    seen = []
    personalize(stopped, tiny, case, case.photos, config, [3, 6], seed=7, on_step=seen.append)
    assert [row["step"] for row in seen] == [4, 5]  # from the checkpoint at 4
    for n in (3, 6):
        assert whole.path(case.model_file(n)).read_bytes() == stopped.path(case.model_file(n)).read_bytes()
    # a model that was lost after the training went past it cannot be made from the checkpoint
    stopped.path(case.model_file(3)).unlink()
    with pytest.warns(UserWarning, match="missing"):
        stopped = Run.open(stopped.folder, "test", {}, resume=True)
    with pytest.raises(ArtifactError, match="step 3 is lost.*remove it, then resume"):
        personalize(stopped, tiny, case, case.photos, config, [3, 6], seed=7)


# --- what there is to learn from -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards, shown, share",
    [
        ([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], 1.0),  # the reward is the activity
        ([0.0, 2.0, 2.0, 4.0], [0, 0, 1, 1], 0.5),  # means 1 and 3: between them 1, in all 2
        ([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], 0.0),  # nothing to do with it
        ([0.0, 1.0, 5.0, 9.0], [0, 0, 0, 0], 0.0),  # nobody shows it: all of the spread is something else
        ([0.0, 1.0, 5.0, 9.0], [1, 1, 1, 1], 0.0),
        ([2.0, 2.0, 2.0, 2.0], [0, 0, 1, 1], 0.0),  # no spread at all
    ],
)
def test_how_much_of_the_reward_is_the_activity(rewards, shown, share):
    assert explained_share(torch.tensor(rewards), torch.tensor(shown)) == pytest.approx(share)


def test_without_a_connection_the_share_is_small():
    """1 / (N - 1) on average, which the notebook says so that nobody takes it for a signal."""
    stream = torch.Generator().manual_seed(0)
    shown = torch.arange(10) < 4
    shares = [explained_share(torch.randn(10, generator=stream), shown) for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(1 / 9, abs=0.01)


# --- training an arm -----------------------------------------------------------------------------------------------


def look_at(model, prompts):
    asked, seeds = on_fixed_noise([p for p in prompts if p.identifier], 4, seed=0)
    return FixedNoise(model, asked, seeds, SAMPLER, brightness, lambda images, prompts: {"n_looked": len(images)})


def test_a_row_is_the_policy_that_drew_the_epochs_pictures(run, tiny):
    prompts = ARMS["both"].prompts(CAT, ACTIVITIES)
    look = look_at(tiny, prompts)
    pictures = sample(tiny, [p.text for p in look.prompts], look.seeds, SAMPLER)
    before = brightness(pictures, look.prompts).mean().item()
    policies = []

    def keep(row, model):
        policies.append(sample(model, [p.text for p in look.prompts], look.seeds, SAMPLER))

    train_arm(run, "arms/a", tiny, prompts, brightness, replace(SMALL, n_epochs=3), 5, look, on_epoch=keep)
    history = pd.read_csv(run.path("arms/a/history.csv"))
    assert list(history["n_looked"]) == [4, 4, 4]
    assert history["fixed_reward"][0] == pytest.approx(before)
    for epoch in (1, 2):  # what was measured in epoch k is the policy after k epochs
        assert history["fixed_reward"][epoch] == pytest.approx(brightness(policies[epoch - 1], None).mean().item())
    assert history["fixed_reward"].nunique() == 3


def test_a_finished_arm_is_left_alone_and_an_interrupted_one_goes_on(run, tokenizer, tiny):
    prompts = ARMS["identifier_equal_totals"].prompts(CAT, ACTIVITIES)
    models = [tiny.copy() for _ in range(3)]

    def stop(row, model):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    train_arm(
        run, "arms/whole", models[0], prompts, brightness, replace(SMALL, n_epochs=3), 5, look_at(models[0], prompts)
    )
    with pytest.raises(KeyboardInterrupt):
        own = look_at(models[1], prompts)
        train_arm(run, "arms/cut", models[1], prompts, brightness, replace(SMALL, n_epochs=3), 5, own, on_epoch=stop)
    assert not run.has("arms/cut/history.csv")
    epochs = []
    for _ in range(2):  # the second call finds all there
        train_arm(
            run, "arms/cut", models[2], prompts, brightness, replace(SMALL, n_epochs=3), 5, look_at(models[2], prompts),
            on_epoch=lambda row, model: epochs.append(row["epoch"]),
        )  # fmt: skip
    assert epochs == [1, 2]  # the epoch in which it was interrupted is made again
    whole, cut = (
        pd.read_csv(run.path(f"arms/{name}/history.csv")).drop(columns="seconds") for name in ("whole", "cut")
    )
    pd.testing.assert_frame_equal(whole, cut)
    assert run.path("arms/whole/lora.safetensors").read_bytes() == run.path("arms/cut/lora.safetensors").read_bytes()


def test_every_arm_is_trained_from_every_model_and_comes_back(run, case, tiny):
    personalize(run, tiny, case, case.photos, DreamBoothConfig(learning_rate=1e-3), [1, 2], seed=0)
    watched = {"judge_activity": 0.5, "judge_identity": 1.0, "monitor": 0.4}
    named = [CAT.prompt(activity) for activity in ACTIVITIES]

    def look(model):
        return FixedNoise(model, named, [1, 2], SAMPLER, brightness, lambda images, prompts: watched)

    config = replace(SMALL, n_epochs=1, images_per_epoch=4)
    seen = []
    table = train_arms(run, tiny, case, [1, 2], [5], config, look, -0.5, lambda folder, row: seen.append(folder))
    assert len(table) == len(seen) == len(set(seen)) == 2 * len(ARMS)
    starts = table.groupby("dreambooth_steps")["reward_identifier"].unique()
    assert [len(start) for start in starts] == [1, 1] and starts[1] != starts[2]  # one model an arm starts from
    personalized, trained = (
        load_personalized(run, tiny, case, 2),
        load_arm(run, tiny, case, 2, "both", 5, SMALL.lora_rank),
    )
    assert all(v.abs().sum() > 0 for k, v in state(trained, "ddpo").items() if "lora_B" in k)
    pictures = [sample(m, [named[0].text], [9], SAMPLER)[0].tobytes() for m in (personalized, trained)]
    assert pictures[0] != pictures[1]
    with without(trained, "ddpo"):
        assert sample(trained, [named[0].text], [9], SAMPLER)[0].tobytes() == pictures[0]


def test_rows_count_the_images_made_before_the_measurement(case):
    measured = {"judge_activity": 0.5, "judge_identity": 1.0, "monitor": 0.4}
    history = pd.DataFrame(
        {"epoch": [0, 1, 2], "reward_identifier": -9.0, "fixed_reward": [-3.0, -2.5, -2.0], **measured}
    )
    made = {}
    for arm in ARMS:
        rows = arm_rows(history, arm, case, 950, 1, per_prompt=12, reward_base=-0.5)
        made[arm] = (list(rows["n_images"]), list(rows["n_identifier_images"]))
        assert list(rows["reward_identifier"]) == [-3.0, -2.5, -2.0]  # of the fixed noise, not of the training
        assert set(rows["training_reward_identifier"]) == {-9.0} and rows["training_reward_class"].isna().all()
    assert made == {
        "both": ([0, 48, 96], [0, 24, 48]),
        "identifier_equal_identifier": ([0, 24, 48], [0, 24, 48]),
        "identifier_equal_totals": ([0, 48, 96], [0, 48, 96]),
    }


# --- sample efficiency ---------------------------------------------------------------------------------------------


def test_images_to_reach():
    images, values = [0, 10, 20, 30, 40], [0.0, 0.0, 3.0, 3.0, 3.0]  # means of three rows: 0, 0, 1, 2, 3
    assert images_to_reach(images, values, 1.0) == 20
    assert images_to_reach(images, values, 1.5) == 25
    assert images_to_reach(images, values, 3.0) == 40
    assert images_to_reach(images, values, 3.1) == math.inf
    assert images_to_reach(images, values, -1.0) == 0
    assert images_to_reach([0, 10, 20, 30], [0.0, 6.0, 0.0, 0.0], 3.0) == 10  # means 0, 3, 2, 2: first time counts
    assert images_to_reach([0, 10, 20, 30], [0.0, 0.0, 6.0, 0.0], 3.0) == math.inf  # one lucky row is not enough


def test_mean_gain():
    images, values = [0, 50, 100], [-1.0, 0.0, 1.0]
    assert mean_gain(images, values, 100) == pytest.approx(1.0)  # a straight line from -1 to 1
    assert mean_gain(images, values, 50) == pytest.approx(0.5)
    assert mean_gain(images, values, 75) == pytest.approx(0.75)  # cut between two rows
    assert mean_gain([0, 50, 100], [2.0, 2.0, 2.0], 100) == 0


def curve(arm, rl_seed, values, per_epoch, class_noun="cat", steps=950, base=0.0):
    n_identifier = {"both": per_epoch // 2}.get(arm, per_epoch)
    epochs = np.arange(len(values))
    return pd.DataFrame(
        {
            "arm": arm, "class_noun": class_noun, "subject": f"my {class_noun}", "dreambooth_steps": steps,
            "rl_seed": rl_seed, "epoch": epochs, "n_images": epochs * per_epoch,
            "n_identifier_images": epochs * n_identifier, "reward_identifier": values, "reward_base": base,
            "judge_activity": 0.5, "judge_identity": 1.0, "monitor": 0.5,
        }
    )  # fmt: skip


def climb(epochs, n=9, low=-4.0):
    """From `low` straight up for good; the mean of three rows is half-way to 0 after `epochs`, a whole number."""
    slope = -low / 2 / (epochs - 1)  # the mean lags one epoch behind a straight line
    return [low + slope * k for k in range(n)]


def table_of(speeds, arm="identifier_equal_totals", per_epoch=40):
    """One pair of runs for each (epochs of both, epochs of the other) to half of the loss."""
    parts = []
    for seed, (both, other) in enumerate(speeds):
        parts += [curve("both", seed, climb(both), 40), curve(arm, seed, climb(other), per_epoch)]
    return pd.concat(parts, ignore_index=True)


def test_the_ratio_of_images_at_equal_totals():
    table = table_of([(3, 6), (4, 6), (3, 8)] * 2)
    pairs = pair_runs(table, "identifier_equal_totals")
    assert list(pairs["both"]) == pytest.approx([120, 160, 120] * 2)
    assert list(pairs["other"]) == pytest.approx([240, 240, 320] * 2)
    assert set(pairs["level"]) == {-2.0} and set(pairs["horizon"]) == {320.0}
    (row,) = efficiency(table).to_dict("records")
    assert row["ratio"] == pytest.approx(800 / 400) and row["axis"] == "n_images"
    # the bounds are those of drawing six of the six pairs with replacement: 1.5 and 8/3 are the extreme draws
    assert 1.5 <= row["ratio_low"] < 2 < row["ratio_high"] <= 8 / 3 + 1e-9
    assert row["gain_difference"] > 0 and row["gain_low"] > 0
    assert row["verdict"] == "both kinds are faster" and (row["reached_both"], row["reached_other"]) == (6, 6)


def test_the_sign_turns_with_the_arms():
    (row,) = efficiency(table_of([(6, 3), (6, 4), (8, 3)] * 2)).to_dict("records")
    assert row["ratio"] == pytest.approx(0.5) and row["ratio_high"] < 1 and row["gain_high"] < 0
    assert row["verdict"] == "the identifier alone is faster"
    (row,) = efficiency(table_of([(3, 6), (6, 3), (4, 4)] * 2)).to_dict("records")
    assert row["ratio"] == pytest.approx(1) and row["verdict"] == "not decided"


def test_equal_identifier_images_are_compared_along_those():
    """ "both" makes 20 of them an epoch, the other arm 20 in all: equal curves over epochs are equal efficiency."""
    (row,) = efficiency(table_of([(4, 4)] * 3, "identifier_equal_identifier", per_epoch=20)).to_dict("records")
    assert row["axis"] == "n_identifier_images" and row["ratio"] == pytest.approx(1) and row["gain_difference"] == 0


def test_the_judge_is_asked_beside_the_reward():
    """Equal rewards, and only with both kinds does the activity come: from 0 to 80 % on a straight line."""
    table = table_of([(4, 4)] * 6)
    table["judge_activity"] = np.where(table["arm"] == "both", 0.1 * table["epoch"], 0.0)
    (row,) = efficiency(table).to_dict("records")
    assert row["gain_difference"] == 0 and row["activity_difference"] == pytest.approx(0.4)
    assert row["activity_low"] == pytest.approx(0.4) and row["activity_high"] == pytest.approx(0.4)
    (row,) = efficiency(table[table["rl_seed"] < 2]).to_dict("records")
    assert row["activity_difference"] == pytest.approx(0.4) and math.isnan(row["activity_low"])


def test_a_run_that_never_gets_there_counts_with_its_horizon():
    flat = [-4.0] * 9
    table = table_of([(4, 8)] * 6)
    table.loc[(table["arm"] != "both") & (table["rl_seed"] == 0), "reward_identifier"] = flat
    pairs = pair_runs(table, "identifier_equal_totals")
    assert list(pairs["other"]) == pytest.approx([math.inf, *[320] * 5])
    (row,) = efficiency(table).to_dict("records")
    assert row["ratio"] == pytest.approx(2) and row["reached_other"] == 5  # 320 images, the horizon, for the flat run
    table["reward_identifier"] = flat * 12
    (row,) = efficiency(table).to_dict("records")
    assert math.isnan(row["ratio"]) and row["verdict"] == "no run got there: train for more epochs"
    assert row["gain_difference"] == 0 and row["gain_low"] == row["gain_high"] == 0


def test_the_horizon_is_that_of_the_shorter_run():
    table = pd.concat([curve("both", 0, climb(8), 40), curve("identifier_equal_totals", 0, climb(3)[:6], 40)])
    (pair,) = pair_runs(table, "identifier_equal_totals").to_dict("records")
    assert pair["horizon"] == 200 and pair["both"] == math.inf  # it gets there at 320, when the other has ended


def test_too_few_runs_have_no_interval():
    (row,) = efficiency(table_of([(3, 6), (3, 6)])).to_dict("records")
    assert row["ratio"] == pytest.approx(2) and math.isnan(row["ratio_low"]) and math.isnan(row["gain_low"])
    assert row["n_pairs"] == 2 and row["verdict"] == "too few runs to say"


def test_what_cannot_be_paired_is_left_out():
    table = table_of([(3, 6)])
    assert efficiency(table[table["arm"] == "both"]).empty  # no other arm
    assert efficiency(table.assign(reward_base=-5.0)).empty  # nothing was lost: the start is above the base model
    other = table_of([(4, 4)]).assign(dreambooth_steps=500)
    rows = efficiency(pd.concat([table, other]))
    assert list(rows["dreambooth_steps"]) == [500, 950] and list(rows["ratio"]) == pytest.approx([1, 2])


def test_what_the_class_prompts_have_kept():
    table = pd.concat([table_of([(3, 6), (4, 6)]), table_of([(3, 3)]).assign(class_noun="dog")])
    both, cat = table["arm"] == "both", table["class_noun"] == "cat"
    table["training_reward_identifier"] = np.where(both, -3.0, -5.0) + 9.0 * (table["epoch"] > 0)  # before RL: -4
    table["training_reward_class"] = np.where(cat, -1.0, -4.0) + 9.0 * (table["epoch"] > 0)
    table.loc[~both, "training_reward_class"] = math.nan
    kept = kept_by_class(table)
    assert list(kept["class_noun"]) == ["cat", "dog"] and list(kept["kept"]) == pytest.approx([0.75, 0])
    assert list(kept["identifier"]) == [-4, -4] and list(kept["class"]) == [-1, -4] and list(kept["base"]) == [0, 0]
    assert kept_by_class(table.assign(reward_base=-4.0))["kept"].isna().all()  # nothing was lost
    with pytest.raises(ScoreError, match="lacks training_reward_class"):
        kept_by_class(table.drop(columns="training_reward_class"))


def test_a_table_that_cannot_be_read():
    table = table_of([(3, 6)])
    with pytest.raises(ScoreError, match="lacks n_images, reward_base"):
        efficiency(table.drop(columns=["reward_base", "n_images"]))
    with pytest.raises(ScoreError, match="holds an epoch of a run twice"):
        efficiency(pd.concat([table, table.tail(1)]))


# --- figures and the notebook --------------------------------------------------------------------------------------


def test_figures_hand_back_what_they_draw():
    table = pd.concat([table_of([(3, 6), (4, 6)]), table_of([(3, 3)]).assign(dreambooth_steps=500)])
    for column in ("reward_identifier", "judge_activity", "monitor"):
        figure, data = learning_curves(table, column)
        assert len(figure.axes) == 2 * 2 and len(data) == len(table)  # two kinds of images, two numbers of steps
        assert list(data["value"]) == list(table[column])
    assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["images made", "images made with the identifier"]
    drawn = pd.DataFrame({"dreambooth_steps": [9, 9], "prompt": ["a", "b"], "reward": [0.0, 1.0], "shown": [0.0, 1.0]})
    figure, data = reward_spread(drawn)
    assert data is drawn and len(figure.axes) == 1


def test_equal_rewards_give_an_equal_figure():
    drawn = pd.DataFrame({"dreambooth_steps": 9, "prompt": "a", "reward": [0.0, 0.5, 1.0], "shown": [0.0, 1.0, 1.0]})
    places = [[dots.get_offsets() for dots in reward_spread(drawn)[0].axes[0].collections] for _ in range(2)]
    assert all(np.array_equal(*pair) for pair in zip(*places, strict=True))
    assert len(np.unique(places[0][1][:, 1])) == 2  # apart from each other


@pytest.mark.slow
def test_the_notebook(tmp_path):
    words = ["-y", "dreambooth_steps: [1]", "-y", "train_seeds: [3]", "-p", "n_epochs", 2, "-p", "n_images", 2]
    words += ["-y", "settings: {images_per_epoch: 4}", "-r", "run_out", tmp_path / "run"]
    result = papermill("06_prompt_ablation", tmp_path / "06.ipynb", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    run = read_run(tmp_path / "run", "06_prompt_ablation")
    table = run.table("prompt_kinds.csv")
    assert len(table) == 3 * 2 and set(table["arm"]) == set(ARMS)  # arms, epochs
    assert set(table["rl_seed"]) == {3} and set(table["dreambooth_steps"]) == {1}
    assert (
        table[["reward_identifier", "judge_activity", "judge_identity", "monitor", "reward_base"]].notna().all().all()
    )
    assert table.loc[table["epoch"] == 0, "reward_identifier"].nunique() == 1  # the arms start from one model
    assert {"figures/curves_reward.png", "figures/spread.png", "efficiency.csv"} <= set(run.outputs)
