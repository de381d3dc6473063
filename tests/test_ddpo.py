"""DDPO: hand-worked losses, exact ratios, advantages, learning, and checkpoints."""

import dataclasses
import itertools
import math

import pytest
import torch
from PIL import Image

from ibkit.adapt import attach, state
from ibkit.data.prompts import training_prompts
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError, TrainingError
from ibkit.methods import ddpo
from ibkit.methods.ddpo import (
    DDPOConfig,
    epoch_prompts,
    gaussian_kl,
    pair_loss,
    policy_loss,
    train,
)
from ibkit.methods.engine.advantages import PromptStats
from ibkit.methods.engine.objectives import Objectives
from ibkit.methods.engine.rollout import rollout
from ibkit.model.ddim import step_mean
from ibkit.model.sample import Sampler
from ibkit.presets import SD15
from ibkit.runs import Checkpoints
from ibkit.train.kept import Average
from ibkit.train.processes import Processes
from tests.tiny import tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
CONFIG = DDPOConfig(
    n_epochs=2,
    images_per_epoch=8,
    batch=4,
    sampler=Sampler(4, 3.0, 1.0),
    learning_rate=1e-2,
    clip_range=0.1,
    micro_batch=8,
    stats_min_count=2,
    checkpoint_every=1,
)


def brightness(images, prompts):
    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


# --- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, expected",
    [
        (2.0, 1.0, -2.0),
        (2.0, 1.05, -2.1),  # inside the clip range
        (2.0, 1.30, -2.2),  # a good action already made likelier: clipped at 1.1
        (2.0, 0.70, -1.4),  # a good action made less likely: not clipped
        (-2.0, 1.30, 2.6),  # a bad action made likelier: not clipped
        (-2.0, 0.70, 1.8),  # a bad action already made less likely: clipped at 0.9
    ],
)
def test_policy_loss_by_hand(advantage, ratio, expected):
    loss, r = policy_loss(torch.tensor([math.log(ratio)]), torch.tensor([0.0]), torch.tensor([advantage]), 0.1)
    torch.testing.assert_close(loss, torch.tensor([expected]))
    torch.testing.assert_close(r, torch.tensor([ratio]))


@pytest.mark.parametrize("advantage, gradient", [(2.0, -2.0), (-2.0, 2.0)])
def test_gradient_raises_the_log_prob_of_good_actions_and_lowers_that_of_bad_ones(advantage, gradient):
    new = torch.zeros(1, requires_grad=True)
    policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 1e-4)[0].sum().backward()
    assert new.grad.item() == pytest.approx(gradient)


def test_clipped_pairs_have_no_gradient():
    new = torch.tensor([0.5], requires_grad=True)
    policy_loss(new, torch.zeros(1), torch.tensor([1.0]), 1e-4)[0].sum().backward()
    assert new.grad.item() == 0


def test_kl_against_torch():
    mean, reference = torch.randn(2, 3, 4, 2, 2, generator=generator(0)).unbind(0)
    std = torch.tensor([0.1, 1.0, 2.0])
    s = std.view(3, 1, 1, 1).expand_as(mean)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, s), normal(reference, s)).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)


# --- advantages -------------------------------------------------------------------------------------------------


def test_prompts_with_and_without_the_identifier_have_their_own_baselines():
    stats = PromptStats(min_count=2)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    advantages = stats.advantages(prompts, torch.tensor([0.0, 2.0, 10.0, 14.0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_equal_rewards_give_zero_and_a_prompt_seen_once_uses_those_of_its_kind():
    """Two prompts with the identifier, the second seen once; the class prompt's 90 is not looked at."""
    stats = PromptStats(min_count=2)
    advantages = stats.advantages([PROMPTS[i] for i in (0, 0, 2, 1)], torch.tensor([3.0, 3.0, 6.0, 90.0]))
    assert advantages[:2].tolist() == [0.0, 0.0]
    assert advantages[2].item() == pytest.approx((6 - 4) / 2**0.5, rel=1e-4)
    assert advantages[3].item() == 0.0  # alone of its kind


def test_where_a_prompt_is_rare_its_kind_serves_and_not_the_other(tokenizer):
    """The sd15 preset: 16 pictures on 3 x 2 prompts. With the identifier all earn less; none of them is bad for it."""
    config = SD15.settings("ddpo")
    prompts = training_prompts(SD15.activities, "cat", "sks")
    stats = Objectives(brightness, None, config)
    for epoch in range(8):
        chosen = epoch_prompts(prompts, config.images_per_epoch, seed=0, epoch=epoch)
        named = torch.tensor([p.identifier for p in chosen])
        rewards = torch.randn(len(chosen), generator=generator(0, "fake", epoch)) - 5.0 * named
        advantages = stats.advantages(chosen, rewards[None], 1)[:, 0]
        if epoch < 5:  # no prompt has statistics of its own; then they are over more pictures than an epoch's
            assert advantages[named].mean().abs() < 1e-5 and advantages[~named].mean().abs() < 1e-5
        assert advantages[named].mean().abs() < 0.5 and advantages[named].max() > 0.5


def test_the_baseline_remembers_earlier_epochs_and_survives_a_checkpoint():
    stats = PromptStats(min_count=2)
    stats.advantages(PROMPTS[:1] * 2, torch.tensor([0.0, 2.0]))
    copy = PromptStats(min_count=2)
    copy.load(stats.state())
    for s in (stats, copy):
        assert s.advantages(PROMPTS[:1], torch.tensor([4.0])).item() == pytest.approx(
            2 / (8 / 3) ** 0.5, rel=1e-4
        )  # of 0, 2, 4


def test_group_relative_advantages_know_only_their_own_batch():
    stats = PromptStats(buffer_size=0, min_count=2)
    stats.advantages(PROMPTS[:1] * 2, torch.tensor([100.0, 200.0]))
    advantages = stats.advantages(PROMPTS[:2] * 2, torch.tensor([1.0, 5.0, 3.0, 5.0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 1.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_a_buffer_of_zero_is_enough_for_group_relative_advantages():
    """With the other settings as they are: two prompts, eight pictures each, half of one DDPO batch."""
    config = DDPOConfig(stats_buffer=0)
    stats = PromptStats(config.stats_buffer, config.stats_min_count)
    rewards = torch.tensor([9.0, 11.0] * 4 + [1.0, 2.0] * 4)
    advantages = stats.advantages(PROMPTS[:1] * 8 + PROMPTS[1:2] * 8, rewards)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0] * 8), rtol=1e-4, atol=1e-4)


def test_an_epoch_uses_every_prompt_equally_often():
    chosen = epoch_prompts(PROMPTS, 8, seed=0, epoch=3)
    assert all(chosen.count(p) == 2 for p in PROMPTS)


# --- exactness of the loop --------------------------------------------------------------------------------------


def rolled(model, n=4, guidance=3.0):
    schedule = CONFIG.sampler.schedule(model)
    streams = [generator(0, "test", i) for i in range(n)]
    texts = [PROMPTS[i % len(PROMPTS)].text for i in range(n)]
    return schedule, rollout(model, texts, schedule, guidance, streams)


def with_adapter(model):
    trainable = list(attach(model, "lora", "ddpo", {"rank": 4}, generator(0, "lora")).values())
    with torch.no_grad():
        for p in trainable:
            p.add_(0.05 * torch.randn(p.shape, generator=generator(1, str(p.shape))))
    return trainable


def all_pairs(n_steps, n):
    return torch.cartesian_prod(torch.arange(n), torch.arange(n_steps)).unbind(1)


def test_the_stored_trajectory_re_scores_to_ratio_one(tiny):
    with_adapter(tiny)
    schedule, trajectories = rolled(tiny)
    image, step = all_pairs(len(schedule), 4)
    _, ratio, _ = pair_loss(tiny, trajectories, image, step, torch.ones(len(image)), schedule, CONFIG)
    assert (ratio - 1).abs().max() < 1e-5


def test_another_guidance_in_training_than_in_sampling_breaks_the_ratio(tiny):
    with_adapter(tiny)
    schedule, trajectories = rolled(tiny, guidance=1.0)
    image, step = all_pairs(len(schedule), 4)
    _, ratio, _ = pair_loss(tiny, trajectories, image, step, torch.ones(len(image)), schedule, CONFIG)
    assert (ratio - 1).abs().max() > 1e-4


def test_an_image_depends_on_its_own_stream_not_on_its_batch(tiny):
    schedule = CONFIG.sampler.schedule(tiny)
    texts = [p.text for p in PROMPTS]

    def latents(batch_size):
        return rollout(tiny, texts, schedule, 3.0, [generator(0, i) for i in range(4)], batch_size).latents

    torch.testing.assert_close(latents(4), latents(1), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_equal_those_of_the_whole_batch(tokenizer):
    gradients = []
    for micro_batch in (3, 16):
        model = tiny_model(tokenizer)
        trainable = with_adapter(model)
        schedule, trajectories = rolled(model)
        advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None].expand(-1, len(schedule))
        optimizer = torch.optim.SGD(trainable, lr=1.0)
        before = [p.detach().clone() for p in trainable]
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch, batch=4, max_grad_norm=1e9)
        average = Average({}, 0.0)
        ddpo.update(model, optimizer, average, trajectories, advantages, schedule, config, generator(0), Processes())
        gradients.append([b - p.detach() for b, p in zip(before, trainable, strict=True)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_ratio_is_one_before_the_first_update_of_each_epoch(tiny, tmp_path):
    history = train(tiny, PROMPTS, brightness, CONFIG, tmp_path)
    assert all(row["ratio_first"] < 1e-5 for row in history)
    assert math.isfinite(history[0]["log_prob"])
    assert {"reward_identifier", "reward_class", "grad_norm", "loss", "seconds"} <= history[0].keys()


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9, "subsample": 0.5, "trained_share": 0.75, "kl_weight": 0.1}])
def test_the_papers_arm_is_this_loop_bit_for_bit(tokenizer, tmp_path, changes):
    """One objective, an advantage that is the same at every step: `train` beside the paper's loop, written out."""
    config, seed = dataclasses.replace(CONFIG, n_epochs=3, **changes), 5
    trained, model = tiny_model(tokenizer), tiny_model(tokenizer)
    rows = train(trained, PROMPTS, brightness, config, tmp_path, seed)

    parameters = list(attach(model, "lora", "ddpo", {"rank": config.lora_rank}, generator(seed, "lora")).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    average = [p.detach().clone() for p in parameters]
    stats, schedule = PromptStats(config.stats_buffer, config.stats_min_count), config.sampler.schedule(model)
    n_steps = config.n_trained_steps(len(schedule))
    for epoch in range(config.n_epochs):
        chosen = epoch_prompts(PROMPTS, config.images_per_epoch, seed, epoch)
        streams = [generator(seed, "rollout", epoch, i) for i in range(len(chosen))]
        made = rollout(model, [p.text for p in chosen], schedule, config.sampler.guidance, streams)
        rewards = brightness(model.decode(made.latents[-1]), chosen)
        assert rows[epoch]["reward"] == rewards.mean().item()
        advantages = stats.advantages(chosen, rewards).clamp(-5, 5)
        stream = generator(seed, "update", epoch)
        for members in torch.randperm(len(chosen), generator=stream).split(config.batch):
            drawn = [torch.randperm(n_steps, generator=stream)[: round(config.subsample * n_steps)] for _ in members]
            image, step = members.repeat_interleave(len(drawn[0])), torch.cat(drawn)
            for i, t in zip(image.split(config.micro_batch), step.split(config.micro_batch), strict=True):
                loss, _, kl = pair_loss(model, made, i, t, advantages[i], schedule, config)
                ((loss + config.kl_weight * kl).sum() / len(image)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = [a.lerp(p.detach(), 1 - config.ema_decay) for a, p in zip(average, parameters, strict=True)]
    for (name, value), by_hand in zip(state(trained, "ddpo").items(), average, strict=True):
        assert torch.equal(value, by_hand), name


def ratios_of_a_step(monkeypatch, values):
    """The ratios that pair_loss says in each gradient step, whatever they are; CONFIG takes two steps an epoch."""
    whole, steps = ddpo.pair_loss, itertools.cycle(values)

    def faked(model, trajectories, image, step, advantage, schedule, config):
        loss, ratio, kl = whole(model, trajectories, image, step, advantage, schedule, config)
        return loss, torch.full_like(ratio, next(steps)), kl

    monkeypatch.setattr(ddpo, "pair_loss", faked)


@pytest.mark.parametrize("ratio, column", [(1.3, "clip_high"), (0.7, "clip_low")])
def test_all_of_an_epochs_good_or_bad_pairs_can_be_cut(tiny, tmp_path, monkeypatch, ratio, column):
    """Every pair of the second gradient step is outside the range on one side: cut is the half with that advantage."""
    ratios_of_a_step(monkeypatch, [1.0, ratio])
    config = dataclasses.replace(CONFIG, n_epochs=1, micro_batch=64, batch=4)
    signs = lambda images, prompts: torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])[: len(images)]  # noqa: E731
    (row,) = train(tiny, PROMPTS[:1], signs, config, tmp_path)
    of_second_step = torch.randperm(8, generator=generator(0, "update", 0))[4:]
    good = (of_second_step < 4).float().mean().item()
    share = {"clip_high": good, "clip_low": 1 - good}
    other = "clip_low" if column == "clip_high" else "clip_high"
    assert row[column] == share[column] > 0 and row[other] == 0
    assert row["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)


def test_numbers_that_were_not_measured_have_no_column(tokenizer, tmp_path):
    rows = {}
    for weight in (0.0, 0.1):
        config = dataclasses.replace(CONFIG, n_epochs=1, kl_weight=weight)
        (rows[weight],) = train(tiny_model(tokenizer), PROMPTS, brightness, config, tmp_path / f"{weight}")
    assert "kl" not in rows[0.0] and rows[0.1]["kl"] >= 0
    assert all("clip_fraction" not in row for row in rows.values())


def test_an_epoch_of_one_gradient_step_cuts_nothing(tiny, tmp_path):
    config = dataclasses.replace(CONFIG, n_epochs=1, batch=8)
    (row,) = train(tiny, PROMPTS, brightness, config, tmp_path)
    assert row["clip_high"] == row["clip_low"] == 0 and row["approx_kl"] < 1e-9


def test_the_reward_rises(tiny, tmp_path, monkeypatch):
    # The tiny autoencoder is random, so the first latent channel is shown as it is; all else is the real path.
    monkeypatch.setattr(
        tiny, "decode", lambda z: [Image.fromarray((128 + 60 * x[0].clamp(-2, 2)).round().byte().numpy()) for x in z]
    )
    config = dataclasses.replace(
        CONFIG,
        n_epochs=16,
        images_per_epoch=32,
        batch=16,
        sampler=Sampler(4, 1.0, 1.0),
        clip_range=1e-2,
        micro_batch=64,
        stats_buffer=32,
        lora_rank=8,
        checkpoint_every=100,
    )
    rewards = torch.tensor([row["reward"] for row in train(tiny, PROMPTS[:2], brightness, config, tmp_path)])
    assert rewards[-4:].mean() > rewards[:4].mean() + 5 * rewards[:4].std()


# --- faults -----------------------------------------------------------------------------------------------------


def test_a_kind_of_prompt_that_is_not_there_has_no_number(tiny, tmp_path):
    rows = train(tiny, [p for p in PROMPTS if p.identifier], brightness, CONFIG, tmp_path)
    assert all("reward_class" not in row and row["reward_identifier"] == pytest.approx(row["reward"]) for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_only_the_noisiest_steps_are_trained(tiny, tmp_path, monkeypatch):
    seen = set()
    whole = ddpo.pair_loss
    monkeypatch.setattr(ddpo, "pair_loss", lambda *words: (seen.update(words[3].tolist()), whole(*words))[1])
    config = dataclasses.replace(CONFIG, n_epochs=1, trained_share=0.5)
    history = train(tiny, PROMPTS, brightness, config, tmp_path)
    assert seen == {0, 1}
    assert sum(k.startswith("log_prob_t") for k in history[0]) == 4  # all are sampled


def test_the_kl_is_taken_from_the_policy_before_rl(tiny):
    """From the model without its adapter, whose weights are trainable again afterwards."""
    schedule, trajectories = rolled(tiny)
    image, step = all_pairs(len(schedule), 4)
    x_t, t = trajectories.latents[step, image], schedule.timesteps[step]

    def mean():
        eps = tiny.guided_noise(x_t, t, [trajectories.prompts[i] for i in image.tolist()], 3.0)
        return step_mean(x_t, eps, schedule.alpha_bar[step], schedule.alpha_bar_prev[step], schedule.std[step])

    with torch.no_grad():
        personalized = mean()
    trainable = with_adapter(tiny)
    config = dataclasses.replace(CONFIG, kl_weight=1.0)
    _, _, kl = pair_loss(tiny, trajectories, image, step, torch.ones(len(image)), schedule, config)
    with torch.no_grad():
        expected = gaussian_kl(mean(), personalized, schedule.std[step])
    assert expected.min() > 0
    torch.testing.assert_close(kl.detach(), expected)
    kl.sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in trainable)


def test_a_heavy_kl_holds_the_policy(tokenizer, tmp_path):
    moved = {}
    for weight in (0.0, 100.0):
        config = dataclasses.replace(CONFIG, n_epochs=4, kl_weight=weight)
        model = tiny_model(tokenizer)
        train(model, PROMPTS, brightness, config, tmp_path / f"{weight}")
        schedule, trajectories = rolled(model)
        image, step = all_pairs(len(schedule), 4)
        watched = dataclasses.replace(CONFIG, kl_weight=1.0)
        with torch.no_grad():
            _, _, kl = pair_loss(model, trajectories, image, step, torch.ones(len(image)), schedule, watched)
        moved[weight] = kl.mean().item()
    assert 0 < moved[100.0] < 0.3 * moved[0.0]


def test_the_result_is_the_moving_average_of_the_adapter(tokenizer, tmp_path):
    """With one gradient step an epoch, by hand from the policies that `on_epoch` sees."""
    decay = 0.7
    config = dataclasses.replace(CONFIG, n_epochs=3, batch=8, ema_decay=decay)
    model = tiny_model(tokenizer)
    start = tiny_model(tokenizer)
    attach(start, "lora", "ddpo", {"rank": config.lora_rank}, generator(0, "lora"))
    expected, policies = state(start, "ddpo"), []

    def on_epoch(row, model):
        policies.append(state(model, "ddpo"))
        for name, value in policies[-1].items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    train(model, PROMPTS, brightness, config, tmp_path / "whole", on_epoch=on_epoch)
    result = state(model, "ddpo")
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name])
    assert any(not torch.equal(value, policies[-1][name]) for name, value in result.items())
    resumed = tiny_model(tokenizer)
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(config, n_epochs=2), tmp_path / "cut")
    train(resumed, PROMPTS, brightness, config, tmp_path / "cut")
    assert all(torch.equal(value, result[name]) for name, value in state(resumed, "ddpo").items())


def test_a_gradient_step_draws_some_of_the_steps_anew_for_each_image(tiny, tmp_path, monkeypatch):
    seen = []

    def spy(model, trajectories, image, step, *rest):
        seen.append((image.tolist(), step.tolist()))
        return pair_loss(model, trajectories, image, step, *rest)

    monkeypatch.setattr(ddpo, "pair_loss", spy)
    config = dataclasses.replace(CONFIG, n_epochs=4, subsample=0.5, micro_batch=64)
    train(tiny, PROMPTS, brightness, config, tmp_path)
    drawn = [
        frozenset(s for i, s in zip(images, steps, strict=True) if i == k)
        for images, steps in seen
        for k in set(images)
    ]
    assert {len(d) for d in drawn} == {2}  # half of four steps, none twice
    assert len(set(drawn)) > 3 and frozenset.union(*drawn) == {0, 1, 2, 3}


def test_a_subsampled_gradient_is_right_on_average(tiny):
    """The mean of the gradients of all draws, each as likely, is the gradient of all steps."""
    trainable = with_adapter(tiny)
    schedule, trajectories = rolled(tiny, n=1)
    steps = range(len(schedule))

    def gradient(some):
        step = torch.tensor(some)
        image = torch.zeros_like(step)
        loss, *_ = pair_loss(tiny, trajectories, image, step, torch.ones(len(step)), schedule, CONFIG)
        (loss.sum() / len(step)).backward()
        found = torch.cat([p.grad.flatten() for p in trainable])
        tiny.unet.zero_grad(set_to_none=True)
        return found

    draws = [gradient(some) for some in itertools.combinations(steps, 2)]
    whole = gradient(list(steps))
    torch.testing.assert_close(torch.stack(draws).mean(0), whole, rtol=1e-3, atol=1e-5 * whole.abs().max().item())
    assert (draws[0] - whole).norm() > 0.1 * whole.norm()  # a single draw is another gradient


@pytest.mark.parametrize("share, n_steps, trained", [(1.0, 50, 50), (0.4, 15, 6), (0.4, 3, 1), (0.4, 1, 1)])
def test_the_trained_share_in_steps(share, n_steps, trained):
    assert dataclasses.replace(CONFIG, trained_share=share).n_trained_steps(n_steps) == trained


def test_a_resumed_training_ends_bit_identical(tokenizer, tmp_path):
    straight, stopped, resumed = (tiny_model(tokenizer) for _ in range(3))
    config = dataclasses.replace(CONFIG, n_epochs=3)
    whole = train(straight, PROMPTS, brightness, config, tmp_path / "a")
    train(stopped, PROMPTS, brightness, dataclasses.replace(config, n_epochs=2), tmp_path / "b")
    parts = train(resumed, PROMPTS, brightness, config, tmp_path / "b")
    for name, weight in state(straight, "ddpo").items():
        assert torch.equal(weight, state(resumed, "ddpo")[name]), name
    assert [row["reward"] for row in whole] == [row["reward"] for row in parts]


def test_a_reward_that_is_not_finite_names_the_image_and_keeps_the_checkpoint(tiny, tmp_path):
    calls = []

    def reward(images, prompts):
        calls.append(1)
        scores = brightness(images, prompts)
        if len(calls) == 2:
            scores[5] = float("nan")
        return scores

    with pytest.raises(TrainingError, match=r"epoch 1: the reward of image 5 \('a .*'\) is nan"):
        train(tiny, PROMPTS, reward, CONFIG, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] == 1


@pytest.mark.parametrize("changes, seed, named", [({"lora_rank": 2}, 0, "lora_rank"), ({}, 1, "seed")])
def test_checkpoints_of_other_settings_are_refused(tokenizer, tmp_path, changes, seed, named):
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, n_epochs=1), tmp_path)
    with pytest.raises(ArtifactError, match=f"are of a training with another {named}: go on with what"):
        train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, **changes), tmp_path, seed)


def test_checkpoints_of_another_model_or_other_prompts_are_refused(tokenizer, tmp_path):
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, n_epochs=1), tmp_path)
    with pytest.raises(ArtifactError, match="another model, another prompts"):
        train(tiny_model(tokenizer, seed=1), PROMPTS[:2], brightness, CONFIG, tmp_path)


def test_training_goes_on_with_another_micro_batch(tokenizer, tmp_path):
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, n_epochs=1), tmp_path)
    rows = train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, micro_batch=3), tmp_path)
    assert len(rows) == 2


def test_a_reward_function_that_fails_says_so_and_keeps_the_checkpoint(tiny, tmp_path):
    def reward(images, prompts):
        if (tmp_path / "checkpoints").exists():
            raise KeyError("no such word")
        return brightness(images, prompts)

    with pytest.raises(TrainingError, match="reward function failed with KeyError: 'no such word'; mend it and resume"):
        train(tiny, PROMPTS, reward, CONFIG, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] == 1


def test_a_deterministic_sampler_is_refused_at_the_start(tiny, tmp_path):
    config = dataclasses.replace(CONFIG, sampler=Sampler(4, 1.0, eta=0.0))
    with pytest.raises(ParameterError, match=r"standard deviation 0 \(sampler: DDIM, 4 steps, guidance 1, eta 0\)"):
        train(tiny, PROMPTS, brightness, config, tmp_path)


def test_a_reward_of_the_wrong_shape_is_refused(tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"returned shape \(8, 1\) for 8 images"):
        train(tiny, PROMPTS, lambda images, prompts: brightness(images, prompts)[:, None], CONFIG, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_knob(tiny, tmp_path, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(ddpo, "pair_loss", full)
    with pytest.raises(TrainingError, match=r"out of memory: lower micro_batch \(now 8\)"):
        train(tiny, PROMPTS, brightness, CONFIG, tmp_path)


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tiny, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(ddpo, "pair_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(tiny, PROMPTS, brightness, CONFIG, tmp_path)
