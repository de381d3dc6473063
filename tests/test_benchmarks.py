"""Benchmarks: that of a GPU runs here on a small U-Net; arms from different starts stay apart."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import baselines, dreambooth, personalize, report, scoring, sd15, sd15_all
from benchmarks.arms import personalized
from benchmarks.personalize import as_scores, chosen
from ibkit.adapt import Adapted
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.errors import ModelError, ParameterError
from ibkit.evaluate.claims import claims_from_scores
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.methods.records import METHODS, Job
from ibkit.model.mapper import N_UNITS, Mapper
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import POCKET
from ibkit.scorers import SCORERS, make_scorer


def test_the_benchmark_at_stable_diffusions_shape_runs_on_a_small_u_net(capsys):
    result = sd15.measure(torch.device("cpu"), tiny=True, batches=[1], variants=["plain", "checkpointing"])
    assert [row["variant"] for row in result["rows"]] == ["plain", "checkpointing"]
    for row in result["rows"]:
        assert row["rollout_images_per_second"] > 0 and row["train_images_per_second"] > 0
        assert "note" not in row and row["train_gib"] is None  # a CPU keeps no such count
    forward, trained = result["gflop_forward"], result["gflop_trained"]
    assert 1.2 * forward < trained < 3 * forward  # back to the adapter's layers, without the weights' gradients
    assert capsys.readouterr().out.count("of the ceiling") == 4


def test_what_is_to_be_seen_on_a_gpu_is_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(sd15_all, "command", lambda *words: sd15_all.Found(True, "another command"))
    some = ("parity", "first ratio", "step of custom_diffusion", "scoring")
    found = [one for one in sd15_all.checks(torch.device("cpu"), tiny=True) if one[0] in some]
    rows = sd15_all.run(found)
    assert tuple(row["check"] for row in rows) == some and all(row["holds"] for row in rows)
    assert "4 rows" in rows[2]["found"]
    monkeypatch.setattr(TextToImage, "predict_noise", lambda model, x, t, prompts: torch.zeros_like(x))
    assert [row["holds"] for row in sd15_all.run(found[:2])] == [False, False]  # other noise; and no gradient
    assert capsys.readouterr().out.count("FAIL") == 2


def test_stable_diffusions_shape_is_not_tried_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sd15.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        sd15.main()
    assert stopped.value.code == 2 and "needs a GPU" in capsys.readouterr().err


def test_a_batch_scores_as_its_pictures_do_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scoring.py", "--images=3", "--repeats=1", "--device=cpu", "--json"])
    assert scoring.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["scorer"] for row in found["scorers"]} == SCORERS.keys() - {"pick_score", "feedback"}
    assert found["target"] == 1.5
    assert all(row["max_abs_diff"] <= 1e-4 for row in found["scorers"])
    for name, why in (("pick_score", "the pocket weights have none"), ("feedback", "learned from your feedback")):
        with pytest.raises(ModelError, match=why):
            make_scorer(name, "pocket")  # the only ones that are left out


def test_a_score_that_depends_on_its_batch_ends_in_failure_and_a_slow_one_in_a_sentence(monkeypatch, capsys):
    row = {"images_per_second": 9.0, "images_per_second_one_by_one": 9.0}
    found = {"dino": {"ratio": 1.4, "max_abs_diff": 9e-5}, "clip_t": {"ratio": 1.5, "max_abs_diff": 2e-4}}
    monkeypatch.setattr(scoring, "measure", lambda name, *_: row | {"scorer": name} | found[name])
    monkeypatch.setattr("sys.argv", ["scoring.py", "--device", "cpu"])
    monkeypatch.setattr(scoring, "SCORERS", ("dino",))
    assert scoring.main() == 0
    assert "dino: 1.40 times as fast as one by one, short of the target 1.5" in capsys.readouterr().out
    monkeypatch.setattr(scoring, "SCORERS", ("dino", "clip_t"))
    assert scoring.main() == 1
    told = capsys.readouterr().out
    assert "clip_t: batched and one by one differ by 2.0e-04, more than 0.0001" in told and "clip_t: 1.50" not in told


def test_arms_from_one_start_are_not_mixed_with_arms_from_another(tmp_path):
    (tmp_path / "start.json").write_text('{"method": "lora_dreambooth", "n_steps": 800}\n')
    who = PersonalizedSubject("cat", "cat", "sks", "", "pocket", "", demo_subject("cat"))
    with pytest.raises(ParameterError, match="start from .*800}, not from .*500}: name another folder"):
        personalized(who, tmp_path, "lora_dreambooth", 500)


@pytest.mark.parametrize(
    ("shown", "same", "steps"),
    [
        ((0.9, 0.7, 0.5), (0.8, 0.9, 0.95), 1000),  # the fewest of two that keep the rule
        ((0.9, 0.8, 0.7), (0.9, 0.9, 0.9), 1400),  # too much is shown at first
        ((0.7, 0.7, 0.2), (0.8, 0.87, 0.9), None),  # the subject is kept only where the prompt is not
    ],
)
def test_the_fewest_steps_that_keep_subject_and_prompt_are_chosen(shown, same, steps):
    rows = [
        {"setting": "lora", "steps": n, "subject": noun, "phrase": "dancing", "shown": a, "same_subject": b}
        for n, a, b in zip((600, 1000, 1400), shown, same, strict=True)
        for noun, b in (("cat", b + 0.05), ("dog", b - 0.05))
    ]
    table = pd.DataFrame(rows).assign(right_class=1)
    bare = table.assign(phrase="", shown=1, same_subject=1)  # counts for nothing
    found = chosen(pd.concat([table, bare]))
    assert found.to_dict() == ({"lora": steps} if steps else {})


def test_a_sweep_that_was_stopped_keeps_the_looks_that_it_had(tmp_path, monkeypatch):
    """It does not look again at an earlier step with the weights of a later one."""
    trained, blank = [], Image.new("RGB", (4, 4))

    def train(model, job, method, config):
        if config.n_steps == 1000 and not trained.count(1000):
            trained.append(1000)
            raise KeyboardInterrupt
        trained.append(config.n_steps)
        return [{}] * config.n_steps

    judge = SimpleNamespace(
        agrees=lambda pictures, *_: torch.ones(len(pictures)), identifies=lambda pictures, _: torch.ones(len(pictures)),
        answers=lambda pictures, _: ["none"] * len(pictures),
    )  # fmt: skip
    fakes = {
        "train": train,
        "load_model": lambda name: None,
        "class_images": lambda *_, **__: [],
        "mosaic": lambda *_: blank,
    }
    fakes |= {"sample": lambda model, prompts, *_: [blank] * len(prompts), "Judge": SimpleNamespace(load=lambda: judge)}
    for name, fake in (fakes | {"Adapted": SimpleNamespace(of=lambda model: None)}).items():
        monkeypatch.setattr(personalize, name, fake)
    look = ("cat", "lora", 0, tmp_path, "pocket", (600, 1000))
    with pytest.raises(KeyboardInterrupt):
        personalize.train_and_look(*look)
    personalize.train_and_look(*look)
    assert trained == [600, 1000, 1000]
    assert personalize.read([tmp_path]).groupby("steps").size().to_dict() == {600: 48, 1000: 48}


def test_the_ends_of_variants_are_scores_that_claims_read():
    """The last look of each training, without the bare prompt, and LoRA DreamBooth's where there is another."""
    rows = [
        {"setting": setting, "steps": steps, "subject": noun, "phrase": phrase, "image_seed": i, "seed": 0,
         "shown": int(setting == "dpg" or i > 2), "same_subject": int(steps == 1400 and i > 0)}
        for setting, steps, noun in (
            ("lora", 600, "cat"), ("lora", 1400, "cat"), ("lora", 1400, "dog"), ("dpg", 600, "cat"),
            ("dpg", 1400, "cat"), ("lora fast", 1400, "cat"),
        )
        for phrase in ("", "dancing", "cooking") for i in range(8)
    ]  # fmt: skip
    found = as_scores(pd.DataFrame(rows))
    assert set(found["arm"]) == {"lora_dreambooth", "dpg"} and set(found["subject"]) == {"cat"}
    assert len(found) == 2 * 2 * 8 and set(found["steps"]) == {1400} and found["prompt_id"].all()
    assert found["text"].iloc[0] == "a sks cat cooking"
    gains = found.groupby("arm")[["judge_text", "judge_identity"]].mean()
    assert gains.loc["dpg"].tolist() == [1.0, 7 / 8] and gains.loc["lora_dreambooth"].tolist() == [5 / 8, 7 / 8]
    assert {claim.id for claim in claims_from_scores(found) if claim.value is not None} == {"D1", "D2"}


def test_a_dreambooth_step_has_the_loss_of_diffusers_recipe(tiny, tmp_path):
    pictures = [photo.resize((tiny.image_px,) * 2) for photo in world_photos(demo_subject("cat"))[:4]]
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    config = DreamBoothConfig(n_steps=3, batch=2, prior_weight=0.5, learning_rate=1e-3)
    theirs, ours = (train(tiny.copy(), paths[:2], paths[2:], config) for train in (dreambooth.recipe, dreambooth.ours))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(set(ours)) == 3


@pytest.mark.parametrize("method", baselines.BASELINES)
def test_a_step_of_a_baseline_has_the_loss_of_a_plain_loop(tiny, tmp_path, monkeypatch, method):
    monkeypatch.setattr(Mapper, "kept_units", lambda self, layer: torch.ones(len(layer), N_UNITS, dtype=torch.bool))
    photos = [photo.resize((tiny.image_px,) * 2) for photo in world_photos(demo_subject("cat"))[:4]]
    who = METHODS[method].names(PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None))
    config = POCKET.settings(method, {"n_steps": 3, "batch": 2, "ema_decay": 0.0})
    job = Job(Adapted.of(tiny), who, photos[:2], method, 0, tmp_path, photos[2:])
    theirs, ours = (train(tiny.copy(), method, job, config) for train in (baselines.plain, baselines.ours))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(set(ours)) == 3


def test_the_page_of_a_grid_is_timed(monkeypatch, capsys):
    assert report.arms(10)[0] == "base" and len(set(report.arms(10))) == 10
    monkeypatch.setattr(report, "opens", lambda page, scratch: (len(page.read_bytes()) / 1e6, 2.0))
    monkeypatch.setattr(report, "CHROMIUM", "a browser")
    monkeypatch.setattr("sys.argv", ["report.py", "--subjects=2", "--arms=2", "--side=16", "--json"])
    report.main()
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 2 * (1 + 2) * 5 * 10  # both kinds of prompts for the arm that has an identifier
    assert found["opens_s"] == pytest.approx(found["mb"], abs=0.1) and found["slowest_s"] == 2
