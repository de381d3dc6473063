"""Textual Inversion, Custom Diffusion and NeTI: what moves, the maths by hand, resuming, and files for diffusers."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ibkit.adapt import Adapted, attach, cross_kv, freeze, parameters_of, tokens
from ibkit.adapt.cross_kv import changed
from ibkit.data.prompts import training_prompts
from ibkit.data.subject import PersonalizedSubject
from ibkit.data.templates import TEMPLATES
from ibkit.device import generator
from ibkit.errors import ArtifactError, ModelError, ParameterError
from ibkit.evaluate.training_costs import training_costs
from ibkit.job import run as main_job
from ibkit.methods import custom_diffusion as cd
from ibkit.methods import neti
from ibkit.methods import textual_inversion as ti
from ibkit.methods.records import METHODS, Job, named
from ibkit.model.attention import cross_attention_layers, token_positions
from ibkit.model.loading import load_model
from ibkit.model.mapper import BYPASS, N_UNITS, Mapper
from ibkit.model.sample import Sampler, sample_latents
from ibkit.model.text_to_image import model_fingerprint
from ibkit.runs import Run, read_run
from ibkit.train.resources import Resources
from tests.tiny import tiny_model

CAT = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)
SETTINGS = {
    "textual_inversion": ti.TextualInversionConfig(n_steps=6, batch=2, checkpoint_every=3, templates="plain"),
    "custom_diffusion": cd.CustomDiffusionConfig(n_steps=6, batch=2, checkpoint_every=3, learning_rate=1e-2),
    "neti": neti.NeTIConfig(n_steps=6, batch=2, checkpoint_every=3, templates="plain"),
}


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]


def train(method, model, folder, settings=None, who=CAT, **options):
    who = METHODS[method].names(who)
    job = Job(Adapted.of(model), who, pictures(2), method, 5, folder, pictures(3, 1))
    return METHODS[method].train(model, job, settings or SETTINGS[method], **options)


def noise_of(model, *words):
    x = torch.randn(len(words), 4, 8, 8, generator=generator(0, "probe"))
    with torch.no_grad():
        return model.predict_noise(x, torch.tensor([1, 500, 900][: len(words)]), words)


def weights_of(model):
    parts = {"unet": model.unet, "vae": model.vae, "text": model.text_encoder}
    return {f"{part}.{n}": p.detach().clone() for part, m in parts.items() for n, p in m.named_parameters()}


# --- what moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_nothing_but_the_delta_moves(tokenizer, tmp_path, method):
    base = tiny_model(tokenizer)
    model, before = base.copy(), weights_of(base)
    said = noise_of(base, "a cat", "a sks cat", "")
    first = state_of(model, method)
    train(method, model, tmp_path, dataclasses.replace(SETTINGS[method], weight_decay=0.5))
    after = weights_of(model)
    assert all(torch.equal(after[moved_name(name, after)], value) for name, value in before.items())
    moved = parameters_of(model, method)
    assert not any(torch.equal(p, first[n]) for n, p in moved.items() if n in first)
    assert not any(p.requires_grad for part in model.parts().values() for p in part.parameters())
    # the base, whose text encoder it shared, still reads what it read, and does not know the word
    assert torch.equal(noise_of(base, "a cat", "a sks cat", ""), said)
    assert base.token_ids("<sks>") != model.token_ids("<sks>") == [len(tokenizer)]
    if method != "custom_diffusion":  # whose cross-attentions read every prompt
        assert torch.equal(noise_of(model, "a cat", "a sks cat", ""), said)
    assert not torch.equal(noise_of(model, "a <sks> cat"), noise_of(model, "a sks cat"))


def moved_name(name, after):
    """A weight's name once the embedding has rows beside it."""
    return name if name in after else name.replace("token_embedding.", "token_embedding.below.")


def state_of(model, method):
    """A delta's weights before training, from a copy."""
    probe = model.copy()
    word = {"word": "<sks>", "start": "cat"}
    kinds = {
        "textual_inversion": ("tokens", word | {"n_vectors": 1}),
        "custom_diffusion": ("cross_kv", {"words": {"<sks>": "sks"}}),
        "neti": ("mapper", word | {"seed": 5, "norm": "whole", "truncate": 0}),
    }
    kind, settings = kinds[method]
    return {n: p.detach().clone() for n, p in attach(probe, kind, method, settings, generator(5, method)).items()}


@pytest.mark.parametrize("method", SETTINGS)
def test_a_resumed_training_ends_bit_identical(tokenizer, tmp_path, method):
    straight, stopped, resumed = (tiny_model(tokenizer) for _ in range(3))
    rows = train(method, straight, tmp_path / "a")

    def interrupt(row, model):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(method, stopped, tmp_path / "b", on_row=interrupt)
    again = train(method, resumed, tmp_path / "b")
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    ours, theirs = parameters_of(straight, method), parameters_of(resumed, method)
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert torch.equal(noise_of(straight, "a <sks> cat"), noise_of(resumed, "a <sks> cat"))


@pytest.mark.parametrize("method", SETTINGS)
def test_pictures_in_between_change_no_training(tokenizer, tmp_path, method):
    """Somebody who looks while it trains, as notebooks do, must not disturb the random streams or the cached text."""
    alone, watched = tiny_model(tokenizer), tiny_model(tokenizer)
    train(method, alone, tmp_path / "a")
    train(
        method, watched, tmp_path / "b",
        on_row=lambda row, model: sample_latents(model, ["a <sks> cat"], [0], Sampler(2, 2.0)),
    )  # fmt: skip
    ours, theirs = parameters_of(alone, method), parameters_of(watched, method)
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


@pytest.mark.parametrize("method", SETTINGS)
def test_what_is_written_is_built_again(tokenizer, tmp_path, method):
    tiny_model(tokenizer).save_pipeline(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    start = Adapted.of(model)
    train(method, model, tmp_path / "training")
    run = Run.open(tmp_path / "run", "01_personalize", {})
    built = start.then(run, "delta.safetensors", model, method, method, 5).build()
    for words in (["a <sks> cat"], ["a <sks>", "a cat", "a <sks> dancing"]):
        assert torch.equal(noise_of(built, *words), noise_of(model, *words))
    assert model_fingerprint(built) == model_fingerprint(model) != model_fingerprint(tiny_model(tokenizer))


# --- words ---------------------------------------------------------------------------------------------------------


def test_each_method_calls_the_subject_in_its_own_way():
    who = dataclasses.replace(CAT, description="striped")
    said = {method: named(who, f"{method}+ddpo").prompt("playing soccer") for method in METHODS if method != "ddpo"}
    assert {method: prompt.text for method, prompt in said.items() if method in ("dreambooth", *SETTINGS)} == {
        "dreambooth": "a sks striped cat playing soccer",
        "textual_inversion": "a <sks> playing soccer",
        "custom_diffusion": "a <sks> striped cat playing soccer",
        "neti": "a <sks> playing soccer",
    }
    assert {prompt.clean for prompt in said.values()} == {"a striped cat playing soccer"}
    word = named(who, "neti")
    assert word.instance_prompt == "a <sks>" and word.class_prompt == "a cat"
    assert word.prompt("a red {subject} in the snow").text == "a red <sks> in the snow"
    both = training_prompts(["dancing"], "cat", word.identifier, "", True, word.alone)
    assert [(p.text, p.clean) for p in both] == [("a <sks> dancing", "a cat dancing"), ("a cat dancing",) * 2]


@pytest.mark.parametrize(
    ("word", "start", "said"),
    [
        ("cat", "dog", "knows the word 'cat' already: choose another identifier"),
        ("<sks>", "monster toy", "'monster toy', which is 2 tokens in tiny: give a word .* as the setting start"),
    ],
)
def test_words_that_cannot_be_learned_are_refused(tiny, word, start, said):
    with pytest.raises(ModelError, match=said):
        attach(tiny, "tokens", "mine", {"word": word, "start": start, "n_vectors": 1}, generator(0))
    assert not tiny.deltas and tiny.token_ids("<sks>") != [len(tiny.tokenizer) - 1]


def test_a_class_noun_of_two_words_starts_as_its_last(tiny, tmp_path):
    toy = dataclasses.replace(CAT, class_noun="monster toy")
    train("textual_inversion", tiny, tmp_path, who=toy)
    assert tiny.deltas["textual_inversion"].settings["start"] == "toy"


def test_the_captions_of_textual_inversion():
    assert len(TEMPLATES["objects"]) == 27 == len(set(TEMPLATES["objects"]))
    assert all(caption.count("{}") == 1 for captions in TEMPLATES.values() for caption in captions)


def test_several_vectors_stand_beside_each_other(tiny):
    rows = attach(tiny, "tokens", "mine", {"word": "<sks>", "start": "cat", "n_vectors": 3}, generator(0))["rows"]
    first = len(tiny.tokenizer) - 3
    assert tiny.spelled_out("a <sks> dancing") == "a <sks> <sks>_1 <sks>_2 dancing"
    assert tiny.token_ids("a <sks> dancing")[1:4] == [first, first + 1, first + 2]
    assert token_positions(tiny, "a <sks> dancing", "<sks>") == [2, 3, 4]
    assert token_positions(tiny, "a <sks> dancing", "dancing") == [5]
    [cat] = tiny.token_ids("cat")
    table = tiny.text_encoder.get_input_embeddings()
    assert torch.equal(rows[0], table(torch.tensor(cat))) and torch.equal(rows[0], rows[2])
    assert torch.equal(table(torch.tensor([cat, first + 1])), torch.stack([rows[0], rows[1]]))


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_diffusers_reads_our_word_and_we_theirs(tokenizer, tmp_path, n_vectors):
    settings = dataclasses.replace(SETTINGS["textual_inversion"], n_vectors=n_vectors)
    base = tiny_model(tokenizer)
    base.save_pipeline(tmp_path / "base")
    model = base.copy()
    train("textual_inversion", model, tmp_path / "a", settings)
    tokens.export(model, "textual_inversion", tmp_path / "word")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    theirs.load_textual_inversion(tmp_path / "word")
    prompt = theirs.maybe_convert_prompt("a <sks> dancing", theirs.tokenizer)
    ids = theirs.tokenizer(prompt, padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(theirs.text_encoder(ids).last_hidden_state, model.encode_text(["a <sks> dancing"]))
    # and the file starts another training, at a learning rate of 0 without a change
    again, still = base.copy(), {"start_file": str(tmp_path / "word" / "learned_embeds.safetensors")}
    train("textual_inversion", again, tmp_path / "b", dataclasses.replace(settings, learning_rate=0.0, **still))
    assert torch.equal(noise_of(again, "a <sks> cat"), noise_of(model, "a <sks> cat"))
    with pytest.raises(ParameterError, match=f"has {n_vectors} vectors and n_vectors is 5: make them equal"):
        train("textual_inversion", base.copy(), tmp_path / "c", dataclasses.replace(settings, n_vectors=5, **still))


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_file_that_is_no_embedding_is_refused(tiny, tmp_path, content):
    file = tmp_path / "word.safetensors"
    if content is not None:
        file.write_bytes(content)
    settings = dataclasses.replace(SETTINGS["textual_inversion"], start_file=str(file))
    with pytest.raises(ArtifactError, match="does not hold the embedding of one word .*load_textual_inversion"):
        train("textual_inversion", tiny, tmp_path, settings)


# --- Custom Diffusion ----------------------------------------------------------------------------------------------


def test_the_start_mark_passes_no_gradient(tiny):
    attach(tiny, "cross_kv", "custom_diffusion", {"words": {"<sks>": "sks"}}, generator(0))
    module = next(iter(changed(tiny, "custom_diffusion").values()))
    text = torch.randn(2, 3, 16, generator=generator(1)).requires_grad_(True)
    out = module(text)
    torch.testing.assert_close(out, text @ (module.weight + module.delta).T)
    out.sum().backward()
    assert text.grad[:, 0].abs().sum() == 0 < text.grad[:, 1:].abs().sum()
    torch.testing.assert_close(module.delta.grad[0], text.detach()[:, 1:].sum((0, 1)))


def test_what_is_changed_are_keys_and_values_of_all_cross_attentions(tiny):
    weights = attach(tiny, "cross_kv", "custom_diffusion", {"words": {"<sks>": "sks"}}, generator(0))
    layers = [name for name, _ in cross_attention_layers(tiny.unet)]
    assert set(weights) == {f"{n}.{p}.delta" for n in layers for p in ("to_k", "to_v")} | {"word <sks>"}
    assert torch.equal(
        weights["word <sks>"][0], tiny.text_encoder.get_input_embeddings()(torch.tensor(tiny.token_ids("sks")))[0]
    )


def test_the_masked_loss_by_hand():
    eps_hat, noise = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    eps_hat[0, :, 0, 0], eps_hat[0, :, 1, 1], eps_hat[1] = 2.0, 100.0, 3.0  # the photo's second value is not looked at
    mask = torch.zeros(1, 1, 2, 2)
    mask[0, 0, 0] = 1
    terms = cd.masked_loss(eps_hat, noise, mask, instance_weight=4.0, prior_weight=0.5)
    assert [terms[n].item() for n in ("loss_instance", "loss_prior", "loss")] == [2.0, 9.0, 4 * 2 + 0.5 * 9]
    assert cd.masked_loss(eps_hat[:1], noise[:1], mask, 1.0, 0.0)["loss"].item() == 2.0


def test_photos_are_drawn_smaller_and_larger_as_the_caption_says():
    photo = Image.new("RGB", (64, 64), (255, 0, 0))
    drawn = [cd.scaled(photo, generator(i, "scale"), cell_px=8) for i in range(300)]
    small = [d for d in drawn if d[1] in cd.SMALL]
    large = [d for d in drawn if d[1] in cd.LARGE]
    usual = [d for d in drawn if not d[1]]
    assert len(small) + len(large) + len(usual) == 300
    assert 0.26 < len(large) / 300 < 0.41 and 0.2 < len(small) / 300 < 0.35  # 1/3, and 2/3 · (0.6 - 1/3)/(2/3)
    for picture, _, mask in small:
        red = np.asarray(picture)[..., 0] > 200
        rows, columns = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
        assert 20 <= len(rows) == len(columns) < 0.6 * 64 + 1 and not red.all()
        inside = np.kron(mask[0].numpy(), np.ones((8, 8))) > 0
        assert inside.any() or len(rows) < 32  # a cell less a side
        assert red[inside].all()  # the loss looks at the photo alone
    assert all(
        np.asarray(p)[..., 0].min() > 200 and mask.all() and p.size == (64, 64) for p, _, mask in [*large, *usual]
    )


def test_its_own_settings_draw_the_photos_anew(tiny, tmp_path):
    assert SETTINGS["custom_diffusion"].scale_augmentation
    with_scale = train("custom_diffusion", tiny, tmp_path / "a")
    assert all(np.isfinite(row["loss"]) for row in with_scale)


def concepts():
    cat, dog = (
        dataclasses.replace(CAT, class_noun=noun, identifier=f"<{word}>")
        for noun, word in (("cat", "sks"), ("dog", "zwx"))
    )
    return [cd.Concept(cat, pictures(2), pictures(2, 1)), cd.Concept(dog, pictures(2, 2), pictures(2, 3))]


def test_two_subjects_are_trained_together(tiny, tmp_path):
    settings = dataclasses.replace(SETTINGS["custom_diffusion"], n_steps=8, scale_augmentation=False)
    start = {n: r.detach().clone() for n, r in parameters_of_two(tiny.copy()).items()}
    cd.train(tiny, concepts(), settings, tmp_path)
    rows = parameters_of(tiny, "custom_diffusion")
    assert all(
        not torch.equal(rows[n], value) for n, value in start.items() if n.startswith("word")
    )  # both, also the last
    same = [concepts()[0], dataclasses.replace(concepts()[1], subject=concepts()[0].subject)]
    with pytest.raises(ModelError, match="two subjects are called '<sks>': give each its own identifier"):
        cd.train(tiny.copy(), same, settings, tmp_path / "b")


def parameters_of_two(model):
    return attach(model, "cross_kv", "custom_diffusion", {"words": {"<sks>": "sks", "<zwx>": "zwx"}}, generator(0))


def test_two_models_are_merged_in_closed_form(tokenizer, tmp_path):
    base = tiny_model(tokenizer)
    settings = dataclasses.replace(SETTINGS["custom_diffusion"], scale_augmentation=False)
    apart = []
    for i, concept in enumerate(concepts()):
        model = base.copy()
        cd.train(model, [concept], settings, tmp_path / str(i))
        apart.append((model, "custom_diffusion", concept.subject))
    captions = ["a dog dancing", "a cat reading on the moon", "a red pot", "a photo of a bike in the park"]
    merged = cd.merge(base, apart, captions)
    for model, name, subject in apart:
        for prompt in (
            f"{subject.identifier} {subject.class_noun}",
            f"photo of a {subject.identifier} {subject.class_noun}",
        ):
            first = 1 + merged.token_ids(prompt).index(merged.token_ids(subject.identifier)[0])
            text = model.encode_text([prompt])[0, first : 2 + len(model.token_ids(prompt))]
            torch.testing.assert_close(merged.encode_text([prompt]), model.encode_text([prompt]))
            for place, module in changed(model, name).items():
                ours = changed(merged, "custom_diffusion")[place]
                torch.testing.assert_close(ours(text[None]), module(text[None]), rtol=1e-4, atol=1e-4)
    together = noise_of(merged, "a <sks> cat", "a <zwx> dog")
    assert torch.isfinite(together).all() and not any(p.requires_grad for p in merged.unet.parameters())


def test_diffusers_reads_the_weights_of_custom_diffusion(tokenizer, tmp_path):
    base = tiny_model(tokenizer)
    base.save_pipeline(tmp_path / "base")
    model = base.copy()
    train("custom_diffusion", model, tmp_path / "a")
    cross_kv.export(model, "custom_diffusion", tmp_path / "out")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    theirs.unet.load_attn_procs(
        tmp_path / "out", weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=theirs
    )
    theirs.load_textual_inversion(tmp_path / "out" / "sks")
    ids = theirs.tokenizer("a <sks> cat", padding="max_length", max_length=24, return_tensors="pt").input_ids
    x = torch.randn(1, 4, 8, 8, generator=generator(0, "probe"))
    with torch.no_grad():
        text = theirs.text_encoder(ids).last_hidden_state
        found = theirs.unet(x, torch.tensor([1]), encoder_hidden_states=text).sample
    torch.testing.assert_close(found, noise_of(model, "a <sks> cat"), rtol=1e-4, atol=1e-5)


# --- NeTI ----------------------------------------------------------------------------------------------------------


def mapper(**options):
    return Mapper(3, 16, 0.9, generator(0, "frequencies"), generator(0, "weights"), **options)


def test_the_mapper_of_stable_diffusion_has_the_papers_size():
    full = Mapper(16, 768, 0.4, generator(0), generator(1))
    assert sum(p.numel() for p in full.parameters()) == 563_616
    t, layer = torch.tensor([100, 900]), torch.tensor([3, 15])
    at = [1 * 16 + 3, 9 * 16 + 15]  # anchors: timesteps outer, layers inner
    torch.testing.assert_close(full.first.weight[at], full.encode(t, layer))
    torch.testing.assert_close(full.encode(t, layer).norm(dim=1), torch.ones(2))


def test_word_and_bypass_have_the_norm_that_is_asked_for():
    t, layer = torch.tensor([5, 800]), torch.tensor([0, 2])
    whole = torch.cat(mapper()(t, layer), 1)
    torch.testing.assert_close(whole.norm(dim=1), torch.full((2,), 0.9))
    assert (mapper()(t, layer)[0].norm(dim=1) < 0.9).all()
    torch.testing.assert_close(mapper(norm_of="word")(t, layer)[0].norm(dim=1), torch.full((2,), 0.9))


def test_nested_dropout_keeps_a_prefix_of_every_other_layer():
    net = mapper()
    layer = torch.arange(3).repeat(400)
    assert net.kept_units(layer).all()  # none when sampling
    net.dropout = generator(0, "dropout")
    seen = []
    for _ in range(40):
        kept = net.kept_units(layer)
        n = kept.sum(1)
        assert torch.equal(kept, torch.arange(N_UNITS) < n[:, None])  # a prefix
        whole = torch.tensor([bool((n[layer == i] == N_UNITS).all()) for i in range(3)])
        assert all(bool((n[layer == i] < N_UNITS).all()) for i in range(3) if not whole[i])  # one draw for a layer
        seen.append(whole)
    assert 0.3 < torch.stack(seen).float().mean() < 0.7
    with torch.no_grad():
        assert net.kept_units(layer).all()  # a picture in between has all of them
    assert mapper(truncate=16).kept_units(layer).sum(1).unique().tolist() == [16]


def neti_on(model, seed=3):
    weights = attach(
        model,
        "mapper",
        "neti",
        {"word": "<sks>", "start": "cat", "seed": seed, "norm": "whole", "truncate": 0},
        generator(seed),
    )
    freeze(model)
    return weights


def test_layers_read_their_own_text_and_values_the_bypass(tiny):
    neti_on(tiny)
    heard = {}
    layers = cross_attention_layers(tiny.unet)
    for i, (_, layer) in enumerate(layers):
        for what in ("to_k", "to_v"):
            getattr(layer, what).register_forward_pre_hook(lambda _, args, key=(what, i): heard.update({key: args[0]}))
    x = torch.randn(2, 4, 8, 8, generator=generator(0))
    prompts, t = ["a <sks> dancing", "a cat"], torch.tensor([321, 321])
    # hooks run in the order of their making: the pass's own come after, so look at what it computed
    texts = tiny.mapped.texts(tiny, [(prompts[0], 321)])[(prompts[0], 321)]
    plain = tiny.encode_text(prompts)
    word, bypass = tiny.mapped.mapper(torch.full((len(layers),), 321), torch.arange(len(layers)))
    embedding, encoder = tiny.text_encoder.get_input_embeddings(), tiny.text_encoder
    before = []
    encoder.final_layer_norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    for i in range(
        len(layers)
    ):  # by hand: the word's vector in the row's place, one pass of the encoder for each layer
        with torch.no_grad():
            embedding.rows.copy_(word[i][None])
            ids = tiny.padded_ids(prompts[0])
            keys = encoder(ids).last_hidden_state[0]
            h = before.pop()[0, 2]
            value = torch.nn.LayerNorm.forward(
                encoder.final_layer_norm, h + BYPASS * h.norm() * bypass[i] / bypass[i].norm()
            )
        torch.testing.assert_close(texts.keys[i], keys)
        torch.testing.assert_close(texts.values[i], value)
        assert not torch.allclose(value, keys[2], atol=1e-3)
    assert texts.place == 2 and not torch.allclose(texts.keys[0], texts.keys[1], atol=1e-3)
    torch.testing.assert_close(texts.keys[:, :2], plain[:1, :2].expand(len(layers), -1, -1))  # causal: before the word
    with torch.no_grad():
        tiny.predict_noise(x, t, prompts)
    assert len(heard) == 2 * len(layers)


def test_an_adapter_on_top_reads_the_same_text(tiny):
    neti_on(tiny)
    before = noise_of(tiny, "a <sks> dancing", "a cat")
    attach(tiny, "lora", "ddpo", {"rank": 2}, generator(0))
    assert torch.equal(noise_of(tiny, "a <sks> dancing", "a cat"), before)
    heard = []
    layer = cross_attention_layers(tiny.unet)[0][1]
    for part in (layer.to_v.base_layer, layer.to_v.lora_A["ddpo"]):
        part.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    noise_of(tiny, "a <sks> dancing")
    assert torch.equal(heard[0], heard[1]) and not torch.equal(heard[0], tiny.encode_text(["a <sks> dancing"]))


def test_text_of_a_frozen_mapper_is_computed_once(tiny, monkeypatch):
    neti_on(tiny)
    calls = []
    encode = type(tiny.mapped)._encode
    monkeypatch.setattr(
        type(tiny.mapped), "_encode", lambda self, model, pairs: calls.append(len(pairs)) or encode(self, model, pairs)
    )
    for _ in range(2):
        sample_latents(tiny, ["a <sks> cat"] * 3, [0, 1, 2], Sampler(4, 2.0), batch_size=3)
    assert calls == [1] * 4  # one for each step; three pictures, guidance and the second call cost none
    tiny.mapped.capacity = 2
    noise_of(tiny, *["a <sks> cat", "a <sks> dancing", "a <sks>"])
    assert len(tiny.mapped._kept) == 2


def test_the_word_stands_once_in_a_prompt(tiny):
    neti_on(tiny)
    with pytest.raises(ParameterError, match="has the learned word more than once: name the subject once"):
        noise_of(tiny, "a <sks> and a <sks>")
    with pytest.raises(ModelError, match="has a word with a mapper already, and 'second' would be a second"):
        attach(
            tiny,
            "mapper",
            "second",
            {"word": "<new>", "start": "dog", "seed": 0, "norm": "whole", "truncate": 0},
            generator(0),
        )


@pytest.mark.parametrize("method", SETTINGS)
def test_each_record_tells_its_work(method):
    record = METHODS[method]
    work = record.work(record.settings())
    assert work.tuned == record.settings().n_steps * work.graph_rows and work.trained == 0
    assert record.class_pictures(record.settings()) == (200 if method == "custom_diffusion" else 0)
    assert record.class_pictures(record.configure("pocket")) == (64 if method == "custom_diffusion" else 0)


def killed_in_step_4(method, folder, tokenizer):
    def die(row, model):
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train(method, tiny_model(tokenizer), folder, on_row=die)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_training_ends_bit_identical(tokenizer, tmp_path, method):
    straight, resumed = tiny_model(tokenizer), tiny_model(tokenizer)
    train(method, straight, tmp_path / "a")
    child = multiprocessing.get_context("fork").Process(
        target=killed_in_step_4, args=(method, tmp_path / "b", tokenizer)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    rows = train(method, resumed, tmp_path / "b")
    assert len(rows) == 6
    ours, theirs = parameters_of(straight, method), parameters_of(resumed, method)
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_a_checkpoint_of_another_word_or_method_is_refused(tiny, tokenizer, tmp_path):
    train("textual_inversion", tiny, tmp_path)
    toy = dataclasses.replace(CAT, identifier="zwx")
    with pytest.raises(ArtifactError, match="are of a training with another word: go on with what it was started with"):
        train("textual_inversion", tiny_model(tokenizer), tmp_path, who=toy)


@pytest.mark.parametrize("method", ["textual_inversion", "custom_diffusion"])
def test_a_batch_in_parts_has_the_same_gradient(tokenizer, tmp_path, method):
    losses = []
    for micro_batch in (0, 1):
        model = tiny_model(tokenizer)
        settings = dataclasses.replace(SETTINGS[method], micro_batch=micro_batch)
        rows = train(method, model, tmp_path / str(micro_batch), settings)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- what it cost --------------------------------------------------------------------------------------------------


def test_costs_are_told_by_part(tokenizer, tmp_path):
    tiny_model(tokenizer).save_pipeline(tmp_path / "base")
    sources = {}
    for i, method in enumerate(SETTINGS):
        model = load_model(str(tmp_path / "base"))
        start = Adapted.of(model)
        run = Run.open(tmp_path / method, "01_personalize", {"class_noun": "cat"})
        history = train(method, model, run.folder)
        run.write_table("history.csv", pd.DataFrame(history))
        run.record(config=dataclasses.asdict(SETTINGS[method]))
        start.then(run, "delta.safetensors", model, method, method, 5).write(run)
        run.finish()
        sources[f"run{i}"] = read_run(run.folder)
    evaluation = Run.open(tmp_path / "evaluation", "03_evaluate", {}, sources)
    evaluation.finish()
    costs = training_costs([read_run(evaluation.folder)] * 2)  # two evaluations of the same runs count them once
    weights = {(row.arm, row.part): row.weights for row in costs.itertuples()}
    n_layers = len(cross_attention_layers(tiny_model(tokenizer).unet))
    assert weights["textual_inversion", "the word's rows"] == weights["custom_diffusion", "the word's rows"] == 16
    layers = [layer for _, layer in cross_attention_layers(tiny_model(tokenizer).unet)]
    matrices = sum(layer.to_k.weight.numel() + layer.to_v.weight.numel() for layer in layers)
    assert weights["custom_diffusion", "keys and values of text"] == matrices
    assert weights["neti", "a network that makes the word"] == sum(p.numel() for p in Mapper(
        n_layers, 16, 1.0, generator(0), generator(0)).parameters())  # fmt: skip
    by_arm = costs.groupby("arm")[["steps", "photos", "class_pictures"]].first()
    assert by_arm.loc["neti"].tolist() == [6, 12, 0] and by_arm.loc["custom_diffusion"].tolist() == [6, 12, 200]
    assert (costs["seconds"] > 0).all() and (costs["kilobytes"] > 0).all()


@pytest.mark.slow
def test_one_job_compares_them_and_notebook_08_reads_it():
    """Three personalizations, an evaluation and the notebook, for real at the smallest budget; two minutes."""
    name = f"test-baselines-{os.getpid()}"
    folder = main_job.OUTPUTS / name
    sets = [f"{method}.n_steps=2" for method in SETTINGS] + ["custom_diffusion.n_class_images=2"]
    words = ["run", "--name", name, "--device", "cpu", "--personalize", *SETTINGS, "--tune", "none"]
    words += [w for s in sets for w in ("--set", s)]
    words += ["-p", "03_evaluate.n_images=2", "-p", '03_evaluate.scorers=["clip_t"]']
    try:
        ibkit(*words)
        evaluated = f'run_evaluate=["{folder / "03_evaluate"}"]'
        small = ["--set", "n_steps=2", "--set", "n_class_images=2"]
        ibkit("stage", "08_baselines", "--out", folder / "08_baselines", "-p", evaluated, *small)
        run = read_run(folder / "08_baselines")
        assert set(run.table("costs.csv")["arm"]) == set(SETTINGS)
        assert set(run.manifest["metrics"]["claims"]) == {f"B{i}" for i in range(1, 6)}
        assert len(run.table("two_subjects.csv")) == 6
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ibkit(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ibkit", *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_with_gradient_checkpointing_the_layers_read_the_same_text_again(tokenizer, tmp_path):
    """The backward pass runs the layers once more, when the forward pass is over."""
    rows = []
    for checkpointing in (False, True):
        model = tiny_model(tokenizer)
        settings = dataclasses.replace(SETTINGS["neti"], resources=Resources(checkpointing=checkpointing))
        rows.append([row["loss"] for row in train("neti", model, tmp_path / str(checkpointing), settings)])
        assert model.unet.is_gradient_checkpointing == checkpointing
    assert rows[0] == pytest.approx(rows[1], rel=1e-5) and len(set(rows[0])) == 6
