"""Trainings end bit for bit where they ended when `golden.json` was written; `python -m tests.test_golden` writes it.

A change of the structure must leave every hash alone; a change of the mathematics or of the shipped weights writes new
ones and says why. The last bit depends on the processor and on PyTorch, so each machine has its own, and another is
skipped. Written anew, those of other machines stay: remove what no longer holds.
"""

import dataclasses
import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from ibkit.adapt import state
from ibkit.data.prompts import training_prompts
from ibkit.data.subject import demo_subject, world_photos
from ibkit.methods import ddpo, dreambooth
from ibkit.model.loading import POCKET_PIPELINE, load_model
from ibkit.model.sample import Sampler
from ibkit.presets import POCKET
from ibkit.train.guard import Guard
from ibkit.train.processes import start
from tests.tiny import tiny_model

RECORD = Path(__file__).with_name("golden.json")
PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")
TINY = ddpo.DDPOConfig(
    n_epochs=3, images_per_epoch=8, batch=4, sampler=Sampler(4, 3.0, 1.0), learning_rate=1e-3, micro_batch=3,
    stats_min_count=2, checkpoint_every=1, ema_decay=0.9, kl_weight=0.1,
)  # fmt: skip
SMALL = dataclasses.replace(
    POCKET.settings("ddpo"), n_epochs=3, images_per_epoch=8, batch=4, micro_batch=8, stats_buffer=8, stats_min_count=2
)


def brightness(images, prompts):
    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


def redness(images, prompts):
    return torch.tensor([i.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] / 255 for i in images])


def a_tiny_model():
    return tiny_model(CLIPTokenizer.from_pretrained(POCKET_PIPELINE / "tokenizer"))


def tensor_hash(tensors) -> str:
    """Of bytes and shapes in order: names may change with the house."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def dreambooth_hash(model, photos, prior, config, folder) -> str:
    dreambooth.train(model, photos, "a sks cat", "a cat", prior, config, folder, seed=1)
    return tensor_hash(model.unet.state_dict().values())


def ddpo_adapter(processes, device, folder, model, config, **options):
    torch.set_num_threads(1)
    ddpo.train(model(), PROMPTS, brightness, config, folder, 1, processes=processes, **options)


def ddpo_hash(folder, model, config, **options) -> str:
    trained = model()
    ddpo.train(trained, PROMPTS, brightness, config, folder, 1, **options)
    return tensor_hash(state(trained, "ddpo").values())


def tiny_dreambooth(folder):
    photos = [photo.resize((16, 16)) for photo in world_photos(demo_subject("cat"))]
    config = dreambooth.DreamBoothConfig(n_steps=4, batch=2, learning_rate=1e-3)
    return dreambooth_hash(a_tiny_model(), photos, photos[:2], config, folder)


def tiny_dreambooth_average(folder):
    photos = [photo.resize((16, 16)) for photo in world_photos(demo_subject("cat"))]
    config = dreambooth.DreamBoothConfig(n_steps=4, prior_weight=0.0, learning_rate=1e-3, ema_decay=0.9)
    return dreambooth_hash(a_tiny_model(), photos, [], config, folder)


def pocket_dreambooth(folder):
    photos = world_photos(demo_subject("cat"))
    config = dataclasses.replace(POCKET.settings("dreambooth"), n_steps=3)
    return dreambooth_hash(load_model("pocket"), photos, photos[:4], config, folder)


def tiny_ddpo(folder):
    return ddpo_hash(folder, a_tiny_model, TINY)


def tiny_ddpo_two_objectives(folder):
    return ddpo_hash(folder, a_tiny_model, TINY, subject_reward=redness, guard=Guard())


def tiny_ddpo_two_processes(folder):
    options = (folder, a_tiny_model, TINY)
    with start(2, torch.device("cpu"), ddpo_adapter, *options) as processes:
        torch.set_num_threads(1)
        return ddpo_hash(folder, a_tiny_model, TINY, processes=processes)


def pocket_ddpo(folder):
    return ddpo_hash(folder, load_model, SMALL)


def pocket_ddpo_two_processes(folder):
    with start(2, torch.device("cpu"), ddpo_adapter, folder, load_model, SMALL) as processes:
        torch.set_num_threads(1)
        return ddpo_hash(folder, load_model, SMALL, processes=processes)


TRAININGS = (
    tiny_dreambooth, tiny_dreambooth_average, pocket_dreambooth,
    tiny_ddpo, tiny_ddpo_two_objectives, tiny_ddpo_two_processes, pocket_ddpo, pocket_ddpo_two_processes,
)  # fmt: skip


def machine() -> dict[str, str]:
    """What the last bit depends on."""
    cpu = platform.processor() or platform.machine()
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "torch": torch.__version__.partition("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": names[0].partition(":")[2].strip() if names else cpu,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.__name__)
def test_a_training_ends_where_it_did(training, tmp_path):
    records = {str(record["machine"]): record["hashes"] for record in json.loads(RECORD.read_text())}
    if str(machine()) not in records:
        pytest.skip(f"the hashes are of other machines: {', '.join(records)}; this is {machine()}")
    assert training(tmp_path) == records[str(machine())][training.__name__]


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    hashes = {}
    for training in TRAININGS:
        with tempfile.TemporaryDirectory() as folder:
            hashes[training.__name__] = training(Path(folder))
    others = [record for record in json.loads(RECORD.read_text()) if record["machine"] != machine()]
    RECORD.write_text(json.dumps([*others, {"machine": machine(), "hashes": hashes}], indent=1) + "\n")
