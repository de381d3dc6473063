"""A reward learned from good/bad feedback on pictures: an MLP on frozen CLIP embeddings (Lee et al. 2023, section 4.2).

    L = E (y - r(x, z))² + λ E_{y=1} -log softmax_j(r(x, z_j) / T) at the true prompt

| here | paper |
|---|---|
| `FeedbackNet` | r_φ, two layers, 1024 hidden, on the concatenated embeddings of picture and text |
| `feedback_loss` | the squared error, and a classification among rule-made prompts with another object, count, ... |
| λ .5, T 2 | as there |

A trained head is a folder, `feedback.json` and `feedback.safetensors`; as a reward it is
`RewardSpec("feedback", options={"head": folder})`, on the CLIP of `weights`.

Differs from paper: CLIP is the kit's ViT-B/32, or the pocket one, instead of ViT-L/14; its embeddings have unit length
(the paper does not say). Optimizer and number of steps are ours: the paper names none for the reward.

Shapes: N pictures, K prompts of a classification (the true one first), D embedding width.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ibkit.device import generator
from ibkit.errors import ModelError, ParameterError, TrainingError
from ibkit.fields import field
from ibkit.runs import read_json
from ibkit.scorers.base import load_state, reading, require_files
from ibkit.scorers.clip import ClipEncoder
from ibkit.scorers.encoder import Encoder, OnEncoder

CONFIG_FILE, WEIGHTS_FILE = "feedback.json", "feedback.safetensors"


@dataclass(frozen=True)
class FeedbackRewardConfig:
    """Settings of the reward's training."""

    hidden: int = field(1024, "hidden width of the MLP", "Lee et al.", low=1, high=65_536)
    aux_weight: float = field(0.5, "λ of the prompt classification; 0 = without", "Lee et al.", low=0.0, high=100.0)
    temperature: float = field(2.0, "T of its softmax", "Lee et al.", low=1e-6, high=1e6)
    n_steps: int = field(500, "training steps", "ours: the paper is silent", low=1, high=1_000_000)
    batch: int = field(64, "pictures in a step", "ours: the paper is silent", low=1, high=65_536)
    learning_rate: float = field(1e-3, "of AdamW, constant", "ours: the paper is silent", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "PyTorch's", low=0.0, high=1.0)


class FeedbackNet(nn.Module):
    """r_φ: embeddings of pictures and texts, each (..., D), to rewards (...)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.width = width
        self.first, self.last = nn.Linear(2 * width, hidden), nn.Linear(hidden, 1)

    def forward(self, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.first(torch.cat([pictures, texts], -1)))).squeeze(-1)


def prompt_classification_loss(rewards: torch.Tensor, label: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean of -log softmax(r / T) at the true prompt, over the pictures labelled good; 0 without any.

    Args:
        rewards: r(x, z_j), (N, K), the true prompt first.
        label: y (N,), 1 good and 0 bad.
    """
    surprise = -(rewards / temperature).log_softmax(1)[:, 0]
    return (surprise * label).sum() / label.sum().clamp(min=1)


def feedback_loss(
    rewards: torch.Tensor, label: torch.Tensor, aux_weight: float, temperature: float
) -> dict[str, torch.Tensor]:
    """Loss, squared error and prompt classification; arguments as in `prompt_classification_loss`."""
    squared = (label - rewards[:, 0]).square().mean()
    if aux_weight == 0:
        return {"loss": squared, "loss_feedback": squared}
    named = prompt_classification_loss(rewards, label, temperature)
    return {"loss": squared + aux_weight * named, "loss_feedback": squared, "loss_prompts": named}


def train_reward(
    encoder: Encoder,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    labels: Sequence[float],
    others: Sequence[Sequence[str]],
    config: FeedbackRewardConfig,
    seed: int = 0,
) -> tuple[FeedbackNet, list[dict[str, float]]]:
    """Learn from N rated pictures; the result depends on the arguments alone.

    Args:
        labels: 1 good, 0 bad; skipped pictures are left out beforehand.
        others: for each picture K - 1 prompts that it does not show; not read with aux_weight 0.

    Returns:
        The network, and a row a step: step, loss, loss_feedback, loss_prompts (with the auxiliary loss).

    Raises:
        ParameterError: lengths that differ, a label that is neither 0 nor 1, one kind of label alone, or no others.
        TrainingError: a loss that is not finite.
    """
    _check(len(pictures), texts, labels, others, config.aux_weight > 0)
    x, z = encoder.images(pictures).float(), encoder.texts(texts).float()
    every = z[:, None]
    if config.aux_weight:
        flat = [text for of_one in others for text in of_one]
        every = torch.cat([every, encoder.texts(flat).float().view(len(x), -1, z.shape[1])], 1)  # (N, K, D)
    y = torch.tensor(list(labels), dtype=torch.float32, device=x.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "feedback reward").initial_seed())
        net = FeedbackNet(x.shape[1], config.hidden).to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    history = []
    for step in range(config.n_steps):
        rows = torch.randint(len(x), (config.batch,), generator=generator(seed, "feedback reward", step)).to(x.device)
        asked = every[rows]
        rewards = net(x[rows, None].expand(-1, asked.shape[1], -1), asked)
        terms = feedback_loss(rewards, y[rows], config.aux_weight, config.temperature)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        optimizer.step()
        history.append({"step": step} | {name: term.item() for name, term in terms.items()})
        if not bool(torch.isfinite(terms["loss"])):
            raise TrainingError(
                f"step {step} of the reward: the loss is not finite; lower learning_rate ({config.learning_rate:g})."
            )
    return net.eval().requires_grad_(False), history


def _check(n: int, texts: Sequence, labels: Sequence, others: Sequence, needs_others: bool) -> None:
    if not n or {len(texts), len(labels)} != {n}:
        raise ParameterError(
            f"the reward learns from rated pictures, and there are {n} pictures, {len(texts)} prompts and "
            f"{len(labels)} labels: give each picture one of each."
        )
    if set(map(float, labels)) != {0.0, 1.0}:
        found = ", ".join(f"{label:g}" for label in sorted(set(map(float, labels))))
        raise ParameterError(
            f"the reward learns from pictures labelled good (1) and bad (0), and the labels are {found}: leave skipped "
            "pictures out, and have at least one of each kind."
        )
    if needs_others and (len(others) != n or {len(of_one) for of_one in others} != {len(others[0])} or not others[0]):
        raise ParameterError(
            "the prompt classification needs as many other prompts for every picture, at least one: give `others`, or "
            "set aux_weight to 0."
        )


def save_reward(
    net: FeedbackNet, encoder: Encoder, folder: Path, config: FeedbackRewardConfig, card: dict[str, Any] | None = None
) -> None:
    """Write a head and what it stands on; `card` is kept beside it, such as numbers of labels and accuracies."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, folder / WEIGHTS_FILE)
    facts = {"width": net.width, "encoder": encoder.evaluator, "settings": asdict(config), "card": card or {}}
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class FeedbackOptions:
    """Which feedback it learned from."""

    head: str = field("", "folder of a trained head, as `save_reward` writes it", "ours")


class FeedbackReward(OnEncoder):
    """The learned reward, about 1 for a picture that raters would call good for its text and 0 for a bad one."""

    name = "feedback"
    needs = frozenset({"text"})
    options = FeedbackOptions

    def __init__(self, encoder: Encoder, net: FeedbackNet) -> None:
        super().__init__(encoder)
        self.net = net.to(encoder.device).eval().requires_grad_(False)
        self.evaluator = f"reward learned from feedback, {net.first.out_features} hidden, on {encoder.evaluator}"

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu", head: str = "") -> Self:
        encoder = ClipEncoder.load(weights, device)
        if not head:
            raise ModelError(
                "feedback: no head is shipped, since it is learned from your feedback: train one "
                "(ibkit.scorers.feedback.train_reward, notebook 09) and name its folder in the option head."
            )
        folder = Path(head).expanduser()
        require_files("feedback", folder, CONFIG_FILE, WEIGHTS_FILE)
        with reading("feedback", "head", folder):
            facts = read_json(folder / CONFIG_FILE)
            net = FeedbackNet(facts["width"], facts["settings"]["hidden"])
            load_state(net, folder / WEIGHTS_FILE)
        if facts["encoder"] != encoder.evaluator:
            raise ModelError(
                f"feedback: the head in {folder} was trained on {facts['encoder']}, not on {encoder.evaluator}: load "
                "it with those weights, or train one on these."
            )
        return cls(encoder, net)

    def _score(self, images, texts, references):
        return self.net(self.encoder.images(images).float(), self.encoder.texts(texts).float())


def agreement(predicted: torch.Tensor, labels: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """1.0 where a score predicts the label, good above the threshold, else 0.0; (N,)."""
    return ((predicted > threshold) == (labels > 0.5)).float()


def best_threshold(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The threshold at which scores agree most with labels (N,): for a score without a natural one, such as CLIP's,
    chosen on the pictures that the reward learned from.
    """
    ordered = scores.sort().values
    between = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1])
    found = torch.stack([agreement(scores, labels, t.item()).mean() for t in between])
    return between[found.argmax()].item()


def best_of(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices (P, keep) of the best of n pictures of each prompt by their scores (P, n), best first: the paper's
    stronger baseline (4 of 16), which trains nothing. A ParameterError where more are to be kept than there are.
    """
    n = scores.shape[1]
    if not 1 <= keep <= n:
        raise ParameterError(f"best-of-n cannot keep {keep} of {n} pictures: keep from 1 to {n}.")
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
