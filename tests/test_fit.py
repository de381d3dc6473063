"""Stable Diffusion v1.5 on GPUs of several sizes, counted on this machine, and what `ibkit plan` and `run` do with it.

Counting half a dozen training steps takes half a minute; each is counted once, for all tests here.
"""

import json
from argparse import ArgumentParser

import pytest
import torch

from ibkit.cli import main
from ibkit.errors import ArtifactError
from ibkit.fields import fill
from ibkit.job import check, costs, fit, memory
from ibkit.job import run as main_job
from ibkit.job.memory import WEIGHTS, Counter, autoencoder, forward, step
from ibkit.job.stages import defaults, given, plan
from ibkit.methods.records import METHODS
from ibkit.model.single_file import SD15_VAE
from ibkit.presets import SD15
from ibkit.runs import project_root
from ibkit.train.resources import Resources

GIB = 2**30
WORDS = ("lora_dreambooth", "textual_inversion", "neti")


def stages(*words):
    parser = ArgumentParser()
    main_job.add_settings(parser)
    return plan(defaults() | given(parser.parse_args(["--model", "sd15", *words])), main_job.OUTPUTS / "plan")


FULL, TUNE, EVALUATE = stages()
LORA, _, _ = stages("--personalize", "lora_dreambooth")


def test_storages_and_operations_by_hand():
    with Counter(torch.nn.Identity()) as counter:
        x = torch.ones(100)
        y = x + 1
        del x
        z = y.view(10, 10) @ torch.ones(10, 10)
    assert counter.peak == 3 * 400 and counter.now == 2 * 400  # y, a matrix and the product; then y and z
    assert counter.flop == 2 * 10 * 10 * 10
    del y, z
    assert counter.now == 0


def test_the_count_is_what_autograd_keeps(tiny):
    """Of the tiny model, with true tensors."""
    tiny.unet.requires_grad_(True)
    x, t = torch.randn(2, *tiny.latent_shape), torch.tensor([10, 900])
    weights = {p.untyped_storage()._cdata for p in tiny.unet.parameters()}
    tiny.encode_text(["a cat"])
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Counter(tiny.unet) as counter:
        loss = tiny.predict_noise(x, t, ["a cat"] * 2).square().mean()
    assert loss.requires_grad and counter.now == pytest.approx(sum(kept.values()), rel=0.01)


def test_counts_at_stable_diffusions_shape():
    """Against numbers that were known before: of the U-Net 400 G multiplications and additions a row, 3.2 GiB, AdamW
    6.4; a training of the whole U-Net 20 to 21 GiB with a second one; RL about 18 and 10 at micro-batches of 4 and 1.
    """
    assert forward(2).flop / 2e9 == pytest.approx(2 * 401, rel=0.01)
    assert 4 * WEIGHTS["unet"] / GIB == pytest.approx(3.20, abs=0.01)
    assert autoencoder("encode").nbytes / GIB == pytest.approx(0.63, abs=0.01)
    assert autoencoder("decode").flop / (forward(2).flop / 2) == pytest.approx(3.1, abs=0.1)  # rows
    with_the_base_beside = fit.fit(FULL).gib + 4 * WEIGHTS["unet"] / GIB
    assert with_the_base_beside == pytest.approx(20.5, rel=0.25)
    assert fit.fit(TUNE).gib == pytest.approx(18, rel=0.25)
    assert fit.fit(stages("--set", "ddpo.micro_batch=1")[1]).gib == pytest.approx(10, rel=0.25)


@pytest.mark.slow
def test_a_row_takes_the_same_between_the_rows_counted():
    assert step("lora", {"rank": 4}, 4).nbytes == pytest.approx(
        memory._step("lora", (("rank", 4),), 4, False, False).nbytes, rel=0.01
    )


def test_checkpointing_and_bf16_take_less():
    plain, bf16 = step("lora", {"rank": 4}, 2), step("lora", {"rank": 4}, 2, frozen_bf16=True)
    assert bf16.weights == pytest.approx(plain.weights / 2, rel=0.01) and bf16.nbytes < plain.nbytes - 0.9 * GIB
    again = step("unet", {}, 2, checkpointing=True)
    assert again.nbytes < step("unet", {}, 2).nbytes - 0.4 * GIB and again.flop > 1.2 * step("unet", {}, 2).flop


@pytest.mark.parametrize(
    "card, full, lora, tune",
    [
        (8, None, ["frozen_bf16"], ["frozen_bf16", "offload", "micro_batch"]),
        (12, ["offload", "adam_8bit"], [], ["frozen_bf16", "offload"]),
        (16, [], [], ["frozen_bf16"]),
        (24, [], [], []),
        (40, [], [], []),
        (80, [], [], []),
    ],
)
def test_the_ladder(card, full, lora, tune):
    for stage, knobs in ((FULL, full), (LORA, lora), (TUNE, tune), (EVALUATE, [])):
        found = fit.fit(stage, card)
        assert found.fits == (knobs is not None)
        if knobs is not None:
            assert [name.removeprefix("resources.") for name in found.knobs] == knobs
            assert found.gib <= fit.usable_gib(card) < card
            method = stage.parameters.get("method")
            assert not method or fill(SD15.settings(method), found.knobs, method)  # settings that a run takes


def test_the_readme_has_the_ladder():
    """Of the main job's methods; counting all of them takes minutes."""
    assert_in_readme(fit.ladder([FULL, LORA, TUNE, EVALUATE]))


@pytest.mark.slow
def test_the_readme_has_the_whole_ladder(capsys):
    assert main(["plan", "--ladder"]) == 0
    assert_in_readme(capsys.readouterr().out)


def assert_in_readme(table):
    readme = (project_root() / "README.md").read_text().splitlines()
    assert not [line for line in table.strip().splitlines() if line not in readme]


@pytest.mark.slow
def test_a_learned_word_takes_the_text_encoders_graph_too():
    """With a mapper, for each of 16 layers."""
    lora, word, mapper = (step(*METHODS[name].delta(SD15.settings(name)), 2) for name in WORDS)
    assert word.trained == 768 and mapper.trained == 563_616
    assert word.flop < lora.flop < mapper.flop
    assert mapper.nbytes > word.nbytes + GIB


def test_what_the_user_set_is_left_alone():
    tune = stages("--set", "ddpo.micro_batch=1", "--set", "ddpo.resources.offload=False")[1]
    assert fit.fit(tune, 8).knobs == {"resources.frozen_bf16": True}


@pytest.fixture
def bitsandbytes(monkeypatch):
    """As if it were installed, or not: a function that says so."""

    def installed(is_there):
        monkeypatch.setattr("ibkit.train.resources.find_spec", lambda name: name if is_there else None)

    installed(True)
    return installed


def planned(capsys, *words):
    assert main(["plan", "--model", "sd15", "--device", "cpu", *words]) == 0
    return capsys.readouterr().out


def test_plan_for_a_gpu_that_is_not_here(capsys, bitsandbytes):
    out = planned(capsys, "--gpu", "12")
    assert "a GPU of 12 GiB" in out and "speeds assumed, not measured" in out and "disk: 12.8 GiB" in out
    for word in ("dreambooth.resources.adam_8bit=True", "ddpo.resources.frozen_bf16=True"):
        assert f"--set {word}" in out
    assert main(["plan", "--device", "cpu", "--gpu", "8"]) == 2
    assert "add --model sd15" in capsys.readouterr().err


def test_where_dreambooth_does_not_fit_lora_takes_its_place(capsys, bitsandbytes):
    result = json.loads(planned(capsys, "--gpu", "8", "--json"))
    assert result["stages"][0]["peak_gib"] == pytest.approx(fit.fit(LORA, 8).gib)
    assert any("--personalize lora_dreambooth" in note for note in result["notes"])
    bitsandbytes(False)
    out = planned(capsys, "--gpu", "12")
    assert "(it would fit with bitsandbytes: pip install 'ibkit[low-memory]'): lora_dreambooth takes its place" in out
    out = planned(capsys, "--gpu", "12", "--personalize", "dreambooth")  # the user's own word
    assert "choose a method that takes less, or a larger GPU" in out and "lora" not in out


def test_plan_says_that_a_cpu_is_not_for_it(capsys, monkeypatch):
    """At a speed of 80 GFLOP/s; that of this machine is timed in tests/test_plan.py."""
    timed = costs.Costs(0.01, 0.02, 0.03, 0.01, 5.0, 8e8, "timed")
    monkeypatch.setattr(costs, "_pocket", lambda device: timed)
    assert main(["plan", "--model", "sd15", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "scaled from the pocket model by operations, 1004 times as many a row" in out and "Not for a CPU" in out
    assert "(0.08 TFLOP/s)" in out


def test_a_run_on_a_gpu_sets_what_it_needs(monkeypatch, capsys, bitsandbytes):
    parser = ArgumentParser()
    main_job.add_settings(parser)
    settings = defaults() | given(parser.parse_args(["--model", "sd15", "--device", "cpu"]))
    monkeypatch.setattr(fit, "card_gib", lambda device: 12.0)
    monkeypatch.setattr(main_job, "require_disk", lambda folder, nbytes: None)
    added = main_job._fitted(settings, main_job.OUTPUTS / "run")
    assert added == {
        "set.dreambooth.resources.offload": True,
        "set.dreambooth.resources.adam_8bit": True,
        "set.ddpo.resources.frozen_bf16": True,
        "set.ddpo.resources.offload": True,
    }
    assert plan(settings | added, main_job.OUTPUTS)[0].parameters["settings"] == {
        "resources.offload": True, "resources.adam_8bit": True,
    }  # fmt: skip
    assert "to fit on 12.0 GiB: ddpo.resources.offload = True" in capsys.readouterr().out
    monkeypatch.setattr(fit, "card_gib", lambda device: None)
    assert main_job._fitted(settings, main_job.OUTPUTS / "run") == {}
    monkeypatch.undo()
    monkeypatch.setattr("ibkit.runs.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 20 * GIB}))
    with pytest.raises(ArtifactError, match=r"is full: 22\d{3} MiB are to be written and 20480 MiB are free"):
        main_job._fitted(settings, main_job.OUTPUTS / "run")


def test_the_disk_of_a_job():
    moments = 2 * 4 * WEIGHTS["unet"]
    adapter = 4 * step("lora", {"rank": 4}, 2).trained
    assert fit.disk_bytes([FULL, TUNE]) == 4 * WEIGHTS["unet"] + adapter + 2 * (4 * WEIGHTS["unet"] + moments)
    assert f"takes {fit.disk_bytes([FULL]) / GIB:.1f} GiB of the disk" in (project_root() / "README.md").read_text()
    of_models = 4 * sum(WEIGHTS[name] for name in ("unet", "vae", "text_encoder", "image_reward", "clip", "dino"))
    assert fit.disk_bytes([FULL, TUNE]) + of_models < check.SD15_DISK_GIB * GIB


def test_check_asks_for_the_least_gpu_of_the_ladder():
    assert check.SD15_GPU_GIB == fit.LADDER_GIB[0] and fit.fit(LORA, check.SD15_GPU_GIB).fits


def test_resources_that_were_set_count(bitsandbytes):
    with_it = stages("--set", "dreambooth.resources.adam_8bit=True", "--set", "dreambooth.resources.offload=True")[0]
    less = fit.fit(FULL).phases["training"] - fit.fit(with_it).phases["training"]
    assert less == 6 * WEIGHTS["unet"] + fit.PARTS
    average = stages("--set", "dreambooth.ema_decay=0.9")[0]
    assert fit.fit(average).phases["training"] - fit.fit(FULL).phases["training"] == 4 * WEIGHTS["unet"]
    batch = stages("--set", "dreambooth.batch=2", "--set", "dreambooth.micro_batch=1")[0]  # gradients wait
    assert fit.fit(batch).phases["training"] - fit.fit(FULL).phases["training"] == 4 * WEIGHTS["unet"]


def test_the_numbers_of_weights_are_those_of_the_architectures():
    import open_clip
    import transformers
    from diffusers import AutoencoderKL

    from ibkit.scorers.image_reward import ImageRewardModel, RewardConfig

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    shared = {"num_attention_heads": 16, "projection_dim": 1024}
    of_text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | shared
    of_image = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14} | shared
    with torch.device("meta"):
        found = {
            "unet": memory.sd15_unet(),
            "vae": AutoencoderKL(**SD15_VAE),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
            "image_reward": ImageRewardModel(RewardConfig()),
            "clip": open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, device="meta"),
            "dino": transformers.ViTModel(
                transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
                add_pooling_layer=False,
            ),
            "pick_score": transformers.CLIPModel(
                transformers.CLIPConfig(text_config=of_text, vision_config=of_image, projection_dim=1024)
            ),
            "align": transformers.AlignModel(transformers.AlignConfig()),
        }
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in found.items()} == WEIGHTS
    # the largest scorers' vision towers at their batch of 32: what scoring takes beside the weights
    for tower, px in ((found["image_reward"].vision, 224), (found["pick_score"].vision_model, 224)):
        tower.eval().requires_grad_(False)
        with memory.FakeTensorMode():
            memory.fake(tower)
            with torch.no_grad(), Counter(tower) as counter:
                tower(torch.empty(32, 3, px, px))
            assert counter.peak < fit.SCORING_BYTES
            with Counter(tower) as counter:  # and of one picture, with its gradient
                of_first(tower(torch.empty(1, 3, px, px, requires_grad=True))).sum().backward()
            assert counter.peak < fit.SCORING_BYTES


def of_first(made):
    return made if isinstance(made, torch.Tensor) else made[0]


def test_a_rewards_gradient_goes_through_the_decoder():
    """One picture's graph at a time, whatever the micro-batch; it is on the GPU with the U-Net's."""
    _, draft, _ = stages("--tune", "draft")
    whole, of_one = fit.fit(draft).phases, memory.autoencoder("decode", gradient=True)
    assert of_one.nbytes > 5 * memory.autoencoder("decode").nbytes
    assert whole["a gradient step"] > whole["drawing an epoch"] + of_one.nbytes
    assert whole["a gradient step"] > 21 * GIB


def test_methods_without_resources_are_counted_as_they_are():
    assert fit._candidates("dreambooth", object(), set(), True) == [{}]
    assert Resources().moment_bytes == 8 and Resources(adam_8bit=True).moment_bytes == 2
    assert all(hasattr(METHODS[name].settings(), "resources") for name in ("dreambooth", "lora_dreambooth", "ddpo"))
