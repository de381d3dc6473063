"""Loading a text-to-image model: the pocket's, a folder in diffusers format, one on the hub, or a single file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ibkit.errors import ModelError
from ibkit.model import hub
from ibkit.model.parts import N_TRAIN_STEPS, check_parts, read_configs, square_side
from ibkit.model.text_to_image import TextToImage, use_quick_attention

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

POCKET_PIPELINE = Path(__file__).parents[1] / "pocket" / "weights" / "pipeline"
# model.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors, pytorch_model.bin, ...
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)
VARIANTS = ("", "fp16", "bf16")  # in the order they are preferred; others after them
# What a file may hold beside the text encoder: other parts of CLIP, and a buffer of older versions.
NOT_READ = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "embeddings.position_ids")


def load_model(model: str = "pocket", revision: str = "", device: torch.device | str = "cpu") -> TextToImage:
    """Load a text-to-image model for sampling and training, all weights fp32.

    Args:
        model: "pocket"; "sd15" or another name on the hub (SD 1.x, or 2.x that predicts noise); a local folder in
            diffusers format, its weights safetensors or .bin, plain or of a variant; or a .safetensors file of SD 1.x.
        revision: of the hub's repository; empty = its main branch.

    Raises:
        ModelError: there is no such model, it cannot be had from the hub, is damaged or of another architecture, or
            its weights do not fit their config or are not finite.
    """
    source = find(model, revision)
    if source.is_file():
        from ibkit.model.single_file import read

        parts = read(source)
    else:
        parts = _read_folder(model, source)
    unet, vae, text_encoder, tokenizer, scheduler = parts
    if len(tokenizer) > text_encoder.config.vocab_size:  # a table that is padded has more rows, which nothing reads
        raise ModelError(
            f"model {model!r}: the tokenizer has {len(tokenizer)} tokens and the text "
            f"encoder {text_encoder.config.vocab_size}: its files are incomplete."
        )
    room = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > room:  # not every tokenizer's config says it
        tokenizer.model_max_length = room
    device = torch.device(device)
    autocast = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else None
    if device.type == "cuda" and not autocast and unet.config.sample_size > 16:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} has no bf16, which NVIDIA's GPUs have from Ampere (2020) on, "
            f"and a model of the size of {model!r} is not run without: use such a GPU, or the pocket model."
        )
    for part in (unet, vae, text_encoder):
        part.to(device).eval().requires_grad_(False)
    use_quick_attention(unet, device)
    return TextToImage(model, unet, vae, text_encoder, tokenizer, scheduler, device, autocast)


def find(model: str, revision: str = "") -> Path:
    """The folder or file of a model; one on the hub is downloaded where its cache lacks it. Raises as `load_model`
    does.
    """
    if model in hub.HUB_NAMES:
        return hub.obtain(hub.HUB_NAMES[model], revision)
    path = POCKET_PIPELINE if model == "pocket" else Path(model).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(
            f"model {model!r}: only .safetensors is read of single files; one of another kind can hold a program: take "
            "it in that format, or save it in diffusers format first."
        )
    if path.is_file() or (path / "unet" / "config.json").is_file():
        if revision:
            raise ModelError(f"model {model!r} is on this machine and has no revision {revision!r}: leave it out.")
        return path
    if path.exists():
        raise ModelError(
            f"model {model!r}: {path} is not a folder in diffusers format (it has no unet/config.json): give the "
            "folder that holds unet, vae, text_encoder, tokenizer and scheduler."
        )
    if hub.is_name(model):
        return hub.obtain(model, revision)
    raise ModelError(
        f"model {model!r} is not there: give 'pocket', 'sd15', a name on the hub such as 'some-org/some-model', a "
        "folder in diffusers format, or a .safetensors file."
    )


def _read_folder(model: str, folder: Path) -> tuple:
    """U-Net, autoencoder, text encoder, tokenizer and scheduler of a folder in diffusers format."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    check_parts(model, folder)
    configs = read_configs(model, folder)
    side = square_side(model, configs["unet"].get("sample_size"))
    # Of schedulers that sample in another way (Euler, DDPM) the noise levels are read; the sampler is the kit's own,
    # and its offset Stable Diffusion's.
    offset = {} if "steps_offset" in configs["scheduler"] else {"steps_offset": 1}
    fp32 = torch.float32
    try:
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False, **offset)
        if len(scheduler.betas) != N_TRAIN_STEPS or not ((scheduler.betas > 0) & (scheduler.betas < 1)).all():
            raise ModelError(
                f"model {model!r}: the noise levels of its scheduler (betas) are not {N_TRAIN_STEPS} numbers between 0 "
                "and 1: restore scheduler/scheduler_config.json, or give another model."
            )
        return (
            load_weights(UNet2DConditionModel, folder, "unet", torch_dtype=fp32, sample_size=side),
            load_weights(AutoencoderKL, folder, "vae", torch_dtype=fp32),
            load_weights(CLIPTextModel, folder, "text_encoder", dtype=fp32),
            AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False),
            scheduler,
        )
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"model {model!r}: a part of {folder} cannot be read ({first}): restore it.") from error


def load_weights(
    architecture: type[ModelMixin] | type[PreTrainedModel], folder: Path, part: str, **options
) -> torch.nn.Module:
    """A part of a diffusers folder, every weight of which comes from its file; `from_pretrained` only logs what does
    not fit and leaves the weights concerned random. Where there are weights of a variant alone (fp16), they are read.
    Weights that are missing, left over, of another shape or not finite, and a damaged file, are a ModelError.
    """
    where = f"the {part} in {folder}"
    variant, safe, files = _weights_of(folder / part, where)
    try:
        module, report = architecture.from_pretrained(
            folder, subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True,
            variant=variant or None, use_safetensors=safe, **options,
        )  # fmt: skip
    except SafetensorError as error:
        raise ModelError(f"{where}: its weights file is damaged ({error}): restore it.") from error
    missing = sorted(report["missing_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not key.startswith(NOT_READ))
    if adapter := next((key for key in left_over if ".base_layer." in key), ""):
        raise ModelError(
            f"{where} was saved with an adapter (LoRA) attached (first {adapter}): take it off or merge it, and "
            "save it again (unload_lora_weights or fuse_lora of its pipeline, or merge_and_unload of PEFT)."
        )
    wrapped = next((key for key in left_over if missing and key.endswith(f".{missing[0]}")), "")
    prefix = wrapped.removesuffix(missing[0]) if wrapped else ""
    if prefix and {prefix + key for key in missing} <= set(left_over):
        warnings.warn(
            f"{where}: the names of {len(missing)} weights begin with {prefix!r}, which a wrapper put there: they are "
            "read without it.",
            stacklevel=1,
        )
        return _unwrapped(module, where, prefix, files)
    return require_whole(module, where, missing, left_over, sorted(key for key, *_ in report["mismatched_keys"]))


def _unwrapped(module: torch.nn.Module, where: str, prefix: str, files: list[Path]) -> torch.nn.Module:
    """The module with the weights of its files, whose names are taken without a prefix."""
    from diffusers.models.model_loading_utils import load_state_dict

    state = module.state_dict()
    read = {name.removeprefix(prefix): weight for file in files for name, weight in load_state_dict(file).items()}
    own = {name: weight.float() for name, weight in read.items() if name in state or not name.startswith(NOT_READ)}
    fits = {name: weight for name, weight in own.items() if name in state and weight.shape == state[name].shape}
    module.load_state_dict(fits, strict=False, assign=True)
    return require_whole(
        module,
        where,
        sorted(state.keys() - own.keys()),
        sorted(own.keys() - state.keys()),
        sorted(own.keys() & state.keys() - fits.keys()),
    )


def _weights_of(folder: Path, where: str) -> tuple[str, bool, list[Path]]:
    """Which of a part's weights to read, by the names that diffusers and transformers give them: their variant, empty
    for the plain ones; whether they are safetensors (a .bin is read as weights only: it can run no program); the files.

    Raises:
        ModelError: there are none, or those in several files have no index.
    """
    names = [path.name for path in folder.iterdir()]
    found = [match for match in map(WEIGHTS.fullmatch, names) if match]
    if not found:
        there = ", ".join(sorted(names))
        raise ModelError(f"{where} has no weights (it has {there}): save it again with save_pretrained.")
    rank = {variant: i for i, variant in enumerate(VARIANTS)}
    first = min(
        found, key=lambda m: (m["kind"] != "safetensors", rank.get(m["variant"] or "", len(rank)), m["variant"])
    )
    if first["shard"] and not any(name.endswith(".json") and ".index." in name for name in names):
        raise ModelError(f"{where} has weights in several files and no index of them: restore its .index.json.")
    chosen = (first["variant"], first["kind"], bool(first["shard"]))
    files = [folder / m.string for m in found if (m["variant"], m["kind"], bool(m["shard"])) == chosen]
    return first["variant"] or "", first["kind"] == "safetensors", files


def require_whole(
    module: torch.nn.Module, where: str, missing: list[str], left_over: list[str], reshaped: list[str]
) -> torch.nn.Module:
    """The module, if every weight came from its file and is finite, else a ModelError.

    Args:
        where: for the message, such as "the unet in my_model".
        missing, left_over, reshaped: names of weights that the file lacks, has too much, or has in another shape.
    """
    found = {"missing": missing, "not of this model": left_over, "of another shape than its config says": reshaped}
    if not (missing or reshaped):  # else some weights hold no values
        found["not finite"] = [key for key, weight in module.state_dict().items() if not is_finite(weight)]
    if wrong := [f"{len(keys)} {what} (first {keys[0]})" for what, keys in found.items() if keys]:
        raise ModelError(
            f"{where} has weights that cannot be used: {', '.join(wrong)}; restore or download its files "
            "again, or save it again with save_pretrained."
        )
    return module


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are finite; a finite sum proves it five times faster."""
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())
