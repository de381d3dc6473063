"""What a job needs, looked at before its first stage and before a prediction: what would end a later stage after hours
ends the command at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from ibkit.data.photos import require_pictures
from ibkit.data.prompts import check_identifier
from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject
from ibkit.device import pick_device
from ibkit.errors import ModelError, ParameterError
from ibkit.job.stages import Stage
from ibkit.methods.records import METHODS
from ibkit.model import hub
from ibkit.model.loading import find
from ibkit.model.parts import check_parts, read_configs, square_side
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import preset_of
from ibkit.runs import hash_json, resolve
from ibkit.scorers import make_scorer

OFFICIAL = "official"  # weights that are downloaded
SHIPPED = ("pocket", "image_reward")  # weights and reward that are always there


def require_ready(stages: Sequence[Stage], scorers: bool = True) -> None:
    """Refuse a job of which a stage cannot do what its parameters ask for.

    Without `scorers` nothing is asked of the hub, as for a prediction.

    Raises:
        ParameterError: a device that is not here; a class, activity, prompt or identifier that cannot be.
        PhotoError: no photos, or a file among them that is no picture.
        ModelError: no model, or one of another kind; no weights of a reward or of the scorers.
    """
    for name in dict.fromkeys(stage.parameters["device"] for stage in stages):
        pick_device(name)
    asked = dict.fromkeys(tuple(s.parameters["prompts"]) for s in stages if "prompts" in s.parameters)
    for given in _distinct(s.parameters for s in stages if s.notebook.stem == "01_personalize"):
        place = _model(given["model"], given["revision"], download=scorers)
        if given["lora"] and place:
            _require_adapter(given["model"], place, resolve(given["lora"]))
        who = _subject(given)
        reader = _reader(given["model"], place) if place else None
        for prompts in asked:
            _require_prompts(given, who, prompts, reader)
    for cache in filter(None, {str(stage.parameters.get("picture_cache", "")) for stage in stages}):
        try:
            resolve(cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ParameterError(f"picture_cache={cache!r} cannot be a folder ({error}): give another.") from error
    for given in _distinct(stage.parameters for stage in stages):
        weights = given.get("scorer_weights") or preset_of(given["model"]).scorers
        if scorers or weights != OFFICIAL:
            _require_scorers(given, weights, judged=who.world is not None)


def _distinct(stages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameters of stages that differ in more than seeds, settings and folders."""
    not_asked = ("seed", "settings", "run_in", "run_out", "runs")
    found = {hash_json({k: v for k, v in given.items() if k not in not_asked}): given for given in stages}
    return list(found.values())


def _model(model: str, revision: str, download: bool) -> Path | None:
    """The model's folder or file; None where it would have to be downloaded, which the first stage does if it can."""
    if model in hub.HUB_NAMES or (hub.is_name(model) and not Path(model).expanduser().exists()):
        repository = hub.HUB_NAMES.get(model, model)
        folder, missing = hub.in_cache(repository, revision)
        if missing:
            if download:
                hub.require_reachable(repository, revision, missing[0])
            return None
    else:
        folder = find(model, revision)
    if folder.is_dir():
        check_parts(model, folder)
        square_side(model, read_configs(model, folder)["unet"].get("sample_size"))
    return folder


def _subject(given: dict[str, Any]) -> PersonalizedSubject:
    world = None if given["subject"] else demo_subject(given["class_noun"])
    if given["subject"]:
        require_pictures(resolve(given["subject"]))
    words = (given["class_noun"], given["identifier"], given["description"])
    return PersonalizedSubject("", *words, given["model"], given["revision"], world)


def _require_prompts(
    given: dict[str, Any], who: PersonalizedSubject, asked: Sequence[str], reader: TextToImage | None
) -> None:
    """Build each prompt, and read it by the model's tokenizer where that is here."""
    if reader:
        check_identifier(reader, who.identifier, who.class_noun)
    activities = choose_activities(who, asked, preset_of(given["model"]).activities)
    named = METHODS[given["method"]].names(who)
    prompts = [who.prompt(activity, identifier).text for activity in ["", *activities] for identifier in (True, False)]
    prompts += [named.prompt(activity).text for activity in activities]
    if reader:
        for prompt in prompts:
            reader.check_prompt(prompt)


def _reader(model: str, place: Path) -> TextToImage:
    """A model of which only the tokenizer is there."""
    from transformers import AutoTokenizer

    from ibkit.model.single_file import clip_tokenizer

    if place.is_file():
        tokenizer = clip_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer", trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ModelError(
                f"model {model!r}: the tokenizer in {place} cannot be read ({first}): restore it."
            ) from error
        room = read_configs(model, place)["text_encoder"].get("max_position_embeddings", 77)
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)
    nothing = cast(Any, None)
    return TextToImage(model, nothing, nothing, nothing, tokenizer, nothing, nothing)


def _require_adapter(model: str, place: Path, adapter: Path) -> None:
    """Put a LoRA of others on the model's U-Net, without its weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from ibkit.adapt.lora import attach_file
    from ibkit.job.memory import SD15_UNET

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_configs(model, place)["unet"] if place.is_dir() else SD15_UNET)
    nothing = cast(Any, None)
    attach_file(TextToImage(model, unet, nothing, nothing, nothing, nothing, nothing), "adapter", adapter)


def _require_scorers(given: dict[str, Any], weights: str, judged: bool) -> None:
    """Load once, on the CPU, what a later stage scores by and what the kit's own weights may lack."""
    from ibkit.evaluate.score import make_scorers

    rewards = [(given.get(name, ""), given.get(f"{name}_options", {})) for name in ("reward", "subject_reward")]
    if given.get("best_of"):
        rewards.append((given["best_of_reward"], {}))
    for scorer, options in rewards:
        if scorer and (weights, scorer) != SHIPPED:
            make_scorer(scorer, weights, "cpu", options)
    if "scorers" in given and (given["scorers"] or weights != SHIPPED[0]):
        make_scorers(given["scorers"], weights, "cpu", judged)
