"""Scorers against independent computations, on small random models made here; nothing is downloaded.

Shapes: N pictures, R references, B batch, P patches + 1, L tokens, D widths.
"""

import json
import math
import warnings

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torchvision import transforms
from transformers import (
    AlignConfig,
    AlignModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    EfficientNetImageProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from ibkit.errors import IbkitError, ModelError, ParameterError, ScoreError
from ibkit.model import hub
from ibkit.scorers import SCORERS, Scorer, make_scorer
from ibkit.scorers.align import AlignEncoder, AlignI, AlignT, Harmonic
from ibkit.scorers.base import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, from_hub, rgb_square, to_pixel_values
from ibkit.scorers.clip import ClipEncoder, ClipI, ClipT
from ibkit.scorers.dino import Dino
from ibkit.scorers.image_reward import ImageReward, ImageRewardModel, RewardConfig, map_official
from ibkit.scorers.pick_score import PickScore
from ibkit.scorers.subject import IdentityHead, SubjectFidelity

WORDS = "a the cat dog pot cup plays soccer rides bike reads book in on snow beach forest red blue".split()
VOCABULARY = ["[PAD]", "[UNK]", *WORDS, "[BOS]", "[EOS]"]  # end of text last: CLIP pools at the highest id
TEXTS = ["a cat plays soccer", "the dog in snow", "a red pot on the beach"]

SMALL_REWARD = RewardConfig(
    image_px=32,
    patch_px=8,
    vision_width=24,
    vision_mlp=40,
    vision_layers=2,
    vision_heads=3,
    vocab_size=len(VOCABULARY) + 2,
    tokenizer_size=len(VOCABULARY),
    text_width=20,
    text_mlp=36,
    text_layers=3,
    text_heads=4,
    text_positions=16,
    head_widths=(18, 12, 8),
    head_dropout=(0.2, 0.1),
    max_tokens=9,
    mean=0.3,
    std=1.7,
)


def make_tokenizer():
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", ids["[BOS]"]), ("[EOS]", ids["[EOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )


def make_images(n, size=(64, 64), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def strong_weights(model, seed=0):
    """Random weights large enough that every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.copy_((1 if name.endswith("weight") else 0) + 0.3 * noise)
    return model.eval()


# ---------------------------------------------------------------------------------------------- ImageReward


def official_shapes(c):
    """Names and shapes of the official checkpoint, written from its own modules (not from the mapping under test)."""
    shapes = {}

    def linear(name, n_in, n_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    v, d = c.vision_width, c.text_width
    eye = "blip.visual_encoder"
    shapes[f"{eye}.cls_token"] = (1, 1, v)
    shapes[f"{eye}.pos_embed"] = (1, (c.image_px // c.patch_px) ** 2 + 1, v)
    shapes[f"{eye}.patch_embed.proj.weight"] = (v, 3, c.patch_px, c.patch_px)
    shapes[f"{eye}.patch_embed.proj.bias"] = (v,)
    for n in range(c.vision_layers):
        block = f"{eye}.blocks.{n}"
        norm(f"{block}.norm1", v)
        linear(f"{block}.attn.qkv", v, 3 * v)
        linear(f"{block}.attn.proj", v, v)
        norm(f"{block}.norm2", v)
        linear(f"{block}.mlp.fc1", v, c.vision_mlp)
        linear(f"{block}.mlp.fc2", c.vision_mlp, v)
    norm(f"{eye}.norm", v)
    bert = "blip.text_encoder"
    shapes[f"{bert}.embeddings.word_embeddings.weight"] = (c.vocab_size, d)
    shapes[f"{bert}.embeddings.position_embeddings.weight"] = (c.text_positions, d)
    norm(f"{bert}.embeddings.LayerNorm", d)
    for n in range(c.text_layers):
        layer = f"{bert}.encoder.layer.{n}"
        for attention, n_in in (("attention", d), ("crossattention", v)):
            linear(f"{layer}.{attention}.self.query", d, d)
            linear(f"{layer}.{attention}.self.key", n_in, d)
            linear(f"{layer}.{attention}.self.value", n_in, d)
            linear(f"{layer}.{attention}.output.dense", d, d)
            norm(f"{layer}.{attention}.output.LayerNorm", d)
        linear(f"{layer}.intermediate.dense", d, c.text_mlp)
        linear(f"{layer}.output.dense", c.text_mlp, d)
        norm(f"{layer}.output.LayerNorm", d)
    # linear layers of the head's nn.Sequential; a Dropout stands after each but the last two
    widths = [d, *c.head_widths, 1]
    positions, position = [], 0
    for index in range(len(widths) - 1):
        positions.append(position)
        position += 2 if index < len(c.head_widths) - 1 else 1
    for index, position in enumerate(positions):
        linear(f"mlp.layers.{position}", widths[index], widths[index + 1])
    linear("blip.vision_proj", v, 16)
    linear("blip.text_proj", d, 16)
    return shapes


def official_state(c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in official_shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = (1 if "norm" in name.lower() and name.endswith("weight") else 0) + 0.3 * noise
        else:
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(c.text_positions)[None]
    return state


def reference_attention(q, k, v, heads, mask=None):
    """q (B, Lq, D), k and v (B, Lk, D), mask (B, Lk) -> (B, Lq, D), one head and one picture at a time."""
    out = torch.zeros_like(q)
    width = q.shape[-1] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(width)
            if mask is not None:
                scores = scores.masked_fill(mask[b][None] == 0, -math.inf)
            out[b, :, part] = scores.softmax(dim=-1) @ v[b, :, part]
    return out


def reference_reward(state, c, pixels, ids, mask):
    """ImageReward's own forward (timm-like ViT with fused qkv; BERT with cross-attention; MLP), written naively."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    eye = "blip.visual_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"].flatten(1)
    patches = F.unfold(pixels, c.patch_px, stride=c.patch_px).transpose(1, 2)  # (B, P - 1, 3 * patch * patch)
    x = patches @ kernel.T + state[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{eye}.pos_embed"]
    for n in range(c.vision_layers):
        block = f"{eye}.blocks.{n}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", reference_attention(q, k, v, c.vision_heads))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    picture = norm(f"{eye}.norm", x, 1e-6)

    bert = "blip.text_encoder"
    places = state[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{bert}.embeddings.LayerNorm", state[f"{bert}.embeddings.word_embeddings.weight"][ids] + places, 1e-12)
    for n in range(c.text_layers):
        layer = f"{bert}.encoder.layer.{n}"
        for name, source, keep in (("attention", None, mask), ("crossattention", picture, None)):
            at, source = f"{layer}.{name}", y if source is None else source
            seen = reference_attention(
                linear(f"{at}.self.query", y),
                linear(f"{at}.self.key", source),
                linear(f"{at}.self.value", source),
                c.text_heads,
                keep,
            )
            y = norm(f"{at}.output.LayerNorm", linear(f"{at}.output.dense", seen) + y, 1e-12)
        wide = gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", wide) + y, 1e-12)
    z = y[:, 0]
    heads = sorted(
        (n for n in state if n.startswith("mlp.") and n.endswith("weight")), key=lambda n: int(n.split(".")[2])
    )
    for name in heads:
        z = linear(name.removesuffix(".weight"), z)
    return (z[:, 0] - c.mean) / c.std


def reward_inputs(c, batch=4, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, c.image_px, c.image_px, generator=generator)
    ids = torch.randint(1, c.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, length - row :] = 0
    return pixels, ids * mask, mask


@pytest.fixture(scope="module")
def official_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "ImageReward.pt"
    torch.save(official_state(SMALL_REWARD), path)
    return path


def test_official_reward_weights_give_what_the_official_architecture_gives(official_checkpoint):
    model = ImageRewardModel.load_official(official_checkpoint, SMALL_REWARD)
    inputs = reward_inputs(SMALL_REWARD)
    with torch.no_grad():
        ours = model(*inputs)
    expected = reference_reward(official_state(SMALL_REWARD), SMALL_REWARD, *inputs)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert not model.training


def test_default_reward_config_has_the_official_sizes():
    with torch.device("meta"):
        model = ImageRewardModel(RewardConfig())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {n: torch.empty(shape, device="meta") for n, shape in official_shapes(RewardConfig()).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in map_official(expected).items()}
    dropped = 256 * (1024 + 1) + 256 * (768 + 1)  # vision_proj and text_proj
    assert round((sum(tensor.numel() for tensor in model.parameters()) + dropped) / 1e6) == 447
    assert (model.vision.config.num_attention_heads, model.text.config.num_attention_heads) == (16, 12)
    assert (model.vision.config.layer_norm_eps, model.text.config.layer_norm_eps) == (1e-6, 1e-12)
    assert (model.config.max_tokens, model.config.mean, model.config.std) == (
        35,
        0.16717362830052426,
        1.0333394966054072,
    )
    assert [name for name in ours if name.startswith("head") and name.endswith("weight")] == [
        f"head.{index}.weight" for index in (0, 2, 4, 6, 7)
    ]


def test_official_checkpoint_with_a_missing_or_foreign_entry_is_refused(tmp_path):
    state = official_state(SMALL_REWARD)
    del state["blip.visual_encoder.blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(ModelError, match="qkv.bias"):
        ImageRewardModel.load_official(tmp_path / "short.pt", SMALL_REWARD)
    with pytest.raises(ModelError, match="unet.conv"):
        map_official({"unet.conv": torch.zeros(1)})
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="noise.pt"):
        ImageRewardModel.load_official(tmp_path / "noise.pt", SMALL_REWARD)


def test_reward_ignores_padding_only_because_of_the_mask():
    model = strong_weights(ImageRewardModel(SMALL_REWARD))
    pixels, ids, mask = reward_inputs(SMALL_REWARD, batch=3, length=5)
    mask[:] = 1
    padded, padded_mask = F.pad(ids, (0, 4), value=7), F.pad(mask, (0, 4))
    with torch.no_grad():
        short = model(pixels, ids, mask)
        torch.testing.assert_close(model(pixels, padded, padded_mask), short, atol=1e-5, rtol=0)
        assert (model(pixels, padded, torch.ones_like(padded)) - short).abs().min() > 1e-3


def test_reward_model_trains_and_its_folder_gives_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    model = ImageRewardModel(SMALL_REWARD).train()
    inputs = reward_inputs(SMALL_REWARD)
    target = torch.tensor([1.0, -1.0, 2.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = ImageRewardModel.from_pretrained(tmp_path)
    assert loaded.config == SMALL_REWARD and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_damaged_reward_folder_is_refused(tmp_path):
    model = ImageRewardModel(SMALL_REWARD)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="damaged"):
        ImageRewardModel.from_pretrained(tmp_path)
    state = safetensors.torch.load(whole)
    del state["head.0.weight"]
    save_file(state, weights)
    with pytest.raises(ModelError, match="head.0.weight"):
        ImageRewardModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match="model.safetensors"):
        ImageRewardModel.from_pretrained(tmp_path)


@pytest.fixture
def reward_scorer():
    return ImageReward(strong_weights(ImageRewardModel(SMALL_REWARD)), make_tokenizer())


def test_reward_scorer_reads_each_picture_with_its_own_text(reward_scorer):
    images = make_images(3)
    scores = reward_scorer(images, TEXTS)
    model, tokenizer = reward_scorer.model, make_tokenizer()
    transform = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    for image, text, score in zip(images, TEXTS, scores, strict=True):
        encoded = tokenizer([text], return_tensors="pt")  # unpadded: the scorer's padding must not show
        with torch.no_grad():
            alone = model(transform(image)[None], encoded["input_ids"], encoded["attention_mask"])[0]
        torch.testing.assert_close(score, alone, atol=1e-5, rtol=0)
    assert (reward_scorer(images, TEXTS[::-1]) - scores).abs().max() > 1e-3


def test_reward_scorer_names_a_text_that_it_cuts_once(reward_scorer):
    long = "a cat plays soccer in the snow on the beach"
    with pytest.warns(UserWarning, match=long):
        cut = reward_scorer(make_images(1), [long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = reward_scorer(make_images(1), [long])
    assert torch.equal(cut, again)


def test_reward_scorer_refuses_a_tokenizer_of_another_model():
    config = RewardConfig(**{**vars(SMALL_REWARD), "tokenizer_size": len(VOCABULARY) - 1})
    with pytest.raises(ModelError, match="tokenizer"):
        ImageReward(ImageRewardModel(config), make_tokenizer())


# ---------------------------------------------------------------------------------------------- CLIP

CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {
        "context_length": 10,
        "vocab_size": len(VOCABULARY),
        "width": 32,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "local",
    },
}


@pytest.fixture
def clip_weights(tmp_path):
    """A local weights folder with `clip/` in open_clip's `local-dir:` layout."""
    torch.manual_seed(0)
    folder = tmp_path / "weights" / "clip"
    folder.mkdir(parents=True)
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    save_file(strong_weights(open_clip.CLIP(**CLIP_CONFIG)).state_dict(), folder / "model.safetensors")
    make_tokenizer().save_pretrained(folder)
    return folder.parent


def plain_clip(weights, images, texts):
    """(N, D) image and text features by plain open_clip calls."""
    model = open_clip.CLIP(**CLIP_CONFIG).eval()
    model.load_state_dict(load_file(weights / "clip" / "model.safetensors"))
    preprocess = open_clip.image_transform(32, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    tokenizer = AutoTokenizer.from_pretrained(weights / "clip")
    ids = tokenizer(texts, padding="max_length", max_length=10, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pictures = torch.cat([model.encode_image(preprocess(image)[None], normalize=True) for image in images])
        return pictures, model.encode_text(ids, normalize=True)


def test_clip_t_is_the_cosine_of_plain_open_clip_features(clip_weights):
    images = make_images(3, (50, 70))
    scorer = make_scorer("clip_t", clip_weights)
    pictures, words = plain_clip(clip_weights, images, TEXTS)
    torch.testing.assert_close(scorer(images, TEXTS), (pictures * words).sum(1), atol=1e-5, rtol=0)
    repeated = scorer([images[0], images[1], images[0]], [TEXTS[0], TEXTS[1], TEXTS[0]])
    assert torch.equal(repeated[0], repeated[2]) and not torch.isclose(repeated[0], repeated[1])
    assert not scorer.encoder.model.training


def test_clip_i_is_the_mean_cosine_over_all_references(clip_weights):
    images, references = make_images(3), make_images(4, seed=9)
    references[2] = images[1]  # a picture that is its own reference is not left out
    scorer = make_scorer("clip_i", clip_weights)
    pictures, _ = plain_clip(clip_weights, images + references, TEXTS)
    expected = [np.mean([float(g @ r) for r in pictures[3:]]) for g in pictures[:3]]
    np.testing.assert_allclose(scorer(images, references=references), expected, atol=1e-5)
    assert scorer([images[1]], references=[images[1]]).item() == pytest.approx(1, abs=1e-5)


def test_clip_folder_also_loads_through_open_clips_own_scheme(clip_weights):
    pytest.importorskip("open_clip", minversion="3.0")
    source = f"local-dir:{clip_weights / 'clip'}"
    model, tokenizer = open_clip.create_model(source).eval(), open_clip.get_tokenizer(source)
    encoder = ClipEncoder.load(clip_weights)
    texts = [*TEXTS, "  a cat &amp; the   dog ", "a cat plays soccer in the snow on the beach"]
    assert torch.equal(tokenizer(texts), encoder.tokenize(texts))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), encoder.model.encode_image(pixels), atol=1e-6, rtol=0)


def test_clip_names_a_text_over_its_context_once(clip_weights):
    scorer = make_scorer("clip_t", clip_weights)
    long = "a cat plays soccer in the snow on the beach"
    with pytest.warns(UserWarning, match=long) as caught:
        scorer(make_images(3), [long, TEXTS[0], long])
    assert len([w for w in caught if long in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer(make_images(1), [long])


def test_clip_refuses_damaged_or_unfitting_folders(clip_weights):
    folder = clip_weights / "clip"
    config = json.loads((folder / "open_clip_config.json").read_text())

    def refused(match):
        with pytest.raises(ModelError, match=match):
            make_scorer("clip_t", clip_weights)

    small = {**config["model_cfg"]["text_cfg"], "vocab_size": 500}
    write = (folder / "open_clip_config.json").write_text
    write(json.dumps({**config, "model_cfg": {**config["model_cfg"], "text_cfg": small}}))
    refused("model.safetensors")
    write(json.dumps({"preprocess_cfg": {}}))
    refused("open_clip_config.json")
    write(json.dumps(config))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    refused("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    refused("damaged")
    (folder / "model.safetensors").unlink()
    refused("model.safetensors")


def test_clip_refuses_an_end_of_text_that_pooling_would_miss(clip_weights):
    moved = make_tokenizer()
    moved.eos_token = "[BOS]"
    moved.save_pretrained(clip_weights / "clip")
    with pytest.raises(ModelError, match="highest token id"):
        make_scorer("clip_t", clip_weights)


def test_official_clip_is_the_quickgelu_one():
    from ibkit.scorers.clip import OFFICIAL_MODEL, OFFICIAL_WEIGHTS

    assert open_clip.get_model_config(OFFICIAL_MODEL)["quick_gelu"]
    assert open_clip.get_pretrained_cfg(OFFICIAL_MODEL, OFFICIAL_WEIGHTS)["quick_gelu"]
    plain = {**open_clip.get_model_config("ViT-B-32"), "quick_gelu": True}
    assert plain == open_clip.get_model_config(OFFICIAL_MODEL)  # the activation is the only difference


# ---------------------------------------------------------------------------------------------- DINO


def small_vit(image_px, patch_px):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=image_px,
        patch_size=patch_px,
    )
    return strong_weights(ViTModel(config, add_pooling_layer=False))


@pytest.mark.parametrize(
    ("size", "scaled"), [((300, 400), (256, 341)), ((500, 280), (457, 256)), ((64, 64), (256, 256))]
)
def test_dino_preprocessing_is_resize_256_crop_224(size, scaled):
    (image,) = make_images(1, size)
    scorer = Dino(small_vit(224, 56))
    resized = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC), dtype=np.float64)
    top, left = round((scaled[1] - 224) / 2), round((scaled[0] - 224) / 2)
    crop = resized[top : top + 224, left : left + 224] / 255
    expected = ((crop - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    ours = to_pixel_values([image], scorer.resize_px, scorer.image_px, IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(ours[0], expected, atol=1e-5)


def test_small_dino_sees_the_whole_picture_unchanged():
    scorer = Dino(small_vit(64, 16))
    assert (scorer.resize_px, scorer.image_px) == (64, 64)
    (image,) = make_images(1)
    assert np.array_equal(np.asarray(rgb_square(image, 64, 64)), np.asarray(image))


@pytest.mark.parametrize("image_px", [64, 224])
def test_dino_is_the_mean_cosine_of_the_class_token_over_all_references(tmp_path, image_px):
    model = small_vit(image_px, image_px // 4)
    model.save_pretrained(tmp_path / "dino")
    images, references = make_images(3, (image_px + 30, image_px)), make_images(4, (image_px, image_px), seed=9)
    references[1] = images[0]  # not left out
    scorer = make_scorer("dino", tmp_path)
    tokens = []
    before_norm = []
    model.layernorm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0][0, 0].numpy()))
    for image in images + references:
        with torch.no_grad():
            model(to_pixel_values([image], scorer.resize_px, image_px, IMAGENET_MEAN, IMAGENET_STD))
        hidden = before_norm[-1]
        normed = (hidden - hidden.mean()) / np.sqrt(hidden.var() + model.config.layer_norm_eps)
        token = normed * model.layernorm.weight.detach().numpy() + model.layernorm.bias.detach().numpy()
        tokens.append(token / np.linalg.norm(token))
    expected = [np.mean([g @ r for r in tokens[3:]]) for g in tokens[:3]]
    np.testing.assert_allclose(scorer(images, references=references), expected, atol=1e-5)


def test_dino_refuses_weights_that_are_not_all_there(tmp_path):
    model = small_vit(64, 16)
    model.save_pretrained(tmp_path / "dino")
    weights = tmp_path / "dino" / "model.safetensors"
    state = load_file(weights)
    save_file({n: t for n, t in state.items() if n != "layernorm.weight"}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="layernorm.weight"):
        make_scorer("dino", tmp_path)
    weights.write_bytes(b"short")
    with pytest.raises(ModelError, match="dino"):
        make_scorer("dino", tmp_path)


def test_references_are_embedded_once_and_recognised_by_their_pixels():
    scorer = Dino(small_vit(64, 16))
    counted = []
    embed = scorer._references._embed
    scorer._references._embed = lambda images: counted.append(len(images)) or embed(images)
    references = make_images(2, seed=4)
    first = scorer(make_images(2), references=references)
    assert torch.equal(scorer(make_images(2), references=[r.copy() for r in references]), first)
    assert counted == [2]
    other = scorer(make_images(2), references=make_images(2, seed=5))
    assert counted == [2, 2] and not torch.equal(other, first)


# ---------------------------------------------------------------------------------------------- PickScore, ALIGN


def tuned_clip():
    ids = {"eos_token_id": VOCABULARY.index("[EOS]"), "bos_token_id": VOCABULARY.index("[BOS]"), "pad_token_id": 0}
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "max_position_embeddings": 12, **ids}
    config = CLIPConfig(text_config=text, vision_config=vision | {"num_attention_heads": 3}, projection_dim=16)
    return strong_weights(CLIPModel(config))


def small_align():
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"intermediate_size": 40, "max_position_embeddings": 70}
    vision = {"image_size": 48, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 16}
    config = AlignConfig(text_config=text, vision_config=vision, projection_dim=80)
    return strong_weights(AlignModel(config))


@pytest.fixture
def more_weights(tmp_path):
    """A local weights folder with `pick_score/` and `align/` in transformers' format."""
    for name, model in (("pick_score", tuned_clip()), ("align", small_align())):
        model.save_pretrained(tmp_path / "more" / name)
        make_tokenizer().save_pretrained(tmp_path / "more" / name)
    return tmp_path / "more"


def test_pick_score_is_the_published_logit_without_its_temperature(more_weights):
    images = make_images(3, (50, 70))
    scorer = make_scorer("pick_score", more_weights)
    model = CLIPModel.from_pretrained(more_weights / "pick_score").eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    tokens = make_tokenizer()(TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    pixels = to_pixel_values(images, 32, 32, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image
    expected = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(scorer(images, TEXTS), expected, atol=1e-5, rtol=0)
    theirs = processor(images, return_tensors="pt")["pixel_values"]  # torchvision's bicubic on tensors, not PIL's
    torch.testing.assert_close(pixels, theirs, atol=2.1 / 255 / min(CLIP_STD), rtol=0)
    assert "unscaled" in scorer.evaluator and len(set(scorer(images, TEXTS).tolist())) == 3


def test_align_is_the_models_own_similarity(more_weights):
    images, references = make_images(3, (50, 70)), make_images(2, seed=7)
    model = AlignModel.from_pretrained(more_weights / "align").eval()
    processor = EfficientNetImageProcessor(
        size={"height": 57, "width": 57}, crop_size={"height": 48, "width": 48}, do_center_crop=True,
        resample=Image.Resampling.BILINEAR, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False,
        include_top=False,
    )  # fmt: skip
    tokens = make_tokenizer()(TEXTS, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    encoder = AlignEncoder(model, make_tokenizer())
    pixels = torch.stack([encoder.pixels(image) for image in images + references])
    theirs = processor(images + references, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, theirs, atol=2.1 / 127.5, rtol=0)
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    text = ((out.image_embeds[:3] * out.text_embeds).sum(1) + 1) / 2
    subject = ((out.image_embeds[:3] @ out.image_embeds[3:].T).mean(1) + 1) / 2
    torch.testing.assert_close(make_scorer("align_t", more_weights)(images, TEXTS), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        make_scorer("align_i", more_weights)(images, references=references), subject, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_harmonic_reward_by_hand(clip_weights, weight):
    encoder, images, references = ClipEncoder.load(clip_weights), make_images(3), make_images(2, seed=7)
    text, subject = AlignT(encoder)(images, TEXTS), AlignI(encoder)(images, references=references)
    expected = [1 / (weight / i + (1 - weight) / t) for i, t in zip(subject.tolist(), text.tolist(), strict=True)]
    scores = Harmonic(encoder, weight)(images, TEXTS, references)
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(AlignT(encoder)(images, TEXTS), (ClipT(encoder)(images, TEXTS) + 1) / 2)


def test_the_pocket_world_has_no_pick_score():
    with pytest.raises(ModelError, match="pocket weights have none: use weights='official'"):
        make_scorer("pick_score", "pocket")


@pytest.mark.parametrize("name, folder", [("pick_score", "pick_score"), ("align_t", "align")])
def test_weights_that_are_not_all_there_are_refused(more_weights, name, folder):
    path = more_weights / folder / "model.safetensors"
    state = load_file(path)
    state.pop(sorted(k for k in state if k.endswith("weight"))[0])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        make_scorer(name, more_weights)
    (more_weights / folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer_config.json"):
        make_scorer(name, more_weights)


# ---------------------------------------------------------------------------------------------- all scorers


@pytest.fixture
def all_scorers(clip_weights, reward_scorer):
    encoder, align = ClipEncoder.load(clip_weights), AlignEncoder(small_align(), make_tokenizer())
    plain = [ClipT(encoder), ClipI(encoder), Dino(small_vit(64, 16)), reward_scorer]
    plain.append(SubjectFidelity(Dino(small_vit(64, 16)), strong_weights(IdentityHead(24))))
    return [*plain, PickScore(tuned_clip(), make_tokenizer()), AlignT(align), AlignI(align), Harmonic(align)]


def test_scores_do_not_depend_on_the_batch(all_scorers):
    images, texts, references = make_images(5), (TEXTS * 2)[:5], make_images(3, seed=3)
    for scorer in all_scorers:
        together = scorer(images, texts, references)
        assert together.shape == (5,) and together.dtype == torch.float32 and together.device.type == "cpu"
        assert not together.requires_grad and not together.is_inference()
        getattr(scorer, "encoder", getattr(scorer, "dino", scorer)).batch_size = 2
        torch.testing.assert_close(scorer(images, texts, references), together, atol=1e-5, rtol=0)
        order = [3, 0, 4, 2, 1]
        shuffled = scorer([images[i] for i in order], [texts[i] for i in order], references)
        torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)


def test_scorers_are_in_evaluation_mode(all_scorers):
    """Dropout in a scorer would make the reward of a picture a matter of chance."""
    networks = [m for scorer in all_scorers for m in modules(scorer)]
    assert len(networks) >= 4 and not any(part.training for network in networks for part in network.modules())
    for scorer in all_scorers:
        arguments = make_images(2), TEXTS[:2], make_images(1)
        assert torch.equal(scorer(*arguments), scorer(*arguments))


def modules(thing) -> list[torch.nn.Module]:
    """The networks that a scorer holds, itself or in its parts."""
    found = []
    for value in vars(thing).values():
        if isinstance(value, torch.nn.Module):
            found.append(value)
        elif type(value).__module__.startswith("ibkit."):
            found += modules(value)
    return found


def test_bad_calls_are_refused_in_a_sentence(all_scorers):
    images, references = make_images(2), make_images(1)
    for scorer in all_scorers:
        with pytest.raises(ScoreError, match="no image"):
            scorer([], [], references)
        with pytest.raises(ScoreError, match="image 1 is a ndarray"):
            scorer([images[0], np.zeros((8, 8, 3))], TEXTS[:2], references)
        if "text" in scorer.needs:
            with pytest.raises(ScoreError, match="no texts"):
                scorer(images, references=references)
            with pytest.raises(ScoreError, match="2 images and 3 texts"):
                scorer(images, TEXTS)
            with pytest.raises(ScoreError, match="text 1"):
                scorer(images, ["a cat", " "])
        else:
            with pytest.raises(ScoreError, match="references"):
                scorer(images, TEXTS[:2])
            with pytest.raises(ScoreError, match="references"):
                scorer(images, references=[])


def test_a_score_that_is_not_finite_is_refused_with_its_image():
    class Broken(Scorer):
        name = "broken"
        evaluator = "none"
        needs = frozenset()

        def _score(self, images, texts, references):
            return torch.tensor([0.5, 1.0, math.nan])

    with pytest.raises(ScoreError, match="broken gave nan for image 2 of 3"):
        Broken()(make_images(3))


def test_a_model_gone_to_nan_is_noticed(reward_scorer):
    with torch.no_grad():
        reward_scorer.model.head[0].weight[0, 0] = math.inf
    with pytest.raises(ScoreError, match="image_reward gave"):
        reward_scorer(make_images(1), TEXTS[:1])


def test_a_reward_folder_with_its_tokenizer_loads_by_name(tmp_path, reward_scorer):
    reward_scorer.model.save_pretrained(tmp_path / "image_reward")
    make_tokenizer().save_pretrained(tmp_path / "image_reward")
    loaded = make_scorer("image_reward", tmp_path)
    assert torch.equal(loaded(make_images(3), TEXTS), reward_scorer(make_images(3), TEXTS))
    (tmp_path / "image_reward" / "tokenizer.json").unlink()
    with pytest.raises(IbkitError):
        make_scorer("image_reward", tmp_path)


def test_the_weak_reward_is_the_reward_model_of_another_folder(tmp_path, reward_scorer):
    reward_scorer.model.save_pretrained(tmp_path / "weak_reward")
    make_tokenizer().save_pretrained(tmp_path / "weak_reward")
    loaded = make_scorer("weak_reward", tmp_path)
    assert loaded.name == "weak_reward"
    assert torch.equal(loaded(make_images(3), TEXTS), reward_scorer(make_images(3), TEXTS))
    with pytest.raises(ModelError, match="pocket world"):
        make_scorer("weak_reward", "official")


def test_every_scorer_is_described_and_unknown_ones_are_refused(all_scorers, tmp_path):
    not_made = {"weak_reward", "feedback"}  # of the latter no head is shipped
    assert sorted(scorer.name for scorer in all_scorers) == sorted(SCORERS.keys() - not_made)
    for scorer in all_scorers:
        assert "px" in scorer.evaluator and scorer.needs
    with pytest.raises(ParameterError, match="no scorer 'clip_x'; did you mean 'clip_[ti]'"):
        make_scorer("clip_x")
    for name in SCORERS:
        with pytest.raises(ModelError, match="no weights folder"):
            make_scorer(name, tmp_path / "absent")


def test_offline_hub_says_which_metric_and_what_to_do(monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda url: True)
    with pytest.raises(ModelError, match="image_reward.*THUDM/ImageReward.*no route.*HF_HOME"):
        with from_hub("image_reward", "THUDM/ImageReward"):
            raise ConnectionError("no route\nto host")


def test_a_hub_that_does_not_answer_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        ModelError, match="cache lacks its official weights .THUDM/ImageReward., and http.* not answer:"
    ):
        with from_hub("image_reward", "THUDM/ImageReward"):
            inside = constants.is_offline_mode()  # an assertion that fails in there would become the sentence too
            raise ConnectionError("no route\nto host")
    assert inside and not constants.is_offline_mode()


@pytest.mark.parametrize(
    ("size", "resize_px", "crop_px"),
    [((300, 401), 224, 224), ((401, 300), 224, 224), ((64, 64), 64, 64), ((37, 91), 256, 224), ((1000, 333), 256, 224)],
)
def test_square_is_torchvisions_on_pil_images(size, resize_px, crop_px):
    (image,) = make_images(1, size)
    reference = transforms.Compose(
        [transforms.Resize(resize_px, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(crop_px)]
    )(image)
    assert np.array_equal(np.asarray(rgb_square(image, resize_px, crop_px)), np.asarray(reference))
