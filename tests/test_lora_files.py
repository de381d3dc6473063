"""A LoRA made elsewhere as a start: read as diffusers reads it, below all stages, and refused where it cannot be."""

import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibkit.adapt import Adapted, attach, parameters_of
from ibkit.adapt.lora import attach_file
from ibkit.cli import main
from ibkit.device import generator
from ibkit.errors import ModelError
from ibkit.evaluate.score import read_inputs
from ibkit.model.loading import load_model
from ibkit.runs import Run, hash_file, read_run
from tests.test_adapt import noise_of, put
from tests.tiny import tiny_model

RANKS = {"to_q": 4, "to_out.0": 4, "ff.net.0.proj": 2, "conv1": 3}  # beyond ours: other modules, several ranks
ALPHA = 6.0


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pipeline(tmp_path / "model")
    return tmp_path / "model"


def adapter_of(tokenizer):
    """A U-Net with a random adapter, and the adapter's weights."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = tiny_model(tokenizer).unet
    patterns = {f".*{name}": rank for name, rank in RANKS.items() if rank != 4}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=ALPHA, target_modules=list(RANKS), rank_pattern=patterns))
    weights = get_peft_model_state_dict(unet)
    return unet, {n: 0.3 * torch.randn(w.shape, generator=generator(3, n)) for n, w in sorted(weights.items())}


def as_diffusers(tokenizer, folder):
    unet, weights = adapter_of(tokenizer)
    described = unet.peft_config["default"].to_dict()  # its alpha
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, weights, unet_lora_adapter_metadata=described)
    return folder / "pytorch_lora_weights.safetensors"


def as_kohya(tokenizer, folder):
    """As kohya's scripts, which most shared LoRAs are made with, name and scale them."""
    tensors = {}
    for name, weight in adapter_of(tokenizer)[1].items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{stem}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = weight
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def plain(tokenizer, folder):
    """In diffusers' format without a word about alpha: the scale is then 1."""
    tensors = {f"unet.{name}": weight for name, weight in adapter_of(tokenizer)[1].items()}
    save_file(tensors, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def started(folder, place, file):
    """A run like one of 01 that starts from the file and trains an adapter of its own; its model."""
    model = load_model(str(folder))
    run = Run.open(place, "01_personalize", {})
    adapted = Adapted.of(model).on_adapter(run, model, file)
    put(model, "lora_dreambooth")
    adapted = adapted.then(run, "lora_dreambooth.safetensors", model, "lora_dreambooth", "lora_dreambooth", 7)
    adapted.write(run)
    run.finish()
    return read_run(place), model


@pytest.mark.parametrize("write", [as_diffusers, as_kohya, plain])
def test_it_is_read_as_diffusers_reads_it(tokenizer, folder, tmp_path, write):
    file, model = write(tokenizer, tmp_path), load_model(str(folder))
    before = noise_of(model)
    attach_file(model, "style", file)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = load_model(str(folder))
    theirs.unet = pipeline.unet
    torch.testing.assert_close(noise_of(model), noise_of(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noise_of(model), before, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    ranks = model.deltas["style"].settings["ranks"]
    assert set(ranks.values()) == set(RANKS.values()) and all(re.search("|".join(RANKS), name) for name in ranks)


def test_stages_stand_on_it_and_a_run_keeps_it(tokenizer, folder, tmp_path):
    file = as_kohya(tokenizer, tmp_path)
    run, model = started(folder, tmp_path / "run", file)
    file.unlink()  # the run has its own copy
    adapted = Adapted.read(run)
    assert torch.equal(noise_of(adapted.build()), noise_of(model))
    assert adapted.arm == "lora_dreambooth" and adapted.free_name("adapter") == "adapter-2"
    (below,) = adapted.base.adapters
    assert below.sha256 == hash_file(run.path("adapter.safetensors")) and below.kind == "lora"
    base = Adapted(adapted.base)
    assert base.arm == "base" and base.key != Adapted.of(load_model(str(folder))).key != adapted.key
    below_all = load_model(str(folder))
    attach_file(below_all, "style", as_kohya(tokenizer, tmp_path))
    assert torch.equal(noise_of(base.build()), noise_of(below_all))  # what the evaluation compares with


def test_full_dreambooth_can_stand_on_it(tokenizer, folder, tmp_path):
    model, run = load_model(str(folder)), Run.open(tmp_path / "run", "01_personalize", {})
    adapted = Adapted.of(model).on_adapter(run, model, plain(tokenizer, tmp_path))
    frozen = {name: weight.clone() for name, weight in parameters_of(model, "adapter").items()}
    weights = attach(model, "unet", "dreambooth", {}, generator(0))
    assert len(weights) == len(list(tiny_model(tokenizer).unet.parameters()))
    assert {id(p) for p in model.unet.parameters() if p.requires_grad} == {id(p) for p in weights.values()}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(1.01)
    adapted = adapted.then(run, "dreambooth.safetensors", model, "dreambooth", "dreambooth", 7)
    adapted.write(run)
    run.finish()
    assert torch.equal(noise_of(Adapted.read(read_run(run.folder)).build()), noise_of(model))
    assert all(torch.equal(weight, frozen[name]) for name, weight in parameters_of(model, "adapter").items())


@pytest.mark.parametrize("write", [as_diffusers, as_kohya])
def test_it_is_exported_with_the_rest(tokenizer, folder, tmp_path, capsys, write):
    run, model = started(folder, tmp_path / "run", write(tokenizer, tmp_path))
    assert main(["export", str(run.folder), str(tmp_path / "exported")]) == 0
    loaded = {"diffusers": diffusers}
    exec(capsys.readouterr().out, loaded)
    theirs = load_model(str(folder))
    theirs.unet = loaded["pipeline"].unet
    torch.testing.assert_close(noise_of(theirs), noise_of(model), rtol=1e-4, atol=1e-5)


def with_text(tokenizer, folder):
    tensors = load_file(as_kohya(tokenizer, folder))
    save_file(tensors | {"lora_te_text_model_encoder.lora_down.weight": torch.ones(2, 2)}, folder / "text.safetensors")
    return folder / "text.safetensors"


def of_another_kind(tokenizer, folder):
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, folder / "loha.safetensors")
    return folder / "loha.safetensors"


def of_another_shape(tokenizer, folder):
    tensors = load_file(plain(tokenizer, folder))
    save_file({n: torch.cat([w, w], 1) if "lora_A" in n else w for n, w in tensors.items()}, folder / "xl.safetensors")
    return folder / "xl.safetensors"


def of_other_modules(tokenizer, folder):
    tensors = load_file(plain(tokenizer, folder))
    more = {n.replace("down_blocks.0", "down_blocks.7"): w.clone() for n, w in tensors.items()}
    save_file(tensors | more, folder / "more.safetensors")
    return folder / "more.safetensors"


def of_none(tokenizer, folder):
    save_file({"some.lora_A.weight": torch.ones(2, 2)}, folder / "none.safetensors")
    return folder / "none.safetensors"


def of_a_run(tokenizer, folder):
    save_file({f"down_blocks.0.{n}.lora_A.weight": torch.ones(2, 2) for n in RANKS}, folder / "ddpo.safetensors")
    return folder / "ddpo.safetensors"


def damaged(tokenizer, folder):
    path = plain(tokenizer, folder)
    path.write_bytes(path.read_bytes()[:-10])
    return path


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (with_text, r"adapts the text encoder too \(1 weights, first lora_te_.*LoRA of the U-Net alone, or merge"),
        (of_another_kind, r"another kind than LoRA \(lora_unet_x.hada_w1_a\): give a plain LoRA"),
        (of_another_shape, "does not fit the U-Net of .*: it is a LoRA of another model"),
        (of_other_modules, "LoRA of another model"),
        (of_none, "of the 1 weights in .*, 0 belong to the U-Net .*LoRA of another model, or in a format"),
        (of_a_run, "is a file of a run of this kit: `ibkit export RUN FOLDER` writes"),
        (damaged, "is not a .safetensors file, or is damaged"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tokenizer, tmp_path, tiny, write, says):
    with pytest.raises(ModelError, match=says) as refused:
        attach_file(tiny, "style", write(tokenizer, tmp_path))
    assert "\n" not in str(refused.value) and not tiny.deltas


def test_runs_that_start_from_different_ones_are_not_compared_as_one_base(tokenizer, folder, tmp_path):
    from ibkit.data.subject import PersonalizedSubject
    from ibkit.errors import ParameterError

    runs = []
    for i, write in enumerate((as_kohya, plain)):
        model, run = load_model(str(folder)), Run.open(tmp_path / f"run{i}", "01_personalize", {})
        Adapted.of(model).on_adapter(run, model, write(tokenizer, tmp_path)).write(run)
        PersonalizedSubject("cat", "cat", "sks", "", str(folder), "", None).save(run)
        run.finish()
        runs.append(read_run(run.folder))
    with pytest.raises(ParameterError, match="have different models that are both base"):
        read_inputs(runs, str(folder))
