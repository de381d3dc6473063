"""The real notebooks, in order, at the smallest budget: as the main job runs them, alone, and on a user's photos."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch

from ibkit.adapt import Adapted
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.device import generator
from ibkit.job import run as main_job
from ibkit.model.loading import load_model
from ibkit.model.text_to_image import use_quick_attention
from ibkit.runs import project_root, read_run
from tests.tiny import tiny_model

ROOT = project_root()


def small(personalize):
    """The smallest budget, with the preset's method of personalization."""
    settings = [f"{personalize}.{text}" for text in ("n_steps=3", "batch=2", "n_class_images=2")]
    settings += [f"ddpo.{text}" for text in ("n_epochs=2", "images_per_epoch=4", "sampler.n_steps=3")]
    words = [word for value in settings for word in ("--set", value)]
    return [*words, "--n-inference-steps", 3, "-p", "03_evaluate.n_images=2"]


def ibkit(*words, cwd=ROOT, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in variables.items()}
    return subprocess.run(
        [sys.executable, "-m", "ibkit", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def papermill(notebook, out, *words):
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / f"{notebook}.ipynb", out, "-k", "python3"]
    return subprocess.run(
        [*map(str, command), "--start-timeout", "300", *map(str, words)], cwd=out.parent, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder for runs below the checkout's ignored outputs, since the main job writes nowhere else."""
    folder = main_job.OUTPUTS / f"test-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_the_pocket(outputs):
    """The main job on the pocket model."""
    return ibkit("run", "--name", outputs.name, "--device", "cpu", *small("lora_dreambooth"))


def run_photos(outputs, tokenizer, folder):
    """The main job on a user's photos and a model of SD 1.x's format with random weights, twice: with the scorers of
    that scale, whose weights are out of reach here, and with the pocket's.
    """
    tiny_model(tokenizer).save_pipeline(folder / "model")
    (folder / "my dog").mkdir()
    for i, photo in enumerate(world_photos(demo_subject("dog"), 3)):
        photo.resize((300, 200)).save(folder / "my dog" / f"{i}.jpg")
    chain = ["--model", folder / "model", "--subject", folder / "my dog", "--class-noun", "dog", "--device", "cpu"]
    chain += [*small("dreambooth"), "--guidance", 1, "--eta", 0]
    chain += ["--prompts", "playing soccer", "-p", "03_evaluate.n_images=1"]  # as little as a first trial can ask for
    name = outputs.name
    offline = ibkit("run", "--name", f"{name}-offline", *chain, HF_HUB_OFFLINE=1, HF_HOME=folder / "cache")
    return offline, ibkit("run", "--name", f"{name}-photos", "--scorer-weights", "pocket", *chain)


@pytest.fixture(scope="module")
def jobs(outputs, tokenizer, tmp_path_factory):
    """Both, side by side: each is a chain of notebooks on one core."""
    with ThreadPoolExecutor(2) as pool:
        pocket = pool.submit(run_the_pocket, outputs)
        photos = pool.submit(run_photos, outputs, tokenizer, tmp_path_factory.mktemp("photos"))
    yield pocket.result(), photos.result()
    for suffix in ("offline", "photos"):
        shutil.rmtree(main_job.OUTPUTS / f"{outputs.name}-{suffix}", ignore_errors=True)


@pytest.fixture(scope="module")
def done(jobs):
    result, _ = jobs
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_the_main_job_runs_the_real_notebooks(done, outputs):
    scores = read_run(outputs / "03_evaluate").table("scores.csv")
    # 2 activities x 2 images x (base; DreamBooth with and without the identifier; RL likewise)
    pictures = scores[scores["arm"] != "real"]
    assert len(pictures) == 2 * 2 * (1 + 2 + 2) and len(scores) == len(pictures) + 5
    assert (
        pictures[["clip_t", "image_reward", "clip_i", "dino", "judge_activity", "judge_identity"]].notna().all().all()
    )
    report = (outputs / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 5 and "C4" in report
    assert "RL epochs 2/2" in done.stdout and "peak memory" in done.stdout and "open " in done.stdout


def test_no_cell_ends_with_a_path_or_shows_a_bar(done, outputs):
    executed = sorted(outputs.glob("0*.ipynb"))
    assert len(executed) == 3
    shown = [out for path in executed for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in shown]
    assert not [text for text in texts if "PosixPath(" in text or "Loading weights" in text or text == "True"]


def test_claims_read_the_run(done, outputs):
    result = ibkit("claims", outputs, "--json")
    claims = json.loads(result.stdout)
    assert [c["id"] for c in claims][:4] == ["C1", "C2", "C3", "C4"]
    assert set(claims[0]) >= {"id", "claim", "source", "value", "low", "high", "n", "seeds", "verdict"}


def test_a_finished_job_has_nothing_left_to_do(done, outputs):
    result = ibkit("run", "--resume", "--name", outputs.name)
    assert result.returncode == 0 and result.stdout.count("already done") == 3


def test_the_policy_starts_as_the_personalized_model(done, outputs):
    history = read_run(outputs / "02_rl_finetune").table("history.csv")
    assert history["ratio_first"].iloc[0] < 1e-6
    assert {"reward_identifier", "reward_class", "monitor", "judge_activity", "judge_identity"} <= set(history)


def test_the_adapter_loads_into_diffusers_own_pipeline(done, outputs):
    from diffusers import StableDiffusionPipeline

    result = ibkit("export", outputs / "02_rl_finetune", outputs / "exported")
    assert result.returncode == 0, result.stderr[-3000:]
    pipeline = StableDiffusionPipeline.from_pretrained(outputs / "exported")
    for name in ("lora_dreambooth", "ddpo"):
        pipeline.load_lora_weights(str(outputs / "exported" / name), adapter_name=name)
    pipeline.set_adapters(["lora_dreambooth", "ddpo"])
    theirs = load_model("pocket")
    theirs.unet = pipeline.unet
    use_quick_attention(theirs.unet, theirs.device)
    ours = Adapted.read(read_run(outputs / "02_rl_finetune")).build()
    x, t = torch.randn(1, *ours.latent_shape, generator=generator(0)), torch.tensor([500])
    torch.testing.assert_close(*(m.predict_noise(x, t, ["a sks cat dancing"]) for m in (ours, theirs)))
    again = ibkit("export", outputs / "02_rl_finetune", outputs / "exported")
    assert again.returncode == 2 and "is there already: name another folder" in again.stderr


def test_one_notebook_alone(done, outputs):
    run_in = ["-r", "run_in", outputs / "01_personalize", "-r", "run_out", outputs / "alone"]
    small = ["-y", "settings: {n_epochs: 1, images_per_epoch: 4, sampler.n_steps: 3}"]
    result = papermill("02_rl_finetune", outputs / "alone.ipynb", *run_in, *small, "-p", "processes", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    alone = read_run(outputs / "alone").table("history.csv")
    assert len(alone) == 1
    by_one = read_run(outputs / "02_rl_finetune").table("history.csv")
    assert alone["reward"][0] == pytest.approx(by_one["reward"][0], abs=1e-3)


@pytest.mark.slow
def test_where_the_words_look(jobs, outputs):
    """Of a pocket subject counted against the true mask; of photos shown alone."""
    for name, counted in ((outputs.name, True), (f"{outputs.name}-photos", False)):
        stage_1 = main_job.OUTPUTS / name / "01_personalize"
        words = ["-r", "run_in", stage_1, "-r", "run_out", outputs / f"maps-{counted}"]
        model = [] if counted else ["-r", "model", read_run(stage_1).parameters["model"]]
        result = papermill("04_attention_maps", outputs / "04.ipynb", *words, *model, "-p", "n_scenes", 1)
        assert result.returncode == 0, result.stderr[-2000:]
        run = read_run(outputs / f"maps-{counted}")
        drawn = {f"figures/{one}.png" for one in ("maps_over_time", "maps_by_layer", "before_and_after")}
        assert drawn <= set(run.outputs)
        assert ("overlap.csv" in run.outputs) == counted
    models = read_run(outputs / "maps-True").table("overlap.csv").groupby("model")["role"].agg(set)
    assert set(models.index) == {"base", "lora_dreambooth"}
    assert models["base"] == {"identifier", "class noun", "activity", "filler", "start mark"}


def test_the_tour(outputs, done):
    result = papermill("00_start_here", outputs / "00.ipynb", "-r", "run_out", outputs / "tour")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "figures/gallery.png" in read_run(outputs / "tour").outputs


def test_your_own_photos_on_a_local_folder_in_sd_format(jobs, outputs):
    _, (offline, result) = jobs
    assert offline.returncode == 2, offline.stderr[-3000:]
    assert "its official" in offline.stderr and "connect to the internet once" in offline.stderr
    assert result.returncode == 0, result.stdout + result.stderr
    run = main_job.OUTPUTS / f"{outputs.name}-photos"
    scores = read_run(run / "03_evaluate").table("scores.csv")
    sampler = read_run(run / "03_evaluate").manifest["metrics"]["sampler"]
    assert sampler == "DDIM, 3 steps, guidance 1, eta 0"
    assert set(scores["subject"]) == {"my dog"} and scores["dino"].notna().all()
    measured = read_run(run / "01_personalize").table("measured.csv")  # nobody knows the truth: both axes by scorers
    assert set(measured) == {"model", "monitor", "clip_t", "image_reward"} and measured.notna().all().all()
    assert "judge_activity" not in scores or scores["judge_activity"].isna().all()
    assert json.loads(ibkit("claims", run, "--json").stdout)


def test_the_subject_of_the_run_is_the_demonstration_cat(done, outputs):
    assert PersonalizedSubject.read(read_run(outputs / "01_personalize")).world == demo_subject("cat")
