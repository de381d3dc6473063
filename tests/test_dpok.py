"""DPOK: hand-worked losses, the two divergences, the value network, the replay buffer, learning, and resuming."""

import dataclasses
import math
import multiprocessing
import os
import signal

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from ibkit.adapt import Adapted, attach, state, without
from ibkit.data.prompts import training_prompts
from ibkit.data.subject import PersonalizedSubject
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError
from ibkit.methods import dpok
from ibkit.methods.dpok import DPOKConfig, Value, divergence, policy_loss, text_features, train
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.engine.replay import Replay
from ibkit.methods.engine.rollout import Trajectories
from ibkit.methods.records import METHODS, Job
from ibkit.model.ddim import make_schedule, step_weight
from ibkit.model.loading import POCKET_PIPELINE
from ibkit.model.sample import Sampler
from ibkit.presets import SD15
from ibkit.train.processes import start
from tests.tiny import scheduler, tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
CONFIG = DPOKConfig(
    n_epochs=3, images_per_epoch=8, gradient_steps=2, batch=12, buffer=48, sampler=Sampler(4, 3.0, 1.0),
    learning_rate=1e-2, clip_range=0.1, micro_batch=6, value_batch=16, value_batches=2, checkpoint_every=1,
)  # fmt: skip


def brightness(images, prompts):
    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


@pytest.mark.parametrize(
    "advantage, ratio, expected, gradient",
    [
        (2.0, 1.0, -20.0, -20.0),
        (2.0, 1.05, -21.0, -21.0),  # inside the band
        (2.0, 1.3, -22.0, 0.0),  # a good action already made likelier
        (2.0, 0.7, -18.0, 0.0),  # a good action made less likely: PPO would mend it, the bare clamp does not
        (-2.0, 1.3, 22.0, 0.0),  # a bad action made likelier: neither
        (-2.0, 0.95, 19.0, 19.0),
    ],
)
def test_policy_loss_by_hand(advantage, ratio, expected, gradient):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, found = policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.1, 10.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected) and found.item() == pytest.approx(ratio)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-5)


def test_the_divergences_differ_by_half_the_steps_weight():
    """Of SD's 50 steps .07 to .13 for most, 5.4 for the last but one, .22 in the mean."""
    schedule = make_schedule(scheduler().alphas_cumprod.double(), 50, 1.0, 1, torch.device("cpu"))
    x, ours, theirs = torch.randn(3, 50, 4, 8, 8, generator=generator(0))
    step = torch.arange(50)
    gauss, eps = (divergence(kind, ours, theirs, x, schedule, step) for kind in ("gauss", "eps"))
    half = step_weight(schedule) / 2
    torch.testing.assert_close(gauss, eps * half, rtol=1e-3, atol=1e-6)
    assert half.mean().item() == pytest.approx(0.22, abs=0.01)
    assert half[schedule.timesteps == 21].item() == pytest.approx(5.4, abs=0.1)
    assert 0.06 < half[:40].median().item() < 0.14
    by_hand = (ours[7] - theirs[7]).square().mean()
    torch.testing.assert_close(eps[7], by_hand)


def test_the_paper_and_its_code_pull_alike():
    settings = SD15.settings("dpok")
    assert settings.kl_weight * 0.22 == pytest.approx(0.01, rel=0.02)


def test_the_value_network_learns_what_a_prompt_is_worth():
    value = Value(16, 4, 3, generator(0))
    assert value.rows.shape == (3, 3, 256) and 0 <= value.rows.min() and value.rows.max() < 1
    x, text = torch.randn(64, 1, 4, 4, generator=generator(1)), torch.eye(4)[torch.arange(64) % 4]
    step, reward = torch.arange(64) % 3, (torch.arange(64) % 4).float()
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-2)
    for _ in range(60):
        loss = (value(x, text, step) - reward).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * reward.var()
    with torch.no_grad():
        value.rows[:, 1] = 0  # of step 1 alone
        found = value(x, text, step)
    assert found[step == 1].eq(value.last.bias).all() and (found[step == 0] - reward[step == 0]).abs().mean() < 0.5


def made(first, n):
    """Trajectories whose numbers say which they are."""
    which = torch.arange(first, first + n).float()
    latents = which.view(1, n, 1, 1, 1).expand(3, n, 1, 2, 2)
    return Trajectories(latents, which.expand(2, n), [f"prompt {int(i)}" for i in which]), which


def test_the_buffer_keeps_the_newest_with_their_prompts_and_rewards():
    replay = Replay(5, 0)
    for first in (0, 3, 6):
        replay.add(*made(first, 3))
    assert replay.rewards.tolist() == [4, 5, 6, 7, 8] and replay.fresh == 3
    assert replay.trajectories.prompts == [f"prompt {i}" for i in (4, 5, 6, 7, 8)]
    assert (
        replay.trajectories.latents[0, :, 0, 0, 0].tolist()
        == replay.trajectories.log_probs[1].tolist()
        == [4, 5, 6, 7, 8]
    )
    image, step = replay.draw(7, 2, generator(0))
    assert len({*zip(image.tolist(), step.tolist(), strict=True)}) == 7
    assert len(replay.draw(256, 2, generator(0))[0]) == 10  # all there are
    replay.add(*made(9, 6))
    assert len(replay.rewards) == 6  # an iteration is never cut


def test_the_text_feature_is_the_hidden_state_at_the_end_mark(tiny):
    found = text_features(tiny, [PROMPTS[0].text])[PROMPTS[0].text]
    ids = tiny.padded_ids(PROMPTS[0].text)[0].tolist()
    end = ids.index(tiny.tokenizer.eos_token_id)
    assert torch.equal(found, tiny.encode_text([PROMPTS[0].text])[0][end])


def test_the_reward_rises_and_a_heavy_kl_holds_the_policy(tokenizer, tmp_path):
    """As in test_ddpo.py the first latent channel is shown as it is; and what counts is how bright it is."""
    moved = {}
    for kind, weight, n_epochs in (("gauss", 0.0, 16), ("gauss", 1e4, 4), ("eps", 1e4, 4)):
        model = tiny_model(tokenizer)
        model.decode = lambda z: [Image.fromarray((128 + 60 * x[0].clamp(-2, 2)).round().byte().numpy()) for x in z]
        config = dataclasses.replace(
            CONFIG, n_epochs=n_epochs, images_per_epoch=32, batch=64, buffer=128, sampler=Sampler(4, 1.0, 1.0),
            clip_range=1e-2, micro_batch=64, lora_rank=8, value_learning_rate=1e-2, kl=kind, kl_weight=weight,
        )  # fmt: skip
        rows = train(model, PROMPTS, lambda *of: 20 * (brightness(*of) - 0.5), config, tmp_path / f"{kind}-{weight}")
        moved[kind, weight] = rows[3]["kl"]
        if not weight:
            rewards = [row["reward"] for row in rows]
            assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0
            assert rows[0]["ratio_first"] < 1e-3 and 0 < rows[0]["clipped"] < 1
            assert rows[0]["reused"] == 0 and (rows[0]["pictures"], rows[0]["gradient_steps"]) == (32, 2)
    assert moved["gauss", 1e4] < 0.2 * moved["gauss", 0.0] and moved["eps", 1e4] < 0.2 * moved["gauss", 0.0]


def test_the_divergence_is_from_the_model_below_the_adapter(tiny):
    attach(tiny, "lora", "first", {"rank": 2}, generator(0))
    for p in (parameters := attach(tiny, "lora", "dpok", {"rank": 2}, generator(1))).values():
        p.data.normal_(generator=generator(2))
    x, t = torch.randn(1, *tiny.latent_shape, generator=generator(3)), torch.tensor([500])
    with torch.no_grad(), without(tiny, "dpok"):
        below = tiny.guided_noise(x, t, ["a cat"], 3.0)
    schedule = CONFIG.sampler.schedule(tiny)
    trajectories = Trajectories(x.expand(5, 1, -1, -1, -1), torch.zeros(4, 1), ["a cat"])
    *_, kl = dpok.transition_loss(
        tiny,
        trajectories,
        torch.tensor([0]),
        torch.tensor([1]),
        torch.ones(1),
        schedule,
        dataclasses.replace(CONFIG, kl="eps"),
    )
    t = schedule.timesteps[1].expand(1)
    with torch.no_grad():
        ours = tiny.guided_noise(x, t, ["a cat"], 3.0)
        with without(tiny, "dpok"):
            below = tiny.guided_noise(x, t, ["a cat"], 3.0)
    torch.testing.assert_close(kl, (ours - below).square().mean(dim=(1, 2, 3)))
    assert kl > 1e-4 and parameters


def killed_in_epoch_1(folder, tokenizer):
    def die(row, model):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny_model(tokenizer), PROMPTS, brightness, CONFIG, folder, on_epoch=die)


def test_a_killed_training_ends_bit_identical_with_its_buffer(tokenizer, tmp_path):
    straight, resumed = tiny_model(tokenizer), tiny_model(tokenizer)
    whole = train(straight, PROMPTS, brightness, CONFIG, tmp_path / "a")
    assert whole[2]["reused"] > 0  # a transition of an earlier iteration was learned from
    child = multiprocessing.get_context("fork").Process(target=killed_in_epoch_1, args=(tmp_path / "b", tokenizer))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    rows = train(resumed, PROMPTS, brightness, CONFIG, tmp_path / "b")
    assert all(torch.equal(p, state(resumed, "dpok")[n]) for n, p in state(straight, "dpok").items())
    assert [row["value_loss"] for row in whole] == [row["value_loss"] for row in rows]
    with pytest.raises(ArtifactError, match="another kl_weight"):
        train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, kl_weight=1.0), tmp_path / "b")


def train_tiny(processes, device, folder):
    torch.set_num_threads(1)
    model = tiny_model(CLIPTokenizer.from_pretrained(POCKET_PIPELINE / "tokenizer"))
    config = dataclasses.replace(CONFIG, learning_rate=1e-3, micro_batch=3)
    train(model, PROMPTS, brightness, config, folder, processes=processes)
    return state(model, "dpok")


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path):
    cpu = torch.device("cpu")
    with start(1, cpu, train_tiny) as alone:
        one = train_tiny(alone, cpu, tmp_path / "one")
    with start(2, cpu, train_tiny, tmp_path / "two") as processes:
        two = train_tiny(processes, cpu, tmp_path / "two")
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sampler": Sampler(4, 3.0, 0.0)}, "standard deviation 0"),
        ({"kl": "exact"}, "one of 'gauss', 'eps'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny, tmp_path, changes, sentence):
    with pytest.raises(ParameterError, match=sentence):
        if "kl" in changes:
            METHODS["dpok"].configure("pocket", changes)
        train(tiny, PROMPTS, brightness, dataclasses.replace(CONFIG, **changes), tmp_path)


def test_a_second_reward_is_refused_in_words(tiny, tmp_path):
    who = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)
    text, subject = RewardSpec("image_reward"), RewardSpec("subject")
    job = Job(Adapted.of(tiny), who, [], "dpok", 0, tmp_path, (), PROMPTS, text, subject)
    with pytest.raises(ParameterError, match="use ddpo for two objectives"):
        METHODS["dpok"].train(tiny, job, CONFIG)


def test_its_work_is_counted():
    work = METHODS["dpok"].work(CONFIG)
    assert work.pictures == 24 and work.tuned == 2 * 3 * 2 * 12
    assert work.forward == 24 * 8 + work.tuned and work.graph_rows == 12
