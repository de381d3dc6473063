"""Deltas on a model: they stack, each can be looked below, and what is written is built again, or refused in words."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

from ibkit.adapt import KINDS, Adapted, attach, freeze, load_state, parameters_of, state, without
from ibkit.cli import main
from ibkit.device import generator
from ibkit.errors import ArtifactError, ModelError
from ibkit.model.loading import load_model
from ibkit.model.text_to_image import use_quick_attention
from ibkit.runs import Run, read_run


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pipeline(tmp_path / "model")
    return tmp_path / "model"


def noise_of(model, words=None):
    g = generator(0, "probe")
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([1, 500])
    with torch.no_grad():
        return model.guided_noise(x, t, ["a cat", "a sks cat dancing"] if words is None else words, 3.0)


def put(model, name, kind="lora", settings=None, change=0.3):
    """Attach a delta and move its weights, as a training would."""
    weights = attach(model, kind, name, {"rank": 2} if settings is None else settings, generator(0, name))
    with torch.no_grad():
        for i, p in enumerate(weights.values()):
            p.add_(change * torch.randn(p.shape, generator=generator(1, name, i)) * (p.std() if kind == "unet" else 1))
    return weights


def trained_run(folder, place, *deltas):
    """A finished run of a model with these deltas (name, kind, settings); its model beside it."""
    model, adapted = load_model(str(folder)), Adapted.of(load_model(str(folder)))
    run = Run.open(place, "02_rl_finetune", {})
    for name, kind, settings in deltas:
        put(model, name, kind, settings, 0.05 if kind == "unet" else 0.3)
        adapted = adapted.then(run, f"{name}.safetensors", model, name, name, seed=7)
    adapted.write(run)
    run.finish()
    freeze(model)
    return read_run(place), model


WORD = {"word": "<sks>", "start": "cat"}
CHAINS = [
    [],
    [("dreambooth", "unet", {})],
    [("lora_dreambooth", "lora", {"rank": 2})],
    [("dreambooth", "unet", {}), ("ddpo", "lora", {"rank": 3})],
    [("lora_dreambooth", "lora", {"rank": 2}), ("ddpo", "lora", {"rank": 3})],
    [("textual_inversion", "tokens", WORD | {"n_vectors": 2}), ("ddpo", "lora", {"rank": 3})],
    [("custom_diffusion", "cross_kv", {"words": {"<sks>": "sks", "<zwx>": "zwx"}}), ("ddpo", "lora", {"rank": 3})],
    [("dreambooth", "unet", {}), ("custom_diffusion", "cross_kv", {"words": {"<sks>": "sks"}})],
]
NETI = [("neti", "mapper", WORD | {"seed": 3, "norm": "whole", "truncate": 0}), ("ddpo", "lora", {"rank": 3})]


def named(chain):
    return "+".join(name for name, *_ in chain) or "base"


def test_an_adapter_starts_as_the_identity_and_is_all_that_is_trained(tiny):
    before = noise_of(tiny)
    weights = attach(tiny, "lora", "ddpo", {"rank": 4}, generator(0))
    assert torch.equal(before, noise_of(tiny))
    trainable = {
        id(p) for part in (tiny.unet, tiny.text_encoder, tiny.vae) for p in part.parameters() if p.requires_grad
    }
    assert trainable == {id(p) for p in weights.values()} and {p.dtype for p in weights.values()} == {torch.float32}


def test_a_second_adapter_stands_on_the_first(tiny):
    base = noise_of(tiny)
    put(tiny, "lora_dreambooth")
    personalized = noise_of(tiny)
    assert not torch.allclose(base, personalized, atol=1e-3)
    weights = attach(tiny, "lora", "ddpo", {"rank": 4}, generator(0))
    assert torch.equal(noise_of(tiny), personalized)  # the first is still on
    assert {id(p) for p in tiny.unet.parameters() if p.requires_grad} == {id(p) for p in weights.values()}
    put_on = {n: p.detach().clone() for n, p in parameters_of(tiny, "lora_dreambooth").items()}
    with torch.no_grad():
        for p in weights.values():
            p.normal_(0, 0.3, generator=generator(2))
    tuned = noise_of(tiny)
    with without(tiny, "ddpo"):  # the reference of the KL divergence is the personalized model, not the base
        assert torch.equal(noise_of(tiny), personalized)
    assert torch.equal(noise_of(tiny), tuned)
    assert {id(p) for p in tiny.unet.parameters() if p.requires_grad} == {id(p) for p in weights.values()}
    assert all(torch.equal(p, put_on[n]) for n, p in parameters_of(tiny, "lora_dreambooth").items())


def test_without_the_only_adapter_the_model_is_its_base(tiny):
    base = noise_of(tiny)
    put(tiny, "ddpo")
    with without(tiny, "ddpo"):
        assert torch.equal(noise_of(tiny), base)
    assert not torch.allclose(noise_of(tiny), base, atol=1e-3)


def test_an_error_inside_without_leaves_the_adapter_on(tiny):
    put(tiny, "ddpo")
    tuned = noise_of(tiny)
    with pytest.raises(ZeroDivisionError), without(tiny, "ddpo"):
        raise ZeroDivisionError
    assert torch.equal(noise_of(tiny), tuned)


def test_names_and_kinds_that_do_not_fit_are_refused(tiny):
    attach(tiny, "unet", "dreambooth", {}, generator(0))
    attach(tiny, "lora", "ddpo", {"rank": 2}, generator(0))
    with pytest.raises(ModelError, match="has a delta 'ddpo' already: give the second one another name"):
        attach(tiny, "lora", "ddpo", {"rank": 2}, generator(0))
    with pytest.raises(ModelError, match="'second' trains the whole U-Net and cannot stand on dreambooth"):
        attach(tiny, "unet", "second", {}, generator(0))
    assert list(tiny.deltas) == ["dreambooth", "ddpo"]


def test_below_a_whole_u_net_there_is_nothing_in_memory(tiny):
    attach(tiny, "unet", "dreambooth", {}, generator(0))
    with pytest.raises(ModelError, match="what lies below 'dreambooth' is not in memory"), without(tiny, "dreambooth"):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"more": torch.zeros(1)}, "or other names: it belongs to another model, kind or rank"),
        (lambda t: {k: v[..., :1] for k, v in t.items()}, "another rank or model"),
        (lambda t: {k: v * torch.nan for k, v in t.items()}, "values that are not finite: its training went astray"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_put_on(tiny, change, said):
    put(tiny, "ddpo")
    before = noise_of(tiny)
    with pytest.raises(ModelError, match=said):
        load_state(tiny, "ddpo", change(state(tiny, "ddpo")))
    assert torch.equal(noise_of(tiny), before)


@pytest.mark.parametrize("chain", [*CHAINS, NETI], ids=named)
def test_what_a_run_wrote_is_built_again(folder, tmp_path, chain):
    run, model = trained_run(folder, tmp_path / "run", *chain)
    adapted = Adapted.read(run)
    assert adapted.arm == named(chain)
    built = adapted.build()
    for words in (None, ["a <sks> cat", "a <sks> dancing"]):
        assert torch.equal(noise_of(built, words), noise_of(model, words))
    assert not any(p.requires_grad for p in (*built.unet.parameters(), *built.text_encoder.parameters()))
    assert list(built.deltas) == [name for name, *_ in chain]


@pytest.mark.parametrize("chain", CHAINS, ids=named)
def test_what_is_exported_draws_the_same_in_diffusers(folder, tmp_path, capsys, chain):
    run, model = trained_run(folder, tmp_path / "run", *chain)
    assert main(["export", str(run.folder), str(tmp_path / "exported")]) == 0
    loaded = {"diffusers": diffusers}
    exec(capsys.readouterr().out, loaded)  # the command says how to load what it wrote
    theirs = load_model(str(tmp_path / "exported"))
    theirs.unet = loaded["pipeline"].unet
    use_quick_attention(theirs.unet, theirs.device)
    for words in (None, ["a <sks> cat", "a <sks> dancing"]):
        torch.testing.assert_close(noise_of(theirs, words), noise_of(model, words), rtol=1e-5, atol=1e-6)


def test_the_key_is_of_weights_and_base_alone(folder, tmp_path):
    chain = CHAINS[-1]
    keys = [Adapted.read(trained_run(folder, tmp_path / name, *chain)[0]).key for name in ("a", "b")]
    assert keys[0] == keys[1]
    adapted = Adapted.read(read_run(tmp_path / "a"))
    others = [
        replace(adapted, deltas=adapted.deltas[:1]),
        replace(adapted, base=replace(adapted.base, fingerprint="x")),
    ]
    others.append(replace(adapted, deltas=(replace(adapted.deltas[0], sha256="x"), *adapted.deltas[1:])))
    assert len({keys[0], *(other.key for other in others)}) == 4


def test_a_run_can_be_moved_with_those_below_it(folder, tmp_path):
    run, model = trained_run(folder, tmp_path / "job" / "run", *CHAINS[3])
    (tmp_path / "job").rename(tmp_path / "moved")
    built = Adapted.read(read_run(tmp_path / "moved" / "run")).build()
    assert torch.equal(noise_of(built), noise_of(model))


def test_a_second_stage_of_a_method_has_a_name_of_its_own(folder, tmp_path):
    run, _ = trained_run(folder, tmp_path / "run", *CHAINS[3])
    adapted = Adapted.read(run)
    assert (adapted.free_name("ddpo"), adapted.free_name("dpok")) == ("ddpo-2", "dpok")


def alter(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda run, base: (run / "ddpo.safetensors").unlink(), ArtifactError, "is not there: its run was moved"),
        (lambda run, base: alter(run / "ddpo.safetensors"), ArtifactError, "was altered since 'ddpo' was trained"),
        (
            lambda run, base: alter(base / "unet" / "diffusion_pytorch_model.safetensors"),
            ModelError,
            "are not those that dreambooth\\+ddpo was trained on: bring them back, or train again",
        ),
    ],
    ids=["missing", "altered", "another base"],
)
def test_files_that_are_not_those_trained_are_refused(folder, tmp_path, harm, error, said):
    run, _ = trained_run(folder, tmp_path / "run", *CHAINS[3])
    adapted = Adapted.read(run)
    harm(run.folder, folder)
    with pytest.raises(error, match=said):
        adapted.build()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', json.dumps({"schema": 1, "base": {}, "deltas": [{}]})])
def test_a_description_that_cannot_be_read_is_refused(tmp_path, text):
    run = Run.open(tmp_path / "run", "01_personalize", {})
    run.write_text("adapted.json", text)
    run.finish()
    with pytest.raises(ArtifactError, match="does not describe an adapted model .*run its notebook again"):
        Adapted.read(read_run(tmp_path / "run"))


def test_every_kind_has_what_the_others_have():
    offered = {"attach", "parameters", "without", "export"}
    assert all(offered <= set(dir(kind)) for kind in KINDS.values())
