"""Controlled changes, subject metrics made from DINO's patches, their statistics, and the notebook that shows them."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from ibkit.data.photos import PhotoWarning
from ibkit.data.subject import PersonalizedSubject, world_photos
from ibkit.errors import ModelError, ParameterError, ScoreError, TrainingError
from ibkit.evaluate.metric_agreement import auc
from ibkit.evaluate.score import make_scorers
from ibkit.experiments import subject_analysis as analysis
from ibkit.experiments import subject_changes, subject_head, subject_metrics
from ibkit.experiments.subject_changes import CHANGES, controlled_pairs, fold_of
from ibkit.methods.engine.objectives import scorer_reward
from ibkit.model.loading import load_model
from ibkit.pocket.build import subject as build
from ibkit.pocket.draw import render, subject_mask
from ibkit.pocket.world import CLASSES, DEMO_SUBJECTS, RARE_SUBJECT, SHAPES, Scene, doing, line_up, reference_scenes
from ibkit.runs import read_run
from ibkit.scorers import make_scorer, subject
from ibkit.scorers.base import POCKET_WEIGHTS
from ibkit.train.monitor import SubjectMonitor
from tests.test_chain import papermill

ROOT = Path(__file__).resolve().parents[1]
# What each change may alter, and must.
FIELDS = {
    "view": {"view"},
    "place": {"place"},
    "accessory": {"accessory"},
    "pose": {"activity"},
    "everything but identity": {"view", "place", "accessory", "activity"},
    "identity": {"subject"},
    "identity and pose": {"subject", "activity"},
    "identity and place": {"subject", "place"},
    "everything": {"subject", "view", "place", "accessory", "activity"},
}


@pytest.fixture(scope="module")
def dino():
    return make_scorer("dino")


@pytest.fixture(scope="module")
def pairs():
    return controlled_pairs(["cat", "pot"], 8, seed=0)


class TestControlledPairs:
    def test_exactly_the_named_fields_differ(self, pairs):
        for pair in pairs:
            before, after = (
                {f.name: getattr(scene, f.name) for f in dataclasses.fields(Scene)}
                for scene in (pair.reference, pair.changed)
            )
            differ = {name for name in before if before[name] != after[name]}
            if differ & {"pose", "things"}:  # the parts of another activity
                differ = (differ - {"pose", "things"}) | {"activity"}
            dressed = {"accessory"} if pair.reference.subject.class_noun == "pot" else set()
            assert differ == FIELDS[pair.change] - dressed
            assert pair.same_identity == ("subject" not in differ)

    def test_every_reference_has_every_change_once(self, pairs):
        found = [(pair.subject, pair.number, pair.change) for pair in pairs]
        assert len(found) == len(set(found)) == 8 * len(CHANGES) + 8 * (len(CHANGES) - 1)  # a pot wears nothing
        references = {(pair.subject, pair.number): pair.reference for pair in pairs}
        assert all(references[pair.subject, pair.number] is pair.reference for pair in pairs)

    def test_half_rest_and_half_of_the_others_share_the_colour(self, pairs):
        for pair in pairs:
            assert (pair.reference.activity == "none") == (pair.number % 2 == 0)
            if not pair.same_identity:
                assert pair.changed.subject in line_up(pair.reference.subject)[1:]
                if pair.number < 2:
                    assert pair.changed.subject.body == pair.reference.subject.body

    def test_a_subject_shows_one_fold_of_activities(self, pairs):
        for pair in pairs:
            shown = {pair.reference.activity, pair.changed.activity} - {"none"}
            assert {fold_of(activity) for activity in shown} <= {pair.fold}
        assert {pair.fold for pair in pairs} == {0, 1}

    def test_the_seed_decides(self, pairs):
        assert controlled_pairs(["cat", "pot"], 8, seed=0) == pairs
        assert controlled_pairs(["cat", "pot"], 8, seed=1) != pairs
        assert controlled_pairs(["cat"], 4, seed=0) == pairs[: 4 * len(CHANGES)]

    def test_refusals(self):
        with pytest.raises(ParameterError, match="no class 'cta': choose class_nouns of cat, dog,"):
            controlled_pairs(["cat", "cta"], 4)
        with pytest.raises(ParameterError, match="24 individuals of a class are kept for tests.*up to 96"):
            controlled_pairs(["bike"], 97)
        assert subject_changes.check_classes([])[0] == "cat"

    @pytest.mark.parametrize("seed", [0, 7])
    def test_nobody_is_trained_on_and_tested(self, seed):
        individuals = set(subject_changes.training_individuals([]))
        assert len(individuals) > 10_000 and {i.class_noun for i in individuals} == set(CLASSES)
        for pair in controlled_pairs([], 96, seed):
            assert not {pair.reference.subject, pair.changed.subject} & individuals
        for who in (*DEMO_SUBJECTS.values(), RARE_SUBJECT, pair.reference.subject):
            assert not set(line_up(who)) & individuals

    def test_individuals_to_train_on_come_from_the_classes_in_turn(self):
        individuals = subject_changes.training_individuals(["cat", "pot"], 41)
        assert len(set(individuals)) == 41
        assert [i.class_noun for i in individuals[:4]] == ["cat", "pot", "cat", "pot"]
        with pytest.raises(ParameterError, match=r"has \d+ of one: choose n_individuals up to \d+"):
            subject_changes.training_individuals(["cat", "pot"], 100_000)

    def test_mask_iou(self):
        scene = reference_scenes(line_up(controlled_pairs(["cat"], 1)[0].reference.subject)[0])[0]
        assert subject_changes.mask_iou(scene, scene) == 1
        far = dataclasses.replace(scene, view=dataclasses.replace(scene.view, dx=scene.view.dx + 0.9))
        assert subject_changes.mask_iou(scene, far) == 0

    def test_changed_outside(self, pairs):
        """Another individual at rest changes nothing but itself; a stove stands beside the cook."""
        rest = [pair for pair in pairs if pair.reference.activity == "none"]
        assert all(
            subject_changes.changed_outside(pair.reference, pair.changed) < 0.01
            for pair in rest
            if pair.change == "identity"
        )
        scene = rest[0].reference
        cook = dataclasses.replace(scene, **doing("cooking a gourmet meal"))
        before, after = np.asarray(render(scene), int), np.asarray(render(cook), int)
        outside = (np.asarray(subject_mask(scene)) == 0) & (np.asarray(subject_mask(cook)) == 0)
        expected = (np.abs(before - after).max(2) > 25)[outside].mean()
        assert subject_changes.changed_outside(scene, cook) == pytest.approx(expected) and expected > 0.05


class TestTable:
    class Brightness:
        """A stand-in scorer: 1 − the difference of the mean grey values."""

        def __call__(self, images, references):
            assert len(references) == 1
            grey = [np.asarray(image.convert("L")).mean() / 255 for image in [*references, *images]]
            return 1 - torch.tensor([abs(g - grey[0]) for g in grey[1:]])

    class Judge:
        """Takes every picture for the subject whose body is as bright as it likes: here everyone."""

        def identifies(self, images, subject):
            return torch.ones(len(images))

    def test_rows_belong_to_their_pairs(self, pairs):
        pictures = subject_changes.draw(pairs)
        done = []
        table = subject_changes.score_pairs(pairs, pictures, {"x": self.Brightness()}, self.Judge(), done.append)
        assert len(table) == len(pairs) and done[-1] == len(pairs)
        for pair, row in zip(pairs, table.itertuples(), strict=True):
            assert (row.subject, row.pair, row.change) == (pair.subject, pair.number, pair.change)
            expected = self.Brightness()([pictures[pair.changed]], [pictures[pair.reference]])
            assert row.x == pytest.approx(expected.item()) and row.judge_identity == 1
        assert not table.duplicated(["subject", "change", "pair"]).any()

    def test_without_clip_a_column_is_missing_and_nothing_else(self, pairs, monkeypatch):
        scored = []
        monkeypatch.setattr(subject_head, "score_pairs", lambda *given: scored.append(given[2]) or self.nothing())
        dino = make_scorer("dino")
        heads = [subject.IdentityHead(96) for _ in range(subject_head.N_FOLDS)]
        for clip_i in (make_scorer("clip_i"), None):
            subject_head.measure(pairs, {}, dino, clip_i, subject.PatchMatch(dino), heads, None)
        assert "subject_score" in scored[0]
        assert scored[0].keys() - scored[1].keys() == {"clip_i"} and not scored[1].keys() - scored[0].keys()

    @staticmethod
    def nothing():
        return pd.DataFrame(columns=["fold", *(f"learned_without_{fold}" for fold in range(subject_head.N_FOLDS))])

    def test_photos(self):
        photos = [Image.new("RGB", (40, 30), (v, v, v)) for v in (0, 100, 200)]
        table = subject_changes.score_photos(photos, list("abc"), {"x": self.Brightness()})
        assert table["change"].value_counts().to_dict() == {"other photo": 6, "mirrored": 3, "cropped": 3}
        others = table[table["change"] == "other photo"]
        assert (others["reference"] != others["photo"]).all()
        assert others["x"].max() == pytest.approx(1 - 100 / 255)
        with pytest.raises(ScoreError, match="There is 1 photo of the subject.* two or more"):
            subject_changes.score_photos(photos[:1], ["a"], {"x": self.Brightness()})

    def test_photos_to_compare(self, tmp_path):
        Image.new("RGB", (80, 90), "red").save(tmp_path / "1.png")
        with pytest.warns(PhotoWarning), pytest.raises(ScoreError, match="give a folder with two or more"):
            subject_changes.photos_to_compare(tmp_path, "cat")
        Image.new("RGB", (300, 280), "blue").save(tmp_path / "2.jpg")
        with pytest.warns(PhotoWarning, match="enlarged"):
            photos, names = subject_changes.photos_to_compare(tmp_path, "cat")
        assert names == ["1.png", "2.jpg"] and [photo.size for photo in photos] == [(256, 256)] * 2
        assert len(subject_changes.photos_to_compare(None, "pot")[0]) == 5


class TestStatistics:
    def test_auc_counts_ties_as_a_half(self):
        assert auc([3, 2], [1, 0]) == 1 and auc([0], [1, 2]) == 0
        assert auc([1, 1], [1]) == 0.5
        assert auc([0.9, 0.7, 0.7], [0.8, 0.7]) == pytest.approx((2 + 0.5 + 0.5) / 6)
        with pytest.raises(ScoreError, match="one of the two is empty"):
            auc([], [1.0])

    @staticmethod
    def table(scores):
        """scores: subject -> change -> list by pair."""
        return pd.DataFrame(
            [
                {"class_noun": "cat", "subject": subject, "pair": k, "change": change, "x": value}
                for subject, by_change in scores.items()
                for change, values in by_change.items()
                for k, value in enumerate(values)
            ]
        )

    def test_subject_auc_compares_within_subjects(self):
        table = self.table(
            {"a": {"pose": [9, 8], "identity and pose": [7, 7]}, "b": {"pose": [2, 4], "identity and pose": [1, 3]}}
        )
        # a: 4 of 4; b: 2 > 1, 4 > 1, 4 > 3 of 4. Across subjects, b's 2 and 4 would lose to a's 7 too.
        found = analysis.subject_auc(table, "x", "pose", "identity and pose")
        assert found.value == pytest.approx((1 + 0.75) / 2) and found.n == 4
        assert (found.low, found.high) == (0, 1)  # two subjects
        turned = analysis.subject_auc(table, "x", "identity and pose", "pose")
        assert turned.value == pytest.approx(1 - found.value)
        table["y"] = -table["x"]
        gain = analysis.subject_auc(table, "x", "pose", "identity and pose", minus="y")
        assert gain.value == pytest.approx(found.value - turned.value) and gain.low < gain.value < gain.high

    def test_resampling_does_not_shift_the_auc(self):
        """Within a reference the subject always wins, across references it is a coin; copies of a reference in a
        resample are no new references."""
        rng = np.random.default_rng(0)
        scores = {}
        for k in range(60):
            level = rng.normal(size=4) * 100
            scores[f"s{k}"] = {"pose": list(level + 1), "identity and pose": list(level)}
        found = analysis.subject_auc(self.table(scores), "x", "pose", "identity and pose")
        assert found.value == pytest.approx(0.25 + 0.75 / 2, abs=0.01)
        assert (found.low + found.high) / 2 == pytest.approx(found.value, abs=0.02)

    def test_interval_is_over_subjects(self):
        """Ten references of one subject are one subject: adding copies of them must not narrow the interval to it."""
        one_right_one_wrong = {
            "a": {"pose": [2] * 10, "identity and pose": [1] * 10},
            "b": {"pose": [1] * 10, "identity and pose": [2] * 10},
        }
        found = analysis.subject_auc(self.table(one_right_one_wrong), "x", "pose", "identity and pose")
        assert (found.low, found.value, found.high) == (0, 0.5, 1)

    def test_fall_cost_and_misranked(self):
        table = self.table({"a": {"view": [1.0, 0.9], "pose": [0.8, 0.5], "identity": [0.6, 0.5]}})
        assert analysis.fall(table, "x", "pose").value == pytest.approx((0.2 + 0.4) / 2)
        assert analysis.pose_cost(table, "x").value == pytest.approx((0.2 + 0.5) / (0.4 + 0.5))
        assert analysis.misranked(table, "x").value == 0.25  # right, and a tie
        table.loc[table["change"] == "pose", "x"] = 0.1
        assert analysis.misranked(table, "x").value == 1
        with pytest.raises(ScoreError, match="No reference has the changes view, place"):
            analysis.fall(table, "x", "place")

    def test_spearman(self):
        x, subjects = pd.Series(np.arange(12.0)), pd.Series(list("aabbccddeeff"))
        found = analysis.spearman(x, -(x**3), subjects)
        assert found.value == pytest.approx(-1) and found.high == pytest.approx(-1)
        tied = pd.Series([5.0, 1, 5, 9] * 3)
        assert analysis.spearman(x, tied, subjects).value == pytest.approx(spearmanr(x, tied).statistic)
        with pytest.raises(ScoreError, match="values that differ"):
            analysis.spearman(x, 0 * x, subjects)
        four = analysis.spearman(x[:4], x[:4] ** 2, pd.Series(list("aaaa")))  # one in 64 resamples is of one pair
        assert (four.value, four.low, four.high) == (pytest.approx(1), -1, 1)


class TestPatches:
    def test_best_match(self):
        a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        b = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
        # a to b: 1 and 0; b to a: 1 and 0
        torch.testing.assert_close(subject.best_match(a[None], b), torch.tensor([0.5]))
        shuffled = a[[1, 0]]
        torch.testing.assert_close(subject.best_match(a[None], shuffled), torch.tensor([1.0]))

    def test_tokens_are_those_of_dino(self, dino):
        images = [render(scene) for scene in reference_scenes(line_up(_cat())[0])]
        last = subject.patch_tokens(dino, images)
        assert last.shape == (5, 64, 96)
        by_number = subject.patch_tokens(dino, images, layer=4)
        torch.testing.assert_close(dino.model.layernorm(by_number), last, atol=1e-4, rtol=1e-4)
        assert subject.middle_layer(dino) == 2

    def test_every_metric_gives_a_picture_one_with_itself(self, dino, pairs):
        pictures = subject_changes.draw(pairs[:8])
        images = list(pictures.values())[:3]
        head = subject.IdentityHead(96).eval()
        found, true = subject_metrics.FoundMask(dino), subject_metrics.TrueMask(dino, pictures)
        for scorer in (
            subject.PatchMatch(dino),
            subject_metrics.MaskedMean(dino, found, 2),
            subject_metrics.MaskedMean(dino, true, subject.LAST_LAYER),
            subject.SubjectFidelity(dino, head),
        ):
            torch.testing.assert_close(scorer(images[:1], references=images[:1]), torch.ones(1), atol=1e-5, rtol=0)
            one_by_one = torch.stack([scorer(images, references=[photo]) for photo in images]).mean(0)
            torch.testing.assert_close(scorer(images, references=images), one_by_one, atol=1e-5, rtol=1e-5)
            with pytest.raises(ScoreError, match="got none: pass references"):
                scorer(images)

    def test_true_mask(self, dino, pairs):
        pictures = subject_changes.draw(pairs[:1])
        scene, picture = next(iter(pictures.items()))
        weights = subject_metrics.TrueMask(dino, pictures)([picture])[0].view(8, 8)
        mask = np.asarray(subject_mask(scene)) / 255
        assert weights[5, 3].item() == pytest.approx(mask[40:48, 24:32].mean())
        with pytest.raises(ScoreError, match="image 0 is not known.*use FoundMask"):
            subject_metrics.TrueMask(dino, pictures)([Image.new("RGB", (64, 64))])

    def test_masked_mean_reads_the_masked_patches_only(self, dino):
        images = [render(scene) for scene in reference_scenes(_cat(), 2)]
        tokens = subject.patch_tokens(dino, images, 2)
        weights = torch.zeros(2, 64)
        weights[:, 27] = 1.0
        scorer = subject_metrics.MaskedMean(dino, lambda some: weights[: len(some)], 2)
        expected = torch.cosine_similarity(tokens[0, 27], tokens[1, 27], dim=0)
        torch.testing.assert_close(scorer(images[:1], references=images[1:]), expected[None])
        nothing = subject_metrics.MaskedMean(dino, lambda some: torch.zeros(len(some), 64), 2)
        assert nothing(images[:1], references=images[1:]).item() == 0

    def test_found_mask(self, dino, pairs):
        scenes = list(dict.fromkeys(pair.changed for pair in pairs))
        images = [render(scene) for scene in scenes]
        found = subject_metrics.FoundMask(dino)(images)
        assert (found.sum(1) == 16).all() and not found.view(-1, 8, 8)[:, 0].any()
        true = subject_metrics.TrueMask(dino, dict(zip(scenes, images, strict=True)))(images) > 0.5
        covered = (found.bool() & true).sum() / true.sum()
        assert covered > 0.6, "a random quarter of the patches would cover 0.25 of the subject"

    def test_show_mask(self):
        weights = torch.zeros(64)
        weights[0] = 1
        shown = subject_metrics.show_mask(Image.new("RGB", (64, 64), (200, 200, 200)), weights)
        assert shown.getpixel((3, 3)) == (200, 200, 200) and shown.getpixel((20, 3))[0] < 60


class TestHead:
    CONFIG = subject_head.HeadConfig(n_pictures=6, n_steps=80, batch=16, learning_rate=1e-2)

    def pictures(self, seed=0):
        """Individuals that one of 12 patches tells apart; each picture hides it at another place of a background."""
        stream = torch.Generator().manual_seed(seed)
        n, each = 24, self.CONFIG.n_pictures
        marks = torch.randn(n, 16, generator=torch.Generator().manual_seed(9)) * 3
        background = torch.linspace(-1, 1, 16)
        tokens = background + 0.1 * torch.randn(n * each, 12, 16, generator=stream)
        where = torch.randint(12, (n * each,), generator=stream)
        who = torch.arange(n).repeat_interleave(each)
        tokens[torch.arange(n * each), where] = marks[who]
        fold = torch.tensor([0, 0, 1, 1, -1, -1]).repeat(n)
        return subject_head.TrainingPictures(tokens, who, fold)

    def test_loss(self):
        eye = torch.eye(3)
        who = torch.arange(3)
        sharp = subject_head.identity_loss(eye, eye, who, 0.1)
        assert sharp.item() == pytest.approx(np.log(1 + 4 * np.exp(-10)), rel=1e-3)
        assert subject_head.identity_loss(eye, eye.roll(1, 0), who, 0.1) > 9
        # A third picture of an individual is neither right nor wrong: it changes nothing but how many there are.
        z = torch.nn.functional.normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
        twice = subject_head.identity_loss(z[[0, 0, 1]], z[[0, 0, 1]], torch.tensor([5, 5, 8]), 1.0)
        cosine = float(z[0] @ z[1])
        of_0, of_1 = (np.log(1 + n * np.exp(cosine - 1)) for n in (2, 4))
        assert twice.item() == pytest.approx((2 * of_0 + of_1) / 3, rel=1e-4)

    def test_it_learns_and_the_seed_decides(self):
        losses = []
        head = subject_head.train_head(self.pictures(), -2, self.CONFIG, on_step=lambda done, loss: losses.append(loss))
        assert len(losses) == 80 and losses[-1] < 0.2 * losses[0]
        again = subject_head.train_head(self.pictures(), -2, self.CONFIG)
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
        fresh = self.pictures(seed=1)  # the same individuals, new pictures
        z = head(fresh.tokens)
        cosines, same = z @ z.T, fresh.individual[:, None] == fresh.individual
        same_pairs = cosines[same & ~torch.eye(len(z), dtype=torch.bool)]
        assert auc(same_pairs.numpy(), cosines[~same].numpy()) > 0.9

    def test_a_left_out_fold_is_never_read(self):
        pictures = self.pictures()
        pictures.tokens[pictures.fold == 1] = torch.nan
        subject_head.train_head(pictures, 1, self.CONFIG)
        with pytest.raises(TrainingError, match="loss is nan at step 0"):
            subject_head.train_head(pictures, 0, self.CONFIG)

    def test_too_few_individuals(self):
        few = self.pictures()
        few = subject_head.TrainingPictures(few.tokens[:6], few.individual[:6], few.fold[:6])
        with pytest.raises(TrainingError, match="raise n_individuals"):
            subject_head.train_head(few, 0, self.CONFIG)

    def test_training_pictures(self, dino):
        individuals = line_up(_cat())[:2]
        pictures = subject_head.training_pictures(dino, individuals, subject_head.HeadConfig(n_pictures=20))
        assert pictures.tokens.shape == (40, 64, 96)
        assert pictures.individual.tolist() == [0] * 20 + [1] * 20 and set(pictures.fold.tolist()) == {-1, 0, 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Pocket weights with a subject head of a few seconds' training."""
    folder = tmp_path_factory.mktemp("build")
    for part in ("dino", "clip"):
        shutil.copytree(POCKET_WEIGHTS / part, folder / "weights" / part)
    vae, cpu = load_model("pocket").vae, torch.device("cpu")
    budget = dataclasses.replace(build.BUDGET, steps=40, batch=64)
    build.build(folder, folder / "weights", vae, cpu, torch.float32, budget, n_groups=16, n_pairs=4)
    return folder / "weights"


class TestScorer:
    def test_a_look_alike_differs_in_one_attribute(self):
        rng, changed = random.Random(0), set()
        for who in (*DEMO_SUBJECTS.values(), RARE_SUBJECT):
            for _ in range(60):
                other = build.look_alike(rng, who)
                differ = {f.name for f in dataclasses.fields(who) if getattr(who, f.name) != getattr(other, f.name)}
                assert len(differ) == 1 and other.shape in (*SHAPES[who.group], who.shape)
                changed |= differ
        assert changed == {"body", "second", "pattern", "shape", "long_ears"}

    def test_a_group_is_one_scene_acted_by_look_alikes(self, tmp_path):
        individuals = subject_changes.training_individuals(["cat"])
        groups = build.Groups(tmp_path, individuals, None, "cpu", 3)
        again = build.Groups(tmp_path, individuals, None, "cpu", 3)
        assert groups.images.shape == (3, build.PARADE, build.N_SCENES, 64, 64, 3)
        assert np.array_equal(groups.images, again.images) and len(list(tmp_path.iterdir())) == 1
        assert groups.who[:, 0].tolist() == [0, 1, 2]
        # In a scene only the individual differs: the corners are the same in all of a group's pictures of it.
        corners = groups.images[:, :, :, :4, :4]
        assert (corners == corners[:, :1]).all() and not (corners == corners[:, :, :1]).all()
        pictures, who = groups.batch(2, torch.Generator().manual_seed(0), "cpu")
        assert pictures.shape == (2, 2 * build.PARADE, 3, 64, 64) and not torch.equal(*pictures)
        assert set(who.view(2, -1)[:, 0].tolist()) < {0, 1, 2}

    def test_the_stage_writes_a_scorer_that_learned(self, weights):
        scorer = make_scorer("subject", weights)
        assert isinstance(scorer, subject.SubjectFidelity) and scorer.name == "subject"
        card = json.loads((weights / "subject" / "subject.json").read_text())
        assert set(card["auc"]) == {"renders", "reconstructions"} and card["n"] == 32
        assert all(0.6 < value <= 1 for aucs in card["auc"].values() for value in aucs.values())
        assert f"pose {card['auc']['renders']['pose']:.3f}" in scorer.evaluator and "n = 32" in scorer.evaluator
        rows = build.card_rows(weights)
        assert len(rows) == 6 and [target for *_, target, n in rows[:3]] == [0.95, 0.97, 0.93]

    def test_measured_aucs_are_those_of_the_notebook(self, weights):
        scorer = make_scorer("subject", weights)
        pairs = controlled_pairs([], 4, seed=1)
        table = subject_changes.score_pairs(
            pairs, subject_changes.draw(pairs), {"subject_score": scorer}, TestTable.Judge()
        )
        compared = analysis.compare_metrics(table.assign(dino=0.0), ["subject_score"]).set_index("measure")["value"]
        measured = build.measure(scorer, None, 4)
        assert measured["n"] == 32
        for change, value in measured["auc"]["renders"].items():
            assert value == pytest.approx(compared[f"auc_{change}"], abs=2e-3)

    def test_a_head_of_another_dino_is_refused(self, weights, tmp_path):
        shutil.copytree(weights, tmp_path / "weights")
        config = tmp_path / "weights" / "dino" / "model.safetensors"
        state = load_file(config)
        save_file({k: v + 0 if v.ndim > 1 else v * 2 for k, v in state.items()}, config, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="trained on another DINO.*--stages subject"):
            make_scorer("subject", tmp_path / "weights")
        (tmp_path / "weights" / "subject" / "subject.json").write_text("{}")
        with pytest.raises(ModelError, match="subject: the subject.safetensors and subject.json"):
            make_scorer("subject", tmp_path / "weights")
        shutil.rmtree(tmp_path / "weights" / "subject")
        matching = make_scorer("subject", tmp_path / "weights")
        assert isinstance(matching, subject.PatchMatch) and "patch matching, no training" in matching.evaluator

    def test_it_is_a_reward_and_a_monitor_like_any_other(self, weights):
        scorer = make_scorer("subject", weights)
        who = PersonalizedSubject("cat", "cat", "sks", "", "pocket", "", _cat())
        photos, images = world_photos(_cat()), [render(scene) for scene in reference_scenes(_cat(), 3, seed=5)]
        prompts = [who.prompt("sleeping")] * 3
        expected = scorer(images, references=photos)
        torch.testing.assert_close(scorer_reward(scorer, photos)(images, prompts)[0], expected)
        watched = SubjectMonitor(who, photos, scorer)(images, prompts)
        assert watched == {"monitor": pytest.approx(expected.mean().item())}

    def test_photos_are_compared_without_the_head(self, weights):
        of_world, _ = make_scorers(["clip_t", "subject"], weights, "cpu", judged=True)
        of_photos, _ = make_scorers(["clip_t", "subject"], weights, "cpu", judged=False)
        assert list(of_world) == list(of_photos) == ["clip_t", "subject_score"]
        assert "subject head" in of_world["subject_score"].evaluator
        assert "no training" in of_photos["subject_score"].evaluator


def _shown(found, digits=3):
    """The way the notebook writes intervals: ".061 [.046, .077]"."""
    value, low, high = (f"{x:.{digits}f}".replace("0.", ".", 1) for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _share(found):
    return f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


@pytest.fixture(scope="module")
def reference():
    return pd.read_csv(ROOT / "outputs" / "reference" / "changes.csv")


def test_the_reference_pairs_hold_what_the_notebook_concludes(reference):
    dino, clip_i = (
        {change: analysis.fall(reference, metric, change) for change in ("pose", "identity", "place")}
        for metric in ("dino", "clip_i")
    )
    assert dino["pose"].low > 0 and dino["identity"].value > 3 * dino["pose"].value
    assert dino["place"].low > dino["identity"].high and clip_i["pose"].low > clip_i["place"].high
    by_pose, by_place, by_all = (
        {m: analysis.subject_auc(reference, m, *pair) for m in analysis.LABELS}
        for pair in subject_changes.CONTRASTS.values()
    )
    assert by_pose["patch_match"].high < by_pose["dino"].low and by_place["patch_match"].high < by_place["dino"].low
    assert by_place["true_mask_last"].low < by_place["dino"].high < by_place["found_mask"].low
    for name in set(analysis.LABELS) - {"subject_score"}:
        assert all(by[name].value < by["subject_score"].value for by in (by_pose, by_place, by_all))
    assert by_pose["learned_unseen"].low < by_pose["dino"].value < by_pose["learned_unseen"].high
    assert by_place["learned_unseen"].low > by_place["dino"].high and by_all["learned_unseen"].low > by_all["dino"].high
    poses = reference[reference["change"] == "pose"]
    outside = analysis.spearman(poses["changed_outside"], poses["dino"], poses["subject"])
    assert (
        outside.high < 0
        and -outside.value > analysis.spearman(poses["mask_iou"], poses["dino"], poses["subject"]).value
    )


def test_the_numbers_in_the_exercises_are_the_references(reference):
    cells = json.loads((ROOT / "notebooks" / "05_dino_metric.ipynb").read_text(encoding="utf-8"))["cells"]
    told = " ".join("".join("".join(cell["source"]) + "\n" for cell in cells).split())
    for shared in (True, False):
        others = reference[(reference["change"] == "identity") & (reference["same_colour"] == shared)]
        chosen = others[["subject", "pair"]]
        assert f"{_share(analysis.misranked(reference.merge(chosen), 'dino'))} of" in told
    groups = {
        "Characters": ["cat", "dog", "teddy bear", "monster toy"], "containers": ["pot", "cup"],
        "vehicles": ["motorbike", "bike"],
    }  # fmt: skip
    for name, group in groups.items():
        assert f"{name} {_shown(analysis.fall(reference[reference['class_noun'].isin(group)], 'dino', 'pose'))}" in told
    means = reference.groupby("change")["learned_unseen"].mean().map("{:.2f}".format).str.lstrip("0")
    changes = ("view", "pose", "everything but identity")
    assert "from {} (view) to {} (pose) and {} (everything but".format(*means[list(changes)]) in told


def _cat():
    return controlled_pairs(["cat"], 1)[0].reference.subject


@pytest.mark.slow
def test_the_notebook(tmp_path, weights):
    small = ["-y", "class_nouns: [cat]", "-p", "n_pairs", "4", "-p", "n_individuals", "8", "-r", "device", "cpu"]
    small += ["-r", "scorer_weights", weights]
    result = papermill("05_dino_metric", tmp_path / "out.ipynb", *small, "-r", "run_out", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    run = read_run(tmp_path / "run", "05_dino_metric")
    changes = run.table("changes.csv")
    assert len(changes) == 4 * len(CHANGES)
    wanted = {
        "class_noun",
        "subject",
        "pair",
        "change",
        "same_identity",
        "activity",
        "dino",
        "clip_i",
        "judge_identity",
    }
    assert wanted | set(analysis.LABELS) <= set(changes) and "subject_score" in changes
    assert set(run.table("metrics.csv")["pictures"]) == {"renders", "reconstructions"}
    assert {"photos.csv", "figures/metrics.png", "figures/cost_of_changes.png"} <= set(run.outputs)
