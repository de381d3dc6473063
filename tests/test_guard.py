"""The reward guard: the frontier by hand, alarms that ring and that do not, stopping, and what is kept."""

import dataclasses
import random

import pytest
import torch

from ibkit.data.prompts import training_prompts
from ibkit.rl.ddpo import DDPOConfig, train
from ibkit.rl.guard import Guard, change, harmonic
from ibkit.sample import Sampler
from tests.tiny import tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
CONFIG = DDPOConfig(
    n_epochs=6, images_per_epoch=4, batch=4, sampler=Sampler(2, 1.0, 1.0), learning_rate=1e-2, stats_min_count=2
)


def history(n, reward=0.0, monitor=0.0, text_monitor=0.0, noise=0.05):
    """n epochs in which each number climbs by so much from the first to the last."""
    rng = random.Random(0)

    def curve(climb, i):
        return 0.5 + climb * i / (n - 1) + rng.gauss(0, noise)

    return [
        {"reward": curve(reward, i), "monitor": curve(monitor, i), "text_monitor": curve(text_monitor, i)}
        for i in range(n)
    ]


def test_the_harmonic_mean_by_hand():
    assert harmonic(0.5, 1.0, 0.5) == pytest.approx(2 / 3)
    assert harmonic(0.5, 1.0, 1.0) == pytest.approx(0.5)  # the subject alone
    assert harmonic(0.5, 1.0, 0.0) == pytest.approx(1.0)  # the text alone
    assert harmonic(0.0, 1.0, 0.5) == 0.0


def test_change_is_welchs_t():
    # means 2 and 5, variances 1 and 4: 3 / sqrt(1/3 + 4/3)
    assert change([1, 2, 3], [3, 5, 7]) == pytest.approx(3 / (5 / 3) ** 0.5)
    assert change([1, 1], [1, 1]) == 0
    assert change([1, 1], [0, 0]) == -float("inf")


@pytest.mark.parametrize(
    "climbs, fallen",
    [
        ({"reward": 1.0, "monitor": -1.0}, ["monitor"]),
        ({"reward": 1.0, "text_monitor": -1.0}, ["text_monitor"]),
        ({"reward": 1.0, "monitor": -1.0, "text_monitor": -1.0}, ["monitor", "text_monitor"]),
        ({"reward": 1.0}, []),  # nothing fell
        ({"reward": 1.0, "monitor": 1.0, "text_monitor": 1.0}, []),  # all is well
        ({"monitor": -1.0}, []),  # no reward was won with it
        ({"reward": 1.0, "monitor": -0.02}, []),  # within the noise
    ],
)
def test_the_alarm_rings_when_the_reward_rises_and_a_watched_number_falls(climbs, fallen):
    rows = history(24, **climbs)
    guard = Guard()
    assert guard.fallen(rows) == fallen
    assert guard.look(rows)["alarm"] == float(bool(fallen))


def test_two_full_windows_come_before_an_alarm():
    rows = history(15, reward=1.0, monitor=-1.0)
    assert Guard(window=8).fallen(rows) == [] and Guard(window=7).fallen(rows) == ["monitor"]


def test_the_frontier_is_of_the_newest_full_window():
    rows = [{"reward": 0.0, "monitor": m, "text_monitor": t} for m, t in ((0.9, 0.9), (0.2, 0.4), (0.4, 0.2))]
    guard = Guard(window=2)
    assert "frontier" not in guard.look(rows[:1])
    assert guard.look(rows)["frontier"] == pytest.approx(harmonic(0.65, 0.65, 0.5))
    assert "frontier" not in guard.look([{"reward": 0.0, "monitor": 0.5}] * 3)  # no second scorer


def test_an_epoch_without_a_picture_of_the_subject_counts_for_nothing():
    rows = [{"reward": 0.0}, {"reward": 0.0, "monitor": 0.4, "text_monitor": 0.2}]
    assert Guard(window=2).look(rows)["frontier"] == pytest.approx(harmonic(0.7, 0.6, 0.5))


def test_patience():
    rows = [{"frontier": f} for f in (0.5, 0.7, 0.6, 0.65)]
    assert Guard().best(rows) == 1
    assert Guard(patience=2).gives_up(rows) and not Guard(patience=3).gives_up(rows)
    assert not Guard(patience=0).gives_up(rows)


def falling(images, prompts):
    """A subject that is lost a little more with each call, and a text fidelity that stays."""
    falling.calls += 1
    return {"monitor": 1.0 - 0.1 * falling.calls, "text_monitor": 0.5}


def constant_reward(images, prompts):
    return torch.arange(float(len(images)))


def test_training_ends_early_and_returns_the_best_policy(tokenizer, tmp_path):
    """The best epoch is the first with a full window; the result is the policy that drew its pictures, so the adapter
    as the epoch before it left it.
    """
    falling.calls, adapters = 0, []
    model = tiny_model(tokenizer)
    guard = Guard(window=2, patience=2)
    rows = train(
        model, PROMPTS, constant_reward, CONFIG, tmp_path / "a", 0, falling, guard,
        lambda row, model: adapters.append(model.lora_state()),
    )  # fmt: skip
    assert len(rows) == 4 and guard.best(rows) == 1
    result = model.lora_state()
    assert all(torch.equal(result[name], adapters[0][name]) for name in result)
    assert any(not torch.equal(result[name], adapters[1][name]) for name in result)
    # Asked to go on, it has nothing left to do and gives the same policy.
    again = tiny_model(tokenizer)
    assert train(again, PROMPTS, constant_reward, CONFIG, tmp_path / "a", 0, falling, guard) == rows
    assert all(torch.equal(value, again.lora_state()[name]) for name, value in result.items())


def test_patience_without_anything_watched_returns_the_last_policy(tokenizer, tmp_path):
    adapters, model = [], tiny_model(tokenizer)
    config = dataclasses.replace(CONFIG, n_epochs=2)
    guard = Guard(window=1, patience=1)
    train(
        model, PROMPTS, constant_reward, config, tmp_path, guard=guard,
        on_epoch=lambda row, model: adapters.append(model.lora_state()),
    )  # fmt: skip
    assert len(adapters) == 2 and all(torch.equal(v, adapters[1][n]) for n, v in model.lora_state().items())


def test_without_patience_the_last_policy_is_the_result(tokenizer, tmp_path):
    falling.calls, adapters = 0, []
    model = tiny_model(tokenizer)
    rows = train(
        model, PROMPTS, constant_reward, dataclasses.replace(CONFIG, n_epochs=4), tmp_path, 0, falling, Guard(window=2),
        lambda row, model: adapters.append(model.lora_state()),
    )  # fmt: skip
    assert len(rows) == 4 and all(torch.equal(v, adapters[-1][n]) for n, v in model.lora_state().items())
