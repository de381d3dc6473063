"""CLIP-T (picture against text) and CLIP-I (picture against photos of the subject), on open_clip.

The official model is ViT-B/32 with OpenAI's weights. A local folder holds any other open_clip model:
`open_clip_config.json` (`model_cfg`, `preprocess_cfg`), `model.safetensors` and a Hugging Face tokenizer's files; it is
the layout of open_clip's `local-dir:` scheme.

Shapes: N pictures or texts, R reference photos, L text tokens, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ibkit.errors import ModelError
from ibkit.scorers.base import (
    ReferenceCache,
    Scorer,
    TruncationWarning,
    batches,
    check_vocabulary,
    embed_texts,
    from_hub,
    hub_name,
    mean_cosine,
    reading,
    require_files,
    weights_folder,
)

# OpenAI trained with QuickGELU. open_clip 3 builds plain "ViT-B-32" with GELU even for its weights, and only warns.
OFFICIAL_MODEL, OFFICIAL_WEIGHTS = "ViT-B-32-quickgelu", "openai"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # on the hub, as open_clip prefers them
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass
class ClipEncoder:
    """A CLIP model with its own preprocessing; `ClipT` and `ClipI` can share one.

    Attributes:
        model: open_clip's `CLIP`.
        preprocess: A picture to its (3, H, W) network input.
        tokenize: Texts to (N, L) ids, padded and cut to the model's context.
        count_tokens: A text to its length in tokens before the cut, special tokens included.
        evaluator: Model and preprocessing in words.
        device: Where the model runs.
        batch_size: Pictures or texts a forward pass.
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]
    count_tokens: Callable[[str], int]
    evaluator: str
    device: str | torch.device = "cpu"
    batch_size: int = 64
    _warn_truncated: TruncationWarning = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self._warn_truncated = TruncationWarning("CLIP", self.model.context_length)

    @classmethod
    def load(cls, weights: str | Path = "pocket", device: str | torch.device = "cpu") -> ClipEncoder:
        """Load `"pocket"`, `"official"` or the `clip/` of a local weights folder; see `make_scorer`.

        Raises:
            ModelError: The weights are missing, damaged, or do not fit the model, or the tokenizer does not.
        """
        if str(weights) == "official":
            return cls._load_official(device)
        folder = weights_folder("CLIP", weights, "clip")
        kind = "pocket CLIP" if str(weights) == "pocket" else f"CLIP in {folder.parent.name}"
        return cls.from_folder(folder, device, kind)

    @classmethod
    def _load_official(cls, device: str | torch.device) -> ClipEncoder:
        import open_clip

        with from_hub("CLIP", f"open_clip {OFFICIAL_MODEL}, {OFFICIAL_WEIGHTS}"):
            model, _, preprocess = open_clip.create_model_and_transforms(OFFICIAL_MODEL, pretrained=OFFICIAL_WEIGHTS)
        tokenizer = open_clip.get_tokenizer(OFFICIAL_MODEL)  # a part of open_clip, with no revision of its own
        repository = open_clip.get_pretrained_cfg(OFFICIAL_MODEL, OFFICIAL_WEIGHTS)["hf_hub"].rstrip("/")
        name = hub_name(repository, *WEIGHTS_FILES)
        check_vocabulary("CLIP", "open_clip", tokenizer.vocab_size, model.vocab_size)
        return cls(
            model,
            preprocess,
            tokenizer,
            lambda text: len(tokenizer.encode(text)) + 2,  # start and end of text
            f"CLIP ViT-B/32 (OpenAI, {name}); 224 px bicubic + centre crop, CLIP mean/std",
            device,
        )

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu", kind: str = "CLIP") -> ClipEncoder:
        """Load an open_clip folder; `kind` names the model in `evaluator`.

        Raises:
            ModelError: The weights are missing, damaged, or do not fit the model, or the tokenizer does not.
        """
        import open_clip
        from open_clip.tokenizer import get_clean_fn
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        folder = Path(folder)
        require_files("CLIP", folder, CONFIG_FILE, WEIGHTS_FILE, "tokenizer_config.json")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            # Built here rather than through `local-dir:`, which leaves a model random when its weights are missing.
            model = open_clip.CLIP(**config["model_cfg"])
            preprocess_config = PreprocessCfg(**{**config["preprocess_cfg"], "size": model.visual.image_size[0]})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"CLIP: {folder / CONFIG_FILE} does not describe an open_clip model ({error}): restore it."
            ) from error
        with reading("CLIP", WEIGHTS_FILE, folder):
            state = load_file(folder / WEIGHTS_FILE)
            model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
        with reading("CLIP", "tokenizer", folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        check_vocabulary("CLIP", folder, len(tokenizer), model.vocab_size)
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

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""
        features = []
        for batch in batches(images, self.batch_size):
            pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in batch])
            features.append(self.model.encode_image(pixels.to(self.device)))
        return normalize(torch.cat(features).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: (N, D) of unit length, on `device`; each different text is encoded once.

        A text over the model's context is cut, as is usual for CLIP-T, and named in a warning.
        """

        def embed(batch: list[str]) -> torch.Tensor:
            for text in batch:
                self._warn_truncated(text, self.count_tokens(text))
            return self.model.encode_text(self.tokenize(batch).to(self.device))

        return embed_texts(texts, embed, self.batch_size)


class ClipT(Scorer):
    """CLIP-T: cosine of the picture's and the text's embedding; the text is without the identifier.

    Source: InstructBooth, appendix C (text fidelity).
    """

    name = "clip_t"
    needs = frozenset({"text"})

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self.evaluator = encoder.evaluator

    @classmethod
    def load(cls, weights: str | Path = "pocket", device: str | torch.device = "cpu") -> ClipT:
        """Load from `"pocket"`, `"official"` or a local weights folder; see `make_scorer`."""
        return cls(ClipEncoder.load(weights, device))

    def _score(self, images, texts, references):
        return (self.encoder.images(images) * self.encoder.texts(texts)).sum(dim=1)


class ClipI(Scorer):
    """CLIP-I: mean cosine of the picture's embedding with those of all reference photos.

    No pair is left out: a picture that is itself a reference counts its cosine of 1 with itself.

    Source: DreamBooth, section 4.1; its mean over pictures is the mean over all pairs.
    """

    name = "clip_i"
    needs = frozenset({"references"})

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self.evaluator = encoder.evaluator
        self._references = ReferenceCache(encoder.images)

    @classmethod
    def load(cls, weights: str | Path = "pocket", device: str | torch.device = "cpu") -> ClipI:
        """Load from `"pocket"`, `"official"` or a local weights folder; see `make_scorer`."""
        return cls(ClipEncoder.load(weights, device))

    def _score(self, images, texts, references):
        return mean_cosine(self.encoder.images(images), self._references(references))
