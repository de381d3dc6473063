"""The parts of a model in diffusers format, by their configs: whether they are Stable Diffusion 1.x's or 2.x's and fit
each other. No weight is read, so it is found before hours and gigabytes are spent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibkit.errors import ModelError
from ibkit.runs import read_json

N_TRAIN_STEPS = 1000  # noise levels that the methods count on
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
SD_WIDTHS = (320, 640, 1280, 1280)  # block_out_channels of Stable Diffusion 1.x and 2.x, and of diffusers' default
CLIP = ("clip", "clip_text_model")  # model_type of a text encoder
# A U-Net's input channels beside 4, and what such a model is made for.
CHANNELS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an image-editing model", 9: "an inpainting model"}


def read_configs(model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The config of each part; a ModelError where one is missing or damaged."""
    configs = {}
    for part, name in PARTS.items():
        path = folder / part / name
        try:
            configs[part] = read_json(path)
            if not isinstance(configs[part], dict):
                raise ValueError("it is no table")
        except FileNotFoundError:
            raise ModelError(
                f"model {model!r}: a part of {folder} cannot be read: there is no {part}/{name}; restore it."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(
                f"model {model!r}: {path} cannot be read ({str(error).splitlines()[0]}): restore it."
            ) from error
    return configs


def check_parts(model: str, folder: Path) -> None:
    """Refuse (ModelError) a folder whose parts do not make a text-to-image model of SD 1.x or 2.x, and name what does
    not fit.
    """
    configs = read_configs(model, folder)
    if not (folder / "tokenizer").is_dir():
        raise ModelError(f"model {model!r}: there is no folder tokenizer in {folder}: restore it.")
    if wrong := _misfit(configs, two_encoders=(folder / "text_encoder_2").is_dir()):
        raise ModelError(
            f"model {model!r} is not a text-to-image model of Stable Diffusion 1.x or 2.x: {wrong}; give one that is."
        )
    scheduler = configs["scheduler"]
    if "flow" in str(scheduler.get("_class_name", "")).lower() or scheduler.get("prediction_type") == "flow_prediction":
        raise ModelError(
            f"model {model!r} is trained by flow matching ({scheduler.get('_class_name')}), and ibkit's methods are "
            "written for noise prediction: give a model of SD 1.x or 2.x."
        )
    if (predicts := scheduler.get("prediction_type", "epsilon")) != "epsilon":
        raise ModelError(
            f"model {model!r} predicts {predicts}; ibkit's methods are written for noise prediction (epsilon), as in "
            "SD 1.x and the base models of 2.x."
        )
    if (levels := scheduler.get("num_train_timesteps", N_TRAIN_STEPS)) != N_TRAIN_STEPS:
        raise ModelError(
            f"model {model!r}: its scheduler has {levels} noise levels (num_train_timesteps) and ibkit's methods take "
            f"{N_TRAIN_STEPS}: give a model that was trained on so many."
        )


def widths_of(model: str) -> tuple[int, ...]:
    """The widths of the U-Net of a local folder; of any other model Stable Diffusion's, which what is counted has."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return SD_WIDTHS
    return tuple(read_configs(model, folder)["unet"].get("block_out_channels", SD_WIDTHS))


def square_side(model: str, sample_size: Any) -> int:
    """The side of a U-Net's square latents, from its config's `sample_size`: a number or a pair of equal ones, else a
    ModelError.
    """
    sides = sample_size if isinstance(sample_size, list | tuple) else [sample_size]
    if len(set(sides)) == 1 and type(sides[0]) is int and sides[0] > 0:
        return sides[0]
    raise ModelError(
        f"model {model!r}: its U-Net has the sample_size {sample_size!r}, and ibkit needs the side of square latents: "
        "write it into unet/config.json, such as 64 for pictures of 512 px."
    )


def _misfit(configs: Mapping[str, Mapping[str, Any]], two_encoders: bool) -> str:
    """What keeps the parts from being a model, in words; a value that a config lacks is that of diffusers."""
    unet, vae, text_encoder = (configs[part] for part in ("unet", "vae", "text_encoder"))
    channels, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latents = vae.get("latent_channels", 4)
    width, text_width = unet.get("cross_attention_dim", 1280), text_encoder.get("hidden_size", 512)
    kind = text_encoder.get("model_type", "clip_text_model")
    if two_encoders or unet.get("addition_embed_type"):
        return "it has what only Stable Diffusion XL has, a second text encoder or a U-Net that takes its output"
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        return "its U-Net takes a class or noise level beside the text (an upscaler or unCLIP model)"
    if channels != out:
        return f"its U-Net takes {channels} channels and gives {out} ({CHANNELS.get(channels, 'not text alone')})"
    if channels != latents:
        return f"its U-Net takes {channels} channels and its autoencoder has {latents}"
    if kind not in CLIP:
        return f"its text encoder is of the kind {kind!r} and not CLIP's"
    if width != text_width:
        return f"its U-Net reads texts {width} wide (cross_attention_dim) and its text encoder gives {text_width}"
    return ""
