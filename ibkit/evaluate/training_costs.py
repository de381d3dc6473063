"""What each personalization of an evaluation trained, and what that cost."""

import math
from collections.abc import Sequence

import pandas as pd

from ibkit.adapt import Adapted
from ibkit.data.subject import personalization_of
from ibkit.evaluate.score import RUN_KINDS
from ibkit.runs import CompletedRun, input_of

KEYS_AND_VALUES, WORD = "keys and values of text", "the word's rows"
PARTS = {  # of a kind of delta; a tensor called "word ..." is a word's rows in any of them
    "unet": "the U-Net",
    "lora": "adapters in all attentions",
    "cross_kv": KEYS_AND_VALUES,
    "tokens": WORD,
    "mapper": "a network that makes the word",
}


def training_costs(evaluated: Sequence[CompletedRun]) -> pd.DataFrame:
    """One row for each part that a personalization trained, of finished runs of 03. A run that was evaluated and is
    gone is an ArtifactError.

    Returns:
        Table with arm, seed, subject (its class noun), part, weights, kilobytes (of the whole delta), steps, photos
        (that the steps saw, all together), seconds, class_pictures.
    """
    runs = {}
    for run in evaluated:
        for name in run.manifest["inputs"]:
            personalized = personalization_of(input_of(run, name, *RUN_KINDS))
            runs[str(personalized.folder)] = personalized
    return pd.concat([_costs(run) for run in runs.values()], ignore_index=True)


def _costs(run: CompletedRun) -> pd.DataFrame:
    from safetensors import safe_open

    delta, history, config = Adapted.read(run).deltas[-1], run.table("history.csv"), run.manifest["metrics"]["config"]
    weights: dict[str, int] = {}
    with safe_open(delta.file, "pt") as file:
        for name in file.keys():
            part = WORD if name.startswith("word ") else PARTS.get(delta.kind, delta.kind)
            weights[part] = weights.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    return pd.DataFrame(
        {
            "arm": delta.method,
            "seed": delta.seed,
            "subject": run.parameters["class_noun"],
            "part": list(weights),
            "weights": list(weights.values()),
            "kilobytes": delta.file.stat().st_size / 1000,
            "steps": len(history),
            "photos": len(history) * config["batch"],
            "seconds": history["seconds"].sum(),
            "class_pictures": config.get("n_class_images", 0) if config.get("prior_weight", 0) else 0,
        }
    )
