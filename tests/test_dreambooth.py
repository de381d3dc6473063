"""DreamBooth: the loss by hand, learning, resuming, and class images that never go stale."""

import dataclasses
import json
import shutil
import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest
import torch
from PIL import Image

from ibkit.errors import TrainingError
from ibkit.methods import class_images as cache
from ibkit.methods.dreambooth import DreamBoothConfig, prior_preservation_loss, train
from ibkit.methods.engine.photos import add_noise
from ibkit.model.sample import Sampler
from ibkit.runs import project_root
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


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_a_resumed_training_ends_bit_identical(tokenizer, tmp_path, decay):
    straight, stopped, resumed = (tiny_model(tokenizer) for _ in range(3))
    config = dataclasses.replace(CONFIG, ema_decay=decay)
    run(straight, tmp_path / "a", config)
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped, pictures(2), "a sks cat", "a cat", pictures(3, 1), config, tmp_path / "b", on_step=interrupt_at(4)
        )
    rows = run(resumed, tmp_path / "b", config)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(torch.equal(a, b) for a, b in zip(straight.unet.parameters(), resumed.unet.parameters(), strict=True))


def test_the_result_is_the_average_of_the_weights(tokenizer, tmp_path):
    model, seen = tiny_model(tokenizer), []
    expected = [p.detach().clone() for p in model.unet.parameters()]

    def keep(row):
        seen.append([p.detach().clone() for p in model.unet.parameters()])

    config = dataclasses.replace(CONFIG, ema_decay=0.5)
    train(model, pictures(2), "a sks cat", "a cat", pictures(3, 1), config, tmp_path, on_step=keep)
    for step, weights in enumerate(seen):
        decay = min(0.5, (step + 1) / (step + 11))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights, strict=True)]
    for a, b, last in zip(model.unet.parameters(), expected, seen[-1], strict=True):
        torch.testing.assert_close(a.detach(), b)
        assert not torch.equal(a, last)


def test_the_fused_optimizer_changes_no_loss(tokenizer, tmp_path, monkeypatch):
    long = dataclasses.replace(CONFIG, n_steps=50, checkpoint_every=1000)
    fused = run(tiny_model(tokenizer), tmp_path / "fused", long)
    asked = []

    class Plain(torch.optim.AdamW):
        def __init__(self, *arguments, fused=None, **settings):
            asked.append(fused)
            super().__init__(*arguments, foreach=False, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", Plain)
    plain = run(tiny_model(tokenizer), tmp_path / "plain", long)
    assert asked == [True]
    assert [row["loss"] for row in fused] == pytest.approx([row["loss"] for row in plain], rel=0, abs=1e-6)


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
    for changes in ({"prompt": "a dog"}, {"seed": 1}, {"sampler": Sampler(3, 2.0)}, {"n": 2}):
        assert made(model, tmp_path, **changes)[1]
    assert made(tiny_model(tokenizer, seed=1), tmp_path)[1] == [3]
    model.autocast = torch.bfloat16
    assert made(model, tmp_path)[1] == [3]


def test_every_notebook_draws_class_images_from_its_seed():
    calls = []
    for path in (project_root() / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        calls += [(path.stem, source) for cell in cells if "= class_images(" in (source := "".join(cell["source"]))]
    assert len(calls) == 5
    assert [name for name, source in calls if "parameters.seed" not in source] == []


def alter(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "0001.png").unlink(),
        lambda folder: (folder / "0001.png").write_bytes(b""),
        lambda folder: alter(folder / "0001.png"),
        lambda folder: shutil.copy(folder / "0000.png", folder / "0001.png"),
        lambda folder: (folder / "index.json").unlink(),
        lambda folder: (folder / "index.json").write_text("["),
    ],
)
def test_a_damaged_cache_of_class_images_is_repaired_to_the_bit(tiny, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(cache, "default_batch", lambda px: 2)
    first, _ = made(tiny, tmp_path, n=5)
    (folder,) = tmp_path.iterdir()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    again, counted = made(tiny, tmp_path, n=5)
    assert again == first and counted in ([2], [2, 4, 5])  # the whole batch of a lost picture, or without an index all
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_lost_class_image_is_drawn_in_the_batch_it_was_drawn_in(tiny, tmp_path, monkeypatch):
    batches = []
    draw = cache.sample_latents

    def watched(model, prompts, seeds, *rest):
        batches.append(seeds)
        return draw(model, prompts, seeds, *rest)

    monkeypatch.setattr(cache, "sample_latents", watched)
    made(tiny, tmp_path)
    next(tmp_path.rglob("0001.png")).unlink()
    made(tiny, tmp_path)
    assert len(batches) == 2 and batches[0] == batches[1] and len(batches[0]) == 3


FILL = """
import sys
from pathlib import Path
import torch
from ibkit.methods.class_images import class_images
from ibkit.pocket.build.tokenizer import save_tokenizer
from ibkit.runs import hash_json
from ibkit.runs import project_root
from ibkit.model.sample import Sampler
from tests.tiny import tiny_model
torch.set_num_threads(1)
model = tiny_model(save_tokenizer(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
counted = []
images = class_images(model, "a cat", 96, Sampler(4, 2.0), Path(sys.argv[2]), 0, lambda done, n: counted.append(done))
print(hash_json([image.tobytes().hex() for image in images]), counted, flush=True)
"""


def test_two_processes_that_fill_one_cache_end_with_the_same_pictures(tmp_path):
    def start(name):
        command = [sys.executable, "-c", FILL, str(tmp_path / name), str(tmp_path / "cache")]
        return subprocess.Popen(command, cwd=project_root(), stdin=PIPE, stdout=PIPE, text=True)

    both = [start(name) for name in "ab"]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=300)[0].strip().partition(" ") for process in both]
    finally:
        for process in both:
            process.kill()
    assert ends[0][0] == ends[1][0] != ""
    assert sorted(counted for _, _, counted in ends) == ["[32, 64, 96]", "[]"]  # one drew, the other waited for it
    assert not list((tmp_path / "cache").rglob("*.tmp"))
