"""The trade of DreamBooth in the pocket world: what more steps, or larger ones, win in subject and cost in text.

    python -m benchmarks.personalize --out outputs/personalize            # 8 subjects x 3 seeds, two hours on one core
    python -m benchmarks.personalize --out outputs/personalize --subjects cat --seeds 0 --settings usual
    python -m benchmarks.personalize --out outputs/personalize --tables   # print what is there

The variants of DPG and RPO, beside LoRA DreamBooth on the same photos, prompts and noise, as notebook 03's scores:

    python -m benchmarks.personalize --out outputs/rpo --subjects cat dog --seeds 0 1 --settings rpo "rpo last"
    python -m benchmarks.personalize --out outputs/rpo --beside outputs/personalize --subjects cat dog \
        --scores outputs/rpo/scores.csv

The rule by which the pocket preset's number of steps is chosen (`chosen`): the fewest at which the mean over subjects
and seeds has the same subject in 88 % of the pictures or more and the prompt shown in 30 to 75 %, where the paper's
DreamBooth is (people: 81 % text, 97 % subject).

One training gives the whole curve: it ends at each of `LOOKS`, draws its pictures from fixed noise, which the judge
looks at, and continues. A training that is there is not made again, so a stopped sweep goes on; several can share a
folder, each with its own subjects. Writes `<subject>-<setting>-<seed>.csv`, one row a picture, and the pictures of each
look as one.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ibkit.adapt import Adapted
from ibkit.data.subject import PersonalizedSubject, choose_activities, demo_subject, world_photos
from ibkit.evaluate.stats import KEYS, check_scores
from ibkit.experiments.variants import DPG, RPO, train
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.methods.records import METHODS, Job
from ibkit.model.loading import load_model
from ibkit.model.sample import sample
from ibkit.pocket.world import CLASSES, activities_of
from ibkit.presets import POCKET
from ibkit.scorers.judge import Judge

LOOKS = {  # steps
    "dreambooth": (200, 300, 450, 600, 800),
    "lora_dreambooth": (600, 1000, 1400),
    "textual_inversion": (200, 400),
    "custom_diffusion": (400, 800),
    "neti": (200, 400, 1000),
    "dpg": (600, 1000, 1400),
    "rpo": (400,),
}
KEPT, SHOWN = 0.88, (0.30, 0.75)  # of the rule
BETWEEN_CHECKPOINTS = 50  # steps, the most that a continued training repeats
N_PICTURES = 8  # of each prompt
N_PHRASES = 5
IDENTIFIER = "sks"
# name -> (method, settings that differ from its preset)
SETTINGS: dict[str, tuple[str, dict]] = {
    "usual": ("dreambooth", {}),
    "last": ("dreambooth", {"ema_decay": 0.0}),
    "heavy prior": ("dreambooth", {"prior_weight": 1.0}),
    "fast": ("dreambooth", {"learning_rate": 7e-4}),
    "slow": ("dreambooth", {"learning_rate": 3e-4}),
    "former": ("dreambooth", {"learning_rate": 7e-4, "prior_weight": 1.0, "ema_decay": 0.0}),
    "lora": ("lora_dreambooth", {}),
    "lora slow": ("lora_dreambooth", {"learning_rate": 2e-3}),
    "lora fast": ("lora_dreambooth", {"learning_rate": 8e-3}),
    "lora heavy prior": ("lora_dreambooth", {"prior_weight": 1.0}),
    "lora wide": ("lora_dreambooth", {"lora_rank": 32}),
    "lora batch": ("lora_dreambooth", {"batch": 8}),
    "lora last": ("lora_dreambooth", {"ema_decay": 0.0}),
    "word": ("textual_inversion", {}),
    "word one row": ("textual_inversion", {"n_vectors": 1}),
    "custom": ("custom_diffusion", {}),
    "custom slow": ("custom_diffusion", {"learning_rate": 1e-3}),
    "custom fast": ("custom_diffusion", {"learning_rate": 1e-2}),
    "custom fast light prior": ("custom_diffusion", {"learning_rate": 1e-2, "prior_weight": 0.3}),
    "neti": ("neti", {}),
    "neti slow": ("neti", {"learning_rate": 1e-3}),
    "rpo slow": ("rpo", {"learning_rate": 2e-3}),
    "rpo fast": ("rpo", {"learning_rate": 8e-3}),
    "rpo no average": ("rpo", {"ema_decay": 0.0}),
    "rpo slow last": ("rpo", {"learning_rate": 2e-3, "early_stopping": False}),
    "rpo fast last": ("rpo", {"learning_rate": 8e-3, "early_stopping": False}),
    "rpo no average last": ("rpo", {"ema_decay": 0.0, "early_stopping": False}),
    "rpo sharp": ("rpo", {"temperature": 0.05}),
}
ARMS = {"lora": "lora_dreambooth"} | {  # setting -> the arm of notebooks 10 and 11
    name.replace("_", " "): name for name, each in (DPG | RPO).items() if name != "lora_dreambooth" and not each.start
}
SETTINGS |= {name: (each.method, dict(each.settings)) for name, arm in ARMS.items() if (each := (DPG | RPO)[arm])}


def train_and_look(noun: str, setting: str, seed: int, folder: Path, weights: str, looks: Sequence[int]) -> None:
    """One training of one subject, ended at each look and continued to the next; writes its table at the end."""
    table = folder / f"{noun}-{setting}-{seed}.csv".replace(" ", "_")
    if table.exists():
        return
    world, judge, started, rows = demo_subject(noun), Judge.load(), time.monotonic(), []
    method, given = SETTINGS[setting]
    config = POCKET.settings(method, given | {"checkpoint_every": BETWEEN_CHECKPOINTS})
    cache, work, photos = folder / "class-images", folder / ".work" / table.stem, world_photos(world)
    who = METHODS[method].names(PersonalizedSubject(noun, noun, IDENTIFIER, "", weights, "", world))
    phrases = ["", *activities_of(noun)[:N_PHRASES]]
    asked = [phrase for phrase in phrases for _ in range(N_PICTURES)]
    prompts = [who.prompt(phrase).text for phrase in asked]
    for steps in looks or LOOKS[method]:
        if (seen := work / f"look-{steps:05d}.csv").exists():  # of a sweep that was stopped later: its weights are gone
            rows.append(pd.read_csv(seen, keep_default_na=False))
            continue
        model = load_model(weights)
        n_class = METHODS[method].class_pictures(config)
        pictures = class_images(model, who.class_prompt, n_class, POCKET.class_sampler, cache, seed=0)
        asked_for = [who.prompt(activity) for activity in choose_activities(who, [], POCKET.activities)]
        reward = RewardSpec(METHODS[method].reward) if METHODS[method].reward else None
        job = Job(Adapted.of(model), who, photos, method, seed, work, pictures, asked_for, reward)
        history = train(model, job, method, replace(config, n_steps=steps))
        drawn = sample(model, prompts, list(range(N_PICTURES)) * len(phrases), POCKET.sampler)
        mosaic(drawn, N_PICTURES).save(folder / f"{table.stem}-{steps:04d}.png")
        look = pd.DataFrame({"phrase": asked, "image_seed": [i % N_PICTURES for i in range(len(asked))]})
        look["shown"] = judge.agrees(drawn, "activity", [phrase or "none" for phrase in asked]).int()
        look["same_subject"] = judge.identifies(drawn, world).int()
        look["right_class"] = judge.agrees(drawn, "class", [noun] * len(drawn)).int()
        look["pose"] = judge.answers(drawn, "pose")
        rows.append(look.assign(subject=noun, setting=setting, seed=seed, steps=len(history)))
        write_table(rows[-1], seen)
        means = look[look["phrase"] != ""][["shown", "same_subject"]].mean()
        print(f"{noun} {setting} seed {seed} step {steps}: {means.to_dict()}", flush=True)
    write_table(pd.concat(rows), table)
    shutil.rmtree(work, ignore_errors=True)  # a training that variants share stays beside it
    print(f"{table.name}: {time.monotonic() - started:.0f} s", flush=True)


def write_table(rows: pd.DataFrame, path: Path) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    rows.to_csv(temporary, index=False)
    temporary.replace(path)


def mosaic(pictures: Sequence[Image.Image], n_columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (n_columns * width, -(-len(pictures) // n_columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % n_columns * width, i // n_columns * height))
    return sheet


def curve(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Prompt shown and same subject, of prompts with an activity, and same subject of the bare prompt; shares."""
    asked, bare = rows[rows["phrase"] != ""], rows[rows["phrase"] == ""]
    table = asked.groupby(by)[["shown", "same_subject", "right_class"]].mean()
    return table.assign(bare_same=bare.groupby(by)["same_subject"].mean())


def of_subjects(rows: pd.DataFrame) -> pd.DataFrame:
    """The curve's means over subjects, each of which counts the same however many seeds it has."""
    return curve(rows, ["setting", "steps", "subject"]).groupby(["setting", "steps"]).mean()


def chosen(rows: pd.DataFrame) -> pd.Series:
    """Setting -> the number of steps by the rule; a setting that never keeps it has none."""
    means = of_subjects(rows)
    kept = means[(means["same_subject"] >= KEPT) & means["shown"].between(*SHOWN)]
    return kept.reset_index("steps").groupby("setting")["steps"].min()


def as_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The end of each training as the scores of notebooks 10 and 11, which claims read, with LoRA DreamBooth's where
    there is another: a row a picture of an activity.
    """
    rows = rows[rows["setting"].isin(ARMS) & (rows["phrase"] != "")]
    of = ["subject", "seed"]
    others = rows.loc[rows["setting"] != "lora", of].drop_duplicates()
    rows = rows.merge(others, on=of)
    rows = rows[rows["steps"] == rows.groupby([*of, "setting"])["steps"].transform("max")]
    named = {"prompt_id": rows["phrase"], "activity": rows["phrase"], "class_noun": rows["subject"]}
    text = [f"a {IDENTIFIER} {noun} {phrase}" for noun, phrase in zip(rows["subject"], rows["phrase"], strict=True)]
    scores = rows.assign(**named, arm=rows["setting"].map(ARMS), tune_seed=None, identifier=True, text=text)
    scores = scores.rename(columns={"shown": "judge_text", "same_subject": "judge_identity"})
    columns = [*KEYS, "class_noun", "activity", "text", "steps", "judge_text", "judge_identity"]
    return check_scores(scores)[columns].sort_values(list(KEYS), ignore_index=True)


def read(folders: Sequence[Path]) -> pd.DataFrame:
    paths = [path for folder in folders for path in sorted(folder.glob("*-*-*.csv"))]
    return pd.concat([pd.read_csv(path, keep_default_na=False) for path in paths], ignore_index=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--settings", nargs="+", default=["lora"], choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="pocket")
    parser.add_argument(
        "--looks", nargs="+", type=int, default=[], help="steps at which to look (default: the method's)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--beside", nargs="+", type=Path, default=[], help="folders whose tables are printed too")
    parser.add_argument("--scores", type=Path, help="write the ends of notebook 10's and 11's variants as scores there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if not arguments.tables and not arguments.scores:
        for seed in arguments.seeds:
            for setting in arguments.settings:
                for noun in arguments.subjects:
                    train_and_look(noun, setting, seed, arguments.out, arguments.model, arguments.looks)
    rows = read([arguments.out, *arguments.beside])
    if arguments.scores:
        chosen_rows = rows["subject"].isin(arguments.subjects) & rows["seed"].isin(arguments.seeds)
        as_scores(rows[chosen_rows]).to_csv(arguments.scores, index=False)
        print(f"{arguments.scores}: ibkit claims {arguments.scores.parent}")
        return 0
    with pd.option_context("display.max_rows", None, "display.max_columns", None, "display.width", 160):
        print(of_subjects(rows).round(2))
        print(curve(rows, ["setting", "steps", "subject"])[["shown", "same_subject"]].round(2).unstack())
        print(f"\nby the rule: {chosen(rows).to_dict() or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
