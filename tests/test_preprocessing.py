"""What every scorer's network is given: golden values on one synthetic picture.

They were computed here once, when each preprocessing was equal to an independent one (torchvision's, the package
image-reward's, a processor of transformers: see test_scorers.py and test_reward_parity.py), and must never move: a
metric under another preprocessing is another metric.
"""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from ibkit.scorers.align import AlignEncoder
from ibkit.scorers.base import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, hub_name, to_pixel_values
from ibkit.scorers.clip import OFFICIAL_MODEL


def picture() -> Image.Image:
    """321 x 243 pixels: two gradients and a fine checkerboard, so that size, crop, filter and channel order show."""
    y, x = np.mgrid[:243, :321]
    return Image.fromarray(
        np.stack([x * 255 // 320, y * 255 // 242, ((x // 3 + y // 3) % 2) * 255], 2).astype(np.uint8)
    )


def inputs() -> dict[str, torch.Tensor]:
    """Scorer -> network input (3, H, W)."""
    image = picture()
    mean, std = (open_clip.get_pretrained_cfg(OFFICIAL_MODEL, "openai")[key] for key in ("mean", "std"))
    clip = open_clip.image_transform(
        open_clip.get_model_config(OFFICIAL_MODEL)["vision_cfg"]["image_size"], False, mean, std
    )
    align = AlignEncoder.__new__(AlignEncoder)  # its preprocessing needs no model
    align.resize_px, align.crop_px = 346, 289
    return {
        "clip": clip(image),
        "dino": to_pixel_values([image], 256, 224, IMAGENET_MEAN, IMAGENET_STD)[0],
        "image_reward, pick_score": to_pixel_values([image], 224, 224, CLIP_MEAN, CLIP_STD)[0],
        "align": align.pixels(image),
    }


GOLDEN = {  # mean of each channel, and three pixels: a corner, one a third down and a quarter across, the last
    "clip": (224, (0.0681, 0.1540, 0.3330), (-1.3397, -0.4914, -1.0110)),
    "dino": (224, (0.0571, 0.1877, 0.4182), (-1.3815, -0.4776, 2.6400)),
    "image_reward, pick_score": (224, (0.0681, 0.1540, 0.3330), (-1.3397, -0.4914, -1.0110)),
    "align": (289, (-0.0068, -0.0068, -0.0000), (-0.8431, -0.2863, 0.4118)),
}


@pytest.mark.parametrize("scorer", GOLDEN)
def test_the_input_of_every_network_is_what_it_was(scorer):
    x, (side, means, pixels) = inputs()[scorer], GOLDEN[scorer]
    assert x.shape == (3, side, side)
    assert x.mean((1, 2)).tolist() == pytest.approx(means, abs=1e-3)
    at = ((0, 0, 0), (1, side // 3, side // 4), (2, -1, -1))
    assert [x[place].item() for place in at] == pytest.approx(pixels, abs=0.01)  # a step of 8 bits is .008 to .035


def test_an_evaluator_names_the_revision_that_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_name("somebody/model") == "somebody/model"
    kept = tmp_path / "models--somebody--model"
    (kept / "snapshots" / "0123456789abcdef").mkdir(parents=True)
    (kept / "snapshots" / "0123456789abcdef" / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123456789abcdef")
    assert hub_name("somebody/model") == "somebody/model@01234567"
