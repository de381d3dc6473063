"""DPG and RPO: hand-worked losses, what moves, the critic, labels, early stopping, resuming, refusals."""

import dataclasses
import math
import multiprocessing
import os
import random
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ibkit.adapt import Adapted, attach, state
from ibkit.data.prompts import Prompt
from ibkit.data.subject import PersonalizedSubject
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError, TrainingError
from ibkit.experiments import variants
from ibkit.methods import dpg, rpo
from ibkit.methods.dpg import Critic, DPGConfig, residual
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.engine.photos import add_noise
from ibkit.methods.records import METHODS, Job
from ibkit.methods.rpo import RPOConfig, Validations, harmonic, preference_loss
from ibkit.model.ddim import predict_x0
from ibkit.model.sample import Sampler
from ibkit.pocket.draw import render
from ibkit.pocket.world import sample_scene
from ibkit.presets import SD15
from ibkit.scorers import make_scorer
from ibkit.train.loop import kept_of
from tests.tiny import scheduler, tiny_model

CAT = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)
PHOTOS = [Image.new("RGB", (16, 16), color) for color in ((240, 160, 40), (200, 120, 40), (250, 180, 90))]
CLASS = [Image.new("RGB", (16, 16), (90, 90, 60 * i)) for i in range(4)]
PROMPTS = [CAT.prompt("playing soccer"), CAT.prompt("dancing")]
COMMON = {"n_steps": 6, "learning_rate": 1e-2, "kind": "lora", "checkpoint_every": 2, "batch": 2}
SETTINGS = {
    # the tiny model is random: its residuals are a hundred times those of a trained one
    "dpg": DPGConfig(**COMMON, n_class_images=4, critic_learning_rate=1e-6),
    "rpo": RPOConfig(**COMMON, n_negatives=3, n_validation=2, validate_every=2, sampler=Sampler(3, 2.0, 1.0)),
}


def train(method, model, folder, settings=None, on_row=None, reward=None):
    spec = RewardSpec(reward or METHODS[method].reward)
    job = Job(Adapted.of(model), CAT, PHOTOS, method, 0, folder, CLASS, PROMPTS, spec)
    return METHODS[method].train(model, job, settings or SETTINGS[method], on_row=on_row)


# --- DPG ----------------------------------------------------------------------------------------------------------


def test_look_forward_weighs_the_noises_error():
    """‖x̂0 - x0‖² = (1/ᾱ - 1) ‖ε - ε̂‖², 214 times at t = 999 of SD's schedule."""
    alphas = scheduler().alphas_cumprod
    x_0, noise, eps_hat = torch.randn(3, 4, 4, 8, 8, generator=generator(0))
    alpha_bar = alphas[[0, 300, 700, 999]]
    x_t = add_noise(x_0, noise, alpha_bar)
    direct = (predict_x0(x_t, eps_hat, alpha_bar) - x_0).square()
    torch.testing.assert_close(residual(eps_hat, noise, alpha_bar), direct, rtol=1e-2, atol=1e-3)
    assert 1 / alphas[999].item() - 1 == pytest.approx(214, abs=2)


def test_the_critic_has_the_papers_size_and_starts_increasing():
    critic = Critic(4, 64, 64, generator(0))
    assert sum(p.numel() for p in critic.parameters()) == 262_310
    assert all(p.min() >= 0 for p in critic.parameters())
    of = torch.rand(2, 4, 64, 64, generator=generator(1)).requires_grad_(True)
    critic(of).sum().backward()
    assert (of.grad > 0).all()
    assert (critic(2 * of) > critic(of)).all()


@pytest.mark.parametrize("critic", ["none", "learned"])
def test_the_discount_is_each_photos_own(tiny, tmp_path, monkeypatch, critic):
    """Without a prior, the loss is the mean of γ^t times each photo's mean residual, or Q of it; Q then takes its step
    of SGD towards the mean residual.
    """
    config = dataclasses.replace(SETTINGS["dpg"], critic=critic, prior_weight=0.0, n_steps=1)
    seen = []
    predict = type(tiny).predict_noise
    monkeypatch.setattr(
        type(tiny), "predict_noise", lambda m, x, t, p: seen.append((x, t, out := predict(m, x, t, p))) or out
    )
    [row] = train("dpg", tiny, tmp_path, config)
    (x, t, eps_hat), alphas = seen[0], tiny.alphas_cumprod.float()
    stream = generator(0, "dpg", 0)
    chosen = torch.randint(len(PHOTOS), (2,), generator=stream)
    assert torch.equal(t, torch.randint(1000, (2,), generator=stream))
    x_0 = tiny.encode_images(PHOTOS)[chosen]
    of = (predict_x0(x, eps_hat, alphas[t]) - x_0).square().detach()
    each, mean = of.mean(dim=(1, 2, 3)), of.mean(dim=(1, 2, 3))
    if critic == "learned":
        q = Critic(4, 8, 8, generator(0, "critic"))
        each = q(of)
        (each - mean).square().mean().backward()
        for name, found in kept_of(tmp_path, "critic").items():
            parameter = dict(q.named_parameters())[name]
            expected = parameter.detach() - config.critic_learning_rate * parameter.grad
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
            assert not torch.equal(found, parameter)
    assert row["loss"] == pytest.approx((0.9986 ** t.float() * each).mean().item(), rel=1e-3)
    assert 0.9986**999 == pytest.approx(0.25, abs=0.005)


def test_the_critic_learns_its_cost_and_the_policy_does_not_move_it(tiny, tmp_path):
    config = dataclasses.replace(SETTINGS["dpg"], n_steps=1, critic_learning_rate=0.0, checkpoint_every=1)
    train("dpg", tiny, tmp_path, config)
    start = Critic(4, 8, 8, generator(0, "critic"))
    assert all(torch.equal(p, kept_of(tmp_path, "critic")[n]) for n, p in start.named_parameters())
    of, optimizer = torch.rand(64, 4, 8, 8, generator=generator(3)), torch.optim.SGD(start.parameters(), lr=0.01)
    errors = []
    for _ in range(150):
        error = (start(of) - of.mean(dim=(1, 2, 3))).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.1 * errors[0]


def test_a_scorers_cost_needs_no_gradient(tokenizer, tmp_path):
    config = dataclasses.replace(SETTINGS["dpg"], cost="scorer", n_steps=3)
    rows = train("dpg", tiny_model(tokenizer), tmp_path / "a", config)
    assert all(0 <= row["cost"] <= 2 and row["critic_loss"] >= 0 for row in rows)
    with pytest.raises(ParameterError, match="leave critic at 'learned'"):
        train("dpg", tiny_model(tokenizer), tmp_path / "b", dataclasses.replace(config, critic="none"))
    wild = dataclasses.replace(SETTINGS["dpg"], critic_learning_rate=10.0, n_steps=20)
    with pytest.raises(TrainingError, match="critic_learning_rate"):
        train("dpg", tiny_model(tokenizer), tmp_path / "c", wild)


# --- RPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, mean, expected",
    [
        (0.5, "harmonic", 0.48),
        (0.5, "arithmetic", 0.5),
        (1.0, "harmonic", 0.4),
        (0.0, "harmonic", 0.6),
        (0.3, "arithmetic", 0.54),
    ],
)
def test_the_reward_by_hand(weight, mean, expected):
    assert harmonic(torch.tensor(0.4), torch.tensor(0.6), weight, mean).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "error, label, k, loss",
    [
        ((0.5, 1.0), 1.0, 0.5, math.log(1 + math.exp(-0.5))),  # the photo is learned and wins
        ((0.5, 1.0), 0.0, 0.5, math.log(1 + math.exp(0.5))),  # it loses: a worse loss
        ((1.0, 0.5), 1.0, -0.5, math.log(1 + math.exp(0.5))),  # the negative is learned
        ((1.0, 1.0), 0.0, 0.0, math.log(2)),  # as the model before
    ],
)
def test_preference_loss_by_hand(error, label, k, loss):
    found, of = preference_loss(torch.tensor(error), torch.ones(2), torch.tensor([label]), 1.0)
    assert of.item() == pytest.approx(k) and found.item() == pytest.approx(loss)


def test_the_gradient_of_the_preference_learns_the_winner():
    for label, sign in ((1.0, 1), (0.0, -1)):
        error = torch.ones(2, requires_grad=True)
        preference_loss(error, torch.ones(2), torch.tensor([label]), 1.0)[0].sum().backward()
        assert error.grad[0] * sign > 0 > error.grad[1] * sign  # the winner's error goes down, the loser's up


def test_the_best_validation_counts_and_patience_runs_from_it():
    of = Validations()
    assert [of.add(r) for r in (0.5, 0.6, 0.6, 0.4)] == [True, True, False, False]
    assert of.without_gain == 2
    again = Validations()
    again.load(of.state())
    assert again.without_gain == 2 and Validations().without_gain == 0


def test_parts_are_of_the_scorer_and_one_without_them_is_refused():
    pictures = [render(sample_scene(random.Random(i))) for i in range(3)]
    asked = [Prompt("a sks cat dancing", "a cat dancing", "dancing", True)] * 3
    found = rpo.parts_of(make_scorer("harmonic"), pictures, asked, pictures[:2])
    expected = (
        make_scorer("align_i")(pictures, None, pictures[:2]),
        make_scorer("align_t")(pictures, [p.clean for p in asked]),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ParameterError, match="image_reward has no align_i: use harmonic"):
        rpo.parts_of(make_scorer("image_reward"), pictures, asked, pictures[:2])


def test_validations_stop_the_training_and_the_best_weights_are_the_result(tokenizer, tmp_path, monkeypatch):
    """Rewards that fall after the second validation: it ends `patience` later with the weights of then."""
    given, weights = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1]), []

    def parts(scorer, pictures, prompts, photos):
        n = len(pictures)
        value = next(given) if n == 4 else 0.5  # 2 prompts × 2 pictures are a validation
        return torch.full((n,), value), torch.full((n,), value)

    monkeypatch.setattr(rpo, "parts_of", parts)
    model = tiny_model(tokenizer)
    config = dataclasses.replace(SETTINGS["rpo"], n_steps=20, patience=2)
    rows = train("rpo", model, tmp_path, config, on_row=lambda row, m: weights.append(state(m, "rpo")))
    found = [row["validation"] for row in rows if "validation" in row]
    assert found == pytest.approx([0.1, 0.5, 0.4, 0.3])
    assert len(rows) == 6  # validated at 0, 2, 4 and 6 steps
    assert all(torch.equal(p, weights[1][n]) for n, p in state(model, "rpo").items())


def test_the_average_is_what_is_validated_and_kept(tokenizer, tmp_path, monkeypatch):
    """With a decay near 1 the average stays at the start while the last weights move."""
    seen, model = [], tiny_model(tokenizer)
    monkeypatch.setattr(RewardSpec, "scorer", lambda self, device: SimpleNamespace(evaluator=""))
    monkeypatch.setattr(rpo, "parts_of", lambda scorer, pictures, *_: (torch.full((len(pictures),), 0.5),) * 2)
    monkeypatch.setattr(rpo, "sample", lambda model, texts, *_: seen.append(state(model, "rpo")) or CLASS[: len(texts)])
    config = dataclasses.replace(SETTINGS["rpo"], ema_decay=0.9, patience=0, early_stopping=False)
    last = []
    train("rpo", model, tmp_path, config, on_row=lambda row, m: last.append(state(m, "rpo")))
    result = state(model, "rpo")
    assert all(torch.equal(p, seen[-1][name]) for name, p in result.items())
    assert any(not torch.equal(p, last[-1][name]) for name, p in result.items())


@pytest.mark.parametrize(
    "change", [{}, {"lambda_val": 0.9}, {"mean": "arithmetic", "patience": 1}, {"early_stopping": False}]
)
def test_variants_that_share_a_training_end_as_they_would_alone(tokenizer, tmp_path, monkeypatch, change):
    """The history and, bit by bit, the weights."""

    def parts(scorer, pictures, prompts, photos):  # of which nobody can say when they are best
        sums = torch.tensor([sum(picture.tobytes()) for picture in pictures])
        return 0.1 + sums % 89 / 100, 0.1 + sums % 83 / 100

    monkeypatch.setattr(rpo, "parts_of", parts)
    monkeypatch.setattr(RewardSpec, "scorer", lambda self, device: SimpleNamespace(evaluator=""))
    first = dataclasses.replace(SETTINGS["rpo"], patience=2, n_steps=6, validate_every=1, ema_decay=0.5)
    config, found = dataclasses.replace(first, **change), {}
    for name, run in (
        ("alone", METHODS["rpo"].train),
        ("shared", lambda *of: variants.train(of[0], of[1], "rpo", of[2])),
    ):
        model = tiny_model(tokenizer)
        job = Job(Adapted.of(model), CAT, PHOTOS, "rpo", 0, tmp_path / name, [], PROMPTS, RewardSpec("harmonic"))
        if name == "shared":  # whose training is there already
            variants.train(tiny_model(tokenizer), job, "rpo", first)
        found[name] = run(model, job, config), state(model, "rpo")
    rows = {name: [{k: v for k, v in row.items() if k != "seconds"} for row in of] for name, (of, _) in found.items()}
    assert rows["alone"] == rows["shared"]
    assert all(torch.equal(p, found["shared"][1][name]) for name, p in found["alone"][1].items())
    assert len(list(tmp_path.glob("rpo-cat-0-*"))) == 1
    assert change.get("early_stopping", True) is False or len(rows["alone"]) < 6


def test_pure_similarity_draws_no_negatives(tokenizer, tmp_path):
    config = dataclasses.replace(SETTINGS["rpo"], preference_weight=0.0)
    model = tiny_model(tokenizer)
    job = Job(Adapted.of(model), CAT, PHOTOS, "rpo", 0, tmp_path / "one", [], PROMPTS, RewardSpec("harmonic"))
    rows = variants.train(model, job, "rpo", config)
    assert all(row["loss"] == row["loss_similarity"] for row in rows) and not {"k", "pr"} & rows[0].keys()
    assert not list(tmp_path.rglob("negatives"))
    pairs, alone = (METHODS["rpo"].work(each) for each in (SETTINGS["rpo"], config))
    assert alone.tuned == pairs.tuned / 2 and alone.graph_rows == pairs.graph_rows / 2
    assert pairs.forward - alone.forward == pairs.tuned + SETTINGS["rpo"].n_negatives * config.sampler.rows


def test_without_early_stopping_the_last_weights_are_the_result(tokenizer, tmp_path):
    model, weights = tiny_model(tokenizer), []
    config = dataclasses.replace(SETTINGS["rpo"], early_stopping=False)
    rows = train("rpo", model, tmp_path, config, on_row=lambda row, m: weights.append(state(m, "rpo")))
    assert len(rows) == 6 and all(torch.equal(p, weights[-1][n]) for n, p in state(model, "rpo").items())
    assert all(0 < row["pr"] < 1 for row in rows) and rows[0]["k"] == pytest.approx(0, abs=1e-6)


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_only_the_delta_moves(tiny, tmp_path, method):
    before = {name: p.clone() for part in tiny.parts().values() for name, p in part.named_parameters()}
    train(method, tiny, tmp_path)
    after = {n.replace(".base_layer", ""): p for part in tiny.parts().values() for n, p in part.named_parameters()}
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert any(p.abs().max() > 0 for name, p in state(tiny, method).items() if "lora_B" in name)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_training_goes_on_from_a_personalized_model(tiny, tmp_path, method):
    """Its delta comes on top of the one that is there, which stays; that model is what it is compared with."""
    below = attach(tiny, "lora", "first", {"rank": 2}, generator(0, "first"))
    with torch.no_grad():
        for weight in below.values():
            weight.add_(0.1)
    before = {name: p.clone() for name, p in below.items()}
    rows = train(method, tiny, tmp_path)
    assert list(tiny.deltas) == ["first", method] and all(torch.equal(p, before[n]) for n, p in below.items())
    assert any(p.abs().max() > 0 for name, p in state(tiny, method).items() if "lora_B" in name)
    assert method == "dpg" or rows[0]["k"] == pytest.approx(0, abs=1e-6) and rows[-1]["k"] != 0


def killed_in_step_4(method, folder, tokenizer):
    def die(row, model):
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train(method, tiny_model(tokenizer), folder, on_row=die)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_training_ends_bit_identical(tokenizer, tmp_path, method):
    straight, resumed = tiny_model(tokenizer), tiny_model(tokenizer)
    whole = train(method, straight, tmp_path / "a")
    child = multiprocessing.get_context("fork").Process(
        target=killed_in_step_4, args=(method, tmp_path / "b", tokenizer)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    rows = train(method, resumed, tmp_path / "b")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert all(torch.equal(p, state(resumed, method)[n]) for n, p in state(straight, method).items())
    other = {"dpg": {"discount": 1.0}, "rpo": {"beta": 2.0}}[method]
    with pytest.raises(ArtifactError, match=f"another {next(iter(other))}"):
        train(method, tiny_model(tokenizer), tmp_path / "b", dataclasses.replace(SETTINGS[method], **other))


def test_a_batch_in_parts_has_the_same_gradient(tokenizer, tmp_path):
    for method in SETTINGS:
        losses = []
        for micro_batch in (0, 1):
            settings = dataclasses.replace(SETTINGS[method], micro_batch=micro_batch)
            rows = train(method, tiny_model(tokenizer), tmp_path / f"{method}{micro_batch}", settings)
            losses.append([row["loss"] for row in rows])
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_settings_are_the_papers_and_work_is_counted():
    assert SD15.settings("dpg").learning_rate == 1e-6 and SD15.settings("rpo").learning_rate == 5e-6
    assert (
        METHODS["dpg"].work(SETTINGS["dpg"]).tuned == 6 * 2 * 2 and METHODS["dpg"].class_pictures(SETTINGS["dpg"]) == 4
    )
    of = METHODS["rpo"].work(SETTINGS["rpo"])
    assert of.tuned == 24 and of.graph_rows == 4 and of.forward > 24
    assert METHODS["rpo"].delta(SD15.settings("rpo"))[0] == METHODS["dpg"].delta(SD15.settings("dpg"))[0] == "unet"
    assert dpg.COSTS[0] == DPGConfig().cost
