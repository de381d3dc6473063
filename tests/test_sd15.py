"""Stable Diffusion v1.5's true shape, random weights: the whole job at few pixels; parity with diffusers at 512 px.

Minutes on two cores, some 12 GiB of memory and 5 GB of disk below the temporary folder: set IBKIT_TEST_SLOW=1.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from ibkit.adapt import Adapted
from ibkit.data.subject import demo_subject, world_photos
from ibkit.device import generator
from ibkit.job import run as main_job
from ibkit.model import single_file
from ibkit.model.loading import load_model
from ibkit.model.sample import Sampler, sample_latents
from ibkit.runs import project_root, read_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stable Diffusion v1.5's folder with random weights. In fp32 they are mapped from the file and not copied, so that
    the models of a notebook share them.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**single_file.SD15_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**single_file.SD15_TEXT)),
            tokenizer=single_file.clip_tokenizer(),
            unet=UNet2DConditionModel(**single_file.SD15_UNET),
            scheduler=DDIMScheduler(**single_file.SD15_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    place = tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(place)
    return place


def set_size(folder, px):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": px // 8}))


def test_the_true_shape_runs_to_its_report(folder, tmp_path):
    set_size(folder, 64)
    (tmp_path / "dog").mkdir()
    for i, photo in enumerate(world_photos(demo_subject("dog"), 3)):
        photo.resize((300, 200)).save(tmp_path / "dog" / f"{i}.jpg")
    name = f"test-sd15-{os.getpid()}"
    words = ["--model", folder, "--subject", tmp_path / "dog", "--class-noun", "dog", "--prompts", "playing soccer"]
    words += ["--n-inference-steps", 1, "--guidance", 1, "--scorer-weights", "pocket", "--device", "cpu"]
    words += ["--personalize", "lora_dreambooth", "-p", "03_evaluate.n_images=1"]
    for setting in ("n_steps=1", "batch=1", "n_class_images=1"):
        words += ["--set", f"lora_dreambooth.{setting}"]
    for setting in ("n_epochs=1", "images_per_epoch=2", "batch=2", "sampler.n_steps=2", "sampler.guidance=1"):
        words += ["--set", f"ddpo.{setting}"]
    command = [sys.executable, "-m", "ibkit", "run", "--name", name, *map(str, words)]
    run = main_job.OUTPUTS / name
    try:
        done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        history = read_run(run / "02_rl_finetune").table("history.csv")
        assert history["ratio_first"].iloc[0] < 1e-5
        scores = read_run(run / "03_evaluate").table("scores.csv")
        assert set(scores["arm"]) == {"base", "lora_dreambooth", "lora_dreambooth+ddpo", "real"}
        adapted = Adapted.read(read_run(run / "02_rl_finetune"))
        assert [delta.kind for delta in adapted.deltas] == ["lora", "lora"]
        assert "data:image/png;base64," in (run / "report.html").read_text()
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_at_512_px_a_guided_sample_is_diffusers_own(folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    set_size(folder, 512)
    prompt, sampler = "a sks dog playing soccer", Sampler(2, 7.5, 0.0)
    model = load_model(str(folder))
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964 and model.image_px == 512
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    x, t = torch.randn(1, *model.latent_shape, generator=generator(5, "sample")), torch.tensor([500])
    with torch.no_grad():
        text = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        theirs = pipeline.unet(x, t, encoder_hidden_states=text).sample
        assert torch.equal(model.predict_noise(x, t, [prompt]), theirs)
    ours = sample_latents(model, [prompt], [5], sampler)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "eta": 0.0, "output_type": "latent"}
    theirs = pipeline(prompt, latents=x, height=512, width=512, **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        pixels = pipeline.vae.decode(ours / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(model.decode_pixels(ours), pixels.clamp(-1, 1))
