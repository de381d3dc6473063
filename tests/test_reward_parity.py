"""ImageReward against the authors' own package: the same random weights, the same inputs, the same rewards.

The package pins old versions and its `__init__` imports much that is missing today, so only the files of its model are
imported, past that `__init__`, and with what transformers has dropped since put back. It is in the extra `reference`;
`pip install --no-deps image-reward==1.5` is enough for this test, which is skipped without it.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ibkit.scorers.base import CLIP_MEAN, CLIP_STD, to_pixel_values
from ibkit.scorers.image_reward import ImageRewardModel, RewardConfig

FOUND = importlib.util.find_spec("ImageReward")
pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="needs the package image-reward (the extra `reference`)"),
    pytest.mark.filterwarnings("ignore:Importing from timm:FutureWarning"),
]

SIZES = RewardConfig(
    image_px=64,
    patch_px=16,
    vision_width=32,
    vision_mlp=128,
    vision_layers=3,
    vision_heads=4,
    vocab_size=100,
    tokenizer_size=98,
    text_width=24,
    text_mlp=48,
    text_layers=2,
    text_heads=4,
    text_positions=40,
    head_widths=(1024, 128, 64, 16),
)


@pytest.fixture
def package(monkeypatch):
    """The package's modules (vit, med, ImageReward), imported one by one."""

    def chunked(forward, chunk_size, dim, *tensors):
        assert chunk_size == 0, "BERT's default: no chunks"
        return forward(*tensors)

    dropped = {
        "apply_chunking_to_forward": chunked,
        "find_pruneable_heads_and_indices": None,  # for pruning, which nothing here does
        "prune_linear_layer": None,
    }
    for name, function in dropped.items():
        monkeypatch.setattr(transformers.modeling_utils, name, function, raising=False)
    checkpointing = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = None  # for gradient checkpointing, which nothing here asks for
    names = ["fairscale", "fairscale.nn", "fairscale.nn.checkpoint", checkpointing.__name__]
    for name in names:
        monkeypatch.setitem(sys.modules, name, checkpointing if name == names[-1] else types.ModuleType(name))
    folder = Path(FOUND.submodule_search_locations[0])
    for name, place in {
        "ImageReward": folder,
        "ImageReward.models": folder / "models",
        "ImageReward.models.BLIP": folder / "models" / "BLIP",
    }.items():
        empty = types.ModuleType(name)
        empty.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, empty)
    med = importlib.import_module("ImageReward.models.BLIP.med")
    methods = {
        "init_weights": lambda self: None,  # they are drawn below
        "get_head_mask": lambda self, mask, n_layers: [None] * n_layers,
        "invert_attention_mask": lambda self, mask: (1.0 - mask[:, None, None, :].float()) * torch.finfo().min,
    }
    for name, method in methods.items():
        monkeypatch.setattr(med.BertModel, name, method, raising=False)
    yield types.SimpleNamespace(
        vit=importlib.import_module("ImageReward.models.BLIP.vit"),
        med=med,
        reward=importlib.import_module("ImageReward.ImageReward"),
    )
    for name in [name for name in sys.modules if name.startswith("ImageReward.")]:
        del sys.modules[name]


def authors_model(package):
    """The package's parts put together as its `ImageReward.__init__` does, at our sizes, with random weights."""
    torch.manual_seed(0)
    eye = package.vit.VisionTransformer(
        img_size=SIZES.image_px,
        patch_size=SIZES.patch_px,
        embed_dim=SIZES.vision_width,
        depth=SIZES.vision_layers,
        num_heads=SIZES.vision_heads,
    )
    config = package.med.BertConfig(
        vocab_size=SIZES.vocab_size,
        hidden_size=SIZES.text_width,
        intermediate_size=SIZES.text_mlp,
        num_hidden_layers=SIZES.text_layers,
        num_attention_heads=SIZES.text_heads,
        max_position_embeddings=SIZES.text_positions,
        layer_norm_eps=1e-12,
        add_cross_attention=True,
        is_decoder=True,
    )
    config.encoder_width, config.add_type_embeddings = SIZES.vision_width, False
    model = torch.nn.Module()
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = eye
    model.blip.text_encoder = package.med.BertModel(config=config, add_pooling_layer=False)
    model.mlp = package.reward.MLP(SIZES.text_width)
    model.mean, model.std, model.device = SIZES.mean, SIZES.std, "cpu"
    for parameter in model.parameters():  # its own initial weights give rewards that are all but equal
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_the_authors_model_and_ours_give_the_same_rewards(package, tmp_path):
    theirs = authors_model(package)
    torch.save(theirs.state_dict(), tmp_path / "ImageReward.pt")
    ours = ImageRewardModel.load_official(tmp_path / "ImageReward.pt", SIZES)
    ids = torch.randint(1, SIZES.vocab_size, (6, 9))
    mask = (torch.arange(9) < torch.tensor([9, 8, 7, 5, 3, 2])[:, None]).long()
    pixels = torch.randn(6, 3, SIZES.image_px, SIZES.image_px)
    with torch.no_grad():
        expected = package.reward.ImageReward.score_gard(theirs, ids, mask, pixels).squeeze(1)
        got = ours(pixels, ids, mask)
    assert expected.std() > 0.1, "rewards that hardly differ would prove nothing"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_authors_preprocessing_is_ours(package):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 421, 3), dtype=np.uint8)
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels[:, :200]), Image.fromarray(pixels).convert("L")):
        expected = package.reward._transform(224)(picture)
        torch.testing.assert_close(to_pixel_values([picture], 224, 224, CLIP_MEAN, CLIP_STD)[0], expected)
