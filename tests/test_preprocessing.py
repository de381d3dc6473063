"""What every scorer's network is given: golden values on two synthetic pictures.

They were computed here once, when each preprocessing was equal to an independent one (torchvision's, the package
image-reward's, a processor of transformers: see test_scorers.py and test_reward_parity.py), and must never move: a
metric under another preprocessing is another metric. The scorers are the official ones with a network that only keeps
what it is given.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
from open_clip import create_model_and_transforms
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, ViTConfig

import ibkit.scorers.encoder as encoder_file
import ibkit.scorers.image_reward as image_reward_file
from ibkit.errors import ModelError
from ibkit.model import hub
from ibkit.scorers import pick_score
from ibkit.scorers.align import AlignEncoder
from ibkit.scorers.base import hub_name
from ibkit.scorers.clip import ClipEncoder
from ibkit.scorers.dino import Dino
from ibkit.scorers.image_reward import ImageReward, ImageRewardModel, RewardConfig
from ibkit.scorers.pick_score import PickScore

ALIGN_PX = 289  # vision_config.image_size of kakaobrain/align-base


def landscape() -> Image.Image:
    """321 x 243 pixels: two gradients and a fine checkerboard, so that size, crop, filter and channel order show."""
    y, x = np.mgrid[:243, :321]
    return Image.fromarray(
        np.stack([x * 255 // 320, y * 255 // 242, ((x // 3 + y // 3) % 2) * 255], 2).astype(np.uint8)
    )


def portrait() -> Image.Image:
    """143 x 211 pixels, smaller than the networks' input; its transparency must not count."""
    y, x = np.mgrid[:211, :143]
    channels = [y * 255 // 210, ((x // 5 + y // 5) % 2) * 255, x * 255 // 142, (x + y) % 256]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8), "RGBA")


PICTURES = {"landscape": landscape, "portrait": portrait}


class Network(nn.Module):
    """Keeps its input and answers with one number a picture."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, pixel_values):
        self.given = pixel_values
        return SimpleNamespace(last_hidden_state=pixel_values[:, :1, :1, 0], pooler_output=pixel_values[:, :1, 0, 0])

    get_image_features = forward


@cache
def without_weights(*names, **options):
    """open_clip's factory; on the device "meta" a network has shapes and no weights: only the preprocessing is real."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "")
        return create_model_and_transforms(*names, **options, load_weights=False, device="meta")


def clip(image, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", without_weights)
    encoder, network = ClipEncoder._load_official("meta"), Network(None)
    encoder.device, encoder.model.encode_image = "cpu", lambda pixels: network(pixels).pooler_output
    encoder.images([image])
    return network.given


def dino(image, monkeypatch):
    network = Network(ViTConfig())
    Dino(network).embed([image])
    return network.given


def image_reward(image, monkeypatch):
    config = RewardConfig()
    return ImageReward(Network(config), range(config.tokenizer_size)).encode_images([image])


def picked(image, monkeypatch):
    network = Network(CLIPConfig())
    PickScore(network, tokenizer=None).images([image])
    return network.given


def align(image, monkeypatch):
    network = Network(SimpleNamespace(vision_config=SimpleNamespace(image_size=ALIGN_PX)))
    AlignEncoder(network, tokenizer=None).images([image])
    return network.given


GOLDEN = {  # mean of each channel, and three pixels: a corner, one a third down and a quarter across, the last
    (clip, "landscape"): (224, (0.0681, 0.1540, 0.3330), (-1.3397, -0.4914, -1.0110)),
    (dino, "landscape"): (224, (0.0571, 0.1877, 0.4182), (-1.3815, -0.4776, 2.6400)),
    (image_reward, "landscape"): (224, (0.0681, 0.1540, 0.3330), (-1.3397, -0.4914, -1.0110)),
    (picked, "landscape"): (224, (0.0681, 0.1540, 0.3330), (-1.3397, -0.4914, -1.0110)),
    (clip, "portrait"): (224, (0.0622, 0.1617, 0.3258), (-1.1937, 2.0749, 2.1459)),
    (dino, "portrait"): (224, (0.0513, 0.1966, 0.4091), (-1.2445, -2.0357, 2.3437)),
    (image_reward, "portrait"): (224, (0.0622, 0.1617, 0.3258), (-1.1937, 2.0749, 2.1459)),
    (picked, "portrait"): (224, (0.0622, 0.1617, 0.3258), (-1.1937, 2.0749, 2.1459)),
    (align, "landscape"): (289, (-0.0068, -0.0068, -0.0000), (-0.8431, -0.2863, 0.4118)),
    (align, "portrait"): (289, (-0.0064, 0.0000, -0.0068), (-0.8431, 1.0000, 0.8353)),
}


@pytest.mark.parametrize("scorer, shape", GOLDEN)
def test_the_input_of_every_network_is_what_it_was(scorer, shape, monkeypatch):
    (x,), (side, means, pixels) = scorer(PICTURES[shape](), monkeypatch), GOLDEN[scorer, shape]
    assert x.shape == (3, side, side)
    assert x.mean((1, 2)).tolist() == pytest.approx(means, abs=1e-3)
    at = ((0, 0, 0), (1, side // 3, side // 4), (2, -1, -1))
    assert [x[place].item() for place in at] == pytest.approx(pixels, abs=0.01)  # a step of 8 bits is .008 to .035


def cached(cache, repository, file, revision):
    """A file in a hub cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / file).write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


def test_an_evaluator_names_the_revision_that_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_name("somebody/model") == "somebody/model"
    cached(tmp_path, "somebody/model", "config.json", "0123456789abcdef")
    assert hub_name("somebody/model") == "somebody/model@01234567"
    assert hub_name("somebody/model", "weights.bin", "config.json") == "somebody/model@01234567"


def test_clip_and_the_tokenizers_of_others_have_revisions_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors", "c" * 12)
    cached(tmp_path, pick_score.OFFICIAL_REPOSITORY, "config.json", "a" * 12)
    cached(tmp_path, pick_score.OFFICIAL_TOKENIZER, "tokenizer_config.json", "b" * 12)
    cached(tmp_path, image_reward_file.OFFICIAL_TOKENIZER, "tokenizer_config.json", "d" * 12)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", without_weights)
    assert "timm/vit_base_patch32_clip_224.openai@cccccccc" in ClipEncoder._load_official("meta").evaluator
    config = CLIPConfig()
    monkeypatch.setattr(encoder_file, "load_transformer", lambda *_: Network(config))
    monkeypatch.setattr(ImageRewardModel, "load_official", lambda: Network(RewardConfig()))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: range(config.text_config.vocab_size))
    told = PickScore.load("official").evaluator
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: range(RewardConfig().tokenizer_size))
    assert "PickScore_v1@aaaaaaaa, tokenizer laion/CLIP-ViT-H-14-laion2B-s32B-b79K@bbbbbbbb" in told
    assert "tokenizer bert-base-uncased@dddddddd" in ImageReward.load("official").evaluator


def test_a_missing_tokenizer_is_named_and_not_the_weights(monkeypatch):
    def missing(*_):
        raise OSError("not here")

    monkeypatch.setattr(hub, "answers", lambda url: True)
    monkeypatch.setattr(encoder_file, "load_transformer", lambda *_: Network(CLIPConfig()))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"official tokenizer \(laion/CLIP-ViT-H-14.*not here") as error:
        PickScore.load("official")
    assert "yuvalkirstain" not in str(error.value)
