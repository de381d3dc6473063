"""PickScore: how well a picture fits its text, as people who chose between pictures see it (Kirstain et al. 2023).

The official model is `yuvalkirstain/PickScore_v1`, a CLIP ViT-H/14 tuned on their choices. A local folder holds any
other CLIP in transformers' format, with its tokenizer.
"""

from pathlib import Path
from typing import Self

import torch
from PIL import Image

from ibkit.errors import ModelError
from ibkit.scorers.base import CLIP_MEAN, CLIP_STD, Scorer, to_pixel_values
from ibkit.scorers.encoder import TransformersEncoder, load_with_tokenizer

OFFICIAL_REPOSITORY = "yuvalkirstain/PickScore_v1"
# PickScore's own repository has no tokenizer; its authors use that of the model it was tuned from.
OFFICIAL_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(TransformersEncoder, Scorer):
    """Cosine of the picture's and the text's embedding by the tuned CLIP; the text is without the identifier.

    The model's own logit is this cosine times a learned temperature (about 100). The cosine is what papers report
    (.20 to .23), and neither changes which picture wins.

    Source: Kirstain et al. 2023, section 3, equation of s(x, y).
    """

    name = "pick_score"
    label = "PickScore"
    needs = frozenset({"text"})

    def _configure(self, config) -> tuple[int, str]:
        self.image_px = config.vision_config.image_size
        preprocessing = f"{self.image_px} px bicubic + centre crop, CLIP mean/std"
        return config.text_config.max_position_embeddings, preprocessing

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load `"official"` or the `pick_score/` of a local weights folder; the pocket weights have none, which is a
        ModelError. See `load_with_tokenizer`.
        """
        from transformers import CLIPModel

        if str(weights) == "pocket":
            raise ModelError(
                f"{cls.name}: the pocket weights have none: use weights='official', or leave this metric out."
            )
        model, tokenizer, origin = load_with_tokenizer(
            cls.name, CLIPModel, OFFICIAL_REPOSITORY, weights, "pick_score", OFFICIAL_TOKENIZER
        )
        return cls(model, tokenizer, device, f"PickScore {origin}, unscaled cosine")

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return to_pixel_values([image], self.image_px, self.image_px, CLIP_MEAN, CLIP_STD)[0]

    def _score(self, images, texts, references):
        return (self.images(images) * self.texts(texts)).sum(dim=1)
