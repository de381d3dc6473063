"""The shipped pocket weights: the files of the card, the recipe of this code, and diffusers' pipeline loads them."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from ibkit.model.loading import POCKET_PIPELINE, load_model
from ibkit.model.sample import Sampler, sample
from ibkit.pocket.build import labels
from ibkit.pocket.build.autoencoder import new_autoencoder
from ibkit.pocket.build.card import reaches
from ibkit.pocket.build.common import ShapewiseMuon, begin_with
from ibkit.pocket.build.reward import ranks
from ibkit.pocket.build.tokenizer import learn_merges
from ibkit.pocket.build.unet import TextToLatent, new_scheduler
from ibkit.pocket.draw import render
from ibkit.pocket.words import vocabulary
from ibkit.pocket.world import (
    ACTIVITIES,
    DEMO_SUBJECTS,
    IDENTIFIERS,
    NO_ACTIVITY,
    activities_of,
    doing,
    sample_mixture,
    sample_scene,
    sample_subject,
)
from ibkit.runs import hash_file
from ibkit.scorers import make_scorer
from ibkit.scorers.judge import ANSWERS, Judge

WEIGHTS = POCKET_PIPELINE.parent


@pytest.fixture(scope="module")
def card():
    return json.loads((WEIGHTS / "card.json").read_text())


def test_every_file_is_the_one_on_the_card(card):
    files = {p.relative_to(WEIGHTS).as_posix(): p for p in WEIGHTS.rglob("*") if p.is_file()}
    assert files.keys() - card["files"].keys() == {"card.json", "MODEL_CARD.md"}
    for name, entry in card["files"].items():
        assert hash_file(files[name]) == entry["sha256"], name
    assert sum(p.stat().st_size for p in files.values()) <= 30e6


def test_the_card_says_what_was_reached(card):
    for row in card["numbers"]:
        assert row["n"] >= 80
        assert row["reached"] == (row["target"] is None or reaches(row["value"], row["target"])), row["name"]
    text = (WEIGHTS / "MODEL_CARD.md").read_text()
    assert text.count("short of the target") == sum(not row["reached"] for row in card["numbers"])


@pytest.mark.parametrize(
    "value, target, reached", [(0.99, 0.98, True), (0.97, 0.98, False), (0.02, -0.03, True), (0.04, -0.03, False)]
)
def test_a_negative_target_is_the_most_that_is_allowed(value, target, reached):
    assert reaches(value, target) == reached


def test_the_weights_are_of_this_recipe():
    model = load_model("pocket")
    tokenizer = model.tokenizer
    recipe = TextToLatent(tokenizer)
    vae = new_autoencoder()
    for built, new in ((model.unet, recipe.unet), (model.text_encoder, recipe.text_encoder), (model.vae, vae)):
        assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in new.state_dict().items()}
    torch.testing.assert_close(model.alphas_cumprod, new_scheduler().alphas_cumprod.double())
    assert all(len(model.token_ids(word)) == 1 for word in vocabulary())


def test_an_identifier_is_as_large_as_a_word():
    model = load_model("pocket")
    table = model.text_encoder.get_input_embeddings().weight
    sizes = {word: table[model.token_ids(word)[0]].norm().item() for word in (*IDENTIFIERS, "cat", "soccer", "red")}
    assert min(sizes.values()) > 0.5 * max(sizes.values()), sizes


def test_diffusers_own_pipeline_draws_with_them():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    stream = torch.Generator().manual_seed(0)
    image = pipeline("a cat playing soccer", num_inference_steps=8, guidance_scale=3.0, generator=stream).images[0]
    assert image.size == (64, 64)
    assert Judge.load().answers([image], "place")  # a picture that the judge can look at


def test_the_model_follows_a_prompt_and_the_judge_sees_it():
    model = load_model("pocket")
    images = sample(model, ["a cat playing soccer"] * 4 + ["a cat riding a bike"] * 4, range(8), Sampler(10, 3.0))
    answers = Judge.load().answers(images, "activity")
    assert sum(a == b for a, b in zip(answers, ["playing soccer"] * 4 + ["riding a bike"] * 4, strict=True)) >= 6


def test_scorers_prefer_the_right_text_and_the_same_subject():
    rng = random.Random("scorers")
    scenes = [sample_scene(rng, DEMO_SUBJECTS["dog"], a) for a in activities_of("dog")]
    renders = [render(s) for s in scenes]
    right = [f"a dog {s.activity}" for s in scenes]
    wrong = right[1:] + right[:1]
    for name, share in (("clip_t", 0.8), ("image_reward", 0.8)):
        scorer = make_scorer(name)
        assert (scorer(renders, texts=right) > scorer(renders, texts=wrong)).float().mean() >= share, name
    rest = [render(sample_scene(rng, s, NO_ACTIVITY, "park")) for s in (DEMO_SUBJECTS["dog"], DEMO_SUBJECTS["cup"])]
    for name in ("dino", "clip_i"):
        like, unlike = make_scorer(name)(
            rest, references=[render(sample_scene(rng, DEMO_SUBJECTS["dog"], NO_ACTIVITY))]
        )
        assert like > unlike, name


def test_the_judge_has_its_accuracy_with_it():
    accuracy = Judge.load().card["accuracy"]
    assert set(accuracy) == {"class", "activity", "pose", "things", "place", "accessory", "identity"}
    assert "renders" in accuracy["activity"] and accuracy["activity"]["n"] >= 400
    assert set(ACTIVITIES) == {a for noun in DEMO_SUBJECTS for a in activities_of(noun)}


@pytest.mark.parametrize("kind, part", [("things at rest", "things"), ("pose without things", "pose")])
def test_the_judge_does_not_take_a_part_for_the_activity(kind, part):
    rng = random.Random(kind)
    scenes = [sample_mixture(rng, sample_subject(rng, noun), kind) for noun in ("cat", "dog", "bike") * 20]
    activities = [getattr(scene, part) for scene in scenes]
    judge = Judge.load()
    assert judge.agrees([render(scene) for scene in scenes], "activity", activities).mean() <= 0.1
    whole = [render(replace(scene, **doing(activity))) for scene, activity in zip(scenes, activities, strict=True)]
    assert judge.agrees(whole, "activity", activities).mean() >= 0.95
    assert set(judge.answers(whole, "activity")) >= set(activities)
    assert (
        judge.agrees(
            [render(replace(scene, **doing(NO_ACTIVITY))) for scene in scenes], "activity", ["none"] * 60
        ).mean()
        > 0.9
    )


@pytest.mark.parametrize("kind", ["things without the pose", "pose without the things", "rest against things"])
def test_the_reward_prefers_more_of_the_activity(kind):
    right, n = ranks(make_scorer("image_reward"), kind, 100)
    assert right / n >= 0.9


def test_the_reward_knows_the_level_of_true_pictures():
    reward, rng = make_scorer("image_reward"), random.Random("level")
    for noun, activity in (("cat", "playing soccer"), ("pot", "with popcorn in it")):
        text = f"a {noun} {activity}"
        level = reward.level(text)
        true = reward([render(sample_scene(rng, sample_subject(rng, noun), activity)) for _ in range(40)], [text] * 40)
        assert abs(true.mean() - level.mean) < 4 * level.std / 40**0.5 + 0.5
        rest = reward([render(sample_scene(rng, sample_subject(rng, noun), NO_ACTIVITY))], [text])
        assert rest.item() < level.mean - 2 * level.std


def test_a_stranger_is_not_recognised_for_want_of_a_nearer_one():
    judge = Judge.load()
    threshold = judge.card["threshold"]
    likeness = torch.tensor([[threshold + 0.01, 0.1], [threshold - 0.01, 0.1], [threshold + 0.01, 0.99]])
    assert judge.recognised(likeness).tolist() == [True, False, False]


def test_the_labelled_pictures_are_whole_and_two_passes_agree():
    table, images = labels.labels(), labels.pictures()
    first, second = (table[table["labeller"] == k].sort_values("picture", ignore_index=True) for k in (1, 2))
    assert len(images) == len(first) == len(second) >= 240 and set(table["subject"]) == set(DEMO_SUBJECTS)
    after_rl = first[first["model"].str.endswith("+ddpo")]
    assert len(after_rl) >= 100 and set(after_rl["subject"]) == set(DEMO_SUBJECTS)
    for question, known in ANSWERS.items():
        if question in labels.QUESTIONS:
            assert set(table[question]) <= {*known, labels.UNCLEAR}
    assert all(share > 0.9 for share, _ in labels.agreement(first, second).values())
    assert sum(p.stat().st_size for p in labels.FOLDER.iterdir()) <= 1.5e6


def test_the_card_has_the_judges_agreement_with_the_labels(card):
    said = {row["name"]: (row["value"], row["n"]) for row in card["numbers"]}
    for name, value, _, n in labels.card_rows(Judge.load()):
        assert said[name] == (pytest.approx(value, abs=0.01), n), name  # another processor, another rounding


def test_agreement_counts_clear_answers_alone():
    first = pd.DataFrame({q: ["yes", "no", "yes", labels.UNCLEAR] for q in labels.QUESTIONS})
    second = pd.DataFrame({q: ["yes", "yes", labels.UNCLEAR, "no"] for q in labels.QUESTIONS})
    assert labels.agreement(first, second) == {q: (0.5, 2) for q in labels.QUESTIONS}


def test_no_pickle_is_shipped():
    assert {p.suffix for p in Path(WEIGHTS).rglob("*") if p.is_file()} <= {".safetensors", ".json", ".md", ".txt"}


def test_the_tokenizer_is_the_same_in_every_process():
    code = "from ibkit.pocket.build.tokenizer import *; print(learn_merges(vocabulary()))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert prints == {f"{learn_merges(vocabulary())}\n"}


def test_all_weights_read_one_tokenizer(tokenizer):
    shipped = {hash_file(path) for path in WEIGHTS.rglob("tokenizer.json")}
    assert len(shipped) == 1
    assert load_model("pocket").tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("seed", [1, 2])
def test_merges_by_hand(seed):
    assert learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
    words = ["tap", "top", "tip"]
    random.Random(seed).shuffle(words)
    assert learn_merges(words)[0] == ("a", "p</w>")  # all pairs are equally frequent: the alphabet decides


def test_shapewise_muon_takes_the_steps_of_pytorchs():
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (8, 5), (5, 8), (16, 16), (4, 36))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizers = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01), ShapewiseMuon(ours, lr=0.02, weight_decay=0.01)
    for _ in range(4):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bf16, summed in another order


def test_a_build_begins_with_what_fits_of_earlier_weights():
    old, new = torch.nn.Linear(3, 2), torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 4)})
    kept = new["b"].weight.detach().clone()
    start = {"a.weight": old.weight.detach(), "b.weight": torch.zeros(4, 9), "c.weight": torch.zeros(1)}
    begin_with(new, start)
    assert torch.equal(new["a"].weight, old.weight) and torch.equal(new["b"].weight, kept)
