"""What RL optimises: the text reward alone, as InstructBooth does, or text and subject together.

| here | Customized-GRPO (arXiv 2510.18263) |
|---|---|
| `time_aware_weight` | w(u), time-aware: text early in denoising, subject late |
| `synergy_term` | S, for pictures that are good, or bad, in both |
| `two_objectives` | A(u) = w(u) A_txt + (1 - w(u)) A_sub + S |

A reward has a level, the score of true pictures: beyond it a policy only finds what the scorer mistakes for better. An
objective may be clipped there (ReFL's relu(2 - r), Xu et al. 2023), and the history says how many pictures passed it.

Differs from paper: advantages are normalised over a prompt's recent pictures (`PromptStats`), not over a group with
common start noise, and only prompts with the identifier have a subject. w belongs to the true denoising step; the
paper's code looks it up at a shuffled one.

Shapes: B images of an epoch, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ibkit.data.prompts import Prompt
from ibkit.errors import IbkitError, ParameterError, TrainingError
from ibkit.fields import nearest
from ibkit.methods.engine.advantages import PromptStats
from ibkit.scorers.base import SCORERS, Level, Scorer, check_options, make_scorer

if TYPE_CHECKING:
    from ibkit.methods.ddpo import DDPOConfig

Parts = dict[str, torch.Tensor]  # what scores are made of, by name, each (B,); for the history, never optimised
# (images, prompts) -> scores (B,), or those and their parts; any scorer makes one, see `scorer_reward`
Reward = Callable[[list[Image.Image], list[Prompt]], torch.Tensor | tuple[torch.Tensor, Parts]]
COMBINATIONS = ("synergy", "sum", "harmonic")


@dataclass(frozen=True)
class Objective:
    """A reward that knows its level; called as the reward is.

    Attributes:
        reward: scores pictures.
        level: the scores of true pictures for a prompt, None where nobody knows.
        clip: whether scores above the level's mean count as the mean.
    """

    reward: Reward
    level: Callable[[Prompt], Level | None] = lambda prompt: None
    clip: bool = False

    @classmethod
    def of(cls, reward: Reward) -> Objective:
        return reward if isinstance(reward, Objective) else cls(reward)

    def __call__(self, images: list[Image.Image], prompts: list[Prompt]) -> tuple[torch.Tensor, Parts]:
        """Scores (B,) and their parts, fp32 on the CPU; a TrainingError where the reward function fails, or does not
        give each picture one number.
        """
        try:
            given = self.reward(images, prompts)
            scores, parts = given if isinstance(given, tuple) else (given, {})
            found = {name: torch.as_tensor(values).float().cpu() for name, values in {"": scores, **parts}.items()}
        except (IbkitError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of any kind, since anybody's function may be the reward
            raise TrainingError(
                f"the reward function failed with {type(error).__name__}: {error}; mend it and resume."
            ) from error
        for name, values in found.items():
            if values.shape != (len(images),):
                raise TrainingError(
                    f"the reward function returned shape {tuple(values.shape)} for {len(images)} images"
                    f"{f' in its part {name!r}' if name else ''}: it must give each one number."
                )
        return found.pop(""), found

    def levels(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """The level of each prompt (B,), NaN where it is not known; that is a ParameterError where it is to be clipped
        at.
        """
        found = [self.level(prompt) for prompt in prompts]
        if self.clip and None in found:
            raise ParameterError(
                f"the reward is to be clipped at its level and knows none for {prompts[found.index(None)].clean!r}: "
                "give its weights a level.json (or two photos of the subject at least), or do without the clip."
            )
        return torch.tensor([level.mean if level else torch.nan for level in found])

    def spreads(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """The standard deviation of true pictures' scores for each prompt (B,), 0 where it is not known."""
        found = [self.level(prompt) for prompt in prompts]
        return torch.tensor([level.std if level else 0.0 for level in found])


@dataclass(frozen=True)
class RewardSpec:
    """An objective by name, so that it can be written down and sent to another process.

    Attributes:
        name: of a scorer, a key of `SCORERS`.
        weights, options: of the scorer, see `make_scorer`.
        clip_at_level: see `Objective.clip`.

    Raises:
        ParameterError: no scorer or option has this name (the nearest is named), or a value that is not allowed.
    """

    name: str
    weights: str = "pocket"
    options: Mapping[str, Any] = field(default_factory=dict)
    clip_at_level: bool = False

    def __post_init__(self):
        if self.name not in SCORERS:
            raise ParameterError(f"There is no reward {self.name!r}{nearest(self.name, SCORERS)}")
        check_options(self.name, self.options)

    def load(
        self, device: torch.device | str = "cpu", references: Sequence[Image.Image] = (), parked: bool = False
    ) -> Objective:
        """Make its scorer, see `make_scorer`, and with it the objective, see `scorer_reward`; `parked` networks are on
        the device only while it scores.
        """
        scorer = self.scorer(device)
        if parked:
            scorer.park()
        return scorer_reward(scorer, references, self.clip_at_level)

    def scorer(self, device: torch.device | str = "cpu") -> Scorer:
        """The scorer alone."""
        return make_scorer(self.name, self.weights, device, self.options)


def scorer_reward(scorer: Scorer, references: Sequence[Image.Image] = (), clip_at_level: bool = False) -> Objective:
    """Use a scorer as a reward; it reads the prompt without the identifier, and sees the subject's photos.

    Its level for a text is the scorer's own. That of a scorer which compares with the photos alone is how much they
    are like each other.
    """
    photos = list(references)
    level = lambda prompt: scorer.level(prompt.clean)  # noqa: E731
    if scorer.needs == {"references"}:
        among_themselves = reference_level(scorer, photos)
        level = lambda prompt: among_themselves  # noqa: E731
    scored = lambda images, prompts: scorer.with_parts(images, [p.clean for p in prompts], photos)  # noqa: E731
    return Objective(scored, level, clip_at_level)


def reference_level(scorer: Scorer, references: Sequence[Image.Image]) -> Level | None:
    """Scores of real photos of the subject, each against the others; None with fewer than two."""
    if len(references) < 2:
        return None
    others = [[*references[:i], *references[i + 1 :]] for i in range(len(references))]
    scores = torch.cat([scorer([photo], None, rest) for photo, rest in zip(references, others, strict=True)]).double()
    return Level(scores.mean().item(), scores.std().item())


def time_aware_weight(done: torch.Tensor) -> torch.Tensor:
    """w(u) of Customized-GRPO: .7 at first, where denoising lays out the scene, .3 later, .5 in the last eighth. `done`
    is u, the share of denoising that was done before each step.
    """
    falling = 0.3 + 0.4 * (1 - torch.sigmoid(20 * (done - 0.4)))
    return torch.where(done < 0.24, 0.7, torch.where(done < 0.88, falling, 0.5))


def synergy_term(text: torch.Tensor, subject: torch.Tensor, strength: float) -> torch.Tensor:
    """S = γ tanh(A_txt A_sub), with the sign turned where neither is positive: bad in both is no success."""
    sign = torch.where((text > 0) | (subject > 0), 1.0, -1.0)
    return strength * sign * torch.tanh(text * subject)


def two_objectives(
    text: torch.Tensor, subject: torch.Tensor, weight: torch.Tensor, synergy_strength: float
) -> torch.Tensor:
    """A = w A_txt + (1 - w) A_sub + S for each image and step, (B, T).

    Args:
        text, subject: advantages (B,), each normalised per prompt.
        weight: w of each denoising step (T,).
        synergy_strength: γ; 0 leaves S out.
    """
    blended = weight * text[:, None] + (1 - weight) * subject[:, None]
    return blended + synergy_term(text, subject, synergy_strength)[:, None]


class Rewards:
    """One or two rewards of a training, functions or `Objective`s; no subject for the paper's own arm.

    Subject fidelity counts where the prompt has the identifier. For "a cat playing soccer" any cat is right, and the
    text alone is rewarded.
    """

    def __init__(self, text: Reward, subject: Reward | None = None):
        given = {"text": text} | ({"subject": subject} if subject else {})
        self.given = {name: Objective.of(reward) for name, reward in given.items()}

    @property
    def facts(self) -> dict[str, bool]:
        """Which there are, and whether they are clipped: what a training must be continued with."""
        return {name: objective.clip for name, objective in self.given.items()}

    def score(self, images: list[Image.Image], prompts: list[Prompt]) -> tuple[torch.Tensor, Parts]:
        """Scores (objectives, B) fp32 on the CPU, text first, and their parts, "text_x" for the text's part x."""
        rows: list[torch.Tensor] = []
        parts: Parts = {}
        for name, objective in self.given.items():
            scores, own = objective(images, prompts)
            rows.append(scores)
            parts |= {f"{name}_{part}": values for part, values in own.items()}
        return torch.stack(rows), parts

    def clipped(self, prompts: Sequence[Prompt], scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each objective's scores (B,) as they are optimised."""
        return {
            name: torch.minimum(row, objective.levels(prompts)) if objective.clip else row
            for (name, objective), row in zip(self.given.items(), scores, strict=True)
        }

    def row(
        self, prompts: Sequence[Prompt], scores: torch.Tensor, parts: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, float]:
        """Columns of the history: means of the scores as they are, never clipped, and of their parts (the subject's
        over identifier prompts, as its own); shares above the level; zero_spread.

        zero_spread is the share of the epoch's prompts whose pictures are all rewarded alike, by every objective and
        after the clip: beside each other they teach nothing. A prompt with one picture does not count.
        """
        named = torch.tensor([p.identifier for p in prompts])
        row = {"reward": scores[0].mean().item()}
        for name, kind in (("reward_identifier", named), ("reward_class", ~named)):
            row |= {name: scores[0][kind].mean().item()} if kind.any() else {}
        counted = {"above_level": torch.ones_like(named), "above_level_subject": named}
        for (column, counts), objective, of in zip(counted.items(), self.given.values(), scores, strict=False):
            levels = objective.levels(prompts)
            known = counts & ~levels.isnan()
            row |= {column: (of > levels)[known].float().mean().item()} if known.any() else {}
        if "subject" in self.given and named.any():
            row["reward_subject"] = scores[1][named].mean().item()
        for name, values in parts.items():
            counts = named if name.startswith("subject_") else torch.ones_like(named)
            row |= {name: values[counts].mean().item()} if counts.any() else {}
        rewards = torch.stack(list(self.clipped(prompts, scores).values()), 1)
        rewards[~named, 1:] = 0.0  # these have no subject
        texts = [p.text for p in prompts]
        groups = [[i for i, text in enumerate(texts) if text == own] for own in dict.fromkeys(texts)]
        alike = [bool((rewards[group] == rewards[group[0]]).all()) for group in groups if len(group) > 1]
        return row | ({"zero_spread": sum(alike) / len(alike)} if alike else {})


class Objectives(Rewards):
    """Rewards (see there), how they make one advantage, which the config says (`DDPOConfig`), and their statistics."""

    def __init__(self, text: Reward, subject: Reward | None, config: DDPOConfig):
        if config.combine not in COMBINATIONS:
            raise ParameterError(f"combine is {config.combine!r}: it must be one of {', '.join(COMBINATIONS)}.")
        super().__init__(text, subject)
        self.config = config
        apart = self.given if config.combine == "synergy" else ["text"]  # else one reward made of both
        self.stats = {name: PromptStats(config.stats_buffer, config.stats_min_count) for name in apart}

    def advantages(self, prompts: Sequence[Prompt], scores: torch.Tensor, n_steps: int) -> torch.Tensor:
        """Add an epoch's scores (objectives, B) to the statistics and return its advantages (B, n_steps), clamped.

        A column belongs to a denoising step, whichever order an update draws the steps in.
        """
        config, clipped = self.config, self.clipped(prompts, scores)
        named = torch.tensor([p.identifier for p in prompts])
        made_one = "subject" in clipped and config.combine != "synergy"
        reward = self._one_reward(clipped, named) if made_one else clipped["text"]
        least = None if made_one else self._least("text", prompts)
        advantages = self.stats["text"].advantages(prompts, reward, least)[:, None].repeat(1, n_steps)
        if "subject" in self.stats and named.any():
            asked = [p for p in prompts if p.identifier]
            of_subject = self.stats["subject"]
            subject = of_subject.advantages(asked, clipped["subject"][named], self._least("subject", asked))
            done = torch.arange(n_steps) / n_steps
            weight = time_aware_weight(done) if config.time_aware else torch.full_like(done, config.text_weight)
            advantages[named] = two_objectives(advantages[named, 0], subject, weight, config.synergy)
        return advantages.clamp(-config.advantage_clip, config.advantage_clip)

    def _least(self, name: str, prompts: Sequence[Prompt]) -> torch.Tensor | None:
        """The least σ (B,) that an objective which is clipped is normalised by, see `DDPOConfig.spread_floor`.

        Where nearly all pictures of a prompt are at the level, their σ goes to 0, and the few below it would weigh as
        much as they did when all were: 1 of 16 pictures has an advantage of -3.9, however little it lacks.
        """
        if not (self.config.spread_floor and self.given[name].clip):
            return None
        return self.config.spread_floor * self.given[name].spreads(prompts)

    def _one_reward(self, scores: dict[str, torch.Tensor], named: torch.Tensor) -> torch.Tensor:
        """Text and subject as one number (B,): their weighted sum, or RPO's λ-harmonic mean (arXiv 2407.12164).

        The harmonic mean needs numbers in (0, 1]: (cosine + 1) / 2 for the subject, as RPO has it, and σ(r) for the
        text, which is how often a Bradley-Terry reward prefers the picture to one of reward 0.
        """
        text, subject, w = scores["text"], scores["subject"], self.config.text_weight
        if self.config.combine == "sum":
            return torch.where(named, w * text + (1 - w) * subject, w * text)
        text, subject = torch.sigmoid(text).clamp(min=1e-6), ((subject + 1) / 2).clamp(min=1e-6)
        return torch.where(named, 1 / (w / text + (1 - w) / subject), text)

    def state(self) -> dict[str, dict]:
        return {name: stats.state() for name, stats in self.stats.items()}

    def load(self, state: dict[str, dict]) -> None:
        for name, stats in self.stats.items():
            stats.load(state[name])
