"""PickScore: how well a picture fits its text, as people who chose between pictures see it (Kirstain et al. 2023).

The official model is `yuvalkirstain/PickScore_v1`, a CLIP ViT-H/14 tuned on their choices. A local folder holds any
other CLIP in transformers' format, with its tokenizer.

Shapes: N pictures or texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ibkit.errors import ModelError
from ibkit.scorers.base import (
    CLIP_MEAN,
    CLIP_STD,
    Scorer,
    TruncationWarning,
    batches,
    check_vocabulary,
    embed_texts,
    from_hub,
    hub_name,
    load_transformer,
    reading,
    require_files,
    to_pixel_values,
    tokenize,
    weights_folder,
)

OFFICIAL_REPOSITORY = "yuvalkirstain/PickScore_v1"
# PickScore's own repository has no tokenizer; its authors use that of the model it was tuned from.
OFFICIAL_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(Scorer):
    """Cosine of the picture's and the text's embedding by the tuned CLIP; the text is without the identifier.

    The model's own logit is this cosine times a learned temperature (about 100). The cosine is what papers report
    (.20 to .23), and neither changes which picture wins.

    Args:
        model: transformers' `CLIPModel`.
        tokenizer: its own.
        device: Where the model runs.
        evaluator: Model in words.
        batch_size: Pictures or texts a forward pass.

    Source: Kirstain et al. 2023, section 3, equation of s(x, y).
    """

    name = "pick_score"
    needs = frozenset({"text"})

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        device: str | torch.device = "cpu",
        evaluator: str = "PickScore",
        batch_size: int = 32,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.image_px = model.config.vision_config.image_size
        self.context = model.config.text_config.max_position_embeddings
        self.evaluator = f"{evaluator}; {self.image_px} px bicubic + centre crop, CLIP mean/std"
        self._warn_truncated = TruncationWarning("PickScore", self.context)

    @classmethod
    def load(cls, weights: str | Path = "official", device: str | torch.device = "cpu") -> PickScore:
        """Load `"official"` or the `pick_score/` of a local weights folder; see `make_scorer`.

        Raises:
            ModelError: The weights are missing, damaged, or do not fit the model, or the tokenizer does not.
        """
        from transformers import AutoTokenizer, CLIPModel

        if str(weights) == "official":
            with from_hub(cls.name, OFFICIAL_REPOSITORY):
                model = load_transformer(cls.name, CLIPModel, OFFICIAL_REPOSITORY)
            with from_hub(cls.name, OFFICIAL_TOKENIZER, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(OFFICIAL_TOKENIZER)
            where, name = OFFICIAL_TOKENIZER, hub_name(OFFICIAL_TOKENIZER, "tokenizer_config.json")
            kind = f"PickScore ({hub_name(OFFICIAL_REPOSITORY)}, tokenizer {name}), unscaled cosine"
        else:
            if str(weights) == "pocket":
                raise ModelError(
                    f"{cls.name}: the pocket weights have none: use weights='official', or leave this metric out."
                )
            where = weights_folder(cls.name, weights, "pick_score")
            require_files(cls.name, where, "config.json", "model.safetensors", "tokenizer_config.json")
            with reading(cls.name, "model", where):
                model = load_transformer(cls.name, CLIPModel, where)
                tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
            kind = f"PickScore in {where.parent.name}, unscaled cosine"
        check_vocabulary(cls.name, where, len(tokenizer), model.config.text_config.vocab_size)
        return cls(model, tokenizer, device, kind)

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""
        features = []
        for batch in batches(images, self.batch_size):
            pixels = to_pixel_values(batch, self.image_px, self.image_px, CLIP_MEAN, CLIP_STD)
            features.append(self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output)
        return normalize(torch.cat(features).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: (N, D) of unit length, on `device`; each different text is encoded once."""

        def embed(batch: list[str]) -> torch.Tensor:
            tokens = tokenize(self.tokenizer, batch, self.context, self._warn_truncated).to(self.device)
            return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output

        return embed_texts(texts, embed, self.batch_size)

    def _score(self, images, texts, references):
        return (self.images(images) * self.texts(texts)).sum(dim=1)
