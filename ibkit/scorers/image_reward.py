"""ImageReward: a reward model of human preference for a picture given its text.

BLIP's vision transformer, BERT that cross-attends to it, and an MLP on the text's first token (Xu et al. 2023,
"ImageReward", section 3 and appendix B). One class serves the official checkpoint (ViT-L, 447 M parameters) and the
pocket-size model; only `RewardConfig` differs.

Shapes: B batch, C/H/W channels and pixels, P patches + 1, L text tokens, V vision width, D text width.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import nn

from ibkit.errors import ModelError
from ibkit.runs import read_json
from ibkit.scorers import base
from ibkit.scorers.gradient import differentiable_pixel_values

OFFICIAL_REPOSITORY = "THUDM/ImageReward"
OFFICIAL_TOKENIZER = "bert-base-uncased"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "ibkit-image-reward-1"

# Official name -> our name; `\1` is the block number. Everything under text_encoder keeps its name.
_RENAMES = [
    (r"blip\.visual_encoder\.cls_token", r"vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", r"vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", r"vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.visual_encoder\.norm\.", r"vision.post_layernorm."),
    (r"blip\.text_encoder\.", r"text."),
    (r"mlp\.layers\.", r"head."),
]
# Heads of BLIP's pre-training and a constant buffer; the reward uses neither.
_DROPPED = re.compile(r"blip\.(vision_proj\.|text_proj\.|text_encoder\.embeddings\.position_ids$)")


@dataclass(frozen=True)
class RewardConfig:
    """Sizes and constants of a reward model; the defaults are the official checkpoint's."""

    image_px: int = 224  # side of the square picture, a multiple of patch_px
    patch_px: int = 16
    vision_width: int = 1024  # V
    vision_mlp: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    vocab_size: int = 30524  # rows of the text embedding
    tokenizer_size: int = 30522  # entries of the tokenizer; the official embedding has two rows more, unused in scoring
    text_width: int = 768  # D
    text_mlp: int = 3072
    text_layers: int = 12
    text_heads: int = 12
    text_positions: int = 512  # rows of the position embedding
    text_dropout: float = 0.0  # in training
    head_widths: tuple[int, ...] = (1024, 128, 64, 16)  # hidden; linear layers only, no activation (the official code)
    head_dropout: tuple[float, ...] = (0.2, 0.2, 0.1)  # in training, after each hidden layer but the last
    max_tokens: int = 35  # texts are cut and padded to this length
    mean: float = 0.16717362830052426  # of the raw reward over a reference set
    std: float = 1.0333394966054072  # likewise; the score is (raw - mean) / std

    def __post_init__(self) -> None:
        # JSON has lists only
        object.__setattr__(self, "head_widths", tuple(self.head_widths))
        object.__setattr__(self, "head_dropout", tuple(self.head_dropout))
        n, n_dropout = len(self.head_widths), len(self.head_dropout)
        for wrong, sentence in (
            (n_dropout != n - 1, f"{n} head widths need {n - 1} dropout values, got {n_dropout}"),
            (self.image_px % self.patch_px, f"image_px {self.image_px} is no multiple of patch_px {self.patch_px}"),
            (
                self.max_tokens > self.text_positions,
                f"max_tokens {self.max_tokens} is over text_positions {self.text_positions}",
            ),
        ):
            if wrong:
                raise ModelError(f"image_reward: {sentence}: correct the config.")

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read `save_pretrained`'s config.json; raises ModelError if it is something else."""
        try:
            values = read_json(path)
        except ValueError as error:
            raise ModelError(f"image_reward: {path} is not JSON ({error}): restore it.") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ModelError(f"image_reward: {path} is no {FORMAT} config: name a folder that save_pretrained wrote.")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ModelError(f"image_reward: {path} has the unknown entries {', '.join(unknown)}: update ibkit.")
        return cls(**values)


class ImageRewardModel(nn.Module):
    """The reward model: `vision`, `text` and `head` (names after the mapping of the official checkpoint).

    Fresh weights are random and trainable (std 0.02 in both transformers, PyTorch's default in the head).
    """

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.config = config
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=config.vision_width,
                intermediate_size=config.vision_mlp,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_heads,
                image_size=config.image_px,
                patch_size=config.patch_px,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
                initializer_range=0.02,  # the library's default, 1e-10, does not train from scratch
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.text_width,
                encoder_hidden_size=config.vision_width,
                intermediate_size=config.text_mlp,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                max_position_embeddings=config.text_positions,
                hidden_dropout_prob=config.text_dropout,
                attention_probs_dropout_prob=config.text_dropout,
                layer_norm_eps=1e-12,
                # padding is masked, so no embedding row is special; special ids would only serve text generation
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
                sep_token_id=None,
                is_decoder=True,  # makes the cross-attention; forward stays bidirectional
                attn_implementation="eager",  # this model adds its mask to the scores, so the mask must be a float one
            ),
            add_pooling_layer=False,
        )
        layers: list[nn.Module] = []
        for width, hidden, dropout in zip_longest(
            (config.text_width, *config.head_widths), (*config.head_widths, 1), config.head_dropout
        ):
            layers += [nn.Linear(width, hidden)] + ([] if dropout is None else [nn.Dropout(dropout)])
        self.head = nn.Sequential(*layers)

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Reward of each picture for its text, (raw - mean) / std, (B,).

        Args:
            pixel_values: (B, 3, H, W), normalised with CLIP's mean and std.
            input_ids: (B, L) token ids, L at most `config.text_positions`.
            attention_mask: (B, L), 1 for tokens and 0 for padding.

        Source: Xu et al. 2023, section 3.2; the official `ImageReward.score`.
        """
        patches = self.vision(pixel_values).last_hidden_state  # (B, P, V)
        tokens = self.text(input_ids, attention_mask, encoder_hidden_states=patches).last_hidden_state  # (B, L, D)
        raw = self.head(tokens[:, 0]).squeeze(-1)  # (B,)
        return (raw - self.config.mean) / self.config.std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; the tokenizer's files go beside them by its own save_pretrained."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, strictly, in evaluation mode; a file that is missing, unreadable, or does
        not fit the config is a ModelError.
        """
        folder = Path(folder)
        base.require_files("image_reward", folder, CONFIG_FILE, WEIGHTS_FILE)
        model = cls(RewardConfig.from_json(folder / CONFIG_FILE))
        with base.reading("image_reward", WEIGHTS_FILE, folder):
            base.load_state(model, folder / WEIGHTS_FILE)
        return model.eval()

    @classmethod
    def load_official(cls, checkpoint: str | Path | None = None, config: RewardConfig | None = None) -> Self:
        """Load an official-format checkpoint (`ImageReward.pt`), strictly, in evaluation mode; a ModelError where it
        cannot be had or read, or its tensors are not the ones expected.

        Args:
            checkpoint: The file; without it, from the hub's cache or the hub (1.8 GB).
            config: Its sizes; the published model's if not given.
        """
        if checkpoint is None:
            from huggingface_hub import hf_hub_download

            with base.from_hub("image_reward", OFFICIAL_REPOSITORY):
                checkpoint = hf_hub_download(OFFICIAL_REPOSITORY, "ImageReward.pt")
        with base.as_model_error(f"image_reward: {checkpoint} cannot be read as tensors", "download it again"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ModelError(f"image_reward: {checkpoint} is no state dict of tensors: name the file ImageReward.pt.")
        model = cls(config or RewardConfig())
        wrong = f"image_reward: {checkpoint} does not hold the expected model"
        with base.as_model_error(wrong, "name the file ImageReward.pt"):
            model.load_state_dict(map_official(state))
        return model.eval()


def map_official(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an official ImageReward state dict to `ImageRewardModel`'s names; an entry that the official checkpoint
    does not have is a ModelError.
    """
    mapped = {}
    for name, tensor in state.items():
        if _DROPPED.match(name):
            continue
        hits = (re.subn("^" + pattern, replacement, name) for pattern, replacement in _RENAMES)
        renamed = next((renamed for renamed, n_hits in hits if n_hits), None)
        if renamed is None:
            raise ModelError(f"image_reward: the checkpoint has an unknown entry {name!r}: is it ImageReward.pt?")
        mapped[renamed] = tensor
    return mapped


def read_levels(folder: Path) -> dict[str, base.Level]:
    """The table of a weights folder, `level.json`: {"a cat dancing": [mean, std], ..., "": [mean, std]}; empty without
    one, a ModelError where it is damaged or an entry is not two finite numbers.
    """
    file = folder / "level.json"
    if not file.is_file():
        return {}
    with base.reading(ImageReward.name, file.name, folder):
        levels = {text: base.Level(*map(float, pair)) for text, pair in read_json(file).items()}
        if not all(math.isfinite(number) for level in levels.values() for number in level):
            raise ValueError("a number is not finite")
    return levels


class ImageReward(base.Scorer):
    """How well people would like the picture for its text (higher is better; about -2 to 2).

    Args:
        tokenizer: A Hugging Face tokenizer with padding; its size must be `model.config.tokenizer_size`.
        evaluator: Model in words.
        levels: Text -> scores of true pictures for it; "" stands for any other text.
    """

    name = "image_reward"
    needs = frozenset({"text"})
    batch_size = 32

    def __init__(
        self,
        model: ImageRewardModel,
        tokenizer,
        device: str | torch.device = "cpu",
        evaluator: str = "ImageReward",
        levels: Mapping[str, base.Level] | None = None,
    ) -> None:
        config = model.config
        base.check_vocabulary(self.name, getattr(tokenizer, "name_or_path", ""), len(tokenizer), config.tokenizer_size)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.levels = dict(levels or {})
        self.evaluator = (
            f"{evaluator}; {config.image_px} px bicubic + centre crop, CLIP mean/std, "
            f"text cut at {config.max_tokens} tokens"
        )
        self._warn_truncated = base.truncation_warning(self.name, config.max_tokens)

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        from transformers import AutoTokenizer

        if str(weights) == "official":
            with base.from_hub(cls.name, OFFICIAL_TOKENIZER, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(OFFICIAL_TOKENIZER)
            model = ImageRewardModel.load_official()
            name = base.hub_name(OFFICIAL_REPOSITORY, "ImageReward.pt")
            reads = base.hub_name(OFFICIAL_TOKENIZER, "tokenizer_config.json")
            return cls(model, tokenizer, device, f"ImageReward ({name}, tokenizer {reads})")
        folder = base.weights_folder(cls.name, weights, cls.name)
        model = ImageRewardModel.from_pretrained(folder)
        base.require_files(cls.name, folder, "tokenizer_config.json")
        with base.reading(cls.name, "tokenizer", folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = "pocket reward model" if str(weights) == "pocket" else f"reward model in {folder.name}"
        return cls(model, tokenizer, device, f"{kind} (ImageReward's architecture)", levels=read_levels(folder))

    def level(self, text: str) -> base.Level | None:
        """That of the text in the weights' table, else that of all texts together (the text "")."""
        return self.levels.get(text, self.levels.get(""))

    def encode_text(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, each (B, max_tokens)."""
        encoded = base.tokenize(self.tokenizer, texts, self.model.config.max_tokens, self._warn_truncated)
        return encoded["input_ids"], encoded["attention_mask"]

    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Network input (B, 3, H, W)."""
        px = self.model.config.image_px
        return base.to_pixel_values(images, px, px, base.CLIP_MEAN, base.CLIP_STD)

    def _score(self, images, texts, references):
        scores = []
        for pairs in base.batches(list(zip(images, texts, strict=True)), self.batch_size):
            some, theirs = map(list, zip(*pairs, strict=True))
            inputs = self.encode_images(some), *self.encode_text(theirs)
            scores.append(self.model(*(one.to(self.device) for one in inputs)).cpu())
        return torch.cat(scores)

    def differentiable(self, pixels, texts):
        px = self.model.config.image_px
        ids, mask = (one.to(self.device) for one in self.encode_text(list(texts)))
        values = differentiable_pixel_values(pixels.to(self.device), px, px, base.CLIP_MEAN, base.CLIP_STD)
        return self.model(values, ids, mask).float()


class WeakReward(ImageReward):
    """The pocket world's badly trained reward: the same model, trained briefly and without hard negatives.

    It exists to be hacked (notebook 02): it takes a change of scene for the activity that the text asks for.
    """

    name = "weak_reward"

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        """As the other scorers do; raises ModelError for `"official"`: nobody publishes a bad reward on purpose."""
        if str(weights) == "official":
            raise ModelError(f"{cls.name}: it is a lesson of the pocket world; choose image_reward as the reward.")
        return super().load(weights, device)
