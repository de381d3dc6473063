"""Best of n: which picture is kept, from which noise, and of which arms."""

import pytest
import torch

from ibkit.adapt.adapted import Adapted, Base, Delta
from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import ParameterError
from ibkit.evaluate.arms import arms_of, label_of
from ibkit.evaluate.best_of import BestOf, candidate, is_chosen
from ibkit.evaluate.score import generate, jobs
from ibkit.model.sample import Sampler, sample
from ibkit.params import Evaluate
from ibkit.runs import Run
from ibkit.scorers.base import Scorer
from tests.tiny import tiny_model

SAMPLER = Sampler(3, 2.0, 1.0)
WHO = PersonalizedSubject("cat", "cat", "sks", "", "tiny", "", None)


class Brightness(Scorer):
    name, evaluator, needs = "brightness", "mean of all channels", frozenset({"text"})

    def _score(self, images, texts, references):
        self.texts = texts
        return torch.tensor([sum(i.convert("RGB").tobytes()) / (i.width * i.height * 3) for i in images])


def test_the_best_of_the_candidates_is_kept_and_the_first_has_the_arms_own_noise(tiny):
    reward = Brightness()
    prompts, seeds = ["a sks cat dancing", "a sks cat"], [5, 6]
    kept = BestOf(4, reward).draw(tiny, prompts, ["a cat dancing", "a cat"], seeds, SAMPLER)
    assert reward.texts == ["a cat dancing"] * 4 + ["a cat"] * 4
    for picture, prompt, seed in zip(kept, prompts, seeds, strict=True):
        noises = [candidate(seed, i) for i in range(4)]
        assert noises[0] == seed and len(set(noises)) == 4
        candidates = sample(tiny, [prompt] * 4, noises, SAMPLER)
        scores = reward(candidates, [prompt] * 4)
        assert picture.tobytes() == candidates[int(scores.argmax())].tobytes()
    alone = BestOf(1, reward).draw(tiny, prompts, prompts, seeds, SAMPLER)
    assert [p.tobytes() for p in alone] == [p.tobytes() for p in sample(tiny, prompts, seeds, SAMPLER)]


def test_each_personalization_gets_one_more_arm_and_no_tuning_does(tmp_path):
    base = Base("tiny", "", "0")
    delta = Delta("dreambooth", "dreambooth", "unet", {}, 0, tmp_path / "a", "0")
    models = {("base", None, None): Adapted(base), ("dreambooth", 0, None): Adapted(base, (delta,))}
    models[("dreambooth+ddpo", 0, 1)] = Adapted(base, (delta, delta))
    found = BestOf(4, Brightness()).added_to(models)
    assert list(found) == [
        ("base", None, None), ("dreambooth", 0, None), ("dreambooth+best_of_4", 0, None), ("dreambooth+ddpo", 0, 1)
    ]  # fmt: skip
    assert found["dreambooth+best_of_4", 0, None] is found["dreambooth", 0, None]
    assert [arm for arm, *_ in found if is_chosen(arm)] == ["dreambooth+best_of_4"]
    assert label_of("dreambooth+best_of_4") == "DreamBooth + best of 4"
    assert list(arms_of(arm for arm, *_ in found))[:3] == ["base", "dreambooth", "dreambooth+ddpo"]


def test_its_pictures_are_made_like_those_of_any_arm(tokenizer, tmp_path):
    rows = jobs(WHO, ["dancing"], 2, [("dreambooth", 0, None), ("dreambooth+best_of_3", 0, None)])
    run, best = Run.open(tmp_path, "03_evaluate", {}), BestOf(3, Brightness())
    generate(run, rows, lambda key: tiny_model(tokenizer), SAMPLER, batch_size=4, best=best)
    for own, chosen in zip(*(rows[rows["arm"] == arm]["image"] for arm in rows["arm"].unique()), strict=True):
        assert "best_of_3" in chosen and run.has(own) and run.has(chosen)


def test_an_unknown_reward_is_refused():
    with pytest.raises(ParameterError, match="image_reward"):
        Evaluate(best_of=4, best_of_reward="image_rewrad")
