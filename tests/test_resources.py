"""What fits a training on a GPU changes what it learns by rounding only; disk and networks are there when needed."""

import copy
import dataclasses
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from ibkit.adapt import attach, parameters_of, state
from ibkit.device import generator, park, working
from ibkit.errors import ArtifactError, ModelError, ParameterError
from ibkit.job import check
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.model import text_to_image
from ibkit.model.loading import load_model
from ibkit.params import make
from ibkit.runs import files
from ibkit.scorers import make_scorer
from ibkit.scorers.base import networks
from ibkit.train.kept import Average, Optimizer, Weights
from ibkit.train.loop import loop
from ibkit.train.resources import Resources
from tests import test_ddpo
from tests.test_dreambooth import CONFIG, pictures, run
from tests.tiny import tiny_model


def gradients(tokenizer, resources, kind="lora", autocast=None):
    """Of a delta of the tiny model, after `prepare`."""
    model = tiny_model(tokenizer)
    model.autocast = autocast
    attach(model, kind, "delta", {"rank": 2}, generator(0, "delta"))
    for weight in parameters_of(model, "delta").values():
        weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator(1)))  # B of a new adapter is zero
    resources.prepare(model)
    x = torch.randn(2, *model.latent_shape, generator=generator(2))
    model.predict_noise(x, torch.tensor([10, 900]), ["a cat", "a dog"]).square().mean().backward()
    return model, {name: p.grad for name, p in parameters_of(model, "delta").items()}


@pytest.mark.parametrize("kind", ["lora", "unet"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(tokenizer, kind):
    kept = []
    for resources in (Resources(), Resources(checkpointing=True)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            kept.append((gradients(tokenizer, resources, kind)[1], sum(sizes)))
    (plain, more), (recomputed, less) = kept
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
    assert less < 0.7 * more


def test_frozen_layers_in_bf16_change_no_bit_and_leave_what_is_trained_in_fp32(tokenizer):
    _, expected = gradients(tokenizer, Resources(), autocast=torch.bfloat16)
    model, found = gradients(tokenizer, Resources(frozen_bf16=True), autocast=torch.bfloat16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {p.dtype for p in parameters_of(model, "delta").values()} == {torch.float32}
    dtypes = {name: p.dtype for name, p in model.unet.named_parameters() if "lora_" not in name}
    assert dtypes["conv_in.weight"] == torch.bfloat16 and dtypes["conv_norm_out.weight"] == torch.float32
    half = sum(p.nbytes for name, p in model.unet.named_parameters() if dtypes.get(name) == torch.bfloat16)
    assert half > 0.4 * sum(p.numel() * 4 for p in tiny_model(tokenizer).unet.parameters())


def test_the_policys_numbers_stay_fp32_with_frozen_layers_in_bf16(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    model.autocast = torch.bfloat16
    config = dataclasses.replace(test_ddpo.CONFIG, n_epochs=1, resources=Resources(frozen_bf16=True))
    test_ddpo.train(model, test_ddpo.PROMPTS, test_ddpo.brightness, config, tmp_path)
    _, tensors, _ = test_ddpo.Checkpoints(tmp_path / "checkpoints").latest()
    assert {t.dtype for name, t in tensors.items()} == {torch.float32}
    x = torch.randn(1, *model.latent_shape)
    assert model.predict_noise(x, torch.tensor([10]), ["a cat"]).dtype == torch.float32


def test_frozen_bf16_is_refused_where_the_unet_computes_in_fp32(tokenizer):
    with pytest.raises(ParameterError, match="computes in fp32: leave it off"):
        gradients(tokenizer, Resources(frozen_bf16=True))


def test_channels_last_changes_rounding_only(tokenizer):
    model, found = gradients(tokenizer, Resources(channels_last=True), "unet")
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, gradients(tokenizer, Resources(), "unet")[1], rtol=1e-4, atol=1e-6)


def test_compiling_is_asked_of_the_unet(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: asked.append(type(module).__name__))
    gradients(tokenizer, Resources(compile=True))
    assert asked == ["UNet2DConditionModel"]


@pytest.mark.parametrize("prior_weight", [1.0, 0.0])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_gradients_in_parts_add_up_to_those_of_the_batch(tokenizer, tmp_path, prior_weight, micro_batch):
    """A last part that is smaller has its share."""
    config = dataclasses.replace(CONFIG, batch=3, n_steps=2, prior_weight=prior_weight)
    ends = []
    for n in (0, micro_batch):
        model = tiny_model(tokenizer)
        rows = run(model, tmp_path / f"{n}", dataclasses.replace(config, micro_batch=n))
        ends.append((state(model, "dreambooth"), [[row["loss"], row["loss_prior"]] for row in rows]))
    (whole, losses), (parts, losses_of_parts) = ends
    assert losses_of_parts == [pytest.approx(row, rel=1e-5) for row in losses]
    # AdamW's first steps are the learning rate times a sign, so compare where they went on average
    moved = torch.cat([(parts[name] - whole[name]).flatten() for name in whole])
    assert moved.abs().mean() < 0.01 * CONFIG.learning_rate


def test_a_training_may_go_on_with_other_resources(tokenizer, tmp_path):
    run(tiny_model(tokenizer), tmp_path, dataclasses.replace(CONFIG, n_steps=3))
    more = dataclasses.replace(CONFIG, micro_batch=1, resources=Resources(checkpointing=True))
    assert len(run(tiny_model(tokenizer), tmp_path, more)) == CONFIG.n_steps


# ---------------------------------------------------------------------------------------------------- 8-bit Adam


class Adam8bit(torch.optim.AdamW):
    """In bitsandbytes' place: it takes no `fused`, and counts steps by a number."""

    def __init__(self, weights, lr, betas, weight_decay):
        super().__init__(weights, lr=lr, betas=betas, weight_decay=weight_decay)


def test_8_bit_adam_is_bitsandbytes(tokenizer, tmp_path, monkeypatch):
    optim = SimpleNamespace(AdamW8bit=Adam8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim, __spec__=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    with_it = dataclasses.replace(CONFIG, resources=Resources(adam_8bit=True))
    run(tiny_model(tokenizer), tmp_path, dataclasses.replace(with_it, n_steps=3))
    assert len(run(tiny_model(tokenizer), tmp_path, with_it)) == CONFIG.n_steps
    with pytest.raises(ArtifactError, match="another optimizer"):  # its moments are of another kind
        run(tiny_model(tokenizer), tmp_path, CONFIG)


def test_an_optimizers_whole_numbers_come_back_as_numbers():
    weight = torch.nn.Parameter(torch.zeros(3))
    one, other = (torch.optim.Optimizer([weight], {}) for _ in range(2))
    one.state[weight] = {"step": 7, "state1": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    Optimizer(other).load(Optimizer(one).tensors())
    assert other.state[weight]["step"] == 7 and type(other.state[weight]["step"]) is int


def test_8_bit_adam_without_bitsandbytes_is_refused_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr("ibkit.train.resources.find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"pip install 'ibkit\[low-memory\]', or leave it off"):
        make("01_personalize", {"method": "dreambooth", "settings": {"resources.adam_8bit": True}})
    with pytest.raises(ParameterError, match="did you mean 'resources.offload'"):
        make("02_rl_finetune", {"settings": {"resources.offlod": True}})


# ---------------------------------------------------------------------------------------------------- parked networks


class Gpu(torch.nn.Linear):
    """A layer that only says where it is."""

    def __init__(self):
        super().__init__(2, 2)
        self.at, self.moves = "cuda", []

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=torch.device(self.at))])

    def to(self, place):
        self.at = torch.device(place).type
        self.moves.append(self.at)
        return self


def test_a_parked_network_is_on_the_gpu_while_it_works():
    network, another = Gpu(), Gpu()
    park(network)
    assert network.at == "cpu"
    with pytest.raises(KeyError), working(network, another):
        with working(network):
            assert network.at == "cuda"
        assert network.at == "cuda"  # still that of the outer one
        raise KeyError
    assert network.moves == ["cpu", "cuda", "cpu"] and another.moves == []
    copied = copy.deepcopy(network)
    with working(copied):
        assert (copied.at, network.at) == ("cuda", "cpu")


def test_nothing_moves_on_a_cpu():
    network = torch.nn.Linear(2, 2)
    park(network)
    assert not hasattr(network, "place")


def test_each_part_of_a_model_works_where_it_is_used(tiny, monkeypatch):
    """Drawing, decoding, encoding, text: each has its network at hand and gives it back."""
    used = []

    class Noted:
        def __init__(self, *modules):
            self.names = [name for name in ("unet", "vae", "text_encoder") if getattr(tiny, name) in modules]

        def __enter__(self):
            used.extend(self.names)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(text_to_image, "working", Noted)
    x = torch.zeros(1, *tiny.latent_shape)
    tiny.predict_noise(x, torch.tensor([5]), ["a cat"])
    assert used == ["text_encoder", "unet"]
    tiny.encode_images(pictures(1))
    tiny.decode(x)
    assert used[2:] == ["vae"] * 3  # decode's own, and for a single part


def test_offload_parks_what_idles(tiny, monkeypatch):
    parked = []
    monkeypatch.setattr("ibkit.train.resources.park", lambda *modules: parked.extend(modules))
    Resources(offload=True).prepare(tiny)
    assert parked == [tiny.vae, tiny.text_encoder]
    parked.clear()
    next(tiny.text_encoder.parameters()).requires_grad_(True)  # a method that trains it needs it at every step
    Resources(offload=True).prepare(tiny)
    assert parked == [tiny.vae]


def test_a_scorer_knows_its_networks_and_parks_them(monkeypatch):
    subject, image_reward = (make_scorer(name, "pocket") for name in ("subject", "image_reward"))
    assert networks(subject) == [subject.dino.model, subject.head]
    assert networks(image_reward) == [image_reward.model]
    assert networks(make_scorer("clip_t", "pocket"))
    parked = []
    monkeypatch.setattr("ibkit.scorers.base.park", lambda *modules: parked.extend(modules))
    RewardSpec("subject").load("cpu", pictures(2), parked=True)
    assert len(parked) == 2


# ---------------------------------------------------------------------------------------------------- GPUs without bf16


@pytest.fixture
def turing(monkeypatch):
    """A GPU that emulates bf16, so that PyTorch says it has it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    properties = SimpleNamespace(name="Tesla T4", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_large_model_on_a_gpu_without_bf16_is_refused_in_words(tiny, tmp_path, turing):
    tiny.unet.register_to_config(sample_size=64)
    tiny.save_pipeline(tmp_path / "model")
    with pytest.raises(ModelError, match="Tesla T4 has no bf16, which NVIDIA's GPUs have from Ampere"):
        load_model(str(tmp_path / "model"), device="cuda")


def test_check_says_that_a_gpu_has_no_bf16(turing, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    finding = check.check_gpu()
    assert finding.stops == ("sd15",) and "computes in bf16" in finding.advice


# ---------------------------------------------------------------------------------------------------- disk


def test_the_disk_is_asked_before_the_first_step(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    weights = attach(tiny, "unet", "delta", {}, generator(0))
    optimizer = torch.optim.AdamW(weights.values())
    kept = {"weights": Weights(weights), "average": Average(weights, 0.9), "optimizer": Optimizer(optimizer)}
    size = sum(p.nbytes for p in weights.values())
    assert sum(one.nbytes for one in kept.values()) == 4 * size  # weights, average, two moments

    def step(number):
        sum(p.sum() for p in weights.values()).backward()
        optimizer.step()
        return {"loss": 0.0}

    free = {"bytes": files.DISK_RESERVE_BYTES + 2 * 4 * size - 1}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(2**40, 0, free["bytes"]))
    never = lambda number: pytest.fail("a step was taken")  # noqa: E731
    with pytest.raises(ArtifactError, match=r"is full: \d+ MiB are to be written and \d+ MiB are free"):
        loop(never, 2, kept, tmp_path, 1, {})
    free["bytes"] += 1
    assert len(loop(step, 2, kept, tmp_path, 1, {})) == 2
    free["bytes"] = files.DISK_RESERVE_BYTES  # those that are there need no more
    assert len(loop(never, 2, kept, tmp_path, 1, {})) == 2
    written = sum(t.nbytes for one in kept.values() for t in one.tensors().values())
    assert 4 * size <= written <= 4 * size + 8 * len(weights)  # and a step's number each
