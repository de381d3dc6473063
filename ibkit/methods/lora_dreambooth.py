"""DreamBooth with LoRA: the same loss and pictures, and a low-rank adapter is trained instead of the U-Net.

The field's usual answer to GPUs of 12 to 16 GiB (diffusers' `train_dreambooth_lora.py`, whose settings are the
defaults): no moments of 860 M weights, and a file of megabytes. The text encoder is frozen.

Differs from the recipe: as `dreambooth` does from its own, and the scale of the adapter is 1 (peft's alpha is the
rank), as there.
"""

from dataclasses import dataclass

from ibkit.fields import field
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.methods.records import Method


@dataclass(frozen=True)
class LoraDreamBoothConfig(DreamBoothConfig):
    """Settings; the defaults are those of diffusers' recipe, or where it has DreamBooth's own, InstructBooth's."""

    lora_rank: int = field(4, "rank of the adapter", "diffusers' recipe", low=1, high=1024)
    n_steps: int = field(500, "training steps", "diffusers' example with LoRA", low=1, high=1_000_000)
    learning_rate: float = field(1e-4, "of AdamW, constant", "diffusers' example with LoRA", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW", "diffusers' recipe", low=0.0, high=1.0)


METHOD = Method(
    name="lora_dreambooth",
    label="DreamBooth (LoRA)",
    stage="personalize",
    settings=LoraDreamBoothConfig,
    train=dreambooth.personalize,
    source="Hu et al. 2021, arXiv 2106.09685; diffusers' train_dreambooth_lora.py",
    pocket={
        **{name: dreambooth.METHOD.pocket[name] for name in ("batch", "prior_weight", "ema_decay", "n_class_images")},
        "n_steps": (1400, "the fewest at which six of eight subjects are kept: benchmarks/personalize.py"),
        "learning_rate": (4e-3, "as the RL stage's adapter there; not compared with others"),
        "lora_rank": (16, "of a U-Net that is 80 and 144 wide; not compared with other ranks"),
    },
    class_pictures=dreambooth.class_pictures,
    work=dreambooth.work,
)
