"""The shipped pocket weights: the files of the card, the recipe of this code, and diffusers' pipeline loads them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibkit.models import POCKET_PIPELINE, load_model
from ibkit.pocket.build.autoencoder import new_autoencoder
from ibkit.pocket.build.tokenizer import learn_merges
from ibkit.pocket.build.unet import TextToLatent, new_scheduler
from ibkit.pocket.draw import render
from ibkit.pocket.world import (
    ACTIVITIES,
    DEMO_SUBJECTS,
    IDENTIFIERS,
    NO_ACTIVITY,
    activities_of,
    sample_scene,
    vocabulary,
)
from ibkit.runs import hash_file
from ibkit.sample import Sampler, sample
from ibkit.scorers import make_scorer
from ibkit.scorers.judge import Judge

WEIGHTS = POCKET_PIPELINE.parent


@pytest.fixture(scope="module")
def card():
    return json.loads((WEIGHTS / "card.json").read_text())


def test_every_file_is_the_one_on_the_card(card):
    files = {p.relative_to(WEIGHTS).as_posix(): p for p in WEIGHTS.rglob("*") if p.is_file()}
    assert files.keys() - card["files"].keys() == {"card.json", "MODEL_CARD.md"}
    for name, entry in card["files"].items():
        assert hash_file(files[name]) == entry["sha256"], name
    assert sum(p.stat().st_size for p in files.values()) <= 25e6


def test_the_card_says_what_was_reached(card):
    for row in card["numbers"]:
        assert row["n"] >= 90
        assert row["reached"] == (row["target"] is None or row["value"] >= row["target"]), row["name"]
    text = (WEIGHTS / "MODEL_CARD.md").read_text()
    assert text.count("short of the target") == sum(not row["reached"] for row in card["numbers"])


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
    assert set(accuracy) == {"class", "activity", "place", "accessory", "identity"}
    assert "renders" in accuracy["activity"] and accuracy["activity"]["n"] >= 400
    assert set(ACTIVITIES) == {a for noun in DEMO_SUBJECTS for a in activities_of(noun)}


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
