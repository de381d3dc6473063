"""DreamBench end to end: the published photos, its prompts of both kinds, and scorers of the official architectures.

The model is tiny and all weights are random, so that the numbers mean nothing; what is tested is that they come.
"""

import os
import shutil
import string
import subprocess
import sys

import pytest
import torch

from ibkit.data.dreambench import read
from ibkit.data.prompts import make_prompt
from ibkit.job import run as main_job
from ibkit.model.single_file import clip_tokenizer
from ibkit.runs import project_root, read_run
from tests.test_photos import DREAMBENCH
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the published photos in ../shared are not here"),
]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """CLIP ViT-B/32, DINO ViT-S/16 and ImageReward (ViT-L, 447 M weights) with random weights, as a weights folder."""
    import json

    import open_clip
    from safetensors.torch import save_file
    from transformers import BertTokenizer, ViTConfig, ViTModel

    from ibkit.scorers.image_reward import ImageRewardModel, RewardConfig

    place = tmp_path_factory.mktemp("scorers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eye = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
        ViTModel(eye, add_pooling_layer=False).save_pretrained(place / "dino")
        config = open_clip.get_model_config("ViT-B-32-quickgelu")
        (place / "clip").mkdir()
        save_file(open_clip.CLIP(**config).state_dict(), place / "clip" / "model.safetensors")
        preprocess = {"interpolation": "bicubic"}
        described = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
        (place / "clip" / "open_clip_config.json").write_text(described)
        clip_tokenizer().save_pretrained(place / "clip")
        ImageRewardModel(RewardConfig()).save_pretrained(place / "image_reward")
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words += [f"[unused{i}]" for i in range(RewardConfig().tokenizer_size - len(words))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(place / "image_reward")
    return place


@pytest.mark.parametrize(
    ("subject", "noun", "live", "words"),
    [
        ("dog6", "dog", True, ["--tune", "ddpo"]),
        ("vase", "vase", False, ["--tune", "none", "-p", "03_evaluate.scorers=['clip_t', 'clip_i', 'dino']"]),
    ],
)
def test_a_subject_runs_to_its_tables(scorers, tmp_path, subject, noun, live, words):
    tiny_model(clip_tokenizer()).save_pipeline(tmp_path / "model")
    name = f"test-dreambench-{subject}-{os.getpid()}"
    chain = ["--model", tmp_path / "model", "--scorer-weights", scorers, "--protocol", "dreambench", "--device", "cpu"]
    chain += ["--subject", DREAMBENCH / subject, "--n-inference-steps", 2, "-p", "03_evaluate.n_images=1", *words]
    settings = ["dreambooth.n_steps=2", "dreambooth.batch=2", "dreambooth.n_class_images=2"]
    if "ddpo" in words:
        settings += ["ddpo.n_epochs=1", "ddpo.images_per_epoch=4", "ddpo.batch=4", "ddpo.sampler.n_steps=2"]
    chain += [word for setting in settings for word in ("--set", setting)]
    run = main_job.OUTPUTS / name
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ibkit", "run", "--name", name, *map(str, chain)],
            cwd=project_root(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        evaluation, bench = read_run(run / "03_evaluate"), read(DREAMBENCH)
        scores = evaluation.table("scores.csv")
        pictures = scores[scores["arm"] != "real"]
        templates = bench.live_prompts if live else bench.object_prompts
        for identifier, part in pictures.groupby("identifier"):
            expected = {make_prompt(template, noun, "sks" if identifier else "").text for template in templates}
            assert set(part["prompt"]) == expected and len(expected) == 25
        arms = ["base", "dreambooth", "dreambooth+ddpo"][: 3 if "ddpo" in words else 2]
        assert set(pictures["arm"]) == set(arms) and set(scores["class_noun"]) == {noun}
        metrics = {"clip_t", "clip_i", "dino"} | ({"image_reward", "subject_score"} if "ddpo" in words else set())
        assert pictures[sorted(metrics)].notna().all().all()
        assert len(scores[scores["arm"] == "real"]) == len(next(s for s in bench.subjects if s.name == subject).photos)
        table = evaluation.path("tables/fidelity.md").read_text()
        assert all(f"{label} |" in table for label in ("Base model", "DreamBooth", "Real photos"))
        if "ddpo" in words:
            assert set(pictures["seen"].dropna()) == {False}  # RL trains on none of the benchmark's prompts
        assert (run / "report.html").is_file()
    finally:
        shutil.rmtree(run, ignore_errors=True)
