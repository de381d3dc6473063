"""The experiment of notebook 09: pictures, labels, rewards, arms, scores and the claims L1 to L8, on a small model."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ibkit.adapt import without
from ibkit.errors import ModelError, ParameterError, ScoreError
from ibkit.evaluate.claims import claims_from
from ibkit.evaluate.precision import diversity, precision
from ibkit.evaluate.stats import check_scores
from ibkit.evaluate.study.ratings import RatingSession
from ibkit.experiments import human_feedback as study
from ibkit.job import run as main_job
from ibkit.methods.feedback import read_labelled
from ibkit.params import make
from ibkit.pocket.build.counter import answers_of, counted_scene
from ibkit.pocket.draw import render
from ibkit.pocket.feedback import Asked
from ibkit.presets import POCKET
from ibkit.runs import read_run
from ibkit.scorers import make_scorer
from ibkit.scorers.counter import Counter
from tests.test_baselines import ibkit

PROMPTS = [
    study.Prompt(study.SEEN, "count", Asked("cat", 2)),
    study.Prompt(study.OBJECT, "colour", Asked("dog", 0, "red")),
]
RIGHT = {"class": "cat", "count": "two", "colour": "red", "place": "park"}


def pictures(n=4, good=2):
    """`n` of each prompt, of which the first `good` show it."""
    asked = [one for one in PROMPTS for _ in range(n)]
    answers = [
        RIGHT
        | {
            "class": one.asked.noun,
            "count": "two" if i % n < good else "one",
            "colour": "red" if i % n < good else "blue",
        }
        for i, one in enumerate(asked)
    ]
    images = [
        Image.new("RGB", (64, 64), (40 * (i % n), 90, 200 if one.kind == "count" else 20))
        for i, one in enumerate(asked)
    ]
    return study.Pictures(asked, [*range(n)] * len(PROMPTS), images, answers)


class Likes:
    """A reward that likes pictures by their red, whatever the text."""

    def __call__(self, images, texts):
        return torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])


def test_precision_and_diversity_by_hand():
    """True points on a line, 0 to 4: the third neighbour of 0 is 3 away, that of 2 is 2 away, and so on."""
    true = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    assert precision(torch.tensor([[-2.9], [-3.1], [6.9], [7.1], [2.2]]), true).tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(ScoreError, match="more than 3 true pictures, and there are 3"):
        precision(true, true[:3])
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert diversity(z, ["a", "a", "a", "b"])[:3].tolist() == [0.5, 0.5, 1.0]
    assert diversity(z, ["a", "a", "a", "b"])[3].isnan()


def test_best_keeps_what_the_reward_likes_of_each_prompt():
    kept = study.best(pictures(), Likes(), 2)
    assert [image.getpixel((0, 0))[0] for image in kept.images] == [120, 80, 120, 80]
    assert kept.texts == ["two cats"] * 2 + ["a red dog"] * 2 and kept.seeds == [0, 1, 0, 1]
    assert not any(kept.truth)  # the first two of each were right: rows go with their pictures


def test_people_rate_on_the_page_of_notebook_07_and_the_method_reads_it(tmp_path):
    shown = pictures(2, 1)
    items = study.rating_items(shown, tmp_path / "rated")
    assert items["item"].is_unique and list(items["text"]) == shown.texts
    files = []
    for rater, wrong in (("ada", False), ("bob", False), ("cyd", True)):
        session = RatingSession(items, rater, tmp_path / "clicks")
        truth = dict(zip(items["item"], shown.truth, strict=True))
        for _ in range(3):  # of four: one is left to nobody or to few
            session.answer(int(truth[session.current.item] == wrong))  # button 0 is yes
        files.append(session.path)
    labels = study.labels_from(files[:1], items)
    assert sum(label is None for label in labels) == 1
    assert all(label is None or label == good for label, good in zip(labels, shown.truth, strict=True))
    mostly = study.labels_from(files, items)  # two against one, or a tie among who rated it
    assert all(label in (None, float(good)) for label, good in zip(mostly, shown.truth, strict=True))
    study.write_labels(tmp_path / "rated", shown, labels)
    images, texts, read = read_labelled(tmp_path / "rated")
    assert (texts, read) == (shown.texts, labels) and images[1].tobytes() == shown.images[1].tobytes()


def test_rewards_learn_and_predict_what_nobody_rated(tmp_path):
    clip, shown = make_scorer("clip_t"), pictures(6, 3)
    labels = [float(good) for good in shown.truth]
    rewards, threshold = study.learn(shown, [None, *labels[1:]], clip, {"hidden": 64, "n_steps": 150}, seed=0)
    table = study.predictions(shown, rewards, clip, threshold, seed=3)
    assert list(table["fulfilled"]) == labels and set(table["seed"]) == {3}
    assert table["reward right"].mean() > 0.9 and table["without prompts right"].mean() > 0.9
    likes = clip(shown.images, shown.texts)
    assert list(table[f"{study.CLIP} right"]) == [int((v > threshold) == y) for v, y in zip(likes, labels, strict=True)]


def test_an_arm_trains_on_what_it_says(monkeypatch, tmp_path):
    seen = {}

    def train(model, images, texts, rewards, config, folder, seed, true, captions, on_step, name):
        seen[name] = (len(images), len(true), len(captions), config.pretrain_weight)
        return []

    monkeypatch.setattr(study.feedback, "train", train)
    for arm in study.ARMS:
        config = study.config_of(POCKET, arm, {"n_pretrain": 3, "n_steps": 5})
        study.tune(None, arm, pictures(2), pictures(1), Likes(), config, tmp_path, 0, name=arm)
    assert seen == {"labelled": (4, 0, 0, 0), "scored": (6, 0, 0, 0), "pretrain": (6, 3, 3, config.pretrain_weight)}
    with pytest.raises(ParameterError, match="no arm 'all'"):
        study.tune(None, "all", pictures(1), pictures(1), Likes(), config, tmp_path, 0)
    _, captions = study.pretraining_pictures(20, 0)
    assert not any(word in caption.split() for caption in captions for word in ("two", "three", "four"))


def rows(arm, right, precise=1, subset="seen", seed=0, n_prompts=6, n=4):
    """Rows of feedback.csv of an arm, of which the share `right` shows the prompt."""
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "tune_seed": None, "subject": "cat", "prompt_id": f"{subset} {p}",
         "text": "two cats",
         "image_seed": i, "identifier": False, "seen": subset == "seen", "subset": subset, "kind": "count",
         "judge_text": int((p * n + i) % 10 < 10 * right), "precision": precise if i else 1 - precise}
        for p in range(n_prompts) for i in range(n)
    ])  # fmt: skip


def verdicts(scores, rewards):
    found = claims_from({"feedback.csv": scores, "feedback_reward.csv": rewards})
    return {claim.id: claim for claim in found if claim.id.startswith("L")}


def predicted(reward, clip, plain=0.5, n_prompts=10, n=8):
    cells = [(p, i) for p in range(n_prompts) for i in range(n)]
    return pd.DataFrame({
        "seed": 0, "subset": "unseen object", "prompt": [f"{p} dogs" for p, _ in cells],
        "image_seed": [i for _, i in cells],
        **{f"{name} right": [int((3 * i + p) % 8 < 8 * share) for p, i in cells]
           for name, share in (("reward", reward), ("without prompts", plain), ("CLIP score", clip))},
    })  # fmt: skip


def test_the_claims_follow_the_tables():
    arms = {"base": 0.2, "labelled": 0.8, "scored": 0.8, "pretrain": 0.9, "best_of_8": 0.2}
    scores = pd.concat([rows(arm, share, arm != "labelled", subset)
                        for arm, share in arms.items() for subset in study.SUBSETS])  # fmt: skip
    found = verdicts(scores, predicted(reward=1.0, clip=0.25))
    assert [found[f"L{i}"].verdict for i in range(1, 9)] == [
        "supported", "supported", "supported", "supported", "supported", "supported", "undecided", "contradicted",
    ]  # fmt: skip
    assert found["L1"].value == pytest.approx(0.75) and "unseen object: reward 100.0 %" in found["L1"].detail
    worse = verdicts(scores.assign(judge_text=1 - scores["judge_text"]), predicted(reward=0.25, clip=1.0))
    assert {worse[i].verdict for i in ("L1", "L2", "L3", "L4", "L5")} == {"contradicted"}
    alone = verdicts(scores[scores["arm"] != "scored"], predicted(1.0, 0.25).assign(subset="seen"))
    assert {alone[i].verdict for i in ("L1", "L6", "L7")} == {"not tested"} and "scored" in alone["L6"].reason
    assert not [c for c in claims_from({"scores.csv": rows("base", 0.2)}) if c.id.startswith("L")]


def test_parameters_of_notebook_09_are_checked():
    with pytest.raises(ParameterError, match="no kind of prompt 'counts'; did you mean 'count'"):
        make("09_human_feedback", {"kinds": ["counts"]})
    with pytest.raises(ParameterError, match="no arm 'labeled'"):
        make("09_human_feedback", {"arms": ["labeled"]})
    with pytest.raises(ParameterError, match="aux_wieght"):
        make("09_human_feedback", {"reward_settings": {"aux_wieght": 0.0}})
    with pytest.raises(ParameterError, match="pocket"):
        make("09_human_feedback", {"model": "sd15"})


def test_the_counter_answers_about_renders_and_missing_weights_are_named(tmp_path):
    scenes = [counted_scene(77, i)[0] for i in range(60)]
    found = Counter.load().answers([render(scene) for scene in scenes])
    for question, least in (("count", 0.95), ("place", 0.95), ("class", 0.85), ("colour", 0.85)):
        right = np.mean(
            [answers[question] == answers_of(scene)[question] for answers, scene in zip(found, scenes, strict=True)]
        )
        assert right >= least, question
    with pytest.raises(ModelError, match="counter"):
        Counter.load(folder=tmp_path)


def test_the_shipped_base_half_counts():
    """The adapter is on the model, which it changes; its file is one that diffusers loads, in half precision."""
    model = study.counting_model()
    assert list(model.deltas) == ["counting"] and model.deltas["counting"].kind == "lora"
    x, t = torch.zeros(1, *model.latent_shape), torch.tensor([500])
    with torch.no_grad():
        found = model.predict_noise(x, t, ["two cats"])
        with without(model, "counting"):
            assert not torch.allclose(model.predict_noise(x, t, ["two cats"]), found, atol=1e-3)


@pytest.mark.slow
def test_notebook_09_runs():
    """For real, at the smallest budget: three minutes."""
    folder = main_job.OUTPUTS / f"test-feedback-{os.getpid()}"
    given = {"n_prompts": 2, "n_rated": 2, "best_of": 4}
    words = [w for name, value in given.items() for w in ("-p", f"{name}={value}")]
    words += ["-p", "settings={'n_steps': 2, 'n_pretrain': 2, 'batch': 2}", "-p", "reward_settings={'n_steps': 5}"]
    try:
        ibkit("stage", "09_human_feedback", "--out", folder, *words)
        run = read_run(folder)
        scores = check_scores(run.table("feedback.csv"))
        assert set(scores["arm"]) == {"base", "best_of_4", *study.ARMS, "pretrain_again"}
        assert set(run.manifest["metrics"]["claims"]) == {f"L{i}" for i in range(1, 9)}
        assert len(read_labelled(run.folder / "rated")[0]) == 4 * 2 * 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
