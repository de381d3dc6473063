"""The model bundle: prompts are never cut silently, adapters travel, damaged folders are refused in one sentence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ibkit.adapt import attach
from ibkit.data.prompts import check_identifier, make_prompt, training_prompts
from ibkit.device import generator
from ibkit.errors import ModelError, ParameterError
from ibkit.methods.engine.rollout import rollout
from ibkit.model.loading import load_model
from ibkit.model.sample import Sampler, sample, sample_latents
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from tests.tiny import tiny_model


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pipeline(tmp_path / "model")
    return tmp_path / "model"


def noise_of(model):
    g = generator(0, "probe")
    return model.guided_noise(
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([1, 500]),
        ["a cat", "a sks cat dancing"],
        3.0,
    )


def test_a_saved_model_loads_here_and_in_diffusers(tiny, folder):
    from diffusers import StableDiffusionPipeline

    loaded = load_model(str(folder))
    assert torch.equal(noise_of(tiny), noise_of(loaded))
    assert (loaded.latent_shape, loaded.image_px) == ((4, 8, 8), 16)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline("a cat", num_inference_steps=2, height=16, width=16, output_type="np").images.shape == (
        1,
        16,
        16,
        3,
    )


def of_weights(weight: torch.Tensor) -> TextToImage:
    """A model whose U-Net is one layer of these weights."""
    unet, nothing = torch.nn.Linear(*reversed(weight.shape), bias=False), torch.nn.Identity()
    unet.weight.data = weight
    return TextToImage("layer", unet, nothing, nothing, None, None, torch.device("cpu"))


def test_the_fingerprint_depends_on_every_weight_and_on_nothing_else():
    weight = torch.randn(400, 500, generator=generator(0))
    before, fingerprints = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fingerprints.append(model_fingerprint(of_weights(weight.clone())))
    finally:
        torch.set_num_threads(before)
    assert fingerprints[0] == fingerprints[1]
    changed, swapped = weight.clone(), weight.clone()
    changed[7, 7] = torch.nextafter(changed[7, 7], torch.tensor(9.0))
    swapped.view(-1)[[3, 1000]] = swapped.view(-1)[[1000, 3]]  # 997 places apart
    others = (changed, swapped, weight.view(500, 400), weight.double())
    assert len({fingerprints[0], *(model_fingerprint(of_weights(other)) for other in others)}) == 5


@pytest.mark.parametrize("sample_size, batches", [(32, [32, 8]), (256, [1] * 40)])
def test_large_pictures_are_decoded_one_at_a_time(tiny, monkeypatch, sample_size, batches):
    seen = []

    def decode(latents):
        seen.append(len(latents))
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 2, 2))

    monkeypatch.setattr(tiny.vae, "decode", decode)
    tiny.unet.register_to_config(sample_size=sample_size)  # twice as many pixels
    assert len(tiny.decode(torch.zeros(40, 4, 1, 1))) == 40 and seen == batches


@pytest.mark.parametrize("px, batches", [(64, [10]), (512, [1] * 10)])
def test_large_pictures_are_encoded_one_at_a_time(tiny, monkeypatch, px, batches):
    """Stable Diffusion's autoencoder takes 0.63 GiB a picture: all 200 class pictures at once fit no GPU."""
    seen = []

    def encode(pixels):  # a picture's latent does not depend on the others, to the bit
        seen.append(len(pixels))
        mean = pixels[:, :, :: px // 8, :: px // 8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs() + 1))

    monkeypatch.setattr(tiny.vae, "encode", encode)
    tiny.unet.register_to_config(sample_size=px // 2)  # twice as many pixels
    drawn = torch.randint(256, (10, px, px, 3), dtype=torch.uint8, generator=generator(0))
    pictures = [Image.fromarray(p) for p in drawn.numpy()]
    mean, sampled = tiny.encode_images(pictures), tiny.encode_images(pictures, generator(1))
    assert seen == batches * 2
    assert torch.equal(mean, torch.cat([tiny.encode_images([picture]) for picture in pictures]))
    scale = tiny.vae.config.scaling_factor
    noise = torch.randn(mean.shape, generator=generator(1))
    torch.testing.assert_close(sampled, mean + ((mean / scale).abs() + 1) * noise * scale)


def test_pictures_encoded_in_batches_are_those_encoded_alone(tiny, monkeypatch):
    monkeypatch.setattr("ibkit.model.text_to_image.pictures_at_once", lambda image_px: 2)
    drawn = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8, generator=generator(0))
    pictures = [Image.fromarray(p) for p in drawn.numpy()]
    alone = torch.cat([tiny.encode_images([picture]) for picture in pictures])
    torch.testing.assert_close(tiny.encode_images(pictures), alone, rtol=1e-5, atol=1e-5)  # rounding of another batch


@pytest.mark.parametrize("largest, batches", [(32, [32, 8]), (4, [4] * 10)])
def test_pictures_are_drawn_as_many_at_a_time_as_suits_their_size(tiny, monkeypatch, largest, batches):
    seen, sizes = [], []

    def guided_noise(x, *rest):
        seen.append(len(x))
        return torch.zeros_like(x)

    def size(image_px):
        sizes.append(image_px)
        return largest

    monkeypatch.setattr(tiny, "guided_noise", guided_noise)
    monkeypatch.setattr("ibkit.model.sample.default_batch", size)
    monkeypatch.setattr("ibkit.methods.engine.rollout.default_batch", size)
    prompts, sampler = ["a cat"] * 40, Sampler(2, 3.0, 1.0)
    sample_latents(tiny, prompts, list(range(40)), sampler)
    assert seen[::2] == seen[1::2] == batches  # two steps
    seen.clear()
    rollout(tiny, prompts, sampler.schedule(tiny), 3.0, [generator(0, i) for i in range(40)])
    assert seen[::2] == seen[1::2] == batches and set(sizes) == {tiny.image_px}


def test_the_policy_is_kept_in_fp32(tiny):
    """Also where the U-Net computes in bf16: half precision would move log-probabilities far beyond the clip range."""
    tiny.autocast = torch.bfloat16
    trainable = list(attach(tiny, "lora", "ddpo", {"rank": 2}, generator(0, "lora")).values())
    schedule = Sampler(4, 3.0, 1.0).schedule(tiny)
    made = rollout(tiny, ["a cat"] * 2, schedule, 3.0, [generator(0, i) for i in range(2)])
    assert {v.dtype for v in (*trainable, made.latents, made.log_probs)} == {torch.float32}
    assert not torch.equal(made.latents, made.latents.bfloat16().float())


def test_a_scheduler_that_clips_is_loaded_without_clipping(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": True}))
    assert load_model(str(folder)).scheduler.config.clip_sample is False


def test_prompts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ParameterError, match=r"has 30 tokens and tiny reads 22: shorten it by 8"):
        tiny.check_prompt("cat " * 30)
    with pytest.raises(ParameterError, match="empty"):
        tiny.check_prompt("  ")


def test_the_same_seed_gives_the_same_picture_whatever_the_batch(tiny):
    prompts, seeds, sampler = ["a cat", "a dog", "a cup"], [5, 6, 7], Sampler(3, 2.0)
    together = sample(tiny, prompts, seeds, sampler)
    alone = [sample(tiny, [p], [s], sampler)[0] for p, s in zip(prompts, seeds, strict=True)]
    differences = [
        max(abs(a - b) for a, b in zip(x.tobytes(), y.tobytes(), strict=True))
        for x, y in zip(together, alone, strict=True)
    ]
    assert max(differences) <= 1  # rounding of another batch shape


def test_missing_and_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="nowhere' is not there: give 'pocket', 'sd15', a name on the hub"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no unet/config.json"):
        load_model(str(folder / "unet"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(ModelError, match="the unet in .* has no weights"):
        load_model(str(folder))


def rewrite(folder, part, change):
    """Change the weights of a part, a dict of tensors by name."""
    (path,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_three(state):
    return {key: state[key] for key in sorted(state)[3:]}


def one_replaced(value):
    """Replace the first weight that has several dimensions by `value` of it."""

    def change(state):
        key = next(k for k in sorted(state) if state[k].ndim > 1)
        return state | {key: value(state[key])}

    return change


def one_not_finite(bad):
    def value(weight):
        weight = weight.clone()
        weight.view(-1)[-1] = bad
        return weight

    return one_replaced(value)


def renamed(prefix, every=1):
    """All names with a prefix, or one of so many."""
    return lambda state: {prefix * (i % every == 0) + key: state[key] for i, key in enumerate(state)}


def with_adapter(state):
    """As PEFT names the weights of layers that it wraps."""
    name, weight = next((name, weight) for name, weight in state.items() if name.endswith(".weight"))
    rest = {key: state[key] for key in state if key != name}
    return rest | {name.replace(".weight", ".base_layer.weight"): weight}


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(
    "change, says",
    [
        (without_three, r"3 missing \(first [a-z]\w*\.[\w.]+\); restore or download"),
        (lambda state: state | {"ears.weight": torch.ones(2)}, r"1 not of this model \(first ears.weight\)"),
        (renamed("encoder_"), r"\d+ missing \(first .*, \d+ not of this model \(first encoder_"),
        (
            lambda state: without_three(renamed("module.")(state)),
            r"\d+ missing .*, \d+ not of this model \(first module",
        ),
        (lambda state: renamed("module.")(one_not_finite(torch.nan)(state)), r"1 not finite \(first .*weight\)"),
        (lambda state: renamed("module.")(one_replaced(lambda w: w[:-1].clone())(state)), r"1 of another shape"),
        (with_adapter, r"was saved with an adapter \(LoRA\) attached \(first .*\.base_layer\.weight\): take it off"),
        (one_replaced(lambda weight: weight[:-1].clone()), r"1 of another shape than its config says \(first .*weight"),
        (one_not_finite(torch.nan), r"1 not finite \(first .*weight\)"),
        (one_not_finite(-torch.inf), r"1 not finite \(first .*weight\)"),
        (lambda state: without_three(one_not_finite(torch.nan)(state)), r"3 missing"),
    ],
)
def test_weights_that_would_be_random_or_not_finite_are_refused(folder, part, change, says):
    rewrite(folder, part, change)
    with pytest.raises(ModelError, match=rf"^the {part} in .*{says}") as refused:
        load_model(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "text_encoder."])
def test_what_a_wrapper_put_before_the_names_is_left_out_and_said(tiny, folder, part, every, prefix):
    rewrite(folder, part, renamed(prefix, every))
    with pytest.warns(
        UserWarning, match=rf"^the {part} in .* weights begin with '{prefix}', which a wrapper put there"
    ):
        loaded = load_model(str(folder))
    assert model_fingerprint(loaded) == model_fingerprint(tiny)


OLD_ATTENTION = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def as_in_2022(state):
    """The autoencoder's attention as Stable Diffusion 1.x was published."""
    for new, old in OLD_ATTENTION.items():
        assert any(new in key for key in state)
        state = {key.replace(new, old): weight for key, weight in state.items()}
    return state


@pytest.mark.parametrize(
    "part, change",
    [
        ("text_encoder", lambda state: {f"text_model.{k.removeprefix('text_model.')}": w for k, w in state.items()}),
        ("text_encoder", lambda state: {k.removeprefix("text_model."): w for k, w in state.items()}),
        ("text_encoder", lambda state: state | {"text_model.embeddings.position_ids": torch.arange(24)[None]}),
        ("text_encoder", lambda state: state | {"text_projection.weight": torch.ones(16, 16)}),
        ("text_encoder", lambda state: state | {"logit_scale": torch.ones(1), "vision_model.x": torch.ones(1)}),
        ("vae", as_in_2022),
    ],
)
def test_harmless_differences_of_real_folders_load(tiny, folder, part, change):
    rewrite(folder, part, change)
    assert model_fingerprint(load_model(str(folder))) == model_fingerprint(tiny)


def test_finite_weights_whose_sum_overflows_load(folder):
    rewrite(folder, "unet", one_replaced(lambda weight: torch.full_like(weight, 3e38)))
    load_model(str(folder))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_file_that_was_cut_off_is_refused(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{part}.*(is damaged|cannot be read)|cannot be read.*{part}"):
        load_model(str(folder))


def test_models_that_do_not_predict_noise_are_refused(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ModelError, match="v_prediction"):
        load_model(str(folder))


# --- prompts ----------------------------------------------------------------------------------------------------


def test_both_kinds_of_prompts_and_what_the_reward_reads():
    prompts = training_prompts(["playing soccer"], "cat", "sks", "striped")
    assert [(p.text, p.clean, p.identifier) for p in prompts] == [
        ("a sks striped cat playing soccer", "a striped cat playing soccer", True),
        ("a cat playing soccer", "a cat playing soccer", False),
    ]
    assert make_prompt("", "orange cat").text == "an orange cat"
    assert len(training_prompts(["dancing", "dancing"], "cat", "sks", use_class_prompts=False)) == 1
    with pytest.raises(ParameterError, match="no activities"):
        training_prompts([], "cat", "sks")


def test_identifiers(tokenizer):
    model = tiny_model(tokenizer)
    assert len(check_identifier(model, "sks", "cat")) == 1
    for poor in ("cat", "the", "two words", ""):
        with pytest.raises(ParameterError, match="rare"):
            check_identifier(model, poor, "cat")
    with pytest.warns(UserWarning, match=r"is 6 tokens \(ids \["):
        check_identifier(model, "qvjwxq", "cat")


def test_a_text_that_is_trained_is_encoded_anew_and_has_a_gradient(tiny):
    frozen = tiny.encode_text(["a cat"])
    assert not frozen.requires_grad
    embeddings = tiny.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    tiny.predict_noise(torch.zeros(1, 4, 8, 8), torch.tensor([5]), ["a cat"]).square().sum().backward()
    read = embeddings.grad.abs().sum(1) > 0
    assert set(tiny.token_ids("a cat")) <= set(read.nonzero().flatten().tolist())
    with torch.no_grad():
        embeddings.add_(1.0)
    assert not torch.equal(tiny.encode_text(["a cat"]), frozen)


def test_decoded_pixels_keep_their_gradient_and_are_the_pictures(tiny):
    latents = torch.randn(2, *tiny.latent_shape, generator=generator(0, "pixels")).requires_grad_(True)
    pixels = tiny.decode_pixels(latents)
    pixels.sum().backward()
    assert pixels.shape == (2, 3, 16, 16) and latents.grad.abs().sum() > 0
    shown = torch.from_numpy(np.stack([np.asarray(image) for image in tiny.decode(latents)])).permute(0, 3, 1, 2)
    assert torch.equal(shown, ((pixels.detach() + 1) * 127.5).round().byte())
