"""What each build stage reads and writes.

Finished stages are files below `weights/`; a stage that is there is not built again.
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from pathlib import Path

import torch

from ibkit.device import describe_device
from ibkit.errors import ArtifactError
from ibkit.pocket.build import autoencoder, clip, dino, judge, reward, subject, unet
from ibkit.pocket.build.common import Budget, compute_dtype, load_float, save_half
from ibkit.pocket.build.data import MIXED_GROUP, Pictures, base_caption, mixed_group, naming_caption
from ibkit.pocket.build.tokenizer import save_tokenizer
from ibkit.scorers.judge import RATER_WIDTHS, RATERS

TRAIN_SEED, N_TRAIN_GROUPS, N_MIXED_GROUPS = 0, 10_000, 11_000
TEST_SEED, N_TEST_GROUPS = 1, 500


class Build:
    """The stages over one folder: `weights/` is what gets shipped, the rest is cache and checkpoints.

    Args:
        earlier: shipped weights to continue from, where a stage can: decoder, U-Net, judge and reward; None = scratch.
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
        """Earlier weights: of one file, or of several with each name before its tensors; None where there are none."""
        if self.earlier is None:
            return None
        tensors = {k: v for file in files for k, v in load_float(self.earlier / file).items()}
        return tensors | {f"{p}.{k}": v for p, f in parts.items() for k, v in load_float(self.earlier / f).items()}

    def vae(self, finished: bool):
        """The autoencoder: after joint training, or with the finished decoder."""
        path = self.folder / ("vae.safetensors" if finished else "vae-joint.safetensors")
        if not path.exists():
            raise ArtifactError(
                f"{path} is not built yet: run the stage {'decoder' if finished else 'autoencoder'} first."
            )
        vae = autoencoder.new_autoencoder()
        state = load_float(path)
        vae.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
        vae.load_state_dict(state)
        return vae.to(self.device).eval()

    def _save_vae(self, vae, name: str) -> None:
        save_half(
            vae.state_dict(),
            self.folder / name,
            scaling_factor=torch.tensor(vae.config.scaling_factor, dtype=torch.float64),
        )

    def autoencoder(self) -> None:
        if not (self.folder / "vae-joint.safetensors").exists():
            self._save_vae(
                autoencoder.train_joint(self.folder, self.mixed_pictures, self.device, self.dtype),
                "vae-joint.safetensors",
            )

    def decoder(self) -> None:
        if not (self.folder / "vae.safetensors").exists():
            start = self.start("pipeline/vae/diffusion_pytorch_model.safetensors")
            decoder = start and {k.removeprefix("decoder."): v for k, v in start.items() if k.startswith("decoder.")}
            vae = self.vae(False)
            self._save_vae(
                autoencoder.train_decoder(self.folder, self.mixed_pictures, vae, self.device, self.dtype, decoder),
                "vae.safetensors",
            )

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

    def pipeline(self) -> None:
        """Put U-Net, text encoder and the finished autoencoder together as a diffusers folder."""
        model = unet.TextToLatent(self.tokenizer)
        model.load_state_dict(load_float(self.folder / "text-to-latent.safetensors"))
        unet.save_pipeline(model, self.vae(True), self.tokenizer, self.weights / "pipeline")

    def judge(self) -> None:
        if not (self.folder / "judge.safetensors").exists():
            start = self.start("judge/judge.safetensors")
            common = (self.folder, self.mixed_pictures, self.vae(False), self.device, self.dtype)
            net = judge.train(*common, budget=judge.CONTINUED if start else judge.BUDGET, start=start)
            save_half(net.state_dict(), self.folder / "judge.safetensors")

    def raters(self) -> None:
        """The judges that vote as simulated raters; measured here, so that the rest of a card need not be again."""
        from ibkit.pocket.build.card import write_raters

        for name in RATERS:
            if not (self.folder / f"{name}.safetensors").exists():
                net = judge.train(
                    self.folder,
                    self.mixed_pictures,
                    self.vae(False),
                    self.device,
                    self.dtype,
                    name,
                    RATER_WIDTHS,
                    judge.RATER_BUDGET,
                    redraw_every=judge.RATER_REDRAWS,
                )
                save_half(net.state_dict(), self.folder / f"{name}.safetensors")
        write_raters(self)

    def image_reward(self) -> None:
        start = self.start("image_reward/model.safetensors")
        self._reward("image_reward", reward.CONTINUED if start else reward.BUDGET, True, start)

    def weak_reward(self) -> None:
        self._reward("weak_reward", reward.WEAK_BUDGET, False)

    def _reward(self, name: str, budget: Budget, hard_negatives: bool, start: dict | None = None) -> None:
        if not (self.weights / name / "config.json").exists():
            model = reward.train(
                self.folder,
                self.mixed_pictures,
                self.tokenizer,
                self.vae(False),
                self.device,
                self.dtype,
                budget,
                name,
                hard_negatives,
                start,
            )
            model.half().save_pretrained(self.weights / name)
            self.tokenizer.save_pretrained(self.weights / name)

    def clip(self) -> None:
        if not (self.weights / "clip" / "model.safetensors").exists():
            clip.save(
                clip.train(self.folder, self.train_pictures, self.tokenizer, self.device, self.dtype),
                self.tokenizer,
                self.weights / "clip",
            )

    def dino(self) -> None:
        if not (self.weights / "dino" / "config.json").exists():
            vit = dino.train(self.folder, self.train_pictures, self.device, self.dtype)
            vit.half().save_pretrained(self.weights / "dino")

    def subject(self) -> None:
        if not (self.weights / "subject" / "subject.json").exists():
            subject.build(self.folder, self.weights, self.vae(True), self.device, self.dtype)

    def card(self) -> None:
        from ibkit.pocket.build.card import write_card

        self.pipeline()
        write_card(self)
