"""CLIP-T (picture against text) and CLIP-I (picture against photos of the subject), on open_clip.

The official model is ViT-B/32 with OpenAI's weights. A local folder holds any other open_clip model in the layout of
open_clip's `local-dir:` scheme: `open_clip_config.json` (`model_cfg`, `preprocess_cfg`), `model.safetensors` and a
Hugging Face tokenizer's files.

Shapes: N texts, H/W pixels, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import nn

from ibkit.errors import ModelError
from ibkit.runs import read_json
from ibkit.scorers import base
from ibkit.scorers.encoder import Encoder, OnEncoder
from ibkit.scorers.gradient import differentiable_pixel_values

# OpenAI trained with QuickGELU. open_clip 3 builds plain "ViT-B-32" with GELU even for its weights, and only warns.
OFFICIAL_MODEL, OFFICIAL_WEIGHTS = "ViT-B-32-quickgelu", "openai"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # on the hub, as open_clip prefers them
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass
class ClipEncoder(Encoder):
    """open_clip's `CLIP` with its own preprocessing.

    Attributes:
        preprocess: A picture to its (3, H, W) network input.
        tokenize: Texts to (N, L) ids, padded and cut to the model's context.
        count_tokens: A text to its length in tokens before the cut, special tokens included.
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]
    count_tokens: Callable[[str], int]
    evaluator: str
    device: str | torch.device = "cpu"
    batch_size: int = 64
    _warn_truncated: Callable[[str, int], None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self._warn_truncated = base.truncation_warning("CLIP", self.model.context_length)

    @classmethod
    def load(cls, weights: str | Path = "pocket", device: str | torch.device = "cpu") -> Self:
        """Load `"pocket"`, `"official"` or the `clip/` of a local weights folder; a ModelError where weights or
        tokenizer are missing, damaged, or do not fit the model.
        """
        if str(weights) == "official":
            return cls._load_official(device)
        folder = base.weights_folder("CLIP", weights, "clip", CONFIG_FILE, WEIGHTS_FILE, "tokenizer_config.json")
        kind = "pocket CLIP" if str(weights) == "pocket" else f"CLIP in {folder.parent.name}"
        return cls._load_folder(folder, device, kind)

    @classmethod
    def _load_official(cls, device: str | torch.device) -> Self:
        import open_clip

        with base.from_hub("CLIP", f"open_clip {OFFICIAL_MODEL}, {OFFICIAL_WEIGHTS}"):
            model, _, preprocess = open_clip.create_model_and_transforms(OFFICIAL_MODEL, pretrained=OFFICIAL_WEIGHTS)
        tokenizer = open_clip.get_tokenizer(OFFICIAL_MODEL)  # a part of open_clip, with no revision of its own
        repository = open_clip.get_pretrained_cfg(OFFICIAL_MODEL, OFFICIAL_WEIGHTS)["hf_hub"].rstrip("/")
        name = base.hub_name(repository, *WEIGHTS_FILES)
        base.check_vocabulary("CLIP", "open_clip", tokenizer.vocab_size, model.vocab_size)
        return cls(
            model,
            preprocess,
            tokenizer,
            lambda text: len(tokenizer.encode(text)) + 2,  # start and end of text
            f"CLIP ViT-B/32 (OpenAI, {name}); 224 px bicubic + centre crop, CLIP mean/std",
            device,
        )

    @classmethod
    def _load_folder(cls, folder: Path, device: str | torch.device, kind: str) -> Self:
        import open_clip
        from open_clip.tokenizer import get_clean_fn
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from transformers import AutoTokenizer

        try:
            config = read_json(folder / CONFIG_FILE)
            # Built here rather than through `local-dir:`, which leaves a model random when its weights are missing.
            model = open_clip.CLIP(**config["model_cfg"])
            preprocess_config = PreprocessCfg(**{**config["preprocess_cfg"], "size": model.visual.image_size[0]})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"CLIP: {folder / CONFIG_FILE} does not describe an open_clip model ({error}): restore it."
            ) from error
        with base.reading("CLIP", WEIGHTS_FILE, folder):
            base.load_state(model, folder / WEIGHTS_FILE)
        with base.reading("CLIP", "tokenizer", folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        base.check_vocabulary("CLIP", folder, len(tokenizer), model.vocab_size)
        if model.text_pool_type == "argmax" and tokenizer.eos_token_id != model.vocab_size - 1:
            raise ModelError(
                f"CLIP: the model in {folder} reads its text at the highest token id, but the end-of-text token has "
                f"id {tokenizer.eos_token_id} of {model.vocab_size}: move it to the end, or set pool_type and eos_id."
            )
        clean = get_clean_fn("whitespace")  # what open_clip does before a Hugging Face tokenizer

        def tokenize(texts: list[str]) -> torch.Tensor:
            limit = {"padding": "max_length", "truncation": True, "max_length": model.context_length}
            return tokenizer([clean(text) for text in texts], return_tensors="pt", **limit)["input_ids"]

        return cls(
            model,
            image_transform_v2(preprocess_config, is_train=False),
            tokenize,
            lambda text: len(tokenizer(clean(text), verbose=False)["input_ids"]),
            f"{kind}; {preprocess_config.size} px {preprocess_config.interpolation}, CLIP mean/std",
            device,
        )

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.preprocess(image.convert("RGB"))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        for text in texts:
            self._warn_truncated(text, self.count_tokens(text))
        return self.model.encode_text(self.tokenize(texts).to(self.device))


class _OnClip(OnEncoder):
    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        return cls(ClipEncoder.load(weights, device))


class ClipT(_OnClip):
    """CLIP-T: cosine of the picture's and the text's embedding; the text is without the identifier.

    Source: InstructBooth, appendix C (text fidelity).
    """

    name = "clip_t"
    needs = frozenset({"text"})

    def differentiable(self, pixels, texts):
        px = self.encoder.model.visual.image_size[0]
        values = differentiable_pixel_values(pixels.to(self.encoder.device), px, px, base.CLIP_MEAN, base.CLIP_STD)
        features = (self.encoder.image_features(values), self.encoder.text_features(list(texts)))
        return torch.nn.functional.cosine_similarity(*(one.float() for one in features))


class ClipI(_OnClip):
    """CLIP-I: mean cosine of the picture's embedding with those of all reference photos.

    No pair is left out: a picture that is itself a reference counts its cosine of 1 with itself.

    Source: DreamBooth, section 4.1; its mean over pictures is the mean over all pairs.
    """

    name = "clip_i"
    needs = frozenset({"references"})
