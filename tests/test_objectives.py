"""Text and subject together: advantages by hand, levels and clips, the true denoising step, checkpoints."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from ibkit.adapt import attach, state
from ibkit.data.prompts import training_prompts
from ibkit.device import generator
from ibkit.errors import ArtifactError, ModelError, ParameterError, TrainingError
from ibkit.methods import ddpo
from ibkit.methods.ddpo import DDPOConfig, train
from ibkit.methods.engine.objectives import (
    Objective,
    Objectives,
    RewardSpec,
    reference_level,
    scorer_reward,
    synergy_term,
    time_aware_weight,
    two_objectives,
)
from ibkit.methods.engine.rollout import rollout
from ibkit.model.sample import Sampler
from ibkit.scorers import Level, Scorer, make_scorer
from ibkit.scorers.base import POCKET_WEIGHTS
from ibkit.train.kept import Average
from ibkit.train.processes import Processes
from tests.tiny import tiny_model

PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
NAMED, CLASS = PROMPTS[:2]  # "a sks cat playing soccer", "a cat playing soccer"
CONFIG = DDPOConfig(
    n_epochs=2, images_per_epoch=8, batch=4, sampler=Sampler(4, 3.0, 1.0), learning_rate=1e-2, clip_range=0.1,
    micro_batch=8, stats_min_count=2, checkpoint_every=1,
)  # fmt: skip
PHOTOS = [Image.new("RGB", (16, 16), colour) for colour in ("red", "orange", "blue")]


def brightness(images, prompts):
    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


def channel(name):
    return lambda images, prompts: torch.tensor(
        [sum(i.getchannel(name).tobytes()) / (i.width * i.height * 255) for i in images]
    )


redness = channel("R")


class Colour(Scorer):
    """Mean cosine of mean colours; a subject scorer."""

    name, evaluator, needs = "colour", "", frozenset({"references"})

    def _score(self, images, texts, references):
        colours = [torch.tensor(i.resize((1, 1)).getpixel((0, 0))).float() + 1 for i in (*images, *references)]
        a, b = torch.stack(colours[: len(images)]), torch.stack(colours[len(images) :])
        return cosine_similarity(a[:, None], b[None], dim=-1).mean(1)


# --- the advantage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, subject, expected",
    [
        (1.0, 2.0, 1.3 + 0.4 * math.tanh(2)),  # good in both: more than their sum
        (-1.0, 2.0, -0.1 - 0.4 * math.tanh(2)),  # good in one alone: less
        (1.0, -2.0, 0.1 - 0.4 * math.tanh(2)),
        (-1.0, -2.0, -1.3 - 0.4 * math.tanh(2)),  # bad in both: less still, though the product is positive
    ],
)
def test_the_two_objective_advantage_by_hand_for_all_pairs_of_signs(text, subject, expected):
    a, b = torch.tensor([text]), torch.tensor([subject])
    found = two_objectives(a, b, torch.tensor([0.7, 0.5]), 0.4)
    assert found.shape == (1, 2)
    assert found[0, 0].item() == pytest.approx(0.7 * text + 0.3 * subject + synergy_term(a, b, 0.4).item(), abs=1e-6)
    assert found[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert two_objectives(a, b, torch.tensor([0.7]), 0.0).item() == pytest.approx(0.7 * text + 0.3 * subject, abs=1e-6)


def test_where_one_objective_is_average_there_is_no_synergy():
    zero, some = torch.zeros(2), torch.tensor([1.0, -1.0])
    assert synergy_term(zero, some, 0.4).tolist() == synergy_term(some, zero, 0.4).tolist() == [0.0, 0.0]


def test_the_time_aware_weight_by_hand():
    done = torch.tensor([0.0, 0.2, 0.24, 0.4, 0.56, 0.8, 0.88, 0.96])
    middle = [0.3 + 0.4 / (1 + math.exp(20 * (u - 0.4))) for u in (0.24, 0.4, 0.56, 0.8)]
    torch.testing.assert_close(time_aware_weight(done), torch.tensor([0.7, 0.7, *middle, 0.5, 0.5]))
    assert middle[1] == 0.5


def objectives(text=brightness, subject=redness, **changes):
    return Objectives(text, subject, dataclasses.replace(CONFIG, **changes))


def test_each_objective_is_normalised_apart_and_a_class_prompt_knows_the_text_alone():
    prompts, scores = [NAMED, NAMED, CLASS, CLASS], torch.tensor([[0.0, 2.0, 30.0, 10.0], [0.9, 0.7, 0.1, 0.2]])
    found = objectives(time_aware=False, text_weight=0.25).advantages(prompts, scores, 3)
    first = -0.25 + 0.75 - 0.4 * math.tanh(1)
    torch.testing.assert_close(
        found[:, 0], torch.tensor([first, 0.25 - 0.75 - 0.4 * math.tanh(1), 1.0, -1.0]), atol=1e-4, rtol=1e-4
    )
    assert all(torch.equal(found[:, 0], found[:, i]) for i in (1, 2))
    aware = objectives().advantages(prompts, scores, 10)
    weight = time_aware_weight(torch.arange(10) / 10)
    torch.testing.assert_close(aware[0], -weight + (1 - weight) - 0.4 * math.tanh(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(aware[2], torch.ones(10), atol=1e-4, rtol=1e-4)


def test_the_clamp_comes_after_the_combination():
    prompts, scores = [NAMED] * 64, torch.zeros(2, 64)
    scores[:, 0] = 1.0  # one picture of 64: √63 = 7.9 standard deviations above
    fixed = {"time_aware": False, "text_weight": 0.75, "synergy": 0.0, "stats_buffer": 64}
    assert objectives(**fixed).advantages(prompts, scores, 4)[0].tolist() == [5.0] * 4
    opposed = scores * torch.tensor([[1.0], [-1.0]])
    found = objectives(**fixed).advantages(prompts, opposed, 4)[0]
    torch.testing.assert_close(found, torch.full((4,), 0.5 * 63**0.5), rtol=1e-4, atol=0.0)  # clamped first, 2.5


@pytest.mark.parametrize("combine", ["sum", "harmonic"])
def test_the_baselines_make_one_reward_of_both(combine):
    text, subject = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.0, 0.8, 0.4])
    if combine == "sum":
        reward = 0.25 * text + 0.75 * subject
    else:
        reward = 1 / (0.25 / torch.sigmoid(text) + 0.75 / ((subject + 1) / 2))
    found = objectives(combine=combine, text_weight=0.25).advantages([NAMED] * 3, torch.stack([text, subject]), 2)
    expected = (reward - reward.mean()) / reward.std(unbiased=False)
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2), atol=1e-4, rtol=1e-4)
    alone = objectives(combine=combine).advantages([CLASS] * 3, torch.stack([text, subject]), 2)
    assert alone.argsort(0)[:, 0].tolist() == text.argsort().tolist()  # no subject in it


def test_an_unknown_combination_is_refused(tiny, tmp_path):
    with pytest.raises(ParameterError, match="combine is 'product': it must be one of synergy, sum, harmonic"):
        train(tiny, PROMPTS, brightness, dataclasses.replace(CONFIG, combine="product"), tmp_path)


# --- the true denoising step ------------------------------------------------------------------------------------


def test_the_weight_belongs_to_the_true_step_whatever_order_an_update_draws(tokenizer, monkeypatch):
    """The pairs of an update, shuffled and cut into other micro-batches, have the same loss pair by pair; and where
    some steps are drawn, each has the advantage of its own step.
    """
    n = 4
    table = two_objectives(
        torch.linspace(-1, 2, n), torch.linspace(1, -1, n), time_aware_weight(torch.arange(4) / 4), 0.4
    )
    assert all(len(set(row.tolist())) == 4 for row in table)  # every step its own

    def losses(micro_batch, subsample, seed):
        model = tiny_model(tokenizer)
        parameters = list(attach(model, "lora", "ddpo", {"rank": 4}, generator(0, "lora")).values())
        schedule = CONFIG.sampler.schedule(model)
        made = rollout(model, [NAMED.text] * n, schedule, 3.0, [generator(0, i) for i in range(n)])
        seen, whole = {}, ddpo.pair_loss

        def spy(model, trajectories, image, step, advantage, *rest):
            found = whole(model, trajectories, image, step, advantage, *rest)
            for i, t, a, loss in zip(image.tolist(), step.tolist(), advantage.tolist(), found[0].tolist(), strict=True):
                assert a == table[i, t].item()
                seen[i, t] = loss
            return found

        monkeypatch.setattr(ddpo, "pair_loss", spy)
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch, subsample=subsample)
        average, optimizer = Average({}, 0.0), torch.optim.SGD(parameters, lr=0.0)
        stream = generator(seed)
        ddpo.update(model, optimizer, average, made, table, schedule, config, stream, Processes())
        monkeypatch.setattr(ddpo, "pair_loss", whole)
        return seen

    reference = losses(16, 1.0, 0)
    assert len(reference) == 16
    for other in (losses(3, 1.0, 1), losses(5, 0.5, 2)):
        assert len(other) >= 8
        assert all(loss == pytest.approx(reference[pair], abs=1e-4) for pair, loss in other.items())


# --- levels -----------------------------------------------------------------------------------------------------


def test_the_text_reward_is_clipped_at_its_level_and_the_history_counts_what_was_above():
    """Mean .5 for soccer: .9 and .6 count the same; a prompt with a higher level keeps its order."""
    dancing = PROMPTS[2]
    levels = {NAMED.clean: Level(0.5, 0.1), dancing.clean: Level(2.0, 0.1)}
    prompts, scores = [NAMED] * 3 + [dancing] * 2, torch.tensor([[0.9, 0.6, 0.1, 0.9, 0.6]])
    for clip in (True, False):
        one = objectives(Objective(brightness, lambda p: levels[p.clean], clip), None)
        found = one.advantages(prompts, scores, 1)[:, 0]
        assert bool(found[0] == found[1]) is clip
        assert found[3] > found[4]
        row = one.row(prompts, scores)
        assert row["above_level"] == pytest.approx(2 / 5)
        assert row["reward"] == pytest.approx(0.62)  # as scored: the curve shows what the clip hides
        assert "reward_subject" not in row and "above_level_subject" not in row


def test_a_clipped_objective_that_is_nearly_saturated_is_not_divided_by_its_own_small_spread():
    """15 of 16 pictures at the level .5, the last at .49. Its own σ is .01 √15 / 16, so that it lacks 15 / √15 of them;
    true pictures' σ is .1, and of that it lacks .01 · 15/16 / .1.
    """
    scores, level = torch.tensor([[0.9] * 15 + [0.49]]), lambda prompt: Level(0.5, 0.1)

    def last(clip=True, **changes):
        return objectives(Objective(brightness, level, clip), None, **changes).advantages([NAMED] * 16, scores, 1)[
            -1, 0
        ]

    assert last() == pytest.approx(-math.sqrt(15), abs=1e-2)
    assert last(spread_floor=1.0) == pytest.approx(-0.09375, abs=1e-4)
    assert last(spread_floor=0.5) == pytest.approx(-0.1875, abs=1e-4)
    assert last(spread_floor=1e-3) == last()  # wide enough by itself
    assert last(clip=False, spread_floor=1.0) == last(clip=False)  # nothing saturates
    both = Objective(brightness, level, True)
    rows = torch.cat([scores, scores])
    found = objectives(both, both, time_aware=False, spread_floor=1.0, synergy=0.0).advantages([NAMED] * 16, rows, 1)
    assert found[-1, 0] == pytest.approx(-0.09375, abs=1e-4)  # half of each


def test_the_subject_objective_saturates_at_the_likeness_of_real_photos():
    subject = scorer_reward(Colour(), PHOTOS, clip_at_level=True)
    level = subject.level(NAMED)
    a, b, c = (
        Colour()([x], None, [y]).item()
        for x, y in ((PHOTOS[0], PHOTOS[1]), (PHOTOS[0], PHOTOS[2]), (PHOTOS[1], PHOTOS[2]))
    )
    assert level.mean == pytest.approx((a + b + c) / 3)  # no photo is compared with itself
    assert level == reference_level(Colour(), PHOTOS)
    prompts = [NAMED, NAMED, NAMED, CLASS]
    scores = torch.tensor([[0.0, 0.0, 0.0, 1.0], [level.mean + 0.1, level.mean + 0.2, level.mean - 0.3, 1.0]])
    both = objectives(brightness, subject, time_aware=False)
    found = both.advantages(prompts, scores, 1)[:, 0]
    assert found[0] == found[1] > found[2]
    row = both.row(prompts, scores)
    assert row["above_level_subject"] == pytest.approx(2 / 3)  # of identifier prompts
    assert row["reward_subject"] == pytest.approx(level.mean)
    assert "above_level" not in row  # nobody knows the level of brightness


def test_zero_spread_counts_prompts_whose_pictures_are_rewarded_alike():
    """Four prompts of two pictures and a fifth of one, which does not count."""
    lone = training_prompts(["reading"], "cat", "sks")[0]
    prompts = [p for p in PROMPTS for _ in range(2)] + [lone]
    text = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    subject = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.6, 0.7, 0.8])
    alone, both = Objectives(brightness, None, CONFIG), Objectives(brightness, redness, CONFIG)
    assert alone.row(prompts, text[None])["zero_spread"] == 2 / 4
    # the first is told apart by the subject; the second has none, so its two numbers are not read
    assert both.row(prompts, torch.stack([text, subject]))["zero_spread"] == 1 / 4
    clipped = Objectives(Objective(brightness, lambda prompt: Level(2.5, 0.1), clip=True), None, CONFIG)
    assert clipped.row(prompts, text[None])["zero_spread"] == 1
    assert "zero_spread" not in alone.row(PROMPTS, text[None, :4])


def test_the_parts_of_a_reward_stand_in_the_history_and_are_not_optimised(tokenizer, tmp_path):
    def in_parts(images, prompts):
        return brightness(images, prompts), {"half": brightness(images, prompts) / 2}

    def likeness(images, prompts):
        return redness(images, prompts), {"named": torch.tensor([float(p.identifier) for p in prompts])}

    plain = train(tiny_model(tokenizer), PROMPTS, brightness, CONFIG, tmp_path / "a", subject_reward=redness)
    parted = train(tiny_model(tokenizer), PROMPTS, in_parts, CONFIG, tmp_path / "b", subject_reward=likeness)
    for without, row in zip(plain, parted, strict=True):
        assert row.pop("text_half") == pytest.approx(row["reward"] / 2)
        assert row.pop("subject_named") == 1.0  # over identifier prompts, as the subject's reward is
        assert {**row, "seconds": 0} == {**without, "seconds": 0}
    objective = Objective(lambda images, prompts: (torch.zeros(len(images)), {"odd": torch.zeros(7)}))
    with pytest.raises(TrainingError, match=r"shape \(7,\) for 3 images in its part 'odd'"):
        objective(PHOTOS, PROMPTS[:3])


def test_a_clip_without_a_level_is_refused():
    with pytest.raises(ParameterError, match="clipped at its level and knows none for 'a cat playing soccer'"):
        objectives(Objective(brightness, clip=True), None).advantages([NAMED], torch.zeros(1, 1), 1)
    assert reference_level(Colour(), PHOTOS[:1]) is None


def test_the_reward_reads_its_level_beside_its_weights(tmp_path):
    folder = tmp_path / "image_reward"
    shutil.copytree(POCKET_WEIGHTS / "image_reward", folder)
    file = folder / "level.json"
    file.write_text(json.dumps({"a cat playing soccer": [4.5, 2.0], "": [4, 2.5]}))
    scorer = make_scorer("image_reward", tmp_path)
    assert scorer.level("a cat playing soccer") == Level(4.5, 2.0)
    assert scorer.level("a dog in a hat") == Level(4.0, 2.5)  # all prompts together
    spec = RewardSpec("image_reward", str(tmp_path), clip_at_level=True).load()
    assert spec.clip and spec.levels(PROMPTS).tolist() == [4.5, 4.5, 4.0, 4.0]  # with and without the identifier
    file.write_text(json.dumps({"a cat playing soccer": [4.5, 2.0]}))
    assert make_scorer("image_reward", tmp_path).level("a dog in a hat") is None
    file.unlink()
    assert make_scorer("image_reward", tmp_path).level("a cat playing soccer") is None
    for broken in ('{"a cat": [1]}', '{"a cat": [1, NaN]}', "{"):
        file.write_text(broken)
        with pytest.raises(ModelError, match="level.json in .* is damaged"):
            make_scorer("image_reward", tmp_path)


def test_a_scorer_as_reward_reads_the_clean_prompt_and_sees_the_photos():
    class Both(Scorer):
        name, evaluator, needs = "both", "", frozenset({"text", "references"})

        def _score(self, images, texts, references):
            assert texts == [p.clean for p in PROMPTS] and references == PHOTOS[:1]
            return torch.arange(float(len(images)))

    reward = scorer_reward(Both(), PHOTOS[:1])
    scores, parts = reward([PHOTOS[0]] * len(PROMPTS), PROMPTS)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0] and parts == {}
    assert reward.levels(PROMPTS).isnan().all()


@pytest.mark.parametrize("name, said", [("image_rewad", "did you mean 'image_reward'"), ("zzz", "it is one of clip_t")])
def test_an_unknown_reward_is_refused_with_the_nearest(name, said):
    with pytest.raises(ParameterError, match=f"no reward '{name}'; {said}"):
        RewardSpec(name)


def test_a_reward_takes_the_options_of_its_scorer():
    pictures, asked = PHOTOS[:2], PROMPTS[:2]
    found = {}
    for weight in (0.0, 1.0):
        found[weight], parts = RewardSpec("harmonic", options={"weight": weight}).load("cpu", PHOTOS)(pictures, asked)
    torch.testing.assert_close(found[0.0], parts["align_t"])
    torch.testing.assert_close(found[1.0], parts["align_i"])
    for options, said in (({"wieght": 0.3}, "did you mean 'weight'"), ({"weight": 2}, "a number from 0.0 to 1.0")):
        with pytest.raises(ParameterError, match=f"Scorer harmonic.*{said}"):
            RewardSpec("harmonic", options=options)
    with pytest.raises(ParameterError, match="Scorer image_reward has no setting 'weight'"):
        RewardSpec("image_reward", options={"weight": 0.3})


# --- training ---------------------------------------------------------------------------------------------------


def test_two_objectives_train_and_resume_bit_identical(tokenizer, tmp_path):
    straight, stopped, resumed = (tiny_model(tokenizer) for _ in range(3))
    config = dataclasses.replace(CONFIG, n_epochs=3)
    photos = scorer_reward(Colour(), PHOTOS, clip_at_level=True)
    whole = train(straight, PROMPTS, brightness, config, tmp_path / "a", subject_reward=photos)
    train(stopped, PROMPTS, brightness, dataclasses.replace(config, n_epochs=2), tmp_path / "b", subject_reward=photos)
    parts = train(resumed, PROMPTS, brightness, config, tmp_path / "b", subject_reward=photos)
    for name, weight in state(straight, "ddpo").items():
        assert torch.equal(weight, state(resumed, "ddpo")[name]), name
    assert [row["reward_subject"] for row in whole] == [row["reward_subject"] for row in parts]
    assert all(0 <= row["above_level_subject"] <= 1 for row in whole)
    alone = tiny_model(tokenizer)
    train(alone, PROMPTS, brightness, config, tmp_path / "c")
    assert any(not torch.equal(v, state(straight, "ddpo")[k]) for k, v in state(alone, "ddpo").items())


def test_checkpoints_with_other_objectives_are_refused(tokenizer, tmp_path):
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(CONFIG, n_epochs=1), tmp_path)
    with pytest.raises(ArtifactError, match="another rewards"):
        train(tiny_model(tokenizer), PROMPTS, brightness, CONFIG, tmp_path, subject_reward=redness)


def test_a_subject_reward_that_is_not_finite_is_named(tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"epoch 0: the reward of image 0 \('a .*'\) is nan"):
        train(tiny, PROMPTS, brightness, CONFIG, tmp_path, subject_reward=lambda i, p: torch.full((len(i),), torch.nan))


def taught(tokenizer, folder, subject, **changes):
    """Rise of redness, the text's, and of another latent channel, the subject's, shown as they are."""

    def decode(z):
        shown = (128 + 60 * z[:, :3].clamp(-2, 2)).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return [Image.fromarray(x) for x in shown]

    model = tiny_model(tokenizer)
    model.decode = decode
    config = dataclasses.replace(
        CONFIG, n_epochs=12, images_per_epoch=32, batch=16, sampler=Sampler(4, 1.0, 1.0), clip_range=1e-2,
        micro_batch=64, stats_buffer=32, lora_rank=8, checkpoint_every=100, **changes,
    )  # fmt: skip
    rows = train(model, [NAMED], channel("R"), config, folder, subject_reward=channel(subject))
    curves = [torch.tensor([row[column] for row in rows]) for column in ("reward", "reward_subject")]
    return [(curve[-4:].mean() - curve[:4].mean()).item() for curve in curves]


def test_two_objectives_rise_together(tokenizer, tmp_path):
    assert min(taught(tokenizer, tmp_path, "G")) > 0.05  # about five standard errors of these means


def test_the_weight_decides_between_objectives_that_are_at_odds(tokenizer, tmp_path):
    fixed = {"time_aware": False, "synergy": 0.0}
    text = taught(tokenizer, tmp_path / "text", "B", **fixed, text_weight=1.0)
    subject = taught(tokenizer, tmp_path / "subject", "B", **fixed, text_weight=0.0)
    assert text[0] > subject[0] + 0.03 and subject[1] > text[1] + 0.02
