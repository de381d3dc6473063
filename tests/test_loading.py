"""Models as users have them: in the hub's cache, under other names, in half precision, in one file; and not there."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibkit.device import generator
from ibkit.errors import ModelError
from ibkit.model import hub, single_file
from ibkit.model.loading import POCKET_PIPELINE, load_model
from ibkit.model.text_to_image import model_fingerprint
from ibkit.runs import project_root
from tests import ldm

COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
SD15 = hub.HUB_NAMES["sd15"]


def fill_cache(cache, repository, fp16=()):
    """The pocket model as diffusers leaves a repository of Stable Diffusion 1.x in the hub's cache: refs, snapshots
    that link to blobs, a tokenizer of the old kind without a tokenizer.json; `fp16` names parts in half precision.
    """
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(POCKET_PIPELINE, snapshot)
    whole = snapshot / "tokenizer" / "tokenizer.json"
    words = json.loads(whole.read_text())["model"]
    whole.unlink()
    (whole.parent / "vocab.json").write_text(json.dumps(words["vocab"]))
    (whole.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in words["merges"])]))
    for part in fp16:
        (path,) = (snapshot / part).glob("*.safetensors")
        half = {name: weight.half() for name, weight in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    (place / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = place / "blobs" / f"{i:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, offline; the network fails the test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "answers", lambda url: pytest.fail("the network was used"))
    return tmp_path / "hub"


def noise_of(model):
    x = torch.randn(1, *model.latent_shape, generator=generator(0, "probe"))
    return model.guided_noise(x, torch.tensor([500]), ["a red cat dancing"], 2.0)


def test_a_cache_that_diffusers_filled_is_enough_offline(tmp_path):
    fill_cache(tmp_path, SD15)
    code = """if True:
        import socket
        def connect(*_): raise AssertionError("the network was used")
        socket.socket.connect = socket.getaddrinfo = connect
        from ibkit.job.check import check_hub
        from ibkit.model.loading import load_model
        from ibkit.model.text_to_image import model_fingerprint
        assert check_hub().stops == (), check_hub()
        model = load_model("sd15")
        print(model_fingerprint(model), model.token_ids("a sks cat"))
    """
    variables = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, cwd=project_root(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pocket = load_model("pocket")
    assert done.stdout.split()[0] == model_fingerprint(pocket)
    assert done.stdout.endswith(f"{pocket.token_ids('a sks cat')}\n")


def test_any_name_on_the_hub_and_any_revision(cache):
    fill_cache(cache, "some-org/some-model")
    assert torch.equal(noise_of(load_model("some-org/some-model")), noise_of(load_model("pocket")))
    assert load_model("some-org/some-model", COMMIT).name == "some-org/some-model"
    with pytest.raises(ModelError, match="no unet/config.json of the model some-org/some-model at revision v2, and HF"):
        load_model("some-org/some-model", "v2")
    for local in ("pocket", str(cache / "models--some-org--some-model" / "snapshots" / COMMIT)):
        with pytest.raises(ModelError, match="is on this machine and has no revision 'v2': leave it out"):
            load_model(local, "v2")


def test_weights_in_half_precision_alone_are_read(cache):
    snapshot = fill_cache(cache, SD15, fp16=("unet", "vae", "text_encoder"))
    half = load_model("sd15")
    assert {weight.dtype for weight in half.unet.state_dict().values()} == {torch.float32}
    pocket = load_model("pocket")
    assert torch.equal(noise_of(half), noise_of(pocket))  # which is shipped in half precision
    as_folder = load_model(str(snapshot))
    assert torch.equal(noise_of(as_folder), noise_of(half))


@pytest.mark.parametrize(
    "lost", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"]
)
def test_what_the_cache_lacks_is_named_and_check_agrees(cache, lost):
    from ibkit.job.check import check_hub

    snapshot = fill_cache(cache, SD15)
    (snapshot / lost).resolve().unlink()  # the blob: the link stays, as after a download that was cut off
    with pytest.raises(ModelError, match=f"cache has no {lost} .*HF_HUB_OFFLINE is set: unset it and go online once"):
        load_model("sd15")
    assert f"{lost} is not in {snapshot}" in check_hub().found and check_hub().stops == ("sd15",)


def test_a_hub_that_does_not_answer_is_said_at_once(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "answers", lambda url: False)
    with pytest.raises(ModelError, match="does not answer: go online once, or give the path of a diffusers folder"):
        load_model("sd15")


NETWORK = [
    ({}, "hub.example", "HF_ENDPOINT='hub.example' is no address .*: write it as https://host, or unset it"),
    ({}, "https://", "HF_ENDPOINT='https://' is no address"),
    (
        {"https_proxy": "proxy:3128"},
        "",
        "proxy of HTTPS_PROXY, 'proxy:3128', is no address .*http://host:port, or unset",
    ),
    ({"https_proxy": "http://proxy:port"}, "", "'http://proxy:port', is no address"),
    ({"all_proxy": "gopher://proxy"}, "", "proxy of ALL_PROXY, 'gopher://proxy', is no address"),
    ({"all_proxy": "http://[::1"}, "", "is no address"),
    ({"https_proxy": "socks5://localhost:1"}, "", "needs the package socksio: pip install socksio, or"),
]


@pytest.mark.parametrize(("variables", "endpoint", "says"), NETWORK, ids=[row[2][:40] for row in NETWORK])
def test_addresses_of_hub_and_proxy_that_are_none_are_named(cache, monkeypatch, variables, endpoint, says):
    from ibkit.job.check import check_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint or "https://huggingface.co")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=says) as refused:
        load_model("sd15")
    assert "\n" not in str(refused.value) and check_hub().found in str(refused.value)


def test_a_server_answers_or_not():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # every request is answered by 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert hub.answers(address)
    server.shutdown()
    server.server_close()
    assert not hub.answers(address)


class TestOnline:
    @pytest.fixture
    def online(self, cache, monkeypatch):
        """A hub that answers: `names` are the files it has of any model; what is downloaded is noted."""
        state = {"names": [], "asked": None}

        class Api:
            def model_info(self, repository, revision, timeout):
                if isinstance(state["names"], Exception):
                    raise state["names"]
                files = [type("File", (), {"rfilename": name}) for name in state["names"]]
                return type("Info", (), {"siblings": files})

        def download(repository, revision, allow_patterns):
            state["asked"] = allow_patterns
            return str(fill_cache(cache, repository))

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "answers", lambda url: True)
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return state

    def test_only_what_is_read_is_downloaded_and_only_once(self, online):
        first_names = [names[0] for names in hub.NEEDED]
        online["names"] = [*first_names, "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.ckpt"]
        load_model("some-org/some-model")
        assert sorted(online["asked"]) == sorted([*first_names, *hub.WELCOME])
        online["asked"] = None
        load_model("some-org/some-model")
        assert online["asked"] is None

    def test_a_repository_without_safetensors_is_refused(self, online):
        online["names"] = [names[0].replace(".safetensors", ".bin") for names in hub.NEEDED]
        with pytest.raises(ModelError, match="no unet/diffusion_pytorch_model.safetensors .*not in diffusers format"):
            load_model("some-org/some-model")

    def test_what_the_hub_refuses_is_told_in_its_words(self, online):
        online["names"] = OSError("404: no such repository\nmore")
        with pytest.raises(ModelError, match=r"hub does not give .*\(404: no such repository\): check its name"):
            load_model("some-org/sme-model")


@pytest.mark.parametrize("name", ["pockett", "a/b/c", "org/two..dots", "/no/such/folder", "~/nowhere"])
def test_a_name_that_can_be_nothing_is_refused(cache, name):
    with pytest.raises(ModelError, match="is not there: give 'pocket', 'sd15', a name on the hub"):
        load_model(name)


@pytest.mark.parametrize(
    ("part", "config"),
    [("unet", {"addition_embed_type": "text"}), ("unet", {"cross_attention_dim": 32}), ("unet", {"in_channels": 9})],
)
def test_other_architectures_are_refused(tiny, tmp_path, part, config):
    from diffusers import UNet2DConditionModel

    given = {name: value for name, value in tiny.unet.config.items() if not name.startswith("_")}
    tiny.unet = UNet2DConditionModel.from_config(given | {"addition_embed_type_num_heads": 2} | config)
    tiny.save_pipeline(tmp_path / "model")
    with pytest.raises(ModelError, match="not a text-to-image model of Stable Diffusion 1.x or 2.x"):
        load_model(str(tmp_path / "model"))


# --- single files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """Stable Diffusion 1.x's parts with its levels and names, but few channels; the reader takes them for the true."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"block_out_channels": (32, 32, 64, 64), "sample_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, changes in {"UNET": small | {"cross_attention_dim": 32}, "VAE": small, "TEXT": text}.items():
        monkeypatch.setattr(single_file, f"SD15_{name}", getattr(single_file, f"SD15_{name}") | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae = UNet2DConditionModel(**single_file.SD15_UNET), AutoencoderKL(**single_file.SD15_VAE)
        return unet.eval(), vae.eval(), CLIPTextModel(CLIPTextConfig(**single_file.SD15_TEXT)).eval()


def test_a_single_file_is_the_model_it_was_made_from(parts, tmp_path):
    unet, vae, text_encoder = parts
    others = {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}
    save_file(ldm.checkpoint(*parts) | others, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path / "model.safetensors"))
    for ours, theirs in ((model.unet, unet), (model.vae, vae), (model.text_encoder, text_encoder)):
        theirs = theirs.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    x, t, text = torch.randn(1, 4, 8, 8, generator=generator(0)), torch.tensor([500]), model.encode_text(["a cat"])
    with torch.no_grad():
        torch.testing.assert_close(model.predict_noise(x, t, ["a cat"]), unet(x, t, encoder_hidden_states=text).sample)
    assert model.vae.config.scaling_factor == 0.18215
    assert model.token_ids("a photo of a cat") == [320, 1125, 539, 320, 2368]  # as OpenAI's CLIP has them
    assert model.token_ids("sks") == [48136]


def test_a_single_file_in_half_precision_is_read_as_fp32_and_can_be_exported(parts, tmp_path):
    half = {name: weight.half() for name, weight in ldm.checkpoint(*parts).items()}
    save_file(half, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path / "model.safetensors"))
    assert {weight.dtype for weight in model.unet.state_dict().values()} == {torch.float32}
    model.save_pipeline(tmp_path / "folder")
    again = load_model(str(tmp_path / "folder"))
    assert model_fingerprint(again) == model_fingerprint(model)
    assert again.token_ids("a sks cat's hat") == model.token_ids("a sks cat's hat")


CONTEXT = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {k: w for k, w in c.items() if "first_stage" not in k}, r"the vae in .* \d+ missing"),
        (lambda c: {k: w for k, w in c.items() if not k.endswith("out.2.bias")}, "the unet in .* 1 missing"),
        (lambda c: {k: w for k, w in c.items() if "cond_stage" not in k}, "the text encoder in .* missing"),
        (lambda c: c | {CONTEXT: torch.ones(3, 3)}, "the unet in .* 1 of another shape .*attn2.to_k.weight"),
        (lambda c: c | {CONTEXT: torch.full_like(c[CONTEXT], torch.nan)}, "the unet in .* 1 not finite"),
        (lambda c: c | {CONTEXT: torch.ones(320, 1024)}, "of the type v2, and of single files only"),
        (lambda c: {"some.weight": torch.ones(2)}, "the unet in .* missing"),
    ],
)
def test_single_files_that_cannot_be_used_are_refused(parts, tmp_path, change, says):
    save_file(change(ldm.checkpoint(*parts)), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=says) as refused:
        load_model(str(tmp_path / "model.safetensors"))
    assert "\n" not in str(refused.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    for name, says in (("model.ckpt", "only .safetensors is read"), ("model.safetensors", "damaged or no safetensors")):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(ModelError, match=says):
            load_model(str(tmp_path / name))
