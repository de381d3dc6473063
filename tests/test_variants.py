"""Variants of a personalization beside each other, and the claims of DPG and RPO that they decide."""

import dataclasses
import os
import shutil

import pandas as pd
import pytest

from ibkit.errors import ParameterError
from ibkit.evaluate.claims import claims_from
from ibkit.evaluate.stats import check_scores
from ibkit.experiments.variants import DPG, RPO, Variant, choose, train_and_draw
from ibkit.job import run as main_job
from ibkit.methods.records import METHODS
from ibkit.model.loading import load_model
from ibkit.params import make
from ibkit.presets import POCKET, SD15
from ibkit.runs import Run, read_run
from tests.test_baselines import ibkit
from tests.test_claims import images


def scores(shares):
    return pd.concat([images(arm, True, *both) for arm, both in shares.items()])


def verdicts(shares):
    return {claim.id: claim for claim in claims_from({"scores.csv": check_scores(scores(shares))})}


AS_RPO_SAYS = {
    "lora_dreambooth": (0.3, 1.0), "rpo": (0.8, 0.8), "rpo_last": (0.5, 0.9), "rpo_similarity": (0.2, 1.0),
    "rpo_val_7": (0.6, 0.95), "rpo_train_7": (0.6, 0.95), "rpo_arithmetic": (0.3, 0.95),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, claim, verdict",
    [({}, f"R{i}", "supported") for i in range(1, 8)]
    + [
        ({"rpo": (0.8, 0.0)}, "R1", "contradicted"),  # a subject that is lost is no balance, whatever the text
        ({"rpo": (0.3, 1.0)}, "R1", "undecided"),  # as DreamBooth
        ({"rpo_last": (0.95, 0.9)}, "R2", "contradicted"),
        ({"rpo_similarity": (0.8, 1.0)}, "R3", "contradicted"),
        ({"rpo_similarity": (0.9, 1.0)}, "R4", "contradicted"),
        ({"rpo_val_7": (0.6, 0.6)}, "R5", "contradicted"),
        ({"rpo_train_7": (0.6, 0.6)}, "R6", "contradicted"),
        ({"rpo_arithmetic": (0.9, 0.95)}, "R7", "contradicted"),
    ],
)
def test_each_claim_of_rpo_can_fail(changes, claim, verdict):
    assert verdicts(AS_RPO_SAYS | changes)[claim].verdict == verdict


@pytest.mark.parametrize(
    "dpg, mean, expected",
    [
        ((0.7, 0.95), (0.7, 0.9), ["supported", "supported", "supported"]),
        ((0.4, 0.5), (0.7, 0.5), ["contradicted", "contradicted", "contradicted"]),
    ],
)
def test_each_claim_of_dpg_can_fail(dpg, mean, expected):
    found = verdicts({"lora_dreambooth": (0.7, 0.7), "dpg": dpg, "dpg_no_critic": mean})
    assert [found[f"D{i}"].verdict for i in (1, 2, 3)] == expected


def test_a_balance_is_the_harmonic_mean_of_both_shares():
    found = verdicts(AS_RPO_SAYS)["R1"]
    assert found.value == pytest.approx(0.8 - 2 * 0.3 * 1.0 / 1.3) and found.low > 0


def test_a_job_without_the_ablations_says_what_is_missing():
    table = check_scores(scores({"rpo": (0.8, 0.8), "lora_dreambooth": (0.3, 0.9), "dpg": (0.7, 1.0)}))
    found = {claim.id: claim for claim in claims_from({"scores.csv": table})}
    assert found["R1"].verdict == found["D1"].verdict == "supported"
    assert found["R2"].verdict == "not tested" and "11_rpo" in found["R2"].reason
    only_lora = claims_from({"scores.csv": table[table["arm"] == "lora_dreambooth"]})
    assert not {"D1", "R1"} & {claim.id for claim in only_lora}


def test_settings_of_every_variant_exist_at_both_scales():
    for variant in (DPG | RPO).values():
        for preset in (POCKET, SD15):
            config = preset.settings(variant.method, dict(variant.settings))
            assert all(getattr(config, name) == value for name, value in variant.settings.items())
    assert list(choose(RPO, ["rpo_last", "rpo"])) == ["rpo_last", "rpo"]
    with pytest.raises(ParameterError, match="no variant 'rpo_lst'.*rpo_last"):
        choose(RPO, ["rpo_lst"])
    with pytest.raises(ParameterError, match="no variants to train"):
        choose(RPO, [])


def test_a_variant_is_trained_drawn_and_judged(tmp_path):
    """On the pocket model, one step: the rows are scores, the same noise for every variant."""
    run, base, tables = Run.open(tmp_path / "run", "11_rpo", {}), load_model("pocket"), []
    small = {"n_steps": 1, "batch": 1, "n_class_images": 1, "n_negatives": 1, "n_validation": 1, "sampler.n_steps": 2}
    preset = dataclasses.replace(POCKET, activities=("dancing",), class_sampler=POCKET.sampler)
    for name in ("lora_dreambooth", "rpo"):
        rows, history, _ = train_and_draw(
            run, base, preset, "cat", name, Variant(METHODS[name].name), 0, small, 2, tmp_path / "cache"
        )
        assert len(history) == 1 and len(rows) == 2
        tables.append(rows)
    run.finish()
    assert len([name for name in read_run(run.folder).manifest["outputs"] if name.startswith("models/")]) == 2
    assert tables[0]["image_seed"].tolist() == tables[1]["image_seed"].tolist()
    check_scores(tables[0].drop(columns="image"))


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"variants": ["dpgg"]}, "no variant 'dpgg'"),
        ({"variants": []}, "'variants' must be a list of one or more"),
        ({"class_nouns": ["catt"]}, "no class 'catt'; did you mean 'cat'"),
        ({"train_seeds": []}, "'train_seeds' must be a list of one or more"),
        ({"settings": {"n_stepz": 3}}, "has the setting 'n_stepz'; did you mean 'n_steps'"),
        ({"settings": {"n_steps": 0}}, "n_steps"),
        ({"model": "sd15"}, "give model='pocket'"),
    ],
)
@pytest.mark.parametrize("notebook", ["10_deterministic_pg", "11_rpo"])
def test_a_wrong_parameter_is_refused_in_words(notebook, values, sentence):
    with pytest.raises(ParameterError, match=sentence):
        make(notebook, values)


@pytest.mark.slow
def test_one_job_personalizes_with_both_and_scores_them():
    """Three personalizations and an evaluation, for real at the smallest budget."""
    name = f"test-variants-{os.getpid()}"
    folder, methods = main_job.OUTPUTS / name, ("rpo", "dpg", "lora_dreambooth")
    sets = [f"{method}.n_steps=2" for method in methods]
    sets += ["dpg.n_class_images=2", "lora_dreambooth.n_class_images=2", "rpo.n_negatives=1", "rpo.n_validation=1"]
    words = ["run", "--name", name, "--device", "cpu", "--personalize", *methods, "--tune", "none"]
    words += [w for s in sets for w in ("--set", s)]
    try:
        ibkit(*words, "-p", "03_evaluate.n_images=2", "-p", '03_evaluate.scorers=["clip_t"]')
        scores = read_run(folder / "03_evaluate").table("scores.csv")
        assert set(methods) <= set(scores["arm"])
        found = {claim.id for claim in claims_from({"scores.csv": check_scores(scores)})}
        assert {"D1", "D2", "D3", "R1", "R7"} <= found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
