"""The reward guard: the frontier by hand, alarms that ring and that do not, stopping, and what is kept."""

import dataclasses
import math
import random

import pytest
import scipy.stats
import torch

from benchmarks.guard import SHAPES, share_of_runs
from ibkit.adapt import load_state, state
from ibkit.data.prompts import training_prompts
from ibkit.errors import ArtifactError
from ibkit.methods.ddpo import DDPOConfig, best_policy, train
from ibkit.model.sample import Sampler
from ibkit.train.guard import Guard, change, harmonic
from tests.tiny import tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
CONFIG = DDPOConfig(
    n_epochs=6, images_per_epoch=4, batch=4, sampler=Sampler(2, 1.0, 1.0), learning_rate=1e-2, stats_min_count=2
)


def history(n, noise=0.05, **climbs):
    """n epochs in which each number climbs by so much from the first to the last."""
    rng = random.Random(0)

    def curve(climb, i):
        return 0.5 + climb * i / (n - 1) + rng.gauss(0, noise)

    columns = ("reward", "reward_subject", "monitor", "text_monitor")
    return [{column: curve(climbs.get(column, 0.0), i) for column in columns} for i in range(n)]


def test_the_harmonic_mean_by_hand():
    assert harmonic(0.5, 1.0, 0.5) == pytest.approx(2 / 3)
    assert harmonic(0.5, 1.0, 1.0) == pytest.approx(0.5)  # the subject alone
    assert harmonic(0.5, 1.0, 0.0) == pytest.approx(1.0)  # the text alone
    assert harmonic(0.0, 1.0, 0.5) == 0.0


def test_change_by_hand():
    """A rise of 8 over 16 epochs with noise that alternates, so that its autocorrelation counts as 0.

    The best curve that only rises pools 1.5 and 1, 2.5 and 2, ...: of its 9 levels 7 are .25 from two epochs each.
    """
    values = [0.5 * i + (1.0 if i % 2 else 0.0) for i in range(16)]  # 0, 1.5, 1, 2.5, 2, ...
    difference, square, n_levels = 4.0, 14 * 0.25**2, 9
    t = difference / math.sqrt(2 * square / max(16 - 1.5 * n_levels, 4) / 8)
    probability = scipy.stats.t.sf(t, 14)
    assert change(values, 8) == pytest.approx(scipy.stats.norm.isf(probability), rel=0.05)
    assert change([-v for v in values], 8) == -change(values, 8)


def test_neighbours_that_resemble_each_other_make_a_change_less_certain():
    slow = [0.1 * i + (0.5 if i % 8 < 4 else -0.5) for i in range(24)]
    quick = [0.1 * i + (0.5 if i % 2 else -0.5) for i in range(24)]
    assert 0 < change(slow, 8) < 0.6 * change(quick, 8)


def test_change_without_any_noise():
    assert change([1.0] * 16, 8) == 0
    assert change([-0.1 * i for i in range(16)], 8) == -math.inf


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
        ({"reward_subject": 1.0, "text_monitor": -1.0}, ["text_monitor"]),  # the second objective has taken over
    ],
)
def test_the_alarm_rings_when_the_reward_rises_and_a_watched_number_falls(climbs, fallen):
    rows = history(24, **climbs)
    guard = Guard()
    assert guard.fallen(rows) == fallen
    assert guard.look(rows)["alarm"] == float(bool(fallen))


def test_two_full_windows_come_before_an_alarm():
    rows = history(24, noise=0.02, reward=1.0, monitor=-1.0)
    assert Guard(window=8).fallen(rows[:15]) == [] and Guard(window=8).fallen(rows[:16]) == ["monitor"]
    assert Guard(window=10).fallen(rows[:19]) == []
    assert Guard(window=5).fallen(rows[:15]) == []  # 15 epochs do not tell their own autocorrelation


def test_it_looks_once_a_window():
    """Between the looks the answer stays, whatever the epochs say: it is as of the last full window."""
    rows = history(24, reward=1.0)
    lost = [row | {"monitor": -9.0 + row["monitor"]} for row in rows[16:]]
    answers = [Guard().fallen(rows[:16] + lost[:n]) for n in range(9)]
    assert answers[:8] == [[]] * 8 and answers[8] == ["monitor"]


@pytest.mark.parametrize("autocorrelation", [0.5, 0.7])
def test_the_alarm_keeps_its_promise_where_nothing_falls(autocorrelation):
    """At most 5 % of runs of 100 epochs, looked at after each window. `benchmarks/guard.py` runs many more."""
    assert share_of_runs(400, 100, autocorrelation) <= 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_the_alarm_finds_a_real_fall_of_any_shape(shape):
    """Of six deviations of an epoch, in 40 epochs; of twelve, where epochs are much like their neighbours."""
    assert share_of_runs(100, 40, 0.0, 6.0, shape) > 0.9
    assert share_of_runs(100, 40, 0.3, 6.0, shape) > 0.6
    assert share_of_runs(100, 40, 0.7, 12.0, shape) > 0.4


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
    as the epoch before it left it, and not the average, which drew none.
    """
    falling.calls, adapters = 0, []
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    model = tiny_model(tokenizer)
    guard = Guard(window=2, patience=2)
    rows = train(
        model, PROMPTS, constant_reward, config, tmp_path / "a", 0, falling, guard,
        lambda row, model: adapters.append(state(model, "ddpo")),
    )  # fmt: skip
    assert len(rows) == 4 and guard.best(rows) == 1
    result = state(model, "ddpo")
    assert all(torch.equal(result[name], adapters[0][name]) for name in result)
    assert any(not torch.equal(result[name], adapters[1][name]) for name in result)
    # Asked to go on, it has nothing left to do and gives the same policy.
    again = tiny_model(tokenizer)
    assert train(again, PROMPTS, constant_reward, config, tmp_path / "a", 0, falling, guard) == rows
    assert all(torch.equal(value, state(again, "ddpo")[name]) for name, value in result.items())


def test_patience_without_anything_watched_returns_the_last_policy(tokenizer, tmp_path):
    adapters, model = [], tiny_model(tokenizer)
    config = dataclasses.replace(CONFIG, n_epochs=2)
    guard = Guard(window=1, patience=1)
    train(
        model, PROMPTS, constant_reward, config, tmp_path, guard=guard,
        on_epoch=lambda row, model: adapters.append(state(model, "ddpo")),
    )  # fmt: skip
    assert len(adapters) == 2 and all(torch.equal(v, adapters[1][n]) for n, v in state(model, "ddpo").items())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_without_patience_the_last_policy_is_the_result_and_the_best_is_kept(tokenizer, tmp_path, ema_decay):
    falling.calls, adapters = 0, []
    model = tiny_model(tokenizer)
    config = dataclasses.replace(CONFIG, n_epochs=4, ema_decay=ema_decay)
    rows = train(
        model, PROMPTS, constant_reward, config, tmp_path, 0, falling, Guard(window=2),
        lambda row, model: adapters.append(state(model, "ddpo")),
    )  # fmt: skip
    result = state(model, "ddpo")
    assert len(rows) == 4 and all(torch.equal(v, adapters[-1][n]) for n, v in result.items()) == (not ema_decay)
    best = best_policy(tmp_path)
    assert Guard().best(rows) == 1 and all(torch.equal(v, adapters[0][n]) for n, v in best.items())
    load_state(model, "ddpo", best)
    assert any(not torch.equal(v, result[n]) for n, v in state(model, "ddpo").items())


def test_the_best_policy_of_no_training_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has no checkpoint of a training"):
        best_policy(tmp_path)
