"""Direct reward gradients: scorers with a gradient, which steps are differentiated, learning, levels, resuming."""

import dataclasses
import multiprocessing
import os
import random
import signal

import pytest
import torch
from PIL import Image

from ibkit.adapt import Adapted, state
from ibkit.data.prompts import training_prompts
from ibkit.data.subject import PersonalizedSubject
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError
from ibkit.methods import reward_gradient
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.records import METHODS, Job
from ibkit.methods.reward_gradient import DRaFTConfig, ReFLConfig, first_step, last_steps, one_shot, train
from ibkit.model.ddim import predict_x0
from ibkit.model.sample import Sampler, denoise, sample, sample_latents
from ibkit.params import RLFinetune
from ibkit.pocket.draw import render
from ibkit.pocket.world import sample_scene
from ibkit.scorers import SCORERS, make_scorer
from ibkit.scorers.base import Level, Scorer
from ibkit.train.processes import Processes
from tests.tiny import tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
CONFIG = DRaFTConfig(
    n_epochs=6, images_per_epoch=8, sampler=Sampler(4, 3.0, 1.0), learning_rate=3e-2, micro_batch=4, lora_rank=4,
    checkpoint_every=2,
)  # fmt: skip
REFL = ReFLConfig(**dataclasses.asdict(CONFIG) | {"sampler": Sampler(8, 1.0, 1.0), "resources": CONFIG.resources,
                                                  "prior_weight": 1.0, "prior_batch": 2, "ema_decay": 0.5})  # fmt: skip
CLASS_PICTURES = [Image.new("RGB", (16, 16), (40 * i, 90, 200 - 40 * i)) for i in range(4)]


class Brightness(Scorer):
    """How bright a picture is; its level is .55."""

    name, evaluator, needs = "brightness", "mean of all channels", frozenset({"text"})

    def _score(self, images, texts, references):
        return torch.tensor([sum(i.convert("RGB").tobytes()) / (i.width * i.height * 3 * 255) for i in images])

    def differentiable(self, pixels, texts):
        return pixels.mean(dim=(1, 2, 3))

    def level(self, text):
        return Level(0.55, 0.01)


# --- scorers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image_reward", "weak_reward", "clip_t"])
def test_the_gradient_path_scores_as_a_call_does(name):
    scorer = make_scorer(name)
    pictures = [render(sample_scene(random.Random(i))) for i in range(6)]
    texts = ["a cat playing soccer", "a dog dancing"] * 3
    pixels = torch.stack([torch.tensor(list(p.tobytes())).view(64, 64, 3).permute(2, 0, 1) for p in pictures]) / 255
    torch.testing.assert_close(
        scorer.differentiable(pixels, texts).detach(), scorer(pictures, texts), atol=2e-4, rtol=2e-4
    )
    pixels = pixels[:1].requires_grad_(True)
    scorer.differentiable(pixels, texts[:1]).sum().backward()
    direction = torch.randn(pixels.shape, generator=generator(0)) * 1e-3
    with torch.no_grad():
        up, down = (scorer.differentiable(pixels + s * direction, texts[:1]).double() for s in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((pixels.grad * direction).sum().item(), rel=0.05)


@pytest.mark.parametrize("px", [64, 96, 200])
def test_pictures_of_another_size_are_resized_alike(px):
    """PIL resizes 8-bit pictures and torchvision tensors: a score differs by less than a tenth of a deviation."""
    scorer, picture = make_scorer("image_reward"), render(sample_scene(random.Random(3))).resize((px, px))
    pixels = torch.tensor(list(picture.tobytes())).view(1, px, px, 3).permute(0, 3, 1, 2) / 255
    found = scorer.differentiable(pixels, ["a cat dancing"]).item()
    assert found == pytest.approx(scorer([picture], ["a cat dancing"]).item(), abs=0.1)


def test_a_scorer_without_a_gradient_is_refused_and_those_with_one_are_named():
    with pytest.raises(ParameterError, match="dino has no gradient .* choose one of clip_t, image_reward, weak_reward"):
        make_scorer("dino").differentiable(torch.zeros(1, 3, 64, 64), ["a cat"])
    assert {"clip_t", "image_reward"} <= {n for n in SCORERS if SCORERS[n].differentiable is not Scorer.differentiable}


# --- which steps ---------------------------------------------------------------------------------------------------


def passes(model, call):
    """The result of a call, and for each pass of the U-Net in it whether it had a gradient."""
    seen, hook = [], model.unet.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    result = call()
    hook.remove()
    return result, seen


@pytest.mark.parametrize("k, expected", [(1, [False] * 3 + [True]), (3, [False] + [True] * 3), (9, [True] * 4)])
def test_the_last_k_steps_have_a_gradient_and_the_picture_is_the_samplers(tiny, k, expected):
    config, prompts = dataclasses.replace(CONFIG, truncate=k), [p.text for p in PROMPTS[:2]]
    streams = [generator(seed, "sample") for seed in (0, 1)]
    [x], seen = passes(tiny, lambda: last_steps(tiny, prompts, streams, generator(0), config))
    assert seen == expected
    torch.testing.assert_close(x.detach(), sample_latents(tiny, prompts, [0, 1], config.sampler))


def test_renoised_copies_take_the_last_step_again(tiny):
    config = dataclasses.replace(CONFIG, n_renoised=2)
    streams = [generator(0, "sample")]
    found, seen = passes(tiny, lambda: last_steps(tiny, [PROMPTS[0].text], streams, generator(0), config))
    assert len(found) == 3 and seen == [False] * 3 + [True] * 3
    assert not torch.equal(found[1], found[2])
    assert (found[1] - found[0]).square().mean() < 0.1 * found[0].square().mean()  # a little noise, taken off again


def test_alignprops_step_is_near_42_of_50():
    config = dataclasses.replace(CONFIG, random_truncation=True)
    drawn = torch.tensor([first_step(50, config, generator(0, i)) for i in range(2000)]).float()
    assert drawn.mean().item() == pytest.approx(42, abs=0.6) and drawn.std().item() == pytest.approx(4.8, abs=0.4)
    assert 1 <= drawn.min() and drawn.max() <= 49


def test_refl_shows_x0_of_one_step_of_the_last_quarter(tiny):
    prompts, found = [PROMPTS[0].text], set()
    for seed in range(12):
        [x], seen = passes(tiny, lambda: one_shot(tiny, prompts, [generator(0, "sample")], generator(seed), REFL))  # noqa: B023
        at = len(seen) - 1
        assert seen == [False] * at + [True]
        found.add(at)
        schedule = REFL.sampler.schedule(tiny)
        with torch.no_grad():
            steps = list(denoise(tiny, prompts, schedule, 1.0, [generator(0, "sample")]))
        expected = predict_x0(steps[at].x_t, steps[at].eps_hat, schedule.alpha_bar[at])
        torch.testing.assert_close(x.detach(), expected)
    assert found == {6, 7}  # of eight


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw, config", [(last_steps, CONFIG), (one_shot, REFL)], ids=["draft", "refl"])
def test_the_reward_of_the_same_noise_rises(tiny, tmp_path, draw, config):
    pictures = CLASS_PICTURES if config.prior_weight else []
    tiny.decode_pixels = lambda z: (z[:, :1] / 4).clamp(-1, 1).expand(-1, 3, -1, -1)  # its own decoder is random
    config = dataclasses.replace(config, reward_weight=300.0, ema_decay=0.0, n_epochs=10)
    asked = [p for p in PROMPTS for _ in range(6)]

    def reward():
        drawn = sample(tiny, [p.text for p in asked], list(range(len(asked))), config.sampler)
        return Brightness()(drawn, [p.clean for p in asked]).mean().item()

    before = reward()
    words = {"class_prompt": "a cat", "class_pictures": pictures}
    rows = train(tiny, PROMPTS, Brightness(), config, tmp_path, draw=draw, **words)
    assert reward() > before + 0.02
    assert "above_level" in rows[0] and ("loss_prior" in rows[0]) == bool(pictures)
    assert (rows[0]["pictures"], rows[0]["gradient_steps"]) == (8, 1)


def test_at_the_level_nothing_pulls_any_more(tokenizer, tmp_path):
    """All pictures of a level below them: no gradient, so no step but weight decay's."""
    low = Brightness()
    low.level = lambda text: Level(-1.0, 0.1)
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    rows = train(tiny_model(tokenizer), PROMPTS, low, config, tmp_path / "clipped", clip_at_level=True)
    assert all(row["grad_norm"] == 0 and row["above_level"] == 1 for row in rows)
    rows = train(tiny_model(tokenizer), PROMPTS, low, config, tmp_path / "not", clip_at_level=False)
    assert all(row["grad_norm"] > 0 for row in rows)


class LightIfDancing(Brightness):
    """How bright a picture of dancing is, and how dark another one: it reads each picture's own text."""

    def differentiable(self, pixels, texts):
        return pixels.mean(dim=(1, 2, 3)) * torch.tensor([1.0 if "dancing" in text else -1.0 for text in texts])


@pytest.mark.parametrize("micro_batch, decoded", [(3, 32), (8, 1), (4, 3)])
def test_a_batch_in_parts_has_the_same_rewards_and_gradient(tokenizer, tmp_path, monkeypatch, micro_batch, decoded):
    """In parts through the U-Net, and in smaller ones through the decoder."""
    found = []
    for each, at_once in ((8, 32), (micro_batch, decoded)):
        monkeypatch.setattr(reward_gradient, "pictures_at_once", lambda image_px, n=at_once: n)
        config = dataclasses.replace(CONFIG, micro_batch=each, n_epochs=2)
        rows = train(tiny_model(tokenizer), PROMPTS, LightIfDancing(), config, tmp_path / f"{each}-{at_once}")
        found.append([row[name] for row in rows for name in ("reward", "loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def killed_in_epoch_4(folder, tokenizer):
    def die(row, model):
        if row["epoch"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny_model(tokenizer), PROMPTS, Brightness(), CONFIG, folder, on_epoch=die)


def test_a_killed_training_ends_bit_identical(tokenizer, tmp_path):
    straight, resumed = tiny_model(tokenizer), tiny_model(tokenizer)
    train(straight, PROMPTS, Brightness(), CONFIG, tmp_path / "a")
    child = multiprocessing.get_context("fork").Process(target=killed_in_epoch_4, args=(tmp_path / "b", tokenizer))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert len(train(resumed, PROMPTS, Brightness(), CONFIG, tmp_path / "b")) == 6
    assert all(torch.equal(p, state(resumed, "draft")[n]) for n, p in state(straight, "draft").items())
    other = dataclasses.replace(CONFIG, truncate=2)
    with pytest.raises(ArtifactError, match="another truncate"):
        train(tiny_model(tokenizer), PROMPTS, Brightness(), other, tmp_path / "b")


def test_what_it_cannot_do_is_refused_in_words(tiny, tmp_path):
    who = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)

    def tune(reward="image_reward", subject=None, processes=None):
        job = Job(Adapted.of(tiny), who, [], "draft", 0, tmp_path, (), PROMPTS, RewardSpec(reward), subject)
        METHODS["draft"].train(tiny, job, CONFIG, processes=processes)

    with pytest.raises(ParameterError, match="use ddpo for two objectives"):
        tune(subject=RewardSpec("subject"))
    with pytest.raises(ParameterError, match="leave processes at 1"):
        tune(processes=Processes(0, 2))
    with pytest.raises(ParameterError, match="has no gradient"):
        tune("align_t")


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"reward": "dino"}, "dino has no gradient .* choose one of clip_t, image_reward"),
        ({"subject_reward": "subject"}, "use ddpo for two objectives"),
        ({"processes": 2}, "leave processes at 1"),
    ],
)
def test_a_notebook_refuses_it_before_a_run_is_opened(given, sentence):
    for method in ("draft", "refl"):
        with pytest.raises(ParameterError, match=sentence):
            RLFinetune(method=method, **given)
    if "subject_reward" in given:
        with pytest.raises(ParameterError, match=sentence):
            RLFinetune(method="dpok", **given)


def test_work_and_what_is_trained():
    draft, refl = METHODS["draft"], METHODS["refl"]
    assert draft.class_pictures(draft.settings()) == 0 and refl.class_pictures(refl.settings()) == 200
    work = draft.work(dataclasses.replace(CONFIG, truncate=3, n_renoised=1))
    assert (work.forward, work.tuned, work.trained) == (48 * 1 * 2, 48 * 4 * 2, 0) and work.graph_rows == 4 * 2 * 4
    assert refl.work(refl.settings()).trained == 100 * (64 + 4) and refl.delta(refl.settings())[0] == "unet"
    assert reward_gradient.draft_work(dataclasses.replace(CONFIG, random_truncation=True)).forward == 48 * 3 * 2
