"""Human feedback: prompts and simulated raters, the learned reward, reward-weighted likelihood, resuming, refusals."""

import dataclasses
import json
import math
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
from ibkit.errors import ArtifactError, ModelError, ParameterError, TrainingError
from ibkit.methods import feedback
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.feedback import FeedbackConfig, read_labelled, train, weighted_likelihood_loss
from ibkit.methods.records import METHODS, Job
from ibkit.model.sample import Sampler
from ibkit.pocket.feedback import HELD_OUT_CLASSES, KINDS, Asked, alternatives, prompts, simulated_labels, split
from ibkit.scorers import make_scorer
from ibkit.scorers.feedback import (
    FeedbackNet,
    FeedbackRewardConfig,
    agreement,
    best_of,
    best_threshold,
    feedback_loss,
    prompt_classification_loss,
    save_reward,
    train_reward,
)
from ibkit.train.guard import Guard
from ibkit.train.processes import Processes
from tests.tiny import tiny_model

CONFIG = FeedbackConfig(
    n_steps=6, batch=2, learning_rate=1e-2, kind="lora", lora_rank=2, checkpoint_every=2, sampler=Sampler(3, 2.0, 1.0),
    n_scored=2, validate_every=3,
)  # fmt: skip
PICTURES = [Image.new("RGB", (16, 16), (60 * i, 90, 200 - 60 * i)) for i in range(4)]
TEXTS = ["a red cat", "two cats", "a red cat", "two cats"]
REWARDS = [1.0, 0.2, -0.5, 0.7]
PRETRAINING = {"pretraining": PICTURES[:2], "pretraining_prompts": ["a cat", "a cat"]}
SMALL = FeedbackRewardConfig(hidden=16, n_steps=30, batch=8)


# --- prompts and raters --------------------------------------------------------------------------------------------


def test_prompts_say_what_they_ask_and_answers_fulfil_them():
    asked = Asked("cat", 2, "red", "park")
    assert asked.text == "two red cats in the park" and Asked("cat", 1).text == "one cat"
    assert Asked("dog", 0, "orange").text == "an orange dog" and Asked("teddy bear", 3).text == "three teddy bears"
    right = {"class": "cat", "count": "two", "colour": "red", "place": "park"}
    assert asked.fulfilled(right)
    for question, wrong in {"class": "dog", "count": "three", "colour": "blue", "place": "moon"}.items():
        assert not asked.fulfilled(right | {question: wrong})
    assert Asked("cat", 2).fulfilled(right | {"colour": "blue", "place": "moon"})  # it does not ask for them
    with pytest.raises(ValueError, match="no prompt has the count 5"):
        Asked("cat", 5)


@pytest.mark.parametrize("kind", KINDS)
def test_seen_and_unseen_prompts_are_disjoint_and_of_one_kind(kind):
    seen, combinations, objects = split(kind, 20)
    texts = [{one.text for one in part} for part in (seen, combinations, objects)]
    assert all(texts) and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert {one.noun for one in objects} == set(HELD_OUT_CLASSES)
    assert not {one.noun for one in seen + combinations} & set(HELD_OUT_CLASSES)
    assert {one.text for one in seen} <= {one.text for one in prompts(kind)}


def test_alternatives_differ_in_one_respect_that_the_prompt_names():
    asked = Asked("cat", 2, place="park")
    found = alternatives(asked, 17, random.Random(0))  # 7 objects, 3 counts, 7 places
    assert len(set(found)) == 17 and asked not in found
    for one in found:
        assert (one.noun != "cat") + (one.count != 2) + (one.place != "park") == 1 and not one.colour
    unseen = {Asked("cat", 3, place="park"), Asked("pot", 2, place="park")}
    fair = alternatives(asked, 13, random.Random(0), unseen)  # without those, and without dogs and cups
    assert not {one for one in fair if one in unseen or one.noun in HELD_OUT_CLASSES} and len(set(fair)) == 13
    with pytest.raises(ParameterError, match="has 13 alternatives, not 14"):
        alternatives(asked, 14, random.Random(0), unseen)
    with pytest.raises(ParameterError, match="has 17 alternatives, not 18"):
        alternatives(asked, 18, random.Random(0))


def test_simulated_raters_err_and_skip_at_the_stated_rates():
    truth = [i % 2 == 0 for i in range(4000)]
    found = simulated_labels(truth, 0.1, 0.05, generator(0, "raters"))
    assert found == simulated_labels(truth, 0.1, 0.05, generator(0, "raters"))
    rated = [(label, good) for label, good in zip(found, truth, strict=True) if label is not None]
    assert 1 - len(rated) / 4000 == pytest.approx(0.05, abs=0.015)
    assert sum(label != good for label, good in rated) / len(rated) == pytest.approx(0.1, abs=0.02)
    assert simulated_labels(truth, 0.0, 0.0, generator(1)) == [float(good) for good in truth]
    with pytest.raises(ParameterError, match="error_rate=0.6"):
        simulated_labels(truth, 0.6, 0.0, generator(0))


# --- the reward ----------------------------------------------------------------------------------------------------


def test_the_rewards_loss_by_hand():
    """A good picture, r .8 of its prompt and .2, 0 of others; a bad one, r .3, that has no part in the second term."""
    rewards, label = torch.tensor([[0.8, 0.2, 0.0], [0.3, 0.9, 0.9]]), torch.tensor([1.0, 0.0])
    named = -math.log(math.exp(0.4) / (math.exp(0.4) + math.exp(0.1) + 1))
    assert prompt_classification_loss(rewards, label, 2.0).item() == pytest.approx(named)
    terms = feedback_loss(rewards, label, 0.5, 2.0)
    assert terms["loss_feedback"].item() == pytest.approx((0.2**2 + 0.3**2) / 2)
    assert terms["loss"].item() == pytest.approx((0.2**2 + 0.3**2) / 2 + 0.5 * named)
    assert "loss_prompts" not in feedback_loss(rewards[:, :1], label, 0.0, 2.0)
    assert prompt_classification_loss(rewards, torch.zeros(2), 2.0).item() == 0


class Embeds:
    """An encoder whose pictures are told by their red, and texts by whether they say red."""

    evaluator, device = "red or not", "cpu"

    def images(self, images):
        return torch.tensor([[float(i.getpixel((0, 0))[0] > 127), 1.0] for i in images])

    def texts(self, texts):
        return torch.tensor([[float("red" in text), 1.0] for text in texts])


def rated(n=40):
    """Red or blue pictures for "red" or "blue"; good where they agree, and the other word as the alternative."""
    rng = random.Random(0)
    colours, words = ([rng.choice(["red", "blue"]) for _ in range(n)] for _ in range(2))
    pictures = [Image.new("RGB", (8, 8), colour) for colour in colours]
    labels = [float(c == w) for c, w in zip(colours, words, strict=True)]
    return pictures, words, labels, [["blue" if w == "red" else "red"] for w in words]


@pytest.mark.parametrize("aux_weight", [0.0, 0.5])
def test_the_reward_learns_what_raters_say(aux_weight):
    pictures, words, labels, others = rated()
    config = FeedbackRewardConfig(hidden=32, n_steps=300, batch=32, learning_rate=1e-2, aux_weight=aux_weight)
    net, history = train_reward(Embeds(), pictures, words, labels, others if aux_weight else [], config)
    scores = net(Embeds().images(pictures), Embeds().texts(words))
    assert agreement(scores, torch.tensor(labels)).mean() == 1
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and ("loss_prompts" in history[0]) == (aux_weight > 0)
    again, _ = train_reward(Embeds(), pictures, words, labels, others if aux_weight else [], config)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    other, _ = train_reward(Embeds(), pictures, words, labels, others if aux_weight else [], config, seed=1)
    assert not torch.equal(net.first.weight, other.first.weight)


def test_a_saved_head_is_a_scorer_and_a_reward(tmp_path):
    encoder = make_scorer("clip_t").encoder
    pictures, words, labels, others = rated(8)
    net, _ = train_reward(encoder, pictures, words, labels, others, SMALL)
    save_reward(net, encoder, tmp_path / "head", SMALL, {"n": 8})
    loaded = RewardSpec("feedback", options={"head": str(tmp_path / "head")}).scorer()
    expected = net(encoder.images(pictures), encoder.texts(words))
    torch.testing.assert_close(loaded(pictures, words), expected)
    assert loaded.evaluator.endswith(encoder.evaluator)
    facts = json.loads((tmp_path / "head" / "feedback.json").read_text())
    (tmp_path / "head" / "feedback.json").write_text(json.dumps(facts | {"encoder": "another CLIP"}))
    with pytest.raises(ModelError, match="trained on another CLIP"):
        make_scorer("feedback", options={"head": str(tmp_path / "head")})
    with pytest.raises(ModelError, match="no head is shipped"):
        make_scorer("feedback")
    with pytest.raises(ModelError, match="feedback"):
        make_scorer("feedback", options={"head": str(tmp_path / "nowhere")})


def test_bad_feedback_is_refused_in_words():
    pictures, words, labels, others = rated(8)
    for given, said in (
        ((pictures[:3], words, labels, others), "3 pictures, 8 prompts and 8 labels"),
        ((pictures, words, [1.0] * 8, others), "the labels are 1: "),
        ((pictures, words, [0.5, *labels[1:]], others), "leave skipped pictures out"),
        ((pictures, words, labels, []), "set aux_weight to 0"),
    ):
        with pytest.raises(ParameterError, match=said):
            train_reward(Embeds(), *given, SMALL)


def test_thresholds_and_best_of_n_by_hand():
    scores, labels = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert best_threshold(scores, labels) == pytest.approx(0.25)
    assert agreement(scores, labels, 0.15).tolist() == [1, 0, 1, 1]
    assert best_of(torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]]), 2).tolist() == [[1, 2], [0, 2]]
    with pytest.raises(ParameterError, match="keep 4 of 3"):
        best_of(torch.zeros(1, 3), 4)


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def test_the_weighted_likelihood_by_hand():
    """Errors 1, 4 of the model's pictures with rewards .5, -1, and 9, 16 of pre-training's."""
    noise = torch.zeros(4, 1, 2, 2)
    eps_hat = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    terms = weighted_likelihood_loss(eps_hat, noise, torch.tensor([0.5, -1.0]), 0.1)
    assert terms["loss_weighted"].item() == pytest.approx(0.25) and terms["loss_pretrain"].item() == 12.5
    assert terms["loss"].item() == pytest.approx(0.25 + 1.25)
    alone = weighted_likelihood_loss(eps_hat[:2], noise[:2], torch.tensor([0.5, -1.0]), 0.0)
    assert alone["loss"].item() == pytest.approx(0.25) and "loss_pretrain" not in alone


def error_of(model, picture, text):
    """The noise loss of a picture with its prompt, on fixed noise and timesteps."""
    z_0, t = model.encode_images([picture]).expand(8, -1, -1, -1), torch.arange(50, 850, 100)
    noise = torch.randn(z_0.shape, generator=generator(9))
    a = model.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        return (model.predict_noise(a.sqrt() * z_0 + (1 - a).sqrt() * noise, t, [text] * 8) - noise).square().mean()


def test_rewarded_pictures_become_likely_and_others_do_not_count(tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, n_steps=30, pretrain_weight=0.0, batch=4)
    model = tiny_model(tokenizer)
    before = error_of(model, PICTURES[0], TEXTS[0])
    rows = train(model, PICTURES, TEXTS, [1.0, 0.0, 0.0, 0.0], config, tmp_path / "a")
    assert error_of(model, PICTURES[0], TEXTS[0]) < 0.9 * before
    assert rows[0]["weight"] == 0.25 and (rows[0]["pictures"], rows[0]["gradient_steps"]) == (4, 1)
    # a negative reward is one of zero, bit by bit
    other = tiny_model(tokenizer)
    train(other, PICTURES, TEXTS, [1.0, -5.0, -0.1, 0.0], config, tmp_path / "b")
    assert all(torch.equal(p, state(other, "feedback")[n]) for n, p in state(model, "feedback").items())


def test_a_batch_in_parts_has_the_same_losses(tokenizer, tmp_path):
    found = []
    for micro_batch in (0, 1):
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch)
        rows = train(
            tiny_model(tokenizer), PICTURES, TEXTS, REWARDS, config, tmp_path / str(micro_batch), **PRETRAINING
        )
        found.append([(row["loss"], row["loss_weighted"], row["loss_pretrain"]) for row in rows])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-6)


def killed_in_step_4(folder, tokenizer):
    def die(row):
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny_model(tokenizer), PICTURES, TEXTS, REWARDS, CONFIG, folder, on_step=die, **PRETRAINING)


def test_a_killed_training_ends_bit_identical(tokenizer, tmp_path):
    straight, resumed = tiny_model(tokenizer), tiny_model(tokenizer)
    train(straight, PICTURES, TEXTS, REWARDS, CONFIG, tmp_path / "a", **PRETRAINING)
    child = multiprocessing.get_context("fork").Process(target=killed_in_step_4, args=(tmp_path / "b", tokenizer))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert len(train(resumed, PICTURES, TEXTS, REWARDS, CONFIG, tmp_path / "b", **PRETRAINING)) == 6
    assert all(torch.equal(p, state(resumed, "feedback")[n]) for n, p in state(straight, "feedback").items())
    for changed, said in (
        ({"rewards": [1.0] * 4}, "rewards"),
        ({"pretraining_prompts": ["a dog"] * 2}, "pre-training"),
    ):
        given = {"rewards": REWARDS, **PRETRAINING} | changed
        with pytest.raises(ArtifactError, match=f"another {said}"):
            train(tiny_model(tokenizer), PICTURES, TEXTS, given.pop("rewards"), CONFIG, tmp_path / "b", **given)


def test_what_it_cannot_learn_from_is_refused(tiny, tmp_path):
    alone = dataclasses.replace(CONFIG, pretrain_weight=0.0)
    with pytest.raises(ParameterError, match="0 pictures, 0 prompts and 0 rewards"):
        train(tiny, [], [], [], alone, tmp_path)
    with pytest.raises(ParameterError, match="no reward of the 4 pictures is above 0 .the highest is -0.1"):
        train(tiny, PICTURES, TEXTS, [-0.1, -1, -2, -3], alone, tmp_path)
    with pytest.raises(TrainingError, match="reward of picture 1 .'two cats'. is nan"):
        train(tiny, PICTURES, TEXTS, [1, math.nan, 1, 1], alone, tmp_path)
    with pytest.raises(ParameterError, match="set pretrain_weight to 0"):
        train(tiny, PICTURES, TEXTS, REWARDS, CONFIG, tmp_path)


def write_rated(folder, rows, columns="picture,prompt,label"):
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(PICTURES):
        picture.save(folder / f"{i}.png")
    (folder / "labels.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder


def test_rated_pictures_are_read_and_faults_named(tmp_path):
    folder = write_rated(tmp_path / "rated", ["0.png,a cat,1", "1.png,two cats,0", "2.png,a dog,"])
    pictures, texts, labels = read_labelled(folder)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in PICTURES[:3]]
    assert (texts, labels) == (["a cat", "two cats", "a dog"], [1.0, 0.0, None])
    for rows, columns, said in (
        (["0.png,a cat,2"], "picture,prompt,label", "line 2: the label"),
        (["0.png,a cat,1", "9.png,a cat,1"], "picture,prompt,label", "line 3: the picture '9.png' cannot be read"),
        (["0.png,1"], "picture,label", "no column prompt"),
    ):
        with pytest.raises(ArtifactError, match=said):
            read_labelled(write_rated(tmp_path / "rated", rows, columns))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_labelled(tmp_path / "nowhere")


def test_the_stage_weighs_labelled_and_scored_pictures(tiny, tmp_path):
    folder = write_rated(tmp_path / "rated", ["0.png,a cat,1", "1.png,two cats,0", "2.png,a dog,"])
    who = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)
    asked = training_prompts(["dancing"], "cat", "sks")
    job = Job(Adapted.of(tiny), who, [], "feedback", 0, tmp_path / "run", PICTURES, asked, RewardSpec("clip_t"))
    config = dataclasses.replace(CONFIG, labelled=str(folder), n_steps=3)
    seen = []
    rows = METHODS["feedback"].train(
        tiny,
        job,
        config,
        on_row=lambda row, model: seen.append(row["step"]),
        monitor=lambda pictures, _: {"monitor": 0.5},
    )
    assert seen == [0, 1, 2] and "reward" not in rows[1]
    assert {"reward", "monitor", "loss_weighted", "loss_pretrain", "epoch"} <= rows[2].keys()
    for changed, given, said in (
        ({"guard": Guard(patience=2)}, {}, "leave guard.patience at 0"),
        ({"subject_reward": RewardSpec("subject")}, {}, "use ddpo for two"),
        ({}, {"processes": Processes(0, 2)}, "leave processes at 1"),
    ):
        with pytest.raises(ParameterError, match=said):
            METHODS["feedback"].train(tiny, dataclasses.replace(job, **changed), config, **given)


def test_skipped_pictures_are_left_out_of_the_tuning(tiny, tmp_path, monkeypatch):
    folder = write_rated(tmp_path / "rated", ["0.png,a cat,1", "2.png,a dog,", "1.png,two cats,0"])
    who = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)
    job = Job(Adapted.of(tiny), who, [], "feedback", 0, tmp_path / "run", PICTURES, (), RewardSpec("clip_t"))
    monkeypatch.setattr(feedback, "train", lambda model, pictures, prompts, rewards, *rest: (pictures, prompts))
    config = dataclasses.replace(CONFIG, labelled=str(folder), scored=False)
    pictures, texts = METHODS["feedback"].train(tiny, job, config)
    assert texts == ["a cat", "two cats"] and [p.tobytes() for p in pictures] == [p.tobytes() for p in PICTURES[:2]]


def test_work_and_presets():
    method = METHODS["feedback"]
    work = method.work(CONFIG)
    assert (work.tuned, work.trained, work.graph_rows) == (2 * 6 * 2, 0, 4)
    assert work.pictures == 4 * (2 + 2) and work.forward == 16 * 3 * 2
    paper = method.configure("sd15")
    assert method.work(paper).graph_rows == 2 * 4
    assert method.delta(paper)[0] == "unet" and method.work(paper).trained == 2 * 10_000 * 256
    assert (
        method.class_pictures(paper) == 200
        and method.class_pictures(dataclasses.replace(CONFIG, pretrain_weight=0.0)) == 0
    )
    assert method.configure("pocket").kind == "lora" and FeedbackNet(4, 8)(
        torch.zeros(3, 4), torch.zeros(3, 4)
    ).shape == (3,)
