"""The description ablation of notebook 14: what differs between arms, looks that disturb nothing, paired numbers."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ibkit.data.subject import PersonalizedSubject, world_photos
from ibkit.device import generator
from ibkit.errors import ParameterError
from ibkit.experiments import attention_figures
from ibkit.experiments import attention_overlap as overlap
from ibkit.experiments import detailed_description as ablation
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.methods.engine.photos import add_noise
from ibkit.methods.records import named
from ibkit.model.attention import AttentionRecord, auc, lift, mask_at, record_attention
from ibkit.model.sample import Sampler
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import DEMO_SUBJECTS, RARE_SUBJECT
from ibkit.runs import Run, project_root, read_run
from tests.tiny import tiny_model

WHO = PersonalizedSubject("red toy", "monster toy", "sks", "triangular", "pocket", "", RARE_SUBJECT)
CONFIG = DreamBoothConfig(n_steps=6, batch=1, learning_rate=1e-3, checkpoint_every=3)


def pictures(n, seed=0, size=16):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", "14_detailed_description", {})


# --- arms and training


def test_the_arms_differ_in_the_description_alone():
    arms = ablation.make_arms(WHO, [3, 5, 3])
    assert [(a.described, a.train_seed) for a in arms] == [(True, 3), (False, 3), (True, 5), (False, 5)]
    assert [a.who.instance_prompt for a in arms[:2]] == ["a sks triangular monster toy", "a sks monster toy"]
    assert arms[0].who.class_prompt == arms[1].who.class_prompt == "a monster toy"
    assert dataclasses.replace(arms[1].who, description="triangular") == arms[0].who
    assert len({a.folder for a in arms}) == 4
    with pytest.raises(ParameterError, match="no description to compare with"):
        ablation.make_arms(dataclasses.replace(WHO, description=""), [0])


def test_another_class_than_the_rare_subjects_is_refused():
    assert ablation.rare_subject("monster toy") == RARE_SUBJECT
    with pytest.raises(ParameterError, match="rare subject is a monster toy, not a cat"):
        ablation.rare_subject("cat")


@pytest.mark.parametrize(("n_steps", "every", "n_looks"), [(950, 150, 12), (600, 100, 12), (3, 150, 12), (1, 1, 3)])
def test_looks_end_with_the_training_and_avoid_checkpoints(n_steps, every, n_looks):
    steps = ablation.look_steps(n_steps, every, n_looks)
    assert steps[-1] == n_steps and 0 < steps[0] and len(steps) <= n_looks
    assert not any(step % every == 0 for step in steps[:-1])


def test_looks_are_at_equal_distances():
    assert ablation.look_steps(600, 1000, 3) == [200, 400, 600]
    assert ablation.look_steps(600, 200, 3) == [199, 399, 600]


def train(run, arm, base, look, on_step=None):
    ablation.train_arm(run, arm, base, pictures(2), pictures(2, 1), CONFIG, look, 3, on_step)


def draws(calls):
    """A look that draws, as the real one does."""

    def look(model, arm):
        calls.append(arm)
        with torch.no_grad():
            noisy = model.predict_noise(torch.ones(1, 4, 8, 8), torch.tensor([5]), ["a cat"])
        return {"dino": noisy.mean().item()}

    return look


def test_looking_changes_nothing_that_is_learned(run, tokenizer, tmp_path):
    base, calls = tiny_model(tokenizer), []
    before = [p.clone() for p in base.unet.parameters()]
    arm = ablation.make_arms(WHO, [1])[0]
    train(run, arm, base, draws(calls))
    plain = base.copy()
    dreambooth.train(
        plain, pictures(2), "a sks triangular monster toy", "a monster toy", pictures(2, 1), CONFIG, tmp_path / "x", 1
    )
    trained = ablation.load_arm(run, arm, base)
    assert all(torch.equal(a, b) for a, b in zip(trained.unet.parameters(), plain.unet.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base.unet.parameters(), before, strict=True)), "the base has changed"
    assert calls == [arm] * 3
    history = ablation.histories(run, [arm])
    assert list(history.loc[history["dino"].notna(), "step"]) == [1, 3, 5]
    assert set(history["arm"]) == {"with_description"} and set(history["train_seed"]) == {1}


def test_a_finished_arm_is_not_trained_again(run, tiny):
    arm, calls = ablation.make_arms(WHO, [0])[1], []
    train(run, arm, tiny, draws(calls))
    assert not (run.folder / arm.folder / "checkpoints").exists()
    train(run, arm, tiny, None)


def test_a_stopped_arm_ends_as_one_never_stopped_with_every_look(run, tokenizer, tmp_path):
    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    base, arm = tiny_model(tokenizer), ablation.make_arms(WHO, [0])[0]
    with pytest.raises(KeyboardInterrupt):
        train(run, arm, base, draws([]), stop)
    train(run, arm, base, draws([]))
    whole = Run.open(tmp_path / "whole", "14_detailed_description", {})
    train(whole, arm, base, draws([]))
    resumed, straight = (ablation.load_arm(r, arm, base).unet.state_dict() for r in (run, whole))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    columns = ["step", "loss", "dino"]
    pd.testing.assert_frame_equal(ablation.histories(run, [arm])[columns], ablation.histories(whole, [arm])[columns])


# --- pictures and measurements


def test_both_arms_draw_the_same_activities_from_the_same_noise():
    rows = ablation.jobs(ablation.make_arms(WHO, [0, 1]), ["dancing", "sleeping"], 3, seed=7)
    assert len(rows) == 2 * 2 * 2 * 3 and rows["image"].is_unique
    for _, pair in rows.groupby(["train_seed", "prompt_id"]):
        with_, without = (pair[pair["description"] == d] for d in (True, False))
        assert list(with_["image_seed"]) == list(without["image_seed"])
        assert set(with_["prompt"]) != set(without["prompt"])
    assert set(rows["prompt"]) >= {"a sks triangular monster toy dancing", "a sks monster toy sleeping"}
    assert set(rows["text"]) >= {"a triangular monster toy dancing", "a monster toy sleeping"}
    with pytest.raises(ParameterError, match="something to draw"):
        ablation.jobs(ablation.make_arms(WHO, [0]), [], 3, 0)


class Likeness:
    """Brightness of a picture's corner."""

    def __call__(self, images, texts=None, references=None):
        assert references
        return torch.tensor([i.getpixel((0, 0))[0] / 255 for i in images])


class Answers:
    """A judge to whom bright pictures are round look-alikes that dance, and dark ones the subject asleep."""

    def _bright(self, images):
        return [i.getpixel((0, 0))[0] > 127 for i in images]

    def pick(self, images, parade):
        assert parade[0] == RARE_SUBJECT
        return [1 if bright else 0 for bright in self._bright(images)]

    def agrees(self, images, question, expected):
        assert question == "activity"
        seen = ["dancing" if bright else "sleeping" for bright in self._bright(images)]
        return torch.tensor([float(a == b) for a, b in zip(seen, expected, strict=True)])

    def identifies(self, images, subject):
        return torch.tensor([float(not bright) for bright in self._bright(images)])


def test_measurements_by_hand():
    bright, dark = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")
    asked = ["dancing", "dancing"]
    of_world = ablation.Measures([bright], Likeness(), Answers(), RARE_SUBJECT)([bright, dark], asked)
    assert {name: list(values) for name, values in of_world.items()} == {
        "dino": [1, 0], "judge_activity": [1, 0], "judge_identity": [0, 1], "judge_shape": [0, 1]
    }  # fmt: skip
    of_photos = ablation.Measures([bright], Likeness(), None, None)([bright, dark], asked)
    assert list(of_photos) == ["dino"]


def test_a_look_is_the_mean_over_pictures_of_every_activity(tiny):
    seen = []

    class Notes(Likeness):
        def __call__(self, images, texts=None, references=None):
            seen.append(len(images))
            return torch.arange(len(images)).float()

    look = ablation.Measures(pictures(1), Notes(), None, None).look(["dancing", "sleeping"], Sampler(2, 2.0), n=3)
    arm = ablation.make_arms(WHO, [0])[0]
    assert look(tiny, arm) == {"dino": pytest.approx(2.5)} and seen == [6]


# --- comparing


def scores(with_, without, seeds=(0,)):
    """A description.csv with the given dino values for 2 prompts × 2 images; `with_` and `without` take the seed."""
    rows = []
    for seed in seeds:
        for described, value in ((True, with_), (False, without)):
            for k in range(4):
                keys = (described, seed, "toy", f"p{k // 2}", "", "", f"{described}{seed}{k}", k % 2)
                rows.append(dict(zip(ablation.KEYS, keys, strict=True)) | {"dino": value(seed, k)})
    return pd.DataFrame(rows)


def test_difference_is_with_minus_without_within_pairs():
    gap = ablation.difference(scores(lambda s, k: 0.5 + k, lambda s, k: 0.2 + k), "dino")
    assert (gap.value, gap.low, gap.high, gap.n) == (*[pytest.approx(0.3)] * 3, 4)
    gap = ablation.difference(scores(lambda s, k: 0.2, lambda s, k: 0.5), "dino")
    assert gap.value == pytest.approx(-0.3)


def test_training_seeds_are_a_level_of_the_interval():
    table = scores(lambda s, k: [0.9, 0.1][s], lambda s, k: 0.5, seeds=(0, 1))
    gap = ablation.difference(table, "dino")
    # Two trainings, ± 0.4: Student's interval with one degree of freedom is ± 12.7 · 0.4.
    assert gap.value == pytest.approx(0) and gap.low < -4 and gap.high > 4
    by_seed = ablation.by_seed(table).set_index("train_seed")["difference"]
    assert dict(by_seed) == {0: pytest.approx(0.4), 1: pytest.approx(-0.4)}


def test_the_verdict_follows_the_interval():
    up, down = lambda s, k: 0.6, lambda s, k: 0.4  # noqa: E731
    assert "description helps: +0.200 [+0.200, +0.200], 4 pairs, one training" in ablation.verdict(
        scores(up, down), "dino"
    )
    assert "description harms" in ablation.verdict(scores(down, up), "dino")
    mixed = ablation.verdict(scores(lambda s, k: [0.9, 0.1][s], lambda s, k: 0.5, (0, 1)), "dino")
    assert "no difference that these pictures can show" in mixed and "2 training seeds" in mixed


def test_compare_has_both_arms_and_their_difference():
    row = ablation.compare(scores(lambda s, k: 0.6, lambda s, k: 0.4, (0, 1, 2))).iloc[0]
    assert (row["with"], row["without"], row["difference"]) == tuple(map(pytest.approx, (0.6, 0.4, 0.2)))
    assert (row["n"], row["seeds"]) == (12, 3)


def test_the_way_is_compared_look_by_look():
    rows = [
        {"arm": arm, "train_seed": seed, "step": step, "dino": value + seed + step,
         "judge_activity": share, "judge_identity": 1.0}
        for arm, value, share in (("with_description", 0.3, 1.0), ("without_description", 0.1, 0.0))
        for seed in (0, 1) for step in (9, 19)
    ]  # fmt: skip
    between = [rows[0] | {"step": 10, "dino": np.nan, "judge_activity": np.nan, "judge_identity": np.nan}]
    found = ablation.along_training(pd.DataFrame(rows + between)).set_index("metric")
    assert found.loc["dino", ["difference", "low", "high"]].tolist() == [pytest.approx(0.2)] * 3
    assert (found.loc["dino", "n"], found.loc["dino", "seeds"]) == (4, 2)
    assert (found.loc["both", "with"], found.loc["both", "without"]) == (1, 0)  # harmonic: neither can be missing
    assert "both" not in set(ablation.along_training(pd.DataFrame(rows)[["arm", "train_seed", "step", "dino"]]).metric)


# --- the shape question


def test_look_alikes_differ_in_shape_alone():
    alike = ablation.look_alikes(RARE_SUBJECT)
    assert alike[0] == RARE_SUBJECT and [a.shape for a in alike] == ["triangular", "round", "square"]
    assert {dataclasses.replace(a, shape="round") for a in alike} == {alike[1]}


def test_trust_counts_the_answer_by_the_truth():
    answers = pd.DataFrame({"shape": ["triangular"] * 4 + ["round"] * 2, "picked": ["triangular"] * 3 + ["round"] * 3})
    trust = ablation.trust(answers, "triangular").set_index("shape")
    assert dict(trust["picked"]) == {"triangular": 0.75, "round": 0.0} and dict(trust["n"]) == {
        "triangular": 4,
        "round": 2,
    }


def test_the_shipped_judge_tells_the_rare_shape_on_renders():
    from ibkit.scorers.judge import Judge

    answers = ablation.ask_about_renders(Judge.load(), RARE_SUBJECT, ["playing soccer", "dancing"], 6)
    trust = ablation.trust(answers, "triangular").set_index("shape")["picked"]
    # it never saw a triangular character in training, and takes a round one for it in half of these twelve renders
    assert len(answers) == 3 * 2 * 6 and trust["triangular"] > 0.6 and trust["round"] < 0.6 and trust["square"] < 0.4


def test_known_words_are_those_of_captions():
    assert ablation.in_known_words(RARE_SUBJECT, "triangular") == "a triangular red monster toy with a white belly"
    assert ablation.in_known_words(RARE_SUBJECT) == "a red monster toy with a white belly"
    assert ablation.in_known_words(DEMO_SUBJECTS["cat"]) == "an orange cat with purple stripes"
    with pytest.raises(ParameterError, match="no pattern to name"):
        ablation.in_known_words(DEMO_SUBJECTS["bike"])


# --- where the words look


def test_words_and_their_roles():
    assert overlap.words_of(WHO, "playing soccer") == {
        "a": "filler",
        "sks": "identifier",
        "triangular": "description",
        "monster toy": "class noun",
        "playing soccer": "activity",
    }
    template = dataclasses.replace(WHO, description="big triangular")
    alone = named(WHO, "textual_inversion")  # whose word stands for the class noun, too
    assert list(overlap.words_of(alone, "dancing").values()) == ["filler", "identifier", "description", "activity"]
    assert list(overlap.words_of(template, "my {subject} asleep")) == ["sks", "big", "triangular", "monster toy"]


def test_overlap_is_what_a_record_gives(tiny):
    scenes = overlap.new_scenes(RARE_SUBJECT, ["dancing", "sleeping"], 1, 0, "test")
    table = overlap.overlap(tiny, WHO, scenes, [900, 100], seed=3)
    assert len(table) == 2 * 2 * (5 + 1)
    prompt, photo = (
        "a sks triangular monster toy sleeping",
        render(scenes[1]).resize((16, 16), Image.Resampling.BICUBIC),
    )
    z0 = tiny.encode_images([photo])
    noise = torch.randn(z0.shape[1:], generator=generator(3, "overlap", 1))
    z_t = add_noise(z0, noise[None], tiny.alphas_cumprod.float()[[900]])
    with record_attention(tiny, prompt, ["sks"]) as record, torch.no_grad():
        tiny.predict_noise(z_t, torch.tensor([900]), [prompt])
    maps, mask = record.statistics(900)[0, 0], mask_at(subject_mask(scenes[1]), 8)
    row = table[(table["scene"] == 1) & (table["t"] == 900) & (table["role"] == "identifier")].iloc[0]
    assert (row["lift"], row["auc"]) == (
        pytest.approx(lift(maps, mask).item(), abs=1e-4),
        pytest.approx(auc(maps, mask).item(), abs=1e-2),
    )


def test_overlap_averages_timesteps_first_and_counts_scenes_and_seeds():
    rows = [
        {"model": "with_description", "train_seed": seed, "role": "identifier", "word": "sks", "activity": "dancing",
         "scene": scene, "t": t, "lift": seed + scene + t / 1000, "auc": 0.6}
        for seed in (0, 1) for scene in (0, 1) for t in (0, 500)
    ]  # fmt: skip
    summary = overlap.overlap_by_word(pd.DataFrame(rows)).set_index("measure")
    assert summary.loc["lift", "value"] == pytest.approx(0.5 + 0.5 + 0.25)
    assert (summary.loc["lift", "n"], summary.loc["lift", "seeds"]) == (4, 2)
    assert summary.loc["auc", ["low", "high"]].tolist() == pytest.approx([0.6, 0.6])


# --- figures


def a_record():
    layers = ("down_blocks.0.attn2", "mid_block.attn2", "up_blocks.0.attn2", "up_blocks.1.attn2")
    sides = dict(zip(layers, (4, 2, 4, 4), strict=True))
    record = AttentionRecord("a sks cat", ("sks", "cat"), layers)
    for value, (layer, r) in enumerate(sides.items(), start=1):
        for t in (900, 500, 100):
            record.maps[layer, r, t] = torch.full((2, 2, r, r), value / 10)
    return record


def test_maps_over_time_layers_and_words():
    record, photo = a_record(), pictures(1)[0]
    time = attention_figures.over_time(record, photo, n_columns=2)
    assert [row.label for row in time] == ['"sks"', '"cat"'] and list(time[0].maps) == ["t = 900", "t = 100"]
    layers = attention_figures.over_layers(record, photo)
    assert list(layers[0].maps) == ["down 4×4", "mid 2×2", "up 4×4"]
    torch.testing.assert_close(layers[0].maps["up 4×4"], torch.full((4, 4), 3 * (0.3 + 0.4) / 2))
    words = attention_figures.over_words(record, pictures(2), {"sks": "identifier", "cat": "class noun"}, "with")
    assert [list(row.maps) for row in words] == [["identifier", "class noun"]] * 2


def test_a_map_grid_holds_what_it_draws_and_leaves_gaps():
    photo = pictures(1)[0]
    rows = [
        attention_figures.MapRow("with", photo, {"sks": torch.ones(2, 2), "triangular": torch.zeros(2, 2)}),
        attention_figures.MapRow("without", photo, {"sks": torch.ones(32, 32)}),
    ]
    figure, data = attention_figures.map_grid(rows, "title")
    assert len(figure.axes) == 2 * 3
    assert data.groupby(["row", "column"]).size().to_dict() == {
        ("with", "sks"): 4, ("with", "triangular"): 4, ("without", "sks"): 256
    }  # fmt: skip


def test_figures_of_the_comparison_hold_their_data():
    table = scores(lambda s, k: 0.6, lambda s, k: 0.4, (0, 1))
    figure, data = attention_figures.differences(ablation.compare(table), ablation.by_seed(table))
    assert list(data["difference"].round(6)) == [0.2] * 3 and list(data["train_seed"].dropna()) == [0, 1]
    history = pd.DataFrame(
        {"arm": "with_description", "train_seed": 0, "step": range(4), "dino": [np.nan, 0.1, np.nan, 0.3]}
    )
    figure, data = attention_figures.training_looks(history)
    assert list(data["steps"]) == [2, 4] and list(data["value"]) == [0.1, 0.3]


# --- the notebook

ROOT = project_root()
SMALL = ["-y", "settings: {n_steps: 2, n_class_images: 2}", "-p", "n_images", "2", "-y", "prompts: [dancing]"]
SMALL += ["-r", "scorer_weights", "pocket", "-r", "device", "cpu"]


def papermill(tokenizer, folder, *words):
    """A finished run of the notebook at the smallest budget, with a tiny model in Stable Diffusion's format."""
    tiny_model(tokenizer).save_pipeline(folder / "model")
    command = [
        sys.executable,
        "-m",
        "papermill",
        ROOT / "notebooks" / "14_detailed_description.ipynb",
        folder / "out.ipynb",
    ]
    command += ["-k", "python3", "--start-timeout", "300", *SMALL, "-r", "model", folder / "model"]
    command += ["-r", "run_out", folder / "run", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return read_run(folder / "run", "14_detailed_description")


@pytest.mark.slow
def test_the_notebook_on_the_rare_subject(tokenizer, tmp_path):
    run = papermill(tokenizer, tmp_path)
    table = run.table("description.csv")
    assert list(table) == [*ablation.KEYS, *ablation.MEASURED] and len(table) == 2 * 2  # arms, images
    assert table[list(ablation.MEASURED)].notna().all().all()
    assert all((run.folder / path).is_file() for path in table["image"])
    roles = {"identifier", "description", "class noun", "activity", "filler", "start mark"}
    assert set(run.table("overlap.csv")["role"]) == roles
    assert {f"figures/{name}.png" for name in ("with_and_without", "maps_with_and_without", "overlap")} <= set(
        run.outputs
    )


@pytest.mark.slow
def test_the_notebook_on_own_photos(tokenizer, tmp_path):
    """Without the truth there are neither judge nor overlap."""
    (tmp_path / "my toy").mkdir()
    for i, photo in enumerate(world_photos(RARE_SUBJECT, 3)):
        photo.resize((90, 70)).save(tmp_path / "my toy" / f"{i}.png")
    words = ["-r", "subject", tmp_path / "my toy", "-r", "class_noun", "monster toy"]
    run = papermill(tokenizer, tmp_path, *words)
    table = run.table("description.csv")
    assert list(table) == [*ablation.KEYS, "dino"] and set(table["subject"]) == {"my toy"}
    assert "overlap.csv" not in run.outputs and "figures/maps_with_and_without.png" in run.outputs
