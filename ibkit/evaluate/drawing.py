"""Making the pictures of an evaluation: the same bytes when resumed, and once where several evaluations share them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from ibkit.adapt import Adapted
from ibkit.data.photos import png
from ibkit.evaluate.best_of import BestOf, is_chosen
from ibkit.evaluate.stats import SEEDS
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.runs import Run, cached, hash_json
from ibkit.scorers.base import batches

Key = tuple[str, int | None, int | None]  # arm, seed of the personalization, seed of the tuning


def generate(
    run: Run,
    rows: pd.DataFrame,
    load_arm: Callable[[Key], TextToImage],
    sampler: Sampler,
    batch_size: int,
    on_image: Callable[[int], None] = lambda there: None,
    best: BestOf | None = None,
    cache: Path | None = None,
    models: Mapping[Key, Adapted] | None = None,
) -> None:
    """Make the pictures of `rows` that the run does not have yet, each an output of the run.

    A picture's noise depends on its image_seed alone. Batches are always cut in the same places and a batch with a
    missing picture is computed whole, so that a resumed run gives the same bytes even where arithmetic depends on the
    batch size.

    Args:
        rows: from `jobs`.
        load_arm: loads a model; called once for each that has pictures to make.
        batch_size: pictures made at a time.
        on_image: called with the number of pictures that exist, of len(rows); first with those that existed before.
        best: draws the arms that keep the best of several pictures; needed where `rows` has such.
        cache: folder for pictures that evaluations on one kind of device share, such as those of the base model; None =
            every evaluation makes its own.
        models: as `Inputs.models`; needed with `cache`.
    """
    n_done = sum(run.has(path) for path in rows["image"])
    on_image(n_done)
    for values, group in rows.groupby(["arm", *SEEDS], sort=False, dropna=False):
        arm, *seeds = values
        key = (arm, *(None if pd.isna(seed) else int(seed) for seed in seeds))
        parts = list(batches(group, batch_size))
        loaded: list[TextToImage] = []  # frees the last model before the next one is loaded

        def draw(number: int, arm=arm, key=key, parts=parts, loaded=loaded) -> list[bytes]:
            loaded or loaded.append(load_arm(key))
            part = parts[number]
            prompts, noise = list(part["prompt"]), list(part["image_seed"])
            if best and is_chosen(arm):
                pictures = best.draw(loaded[0], prompts, list(part["text"]), noise, sampler, batch_size)
            else:
                pictures = sample(loaded[0], prompts, noise, sampler, batch_size)
            return [png(picture) for picture in pictures]

        folder = None
        if cache and models and not is_chosen(arm) and not all(map(run.has, group["image"])):
            facts = [models[key].key, list(group["prompt"]), list(group["image_seed"]), str(sampler), batch_size]
            folder = cache / hash_json(facts)[:16]
            names = [f"{i:05d}.png" for i in range(len(group))]

            def told(made: int, before=n_done) -> None:
                on_image(before + made)

            cached(folder, list(batches(names, batch_size)), draw, told)
        for number, part in enumerate(parts):
            missing = {path: i for i, path in enumerate(part["image"]) if not run.has(path)}
            made = draw(number) if missing and folder is None else []
            for path, i in missing.items():
                if folder is not None:
                    run.link(path, folder / f"{number * batch_size + i:05d}.png")
                else:
                    run.write_bytes(path, made[i])
            n_done += len(missing)
            if missing and folder is None:
                on_image(n_done)
        if folder is not None:
            on_image(n_done)
