"""What each build stage reads and writes.

Finished stages are files below `weights/`; a stage that is there is not built again.
"""

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ibkit.device import describe_device
from ibkit.errors import ArtifactError
from ibkit.model.loading import load_model
from ibkit.pocket.build import autoencoder, clip, counter, counting, dino, judge, reward, subject, unet
from ibkit.pocket.build.common import Budget, compute_dtype, load_float, save_half
from ibkit.pocket.build.data import MIXED_GROUP, Pictures, base_caption, mixed_group, naming_caption
from ibkit.pocket.build.tokenizer import save_tokenizer
from ibkit.scorers.base import POCKET_WEIGHTS
from ibkit.scorers.counter import Counter
from ibkit.scorers.judge import RATER_WIDTHS, RATERS
from ibkit.train.kept import part

TRAIN_SEED, N_TRAIN_GROUPS, N_MIXED_GROUPS = 0, 10_000, 11_000
TEST_SEED, N_TEST_GROUPS = 1, 500


class Build:
    """The stages over one folder: `weights/` is what gets shipped, the rest is cache and checkpoints. Decoder, U-Net,
    judge and reward continue from the shipped weights of `earlier`; None = all start from scratch.
    """

    def __init__(self, folder: Path, device: torch.device, earlier: Path | None = None):
        self.folder, self.device, self.dtype, self.earlier = folder, device, compute_dtype(device), earlier
        self.weights = folder / "weights"
        self.weights.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str) -> None:
        started = time.monotonic()
        getattr(self, stage)()
        path = self.folder / "seconds.json"
        seconds = json.loads(path.read_text()) if path.exists() else {}
        seconds[stage] = {
            "seconds": round(seconds.get(stage, {}).get("seconds", 0) + time.monotonic() - started),
            "device": describe_device(self.device),
        }
        path.write_text(json.dumps(seconds, indent=2) + "\n")

    @cached_property
    def train_pictures(self) -> Pictures:
        """What CLIP and DINO learn from: whole activities and rest."""
        return Pictures(self.folder, "train", TRAIN_SEED, N_TRAIN_GROUPS)

    @cached_property
    def mixed_pictures(self) -> Pictures:
        """What all others learn from: mixtures of pose and things as well."""
        return Pictures(self.folder, "mixed", TRAIN_SEED, N_MIXED_GROUPS, mixed_group, MIXED_GROUP)

    @cached_property
    def test_pictures(self) -> Pictures:
        return Pictures(self.folder, "test", TEST_SEED, N_TEST_GROUPS)

    @cached_property
    def mixed_test_pictures(self) -> Pictures:
        return Pictures(self.folder, "mixed-test", TEST_SEED, N_TEST_GROUPS, mixed_group, MIXED_GROUP)

    @cached_property
    def tokenizer(self):
        return save_tokenizer(self.folder / "tokenizer")

    def start(self, *files: str, **parts: str) -> dict[str, torch.Tensor] | None:
        """Earlier weights of `files`, and of `parts` with the part's name before each tensor's; None from scratch."""
        if self.earlier is None:
            return None
        tensors = {k: v for file in files for k, v in load_float(self.earlier / file).items()}
        return tensors | {f"{p}.{k}": v for p, f in parts.items() for k, v in load_float(self.earlier / f).items()}

    def vae(self, finished: bool):
        """The autoencoder: after joint training, or with the finished decoder."""
        path = self.folder / ("vae.safetensors" if finished else "vae-joint.safetensors")
        if not path.exists():
            stage = "decoder" if finished else "autoencoder"
            raise ArtifactError(f"{path} is not built yet: run the stage {stage} first.")
        return autoencoder.load(path).to(self.device).eval()

    def autoencoder(self) -> None:
        path = self.folder / "vae-joint.safetensors"
        if not path.exists():
            autoencoder.save(autoencoder.train_joint(self.folder, self.mixed_pictures, self.device, self.dtype), path)

    def decoder(self) -> None:
        path = self.folder / "vae.safetensors"
        if not path.exists():
            start = self.start("pipeline/vae/diffusion_pytorch_model.safetensors")
            common = (self.folder, self.mixed_pictures, self.vae(False), self.device, self.dtype)
            autoencoder.save(autoencoder.train_decoder(*common, start and part(start, "decoder")), path)

    def unet(self) -> None:
        path = self.folder / "text-to-latent.safetensors"
        if not path.exists():
            latents = unet.encode_all(self.folder, self.mixed_pictures, self.vae(False), self.device, self.dtype)
            start = self.start(
                unet="pipeline/unet/diffusion_pytorch_model.safetensors",
                text_encoder="pipeline/text_encoder/model.safetensors",
            )
            common = (self.folder, self.mixed_pictures, latents, self.tokenizer, self.device, self.dtype)
            model = unet.train(*common, "unet", unet.CONTINUED if start else unet.BUDGET, base_caption, start)
            model = unet.train(*common, "unet-finish", unet.FINISH, naming_caption, model.state_dict())
            save_half(model.state_dict(), path)

    def judge(self) -> None:
        start = self.start("judge/judge.safetensors")
        self._judge("judge", budget=judge.CONTINUED if start else judge.BUDGET, start=start)

    def raters(self) -> None:
        """The simulated raters. They are measured here, so that the rest of a card need not be measured again."""
        from ibkit.pocket.build.card import write_raters

        for name in RATERS:
            self._judge(name, widths=RATER_WIDTHS, budget=judge.RATER_BUDGET, redraw_every=judge.RATER_REDRAWS)
        write_raters(self)

    def _judge(self, name: str, **options: Any) -> None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            common = (self.folder, self.mixed_pictures, self.vae(False), self.device, self.dtype)
            save_half(judge.train(*common, name, **options).state_dict(), path)

    def counter(self) -> None:
        """On this build's finished autoencoder and its first rater, or the shipped ones where it has none."""
        if not (self.weights / "counter" / "counter.json").exists():
            own = (self.folder / "vae.safetensors").exists()
            vae = self.vae(True) if own else load_model("pocket", device=self.device).vae
            rater = self.folder / f"{RATERS[0]}.safetensors"
            rater = rater if rater.exists() else POCKET_WEIGHTS / "judge" / rater.name
            counter.build(self.folder, self.weights, vae, rater, self.device, self.dtype)

    def counting(self) -> None:
        """An adapter on this build's model, or the shipped one where it has none; card: with the counter."""
        from ibkit.pocket.build.card import write_counts

        own = self.weights / "pipeline"
        if not (self.weights / counting.NAME / f"{counting.NAME}.json").exists():
            model = load_model(str(own) if own.exists() else "pocket", device=self.device)
            looks = Counter.load(self.device, self.weights / "counter")
            counting.build(self.folder, self.weights, model, looks)
        write_counts(self)

    def image_reward(self) -> None:
        start = self.start("image_reward/model.safetensors")
        self._reward("image_reward", reward.CONTINUED if start else reward.BUDGET, start=start)

    def weak_reward(self) -> None:
        self._reward("weak_reward", reward.WEAK_BUDGET, hard_negatives=False)

    def _reward(self, name: str, budget: Budget, **options: Any) -> None:
        folder = self.weights / name
        if not (folder / "config.json").exists():
            common = (self.folder, self.mixed_pictures, self.tokenizer, self.vae(False), self.device, self.dtype)
            reward.train(*common, budget, name, **options).half().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def clip(self) -> None:
        folder = self.weights / "clip"
        if not (folder / "model.safetensors").exists():
            model = clip.train(self.folder, self.train_pictures, self.tokenizer, self.device, self.dtype)
            clip.save(model, self.tokenizer, folder)

    def dino(self) -> None:
        if not (self.weights / "dino" / "config.json").exists():
            vit = dino.train(self.folder, self.train_pictures, self.device, self.dtype)
            vit.half().save_pretrained(self.weights / "dino")

    def subject(self) -> None:
        if not (self.weights / "subject" / "subject.json").exists():
            subject.build(self.folder, self.weights, self.vae(True), self.device, self.dtype)

    def card(self) -> None:
        """The diffusers folder of U-Net, text encoder and finished autoencoder, and the model card of everything."""
        from ibkit.pocket.build.card import write_card

        model = unet.TextToLatent(self.tokenizer)
        model.load_state_dict(load_float(self.folder / "text-to-latent.safetensors"))
        unet.save_pipeline(model, self.vae(True), self.tokenizer, self.weights / "pipeline")
        write_card(self)
