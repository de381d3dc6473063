"""The numbers that the paper publishes, each with its table, to print beside ours.

Source: InstructBooth: Instruction-following Personalized Text-to-Image Generation (arXiv:2312.03011), tables 1 to 3.
They were measured on Stable Diffusion v1.5 at 512 px with the evaluators named here. Numbers from the pocket model
and its pocket evaluators have the same direction but another scale: never compare the two in absolute value.
"""

from dataclasses import dataclass

PAPER = "InstructBooth, arXiv:2312.03011"


@dataclass(frozen=True)
class PublishedNumber:
    """One published value.

    Attributes:
        arm: the kit's name of it.
        metric: the kit's name of the metric (`people_text` and `people_subject`: shares of "yes" of human raters).
        value: as printed; shares as fractions of 1.
        table: the number of the table in the paper.
    """

    arm: str
    metric: str
    value: float
    table: int


TABLE_TITLES = {
    1: "Table 1: people, own set (8 subjects × 5 phrases × 10 images, 7 raters, majority vote)",
    2: "Table 2: own set (8 subjects × 5 phrases × 10 images)",
    3: "Table 3: DreamBench (30 subjects × 25 prompts × 4 images), the paper's own implementation",
}

EVALUATORS = {
    "clip_t": "CLIP, as published: cosine of image and prompt embeddings",
    "image_reward": "ImageReward, official checkpoint",
    "pick_score": "PickScore, unscaled",
    "dino": "DINO ViT-S/16, mean cosine to the references",
    "people_text": "people on Amazon MTurk: “Is the alignment of the image with the text correct?”",
    "people_subject": "people on Amazon MTurk: “Do the objects closely resemble those in the given image?”",
}

# Our metric -> the paper's closest one: the judge plays the part of the raters.
COUNTERPART = {"judge_text": "people_text", "judge_identity": "people_subject"}

_ARMS = ("custom_diffusion", "dreambooth", "neti", "textual_inversion", "dreambooth+ddpo")
_COLUMNS: dict[int, dict[str, tuple[float, ...]]] = {
    1: {
        "people_text": (0.915, 0.813, 0.855, 0.600, 0.973),
        "people_subject": (0.928, 0.970, 0.938, 0.800, 0.970),
    },
    2: {
        "clip_t": (0.323, 0.310, 0.311, 0.271, 0.323),
        "image_reward": (1.088, 0.441, 0.480, -1.15, 1.196),
        "pick_score": (0.224, 0.220, 0.218, 0.206, 0.227),
        "dino": (0.535, 0.699, 0.643, 0.576, 0.650),
    },
}
_DREAMBENCH = {
    "textual_inversion": (0.257, -1.337, 0.203, 0.537),
    "dreambooth": (0.297, 0.052, 0.214, 0.648),
    "dreambooth+ddpo": (0.306, 0.651, 0.217, 0.661),
}

PUBLISHED: tuple[PublishedNumber, ...] = tuple(
    PublishedNumber(arm, metric, value, table)
    for table, columns in _COLUMNS.items()
    for metric, values in columns.items()
    for arm, value in zip(_ARMS, values, strict=True)
) + tuple(
    PublishedNumber(arm, metric, value, 3)
    for arm, values in _DREAMBENCH.items()
    for metric, value in zip(("clip_t", "image_reward", "pick_score", "dino"), values, strict=True)
)


def published(arm: str, metric: str) -> list[PublishedNumber]:
    """The published values to print beside our `metric` of `arm`, in the order of the tables."""
    wanted = COUNTERPART.get(metric, metric)
    return [number for number in PUBLISHED if number.arm == arm and number.metric == wanted]
