"""`ibkit plan`: it counts the passes that the methods make, and its arithmetic is that of its words."""

import json
from argparse import ArgumentParser

import pytest
import torch

from ibkit.cli import main
from ibkit.data.prompts import training_prompts
from ibkit.job import costs
from ibkit.job import run as main_job
from ibkit.job.costs import Passes, PocketCosts, count
from ibkit.job.stages import defaults, given, plan
from ibkit.methods import ddpo, dreambooth
from ibkit.methods.class_images import class_images
from ibkit.methods.records import Work
from ibkit.presets import POCKET

SETTINGS = [
    "lora_dreambooth.n_steps=2", "lora_dreambooth.batch=3", "lora_dreambooth.n_class_images=4",
    "ddpo.n_epochs=2", "ddpo.images_per_epoch=4", "ddpo.sampler.n_steps=5",
]  # fmt: skip
SMALL = [word for value in SETTINGS for word in ("--set", value)] + ["-p", "03_evaluate.n_images=2"]


def works(*words):
    parser = ArgumentParser()
    main_job.add_settings(parser)
    stages = plan(defaults() | given(parser.parse_args(list(words))), main_job.OUTPUTS / "plan")
    return {stage.name: count(stage) for stage in stages}


def small(*words):
    return works(*SMALL, *words)


@pytest.fixture
def rows_passed(tiny, monkeypatch):
    """Rows of the tiny model's U-Net passes: with and without a graph."""
    seen = {True: 0, False: 0}
    forward = tiny.unet.forward

    def counted(x, *arguments, **options):
        seen[torch.is_grad_enabled()] += len(x)
        return forward(x, *arguments, **options)

    monkeypatch.setattr(tiny.unet, "forward", counted)
    return seen


def test_rl_is_counted_as_it_is_done(tiny, rows_passed, tmp_path):
    config = POCKET.settings("ddpo", {"n_epochs": 2, "images_per_epoch": 4, "sampler.n_steps": 5})
    prompts = training_prompts(POCKET.activities, "cat", "sks")
    ddpo.train(tiny, prompts, lambda images, prompts: torch.arange(len(images)).float(), config, tmp_path)
    work = small()["02_rl_finetune"]
    assert work.tuned == rows_passed[True] == 2 * 4 * 2 * 2  # epochs x images x steps drawn (0.6 of 4) x guidance
    grid = 2 * 4 * len(prompts)  # before RL and at its end
    assert work.forward - (grid * 5 + costs.FIXED_PICTURES * POCKET.sampler.n_steps) * 2 == rows_passed[False]
    assert work.pictures == 2 * 4 + grid


def test_the_personalized_policys_passes_are_counted():
    without, with_kl = small()["02_rl_finetune"], small("--set", "ddpo.kl_weight=0.1")["02_rl_finetune"]
    assert with_kl.forward - without.forward == without.tuned and with_kl.tuned == without.tuned
    assert small("--set", "ddpo.kl_weight=0")["02_rl_finetune"] == without


def test_dreambooth_is_counted_as_it_is_done(tiny, rows_passed, tmp_path):
    config = POCKET.settings("dreambooth", {"n_steps": 2, "batch": 3, "n_class_images": 4})
    pictures = class_images(tiny, "a cat", 4, POCKET.class_sampler, tmp_path / "cache", seed=0)
    drawn = rows_passed[False]
    dreambooth.train(tiny, pictures, "a sks cat", "a cat", pictures, config, tmp_path)
    words = ["--personalize", "dreambooth"]
    words += [word.replace("lora_dreambooth", "dreambooth") for word in SMALL]
    work = works(*words)["01_personalize"]
    assert work.trained == rows_passed[True] and work.graph_rows == 6
    measured = (2 * 2 * 16 + costs.FIXED_PICTURES) * POCKET.sampler.n_steps * 2
    assert work.forward - measured == drawn
    by_default = small()["01_personalize"]  # LoRA: the same rows, with the gradient of a few weights
    assert (by_default.tuned, by_default.trained, by_default.forward) == (work.trained, 0, work.forward)
    assert works(*words, "--set", "dreambooth.prior_weight=0")["01_personalize"].trained == work.trained / 2


def test_the_evaluation_draws_for_every_method_and_seed():
    one, three = (small("--tune-seeds", *seeds)["03_evaluate"] for seeds in (["0"], ["0", "1", "2"]))
    assert one.pictures == 2 * (5 * 2 * 2) and three.pictures == 2 * (9 * 2 * 2)  # drawn and scored; 2 activities


def test_fewer_steps_and_no_guidance_are_counted():
    usual, quick = small(), small("--n-inference-steps", "2", "--guidance", "1")
    rows, drawn = POCKET.sampler.rows, (2 * 2 * 16 + costs.FIXED_PICTURES) * POCKET.sampler.rows
    class_rows = usual["01_personalize"].forward - drawn
    assert class_rows == 4 * POCKET.class_sampler.rows
    assert quick["01_personalize"].forward == drawn / rows * 2 + 4 * 2
    assert quick["03_evaluate"].forward == usual["03_evaluate"].forward / rows * 2
    assert quick["02_rl_finetune"] == usual["02_rl_finetune"]


def test_the_arithmetic():
    cost = PocketCosts(
        1.0, 10.0, 100.0, 0.5, 7.0, 1e9, "", 0.25,
        resident=1000.0, weights=50.0, tuned_row_bytes=2.0, trained_row_bytes=3.0,
    )  # fmt: skip
    assert cost.seconds(Work(forward=3, tuned=2, trained=1, pictures=4)) == 7 + 3 + 20 + 100 + 2 + 0.25
    assert cost.seconds(Work(trained=6, graph_rows=2)) == 7 + 600 + 3 * 0.25  # three updates
    assert cost.peak_bytes(Work(tuned=1, graph_rows=10)) == 1000 + 20
    assert cost.peak_bytes(Work(trained=1, graph_rows=10)) == 1000 + 30 + 4 * 50


def test_operations_and_bytes_of_a_layer_by_hand():
    class Out:
        def __init__(self, sample):
            self.sample = sample

    class Layer(torch.nn.Linear):
        def forward(self, x, t, encoder_hidden_states):
            return Out(super().forward(x))

    passes = Passes(Layer(8, 5, bias=False), (8,), torch.zeros(1, 1), torch.device("cpu"))
    assert passes.flop() == 2 * 8 * 5
    assert passes.weight_bytes == 4 * 8 * 5
    assert passes.graph_bytes("all") == 4 * (8 + 5)  # the input for the weight's gradient, the output for the square's


def test_a_machine_is_timed_once_for_grids(tmp_path, monkeypatch):
    timed = []

    def pocket(device):
        timed.append(device)
        return PocketCosts(
            0.1, 0.2, 0.3, 0.4, 5, 6, "timed", resident=7, weights=8, tuned_row_bytes=9, trained_row_bytes=10
        )

    monkeypatch.setattr(costs, "_pocket", pocket)
    kept, cpu = tmp_path / "cache" / "costs.json", torch.device("cpu")
    first, again = (costs.costs("pocket", cpu, kept=kept) for _ in range(2))
    assert first == again and len(timed) == 1 and first.how.startswith("timed at 20")
    monkeypatch.setattr(costs.platform, "node", lambda: "another machine")
    assert costs.costs("pocket", cpu, kept=kept).seconds(costs.Work()) == 5 and len(timed) == 2
    for broken in ("", "[]", '{"of": 1}', kept.read_text().replace('"start"', '"stop"')):
        kept.write_text(broken)
        assert costs.costs("pocket", cpu, kept=kept).start == 5
    assert len(timed) == 6


def test_the_command_says_where_its_numbers_come_from(capsys, monkeypatch):
    monkeypatch.setattr(costs, "REPEATS", 1)
    assert main(["plan", "--device", "cpu", "--json", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in result["stages"]] == ["01_personalize", "02_rl_finetune", "03_evaluate"]
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in result["stages"]))
    assert 0.3 < result["peak_gib"] < 4


def test_bad_settings_are_refused_as_in_a_run(capsys):
    assert main(["plan", "--set", "ddpo.n_epoch=3"]) == 2
    assert "did you mean 'n_epochs'" in capsys.readouterr().err
