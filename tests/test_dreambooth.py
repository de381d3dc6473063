"""DreamBooth: the loss by hand, learning, resuming, and class images that never go stale."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ibkit.errors import TrainingError
from ibkit.personalize import class_images as cache
from ibkit.personalize.dreambooth import DreamBoothConfig, add_noise, prior_preservation_loss, train
from ibkit.sample import Sampler
from tests.tiny import tiny_model

CONFIG = DreamBoothConfig(n_steps=6, batch=2, learning_rate=1e-3, checkpoint_every=3)
SAMPLER = Sampler(2, 2.0)


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]


def run(model, folder, config=CONFIG):
    return train(model, pictures(2), "a sks cat", "a cat", pictures(3, 1), config, folder)


def test_loss_weighs_the_two_halves():
    eps_hat, noise = torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    eps_hat[:2], eps_hat[2:] = 2.0, 3.0  # squared errors 4 and 9
    loss, instance, prior = prior_preservation_loss(eps_hat, noise, 0.5)
    assert (loss.item(), instance.item(), prior.item()) == (4 + 0.5 * 9, 4, 9)
    assert prior_preservation_loss(eps_hat[:2], noise[:2], 0.0)[0].item() == 4


def test_noise_is_added_as_in_ddpm():
    z0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)
    assert add_noise(z0, noise, torch.tensor([0.64])).item() == pytest.approx(0.8 * 2 + 0.6 * 5)


def test_it_learns_the_photos(tiny, tmp_path):
    rows = run(tiny, tmp_path, dataclasses.replace(CONFIG, n_steps=60, learning_rate=3e-3, checkpoint_every=1000))
    first, last = ([row["loss_instance"] for row in part] for part in (rows[:10], rows[-10:]))
    assert sum(last) < 0.8 * sum(first)


def test_the_text_encoder_and_autoencoder_stay_frozen(tiny, tmp_path):
    frozen = [p.clone() for part in (tiny.text_encoder, tiny.vae) for p in part.parameters()]
    moving = [p.clone() for p in tiny.unet.parameters()]
    run(tiny, tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(frozen, [p for part in (tiny.text_encoder, tiny.vae) for p in part.parameters()], strict=True)
    )
    assert not any(torch.equal(a, b) for a, b in zip(moving, tiny.unet.parameters(), strict=True))


def test_a_resumed_training_ends_bit_identical(tokenizer, tmp_path):
    straight, stopped, resumed = (tiny_model(tokenizer) for _ in range(3))
    run(straight, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped, pictures(2), "a sks cat", "a cat", pictures(3, 1), CONFIG, tmp_path / "b", on_step=interrupt_at(4)
        )
    rows = run(resumed, tmp_path / "b")
    assert [row["step"] for row in rows] == list(range(6))
    assert all(torch.equal(a, b) for a, b in zip(straight.unet.parameters(), resumed.unet.parameters(), strict=True))


def interrupt_at(step):
    def on_step(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return on_step


def test_a_loss_that_is_not_finite_says_what_to_do(tiny, tmp_path):
    with torch.no_grad():
        next(tiny.unet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0: the loss is nan; lower the learning rate"):
        run(tiny, tmp_path)


def made(model, folder, prompt="a cat", n=3, seed=0, sampler=SAMPLER):
    counted = []
    images = cache.class_images(model, prompt, n, sampler, folder, seed, lambda done, wanted: counted.append(done))
    return [i.tobytes() for i in images], counted


def test_class_images_are_made_once_and_keyed_by_all_that_made_them(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    first, counted = made(model, tmp_path)
    assert counted == [3]
    assert made(model, tmp_path) == (first, [])
    assert (
        made(model, tmp_path, prompt="a dog")[1]
        and made(model, tmp_path, seed=1)[1]
        and made(model, tmp_path, sampler=Sampler(3, 2.0))[1]
    )
    assert made(tiny_model(tokenizer, seed=1), tmp_path)[1] == [3]


def test_interrupted_class_images_go_on(tiny, tmp_path):
    first, _ = made(tiny, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    next((tmp_path / "part").rglob("0001.png")).unlink()
    again, counted = made(tiny, tmp_path / "part")
    assert again == first and counted == [3]
