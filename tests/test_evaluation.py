"""The images of the evaluation: which there are, that the same seed makes the same picture, and what is scored."""

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import ibkit.scorers.base as scorers_base
from ibkit.adapt import Adapted, attach
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.device import generator
from ibkit.errors import ArtifactError, ModelError, ParameterError, ScoreError
from ibkit.evaluate.score import (
    drift,
    evaluators,
    generate,
    image_seeds,
    jobs,
    make_scorers,
    prompt_ids,
    read_inputs,
    real_photos,
    score,
)
from ibkit.evaluate.stats import METRICS, as_compared, check_scores, one_seed, pair_up, primary_metrics
from ibkit.model.loading import load_model
from ibkit.model.sample import Sampler, sample
from ibkit.runs import Run, read_run
from ibkit.scorers import Scorer
from ibkit.scorers.judge import THINGS_TAKEN, Judge, JudgeNet
from tests.tiny import tiny_model

ACTIVITIES = ["playing soccer", "riding a bike"]
SUBJECT = PersonalizedSubject("cat", "cat", "sks", "", "pocket", "", demo_subject("cat"))
SAMPLER = Sampler(3, 2.0, 1.0)
MODELS = [
    ("base", None, None),
    ("dreambooth", 0, None),
    ("dreambooth+ddpo", 0, 0),
    ("dreambooth+ddpo", 0, 7),
]


class Brightness(Scorer):
    """A toy metric: how bright the picture is."""

    name, evaluator, needs = "clip_t", "mean brightness", frozenset({"text"})

    def _score(self, images, texts, references):
        return torch.tensor([np.asarray(image).mean() / 255 for image in images])


class Likeness(Brightness):
    """A toy metric: how close the brightness is to that of the references."""

    name, evaluator, needs = "dino", "likeness in brightness", frozenset({"references"})

    def _score(self, images, texts, references):
        return 1 - (super()._score(images, texts, None) - super()._score(references, None, None).mean()).abs()


SCORERS = {"clip_t": Brightness(), "dino": Likeness()}


@pytest.fixture
def rows():
    return jobs(SUBJECT, ACTIVITIES, 3, MODELS, seed=5)


@pytest.fixture
def judge():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = JudgeNet((8, 8, 8, 8))
    accuracy = {"renders": 0.991, "reconstructions": 0.975, "n": 400}
    questions = ("class", "activity", "pose", "things", "place", "accessory", "identity")
    return Judge(net, {"accuracy": {q: accuracy for q in questions}})


# --- which images --------------------------------------------------------------------------------------------------


def test_every_scorer_is_a_metric_with_a_label():
    assert set(map(scorers_base.column_of, scorers_base.SCORERS)) <= set(METRICS)


def test_every_arm_has_its_rows(rows):
    seeds = rows[["seed", "tune_seed"]].fillna(-1)
    counts = rows.assign(**seeds).groupby(["arm", "seed", "tune_seed", "identifier"]).size().to_dict()
    assert counts == {
        ("base", -1, -1, False): 6,
        ("dreambooth", 0, -1, True): 6,
        ("dreambooth", 0, -1, False): 6,
        ("dreambooth+ddpo", 0, 0, True): 6,
        ("dreambooth+ddpo", 0, 0, False): 6,
        ("dreambooth+ddpo", 0, 7, True): 6,
        ("dreambooth+ddpo", 0, 7, False): 6,
    }
    assert rows["image"].is_unique
    assert rows["image"].iloc[0] == "images/base/playing-soccer-class-000.png"
    assert rows["image"].iloc[-1] == "images/dreambooth+ddpo-seed0-tune7/riding-a-bike-class-002.png"
    without_rl = jobs(SUBJECT, ACTIVITIES, 1, MODELS[:2])
    assert set(without_rl["arm"]) == {"base", "dreambooth"} and without_rl["seen"].isna().all()
    trained = jobs(SUBJECT, ACTIVITIES, 1, MODELS, trained=["riding a bike"])
    assert trained.groupby("activity")["seen"].unique().map(list).to_dict() == {
        "playing soccer": [False],
        "riding a bike": [True],
    }


def test_arms_share_prompts_and_noise(rows):
    cells = rows.groupby(["arm", "tune_seed", "identifier", "prompt_id"], dropna=False)["image_seed"].agg(tuple)
    assert cells.nunique() == 1 and list(cells.iloc[0]) == image_seeds(5, 3)
    assert rows.groupby("activity")["prompt_id"].unique().map(tuple).to_dict() == {
        "playing soccer": ("playing-soccer",),
        "riding a bike": ("riding-a-bike",),
    }
    texts = rows.drop_duplicates(["identifier", "prompt_id"]).set_index(["identifier", "prompt_id"])
    assert texts.loc[(True, "playing-soccer"), "prompt"] == "a sks cat playing soccer"
    assert texts.loc[(False, "playing-soccer"), "prompt"] == "a cat playing soccer"
    assert set(texts["text"]) == {"a cat playing soccer", "a cat riding a bike"}


def test_the_statistics_pair_what_is_not_tuned_with_every_tuning(rows):
    table = as_compared(check_scores(rows.assign(clip_t=np.arange(len(rows)) / 100)))
    pairs = pair_up({m: table[table["arm"] == m] for m in ("base", "dreambooth", "dreambooth+ddpo")}, "clip_t")
    assert {m: p.shape for m, p in pairs.items()} == {"base": (1, 6), "dreambooth": (1, 6), "dreambooth+ddpo": (2, 6)}


def test_one_seed_is_of_the_personalization_that_all_arms_share(rows):
    later = [("dreambooth", 1, None), ("dreambooth+ddpo", 1, 3), ("dreambooth+ddpo", 1, 4)]
    alone = one_seed(jobs(SUBJECT, ACTIVITIES, 1, [*MODELS[:2], *later]))
    assert set(zip(alone["arm"], alone["image"].str.split("/").str[1], strict=True)) == {
        ("base", "base"), ("dreambooth", "dreambooth-seed1"), ("dreambooth+ddpo", "dreambooth+ddpo-seed1-tune3")
    }  # fmt: skip
    assert len(one_seed(rows)) == 3 * 2 * 5 and 7 not in set(one_seed(rows)["tune_seed"])


def test_noise_is_that_of_no_other_seed_and_of_no_training_stream():
    seeds = image_seeds(0, 50)
    assert seeds[:10] == image_seeds(0, 10) and len(set(seeds)) == 50
    assert not set(seeds) & set(image_seeds(1, 50))
    trained = {int(torch.randint(2**31, (), generator=generator(0, "class image", i))) for i in range(200)}
    assert not set(seeds) & trained


def test_prompt_names_stay_apart():
    ids = prompt_ids(["Playing soccer!", "playing soccer", "playing soccer", "на пляже", "?"])
    assert list(ids.values()) == ["playing-soccer", "playing-soccer-2", "на-пляже", "prompt"]


@pytest.mark.parametrize(("activities", "n_images"), [([], 3), (ACTIVITIES, 0)])
def test_an_evaluation_of_nothing_is_refused(activities, n_images):
    with pytest.raises(ParameterError, match="at least one activity and one image"):
        jobs(SUBJECT, activities, n_images, MODELS)


# --- making them ---------------------------------------------------------------------------------------------------


@pytest.fixture
def load_arm(tokenizer):
    """A tiny model for each arm and seed; remembers what was loaded."""

    def load(key):
        load.calls.append(key)
        return tiny_model(tokenizer, seed=MODELS.index(key))

    load.calls = []
    return load


def make(folder, rows, load_arm, resume=False, **options):
    run = Run.open(folder, "03_evaluate", {}, resume=resume)
    generate(run, rows, load_arm, SAMPLER, batch_size=4, **options)
    run.finish()
    return {path: (run.folder / path).read_bytes() for path in rows["image"]}


def test_a_resumed_run_makes_only_what_is_missing_and_makes_the_same(tmp_path, rows, load_arm):
    first = make(tmp_path / "run", rows, load_arm)
    assert load_arm.calls == MODELS
    removed = rows["image"].iloc[8]
    before = {path: (tmp_path / "run" / path).stat().st_mtime_ns for path in rows["image"]}
    (tmp_path / "run" / removed).unlink()
    load_arm.calls.clear()
    counted = []
    with pytest.warns(UserWarning, match="missing"):
        again = make(tmp_path / "run", rows, load_arm, resume=True, on_image=counted.append)
    assert again == first
    assert load_arm.calls == [("dreambooth", 0, None)] and counted == [len(rows) - 1, len(rows)]
    after = {path: (tmp_path / "run" / path).stat().st_mtime_ns for path in rows["image"]}
    assert [path for path in after if after[path] != before[path]] == [removed]
    assert read_run(tmp_path / "run").path(removed).is_file()


def test_a_picture_is_what_its_row_says(tmp_path, rows, load_arm, tokenizer):
    pictures = make(tmp_path / "run", rows.iloc[:6], load_arm)
    row = rows.iloc[4]
    (alone,) = sample(tiny_model(tokenizer, seed=0), [row.prompt], [int(row.image_seed)], SAMPLER)
    made = np.asarray(Image.open(io.BytesIO(pictures[row.image]))).astype(int)
    assert np.abs(made - np.asarray(alone)).max() <= 1  # rounding may differ with the batch, nothing else does
    assert pictures[rows["image"].iloc[0]] != pictures[rows["image"].iloc[1]]


def test_evaluations_share_the_pictures_of_a_model(tmp_path, rows, load_arm):
    """The second draws nothing that the first drew; a damaged cache is mended, and all bytes are as without it."""
    rows = rows[rows["arm"] != "dreambooth+ddpo"]
    alone = make(tmp_path / "alone", rows, load_arm)
    models = {key: SimpleNamespace(key=str(key)) for key in MODELS}
    shared, counted = {"cache": tmp_path / "cache", "models": models}, []
    assert make(tmp_path / "first", rows, load_arm, **shared, on_image=counted.append) == alone
    assert counted[0] == 0 and counted[-1] == len(rows) and counted == sorted(counted)
    load_arm.calls.clear()
    assert make(tmp_path / "second", rows, load_arm, **shared) == alone and load_arm.calls == []
    (kept,) = {path.stat().st_nlink for path in (tmp_path / "cache").glob("*/*.png")}
    assert kept == 3  # the cache and two runs: one file
    damaged = next(iter(sorted((tmp_path / "cache").glob("*/00000.png"))))
    damaged.unlink()
    damaged.write_bytes(b"no picture")
    assert make(tmp_path / "third", rows, load_arm, **shared) == alone and len(load_arm.calls) == 1
    # Another noise is another picture.
    load_arm.calls.clear()
    make(tmp_path / "fourth", rows.assign(image_seed=rows["image_seed"] + 1), load_arm, **shared)
    assert len(load_arm.calls) == len(set(rows["arm"]))


def test_progress_counts_up_to_all(tmp_path, rows, load_arm):
    counted = []
    make(tmp_path / "run", rows.iloc[:12], load_arm, on_image=counted.append)
    assert counted == [0, 4, 6, 10, 12]


# --- scoring them --------------------------------------------------------------------------------------------------


@pytest.fixture
def scored_folder(tmp_path, rows):
    rng = np.random.default_rng(0)
    for path in rows["image"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / path)
    return tmp_path


def test_scores_are_columns_whatever_the_batch(scored_folder, rows, judge):
    rows = rows.iloc[:8]
    photos, counted = world_photos(SUBJECT.world, 2), []
    table = score(rows, scored_folder, photos, SUBJECT, SCORERS, judge, batch_size=5, on_image=counted.append)
    assert counted[-1] == len(rows) and counted[0] == 5
    assert list(table.columns[len(rows.columns) :]) == [
        "clip_t", "dino", "judge_text", "judge_class", "judge_activity", "judge_pose", "judge_things", "judge_place",
        "judge_accessory", "judge_identity",
    ]  # fmt: skip
    expected = [np.asarray(Image.open(scored_folder / path)).mean() / 255 for path in rows["image"]]
    assert table["clip_t"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert table["judge_place"].isna().all() and table["judge_activity"].isin((0, 1)).all()
    pd.testing.assert_frame_equal(table, score(rows, scored_folder, photos, SUBJECT, SCORERS, judge))
    assert primary_metrics(check_scores(table)) == {"text": "judge_text", "subject": "judge_identity"}


def test_references_of_another_subject_are_refused(scored_folder, rows):
    with pytest.raises(ScoreError, match="references show dog, but there are pictures of cat"):
        score(rows.iloc[:2], scored_folder, world_photos(SUBJECT.world, 2), replace(SUBJECT, name="dog"), SCORERS)


class Embedding:
    """Stands for DINO: a picture's unit vector in the plane, its angle set by its mean brightness."""

    def embed(self, images):
        angles = torch.tensor([np.asarray(image).mean() / 255 for image in images])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_drift_is_the_distance_from_the_base_models_picture_of_the_same_noise(scored_folder, rows):
    values = drift(rows, scored_folder, Embedding(), batch_size=5)
    personalized = (rows["arm"] != "base") & ~rows["identifier"]
    assert values.notna().equals(personalized)
    light = {path: np.asarray(Image.open(scored_folder / path)).mean() / 255 for path in rows["image"]}
    row = rows[personalized].iloc[-1]
    base = rows[(rows["arm"] == "base") & (rows["prompt_id"] == row.prompt_id) & (rows["image_seed"] == row.image_seed)]
    expected = 1 - np.cos(light[row.image] - light[base["image"].item()])
    assert values[row.name] == pytest.approx(expected, abs=1e-6)


def test_real_photos_are_compared_with_the_others_only():
    photos = [Image.new("RGB", (8, 8), (v, v, v)) for v in (0, 51, 255)]

    class Cosine(Likeness):
        def _score(self, images, texts, references):
            angles = [[torch.tensor(np.asarray(i).mean() / 255) for i in group] for group in (images, references)]
            return torch.stack([torch.stack([(a - b).cos() for b in angles[1]]).mean() for a in angles[0]])

    rows = real_photos(photos, SUBJECT, {"clip_t": Brightness(), "dino": Cosine()})
    assert rows["dino"].tolist() == pytest.approx(
        [(np.cos(0.2) + np.cos(1)) / 2, (np.cos(0.2) + np.cos(0.8)) / 2, (np.cos(1) + np.cos(0.8)) / 2]
    )
    assert set(rows["arm"]) == {"real"} and "clip_t" not in rows
    assert real_photos(photos[:1], SUBJECT, {"dino": Cosine()}).empty


def test_photos_of_a_user_have_no_truth_to_judge_by(scored_folder, rows, judge):
    subject = replace(SUBJECT, world=None)
    table = score(rows, scored_folder, world_photos(SUBJECT.world, 2), subject, SCORERS, judge)
    assert not [name for name in table.columns if name.startswith("judge_")]
    assert primary_metrics(check_scores(table)) == {"text": "clip_t", "subject": "dino"}
    assert primary_metrics(table.drop(columns="dino")) == {"text": "clip_t"}


def test_a_prompt_is_shown_when_all_that_it_names_is(scored_folder, rows, judge, monkeypatch):
    right = {"class": [1, 1, 1, 1], "activity": [1, 1, 0, 0], "place": [1, 0, 1, 0]}
    right |= {"pose": [1, 1, 1, 0], "things": [1, 1, 0, 1]}
    monkeypatch.setattr(Judge, "agrees", lambda self, images, question, expected: torch.tensor(right[question]))
    rows = rows.iloc[:4].assign(activity="playing soccer at the beach")
    table = score(rows, scored_folder, world_photos(SUBJECT.world, 2), SUBJECT, SCORERS, judge)
    assert table["judge_text"].tolist() == [1, 0, 0, 0] and table["judge_accessory"].isna().all()
    bare = score(rows.assign(activity=""), scored_folder, world_photos(SUBJECT.world, 2), SUBJECT, SCORERS, judge)
    assert bare["judge_text"].isna().all() and bare["judge_identity"].notna().all()


def test_every_number_has_its_evaluator(judge):
    words = evaluators(SCORERS, judge)
    assert words["clip_t"] == "mean brightness"
    judged = {"text", "class", "activity", "pose", "things", "place", "accessory", "identity"}
    assert set(words) == {"clip_t", "dino", *(f"judge_{question}" for question in judged)}
    assert "99.1% of held-out renders and 97.5%" in words["judge_identity"] and "n = 400" in words["judge_identity"]
    assert set(evaluators(SCORERS)) == {"clip_t", "dino"}


def test_the_headline_metric_says_how_often_its_own_questions_err(judge):
    judge.card["accuracy"]["place"] = {"renders": 0.876, "reconstructions": 0.765, "n": 123}
    words = evaluators({}, judge)["judge_text"]
    assert "activity 99.1% / 97.5% (n = 400), place 87.6% / 76.5% (n = 123), accessory 99.1% / 97.5%" in words
    card = json.loads((scorers_base.POCKET_WEIGHTS / "card.json").read_text())
    (number,) = [number for number in card["numbers"] if number["name"] == THINGS_TAKEN]
    assert f"takes {number['value']:.1%} for the activity (n = {number['n']})" in words


def test_missing_weights_leave_a_gap_with_its_name_and_the_way_out(tmp_path, monkeypatch):
    weights = tmp_path / "some"
    shutil.copytree(scorers_base.POCKET_WEIGHTS / "dino", weights / "dino")
    scorers, gaps = make_scorers(["clip_t", "dino"], weights, "cpu", judged=True)
    assert list(scorers) == ["dino"] and "some/clip: name an existing one" in gaps["clip_t"]


def test_missing_weights_of_an_axis_are_refused(tmp_path):
    shutil.copytree(scorers_base.POCKET_WEIGHTS / "dino", tmp_path / "dino")
    with pytest.raises(ModelError, match=r"Nothing is left that measures text fidelity.*CLIP: there is no weights"):
        make_scorers(["clip_t", "dino"], tmp_path, "cpu", judged=False)
    with pytest.raises(ModelError, match="No scorer is left.*there is no weights folder"):
        make_scorers([], tmp_path / "none", "cpu", judged=True)


def test_an_unknown_scorer_is_refused_with_the_nearest():
    with pytest.raises(ParameterError, match="no scorer 'clipt'; did you mean 'clip_t'"):
        make_scorers(["clipt"], "pocket", "cpu", judged=True)
    with pytest.raises(ParameterError, match="no scorer 'zzz'; it is one of clip_t"):
        make_scorers(["zzz"], "pocket", "cpu", judged=True)


def test_without_the_judge_both_axes_need_a_scorer():
    with pytest.raises(ParameterError, match="None of the scorers clip_t measures subject fidelity"):
        make_scorers(["clip_t"], "pocket", "cpu", judged=False)


# --- the runs it starts from ---------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, tiny):
    """Functions that make finished runs of a tiny model: 01, and 02 on one of these."""
    tiny.save_pipeline(tmp_path / "model")

    def personalize(name="01", seed=0, moved=0.0, **words):
        run = Run.open(tmp_path / name, "01_personalize", {"seed": seed})
        model = load_model(str(tmp_path / "model"))
        start = Adapted.of(model)
        for p in attach(model, "unet", "dreambooth", {}, generator(0)).values():
            p.data.add_(moved)
        start.then(run, "dreambooth.safetensors", model, "dreambooth", "dreambooth", seed).write(run)
        for i, photo in enumerate(world_photos(SUBJECT.world, 3)):
            photo.save(run.path(f"photos/{i:03d}.png"))
        run.note_output("photos")
        replace(SUBJECT, base_model=str(tmp_path / "model"), **words).save(run)
        run.finish()
        return read_run(run.folder)

    def tune(name, seed, start, prompts=(), subject_reward=""):
        parameters = {"seed": seed, "prompts": prompts, "reward": "image_reward", "subject_reward": subject_reward}
        run = Run.open(tmp_path / name, "02_rl_finetune", parameters, inputs={"run_in": start})
        personalized = Adapted.read(start)
        model = personalized.build()
        for p in attach(model, "lora", "ddpo", {"rank": 2}, generator(seed)).values():
            p.data.normal_(0, 0.3, generator=generator(seed, "trained"))
        personalized.then(run, "ddpo.safetensors", model, "ddpo", "ddpo", seed).write(run)
        run.finish()
        return read_run(run.folder)

    return str(tmp_path / "model"), personalize, tune


def test_a_tuning_brings_what_it_started_from(runs):
    model, personalize, tune = runs
    first = personalize()
    both = [tune("02-a", 3, first), tune("02-b", 4, first, prompts=["dancing"], subject_reward="subject")]
    inputs = read_inputs(both, model)
    assert inputs.activities([], ("sleeping",)) == ["sleeping", "dancing"]
    assert inputs.activities(["playing tennis"], ("sleeping",)) == ["playing tennis"]
    with pytest.raises(ParameterError, match="knows no cat 'playing chess'"):
        inputs.activities(["playing chess"], ())
    keys = [("base", None, None), ("dreambooth", 0, None), ("dreambooth+ddpo", 0, 3), ("dreambooth+ddpo", 0, 4)]
    assert list(inputs.models) == keys and len(inputs.references) == 3
    assert inputs.references[0].tobytes() == world_photos(SUBJECT.world, 1)[0].tobytes()
    assert inputs.rewards == {"dreambooth+ddpo": {"image_reward", "subject_score"}}
    pictures = [sample(inputs.load_arm(key, "cpu"), ["a sks cat"], [1], SAMPLER)[0].tobytes() for key in keys]
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3


def test_no_rl_run_is_needed_and_several_personalizations_stand_side_by_side(runs):
    model, personalize, tune = runs
    first, second = personalize("01-a", 0, 0.01), personalize("01-b", 1, 0.02)
    inputs = read_inputs([first, second], model)
    assert list(inputs.models) == [("base", None, None), ("dreambooth", 0, None), ("dreambooth", 1, None)]
    assert inputs.trained(("sleeping",)) == [] and inputs.activities([], ("sleeping",)) == ["sleeping"]
    more = read_inputs([first, tune("02", 1, second)], model)  # its personalization need not be named
    assert list(more.models) == [*inputs.models, ("dreambooth+ddpo", 1, 1)]


def test_runs_that_do_not_belong_together_are_refused(runs):
    model, personalize, tune = runs
    first = personalize()
    with pytest.raises(ParameterError, match="personalized the model .*not 'sd15'"):
        read_inputs([first], "sd15")
    with pytest.raises(ParameterError, match=r"different models that are both dreambooth with the seeds \[0\]"):
        read_inputs([first, personalize("01-b", 0, 0.01)], model)
    with pytest.raises(ParameterError, match="about different subjects.*'a sks cat', 'a qzx cat'"):
        read_inputs([first, personalize("01-c", 1, identifier="qzx")], model)
    with pytest.raises(ParameterError, match="nothing to evaluate"):
        read_inputs([], model)
    tuned = tune("02", 5, first)
    shutil.rmtree(first.folder)
    with pytest.raises(ArtifactError, match="run of 01_personalize that .*02 started from is neither in"):
        read_inputs([tuned], model)
