"""What RL optimises and how, side by side in the pocket world: text alone, text and subject; DDPO, DPOK,
the reward's own gradient.

    python -m benchmarks.arms --out outputs/arms                        # cat and dog, three RL seeds, the first arms
    python -m benchmarks.arms --out outputs/arms --subjects cat --arms text "text and subject" --rl-seeds 0
    python -m benchmarks.arms --out outputs/early --start dreambooth --steps 500    # from another start
    python -m benchmarks.arms --out outputs/arms --tables               # print what is there

All arms of a subject start from one personalized model ("start" in the tables), and are drawn from the same noise.
What is there is not made again, and a training that was stopped goes on from its checkpoint; several can share the
folder, each with arms or seeds of its own. Writes `<subject>-<arm>-<seed>.csv`, one row a picture, and beside it the
history of the training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.personalize import mosaic
from ibkit.adapt import Adapted
from ibkit.data.prompts import Prompt, training_prompts
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.errors import ParameterError
from ibkit.evaluate.tunings import arm_shares, read_arms
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.records import METHODS, Job
from ibkit.model.loading import load_model
from ibkit.model.sample import sample
from ibkit.model.text_to_image import TextToImage
from ibkit.pocket.world import CLASSES
from ibkit.presets import POCKET
from ibkit.scorers import make_scorer
from ibkit.scorers.judge import Judge
from ibkit.train.monitor import SubjectMonitor

IDENTIFIER = "sks"
# arm -> (clip the text at its level, the subject's scorer, method, settings that differ from its preset); the subject's
# score is clipped at its level
ARMS: dict[str, tuple[bool, str, str, dict]] = {
    "text": (False, "", "ddpo", {}),
    "text and subject": (True, "subject", "ddpo", {"combine": "synergy"}),
    "text and DINO": (True, "dino", "ddpo", {"combine": "synergy"}),
    "text clipped": (True, "", "ddpo", {}),
    "floor": (True, "subject", "ddpo", {"combine": "synergy", "spread_floor": 1.0}),  # text and subject, with it
    "sum": (True, "subject", "ddpo", {"combine": "sum"}),
    "harmonic": (True, "subject", "ddpo", {"combine": "harmonic"}),
    "DPOK": (False, "", "dpok", {}),
    "DPOK without KL": (False, "", "dpok", {"kl_weight": 0.0}),
    "DPOK strong KL": (False, "", "dpok", {"kl_weight": 1.0}),
    "DRaFT": (False, "", "draft", {}),
    "DRaFT long": (False, "", "draft", {"n_epochs": 20}),  # the reward passes its level, and the pictures fall apart
    "DRaFT clipped": (True, "", "draft", {}),
    "DRaFT three steps": (False, "", "draft", {"truncate": 3}),
    "DRaFT-LV": (False, "", "draft", {"n_renoised": 2}),
    "AlignProp": (False, "", "draft", {"random_truncation": True}),
    "ReFL": (False, "", "refl", {}),
    "ReFL without prior": (False, "", "refl", {"prior_weight": 0.0}),
}


def look(
    model: TextToImage, prompts: list[Prompt], n: int, judge: Judge, who: PersonalizedSubject, sheet: Path
) -> pd.DataFrame:
    """`n` pictures of each prompt from fixed noise, saved as one sheet, and the judge's answers, one row a picture."""
    asked = [prompt for prompt in prompts for _ in range(n)]
    seeds = [1000 + i for i in range(n)] * len(prompts)
    drawn = sample(model, [prompt.text for prompt in asked], seeds, POCKET.sampler)
    mosaic(drawn, n).save(sheet)
    activities = [prompt.activity for prompt in asked]
    subject = make_scorer("subject", "pocket")(drawn, references=world_photos(who.world))
    return pd.DataFrame(
        {
            "phrase": activities,
            "identifier": [prompt.identifier for prompt in asked],
            "image_seed": seeds,
            "shown": judge.agrees(drawn, "activity", activities).int(),
            "pose": judge.agrees(drawn, "pose", activities).int(),
            "things": judge.agrees(drawn, "things", activities).int(),
            "same_subject": judge.identifies(drawn, who.world).int(),
            "subject_score": subject.double(),
        }
    )


def personalized(who: PersonalizedSubject, folder: Path, method: str, n_steps: int) -> TextToImage:
    """The subject's personalized model, from the checkpoint of its training; 0 steps are the preset's.

    Raises:
        ParameterError: the arms in the folder start from another one.
    """
    config = POCKET.settings(method, {"n_steps": n_steps} if n_steps else {})
    note, this = folder / "start.json", {"method": method, "n_steps": config.n_steps}
    if not note.exists():
        note.write_text(json.dumps(this) + "\n")
    if (there := json.loads(note.read_text())) != this:
        raise ParameterError(f"the arms in {folder} start from {there}, not from {this}: name another folder.")
    model, cache = load_model("pocket"), folder / "class-images"
    pictures = class_images(model, who.class_prompt, config.n_class_images, POCKET.class_sampler, cache, seed=0)
    start, photos = Adapted.of(model), world_photos(who.world)
    METHODS[method].train(model, Job(start, who, photos, method, 0, folder / f".{who.name}-start", pictures), config)
    return model


def run_arm(
    noun: str, arm: str, seed: int, folder: Path, n_pictures: int, n_epochs: int, start: str, n_steps: int
) -> None:
    name = f"{noun}-{arm}-{seed}".replace(" ", "_")
    if (folder / f"{name}.csv").exists():
        return
    started, judge, world = time.monotonic(), Judge.load(), demo_subject(noun)
    who = PersonalizedSubject(noun, noun, IDENTIFIER, "", "pocket", "", world)
    prompts = training_prompts(list(POCKET.activities), noun, IDENTIFIER, "", True)
    model, photos = personalized(who, folder, start, n_steps), world_photos(world)
    before = folder / f"{noun}-start.csv"
    if not before.exists():
        look(model, prompts, n_pictures, judge, who, before.with_suffix(".png")).to_csv(before, index=False)
    clip_text, scorer, method, settings = ARMS[arm]
    config = POCKET.settings(method, settings | ({"n_epochs": n_epochs} if n_epochs else {}))
    text = RewardSpec("image_reward", clip_at_level=clip_text)
    subject = RewardSpec(scorer, clip_at_level=True) if scorer else None
    watch = SubjectMonitor(who, photos, make_scorer(POCKET.monitor, "pocket"), judge, make_scorer("clip_t", "pocket"))

    def say(row: dict, network: TextToImage) -> None:
        if row["epoch"] % 5 == 4:
            shown, same = row.get("judge_activity", float("nan")), row.get("judge_identity", float("nan"))
            seconds = time.monotonic() - started
            print(f"{name} {row['epoch'] + 1}: reward {row['reward']:.2f} shown {shown:.2f} same {same:.2f} "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip

    work = folder / f".{name}"
    n_class, pictures = METHODS[method].class_pictures(config), []
    if n_class:
        pictures = class_images(
            load_model("pocket"), who.class_prompt, n_class, POCKET.class_sampler, folder / "class-images", seed=0
        )
    job = Job(Adapted.of(model), who, photos, method, seed, work, pictures, prompts, text, subject, POCKET.guard)
    rows = METHODS[method].train(model, job, config, on_row=say, monitor=watch)
    pd.DataFrame(rows).to_csv(folder / f"{name}-history.csv", index=False)
    table = look(model, prompts, n_pictures, judge, who, folder / f"{name}.png")
    table.to_csv(folder / f"{name}.tmp", index=False)
    (folder / f"{name}.tmp").replace(folder / f"{name}.csv")
    shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=["cat", "dog"], choices=CLASSES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:3], choices=list(ARMS))
    parser.add_argument("--rl-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=60, help="of each prompt, after training")
    parser.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    parser.add_argument("--start", default=POCKET.personalize, choices=["dreambooth", "lora_dreambooth"])
    parser.add_argument("--steps", type=int, default=0, help="of the start; 0 = the preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only print the table of what is there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if not arguments.tables:
        for seed in arguments.rl_seeds:
            for noun in arguments.subjects:
                for arm in arguments.arms:
                    run_arm(
                        noun, arm, seed, arguments.out, arguments.pictures, arguments.epochs, arguments.start,
                        arguments.steps,
                    )  # fmt: skip
    rows = read_arms(arguments.out)
    named = rows[rows["identifier"]].assign(both=lambda table: table["shown"] * table["same_subject"])
    columns = ["shown", "pose", "things", "same_subject", "both", "subject_score"]
    with pd.option_context("display.max_rows", None, "display.max_columns", None, "display.width", 160):
        print(named.groupby(["subject", "arm", "phrase"])[columns].mean().round(2))
        print(named.groupby(["subject", "arm", "rl_seed"])[columns].mean().round(2))
        print("\nmean over RL seeds, lowest and highest seed:")
        print(arm_shares(rows).round(2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
