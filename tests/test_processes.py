"""Several processes train as one: the same weights, statistics and numbers; one that dies ends the job cleanly."""

import dataclasses
import os
import signal

import pytest
import torch
from accelerate import Accelerator, PartialState
from transformers import CLIPTokenizer

from ibkit.adapt import attach, state
from ibkit.data.prompts import training_prompts
from ibkit.errors import IbkitError, ParameterError, ScoreError, TrainingError
from ibkit.methods import ddpo
from ibkit.model.loading import POCKET_PIPELINE
from ibkit.model.sample import Sampler
from ibkit.runs import Checkpoints
from ibkit.train.kept import memory_advice
from ibkit.train.processes import Processes, _joined, start
from tests.tiny import tiny_model

CPU = torch.device("cpu")
CONFIG = ddpo.DDPOConfig(
    n_epochs=3, images_per_epoch=8, batch=4, sampler=Sampler(4, 3.0, 1.0), learning_rate=1e-3, micro_batch=3,
    stats_min_count=2, checkpoint_every=1,
)  # fmt: skip
PROMPTS = training_prompts(["playing soccer", "dancing"], "cat", "sks")


def brightness(images, prompts):
    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


def train_tiny(processes, device, folder, config, reward=brightness, **options):
    torch.set_num_threads(1)
    model = tiny_model(CLIPTokenizer.from_pretrained(POCKET_PIPELINE / "tokenizer"))
    rows = ddpo.train(model, PROMPTS, reward, config, folder, processes=processes, **options)
    return state(model, "ddpo"), rows


def difference(a: dict, b: dict) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


def die_in_epoch_two(processes, device, folder, config):
    def reward(images, prompts):
        reward.calls += 1
        if reward.calls > 2:  # the second of three chunks of pictures is its, in every epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return brightness(images, prompts)

    reward.calls = 0
    train_tiny(processes, device, folder, config, reward)


def refuse_a_picture(processes, device, folder, config):
    def reward(images, prompts):
        raise KeyError("no such word")

    train_tiny(processes, device, folder, config, reward)


FAILURES = {
    "the loss is not finite.": TrainingError("the loss is not finite."),
    "the picture is empty.": ScoreError("the picture is empty."),
    "out of memory: buy some.": MemoryError(),
    "process 1 of 2 failed with ValueError: shapes do not fit": ValueError("shapes do not fit"),
}


def fail_in_turn(processes, device):
    for error in FAILURES.values():
        with pytest.raises(IbkitError if isinstance(error, MemoryError) else type(error)):
            with processes.agree(), memory_advice("buy some"):
                raise error
    processes.share(None)


# --- one process ------------------------------------------------------------------------------------------------


def test_one_process_is_the_whole_group():
    alone = Processes()
    assert alone.first and alone.chunk(10, 4) == 4 and alone.deal([1, 2, 3]) == [1, 2, 3]
    assert alone.gather([1, 2]) == [1, 2] and alone.share({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("n, largest, count", [(8, 3, 2), (8, 48, 2), (7, 48, 3), (5, 2, 4), (4, 4, 4)])
def test_everybody_gets_a_chunk_and_nothing_is_lost(n, largest, count):
    chunks = torch.arange(n).split(Processes(0, count).chunk(n, largest))
    shares = [Processes(i, count).deal(chunks) for i in range(count)]
    assert all(shares) and max(len(c) for c in chunks) <= largest
    assert sorted(torch.cat([c for share in shares for c in share]).tolist()) == list(range(n))


# --- two processes ----------------------------------------------------------------------------------------------


def test_two_processes_end_as_one(tmp_path):
    seen = []

    def monitor(images, prompts):
        seen.append([p.text for p in prompts])
        return {"monitor": float(len(images))}

    alone, rows_alone = train_tiny(Processes(), CPU, tmp_path / "one", CONFIG, monitor=monitor)
    seen_alone, seen = seen, []
    with start(2, CPU, train_tiny, tmp_path / "two", CONFIG) as processes:
        both, rows = train_tiny(processes, CPU, tmp_path / "two", CONFIG, monitor=monitor)
    assert difference(alone, both) <= 1e-6
    moved = difference(alone, tiny_adapter())
    assert moved > 1e-3  # or the comparison would be of two adapters that learned nothing
    assert seen == seen_alone and [r["monitor"] for r in rows] == [8.0] * 3
    for one, two in zip(rows_alone, rows, strict=True):
        assert one.keys() == two.keys()
        assert all(two[k] == pytest.approx(one[k], rel=1e-3, abs=1e-6) for k in one.keys() - {"seconds"})


def test_an_accelerator_made_before_does_not_keep_the_processes_apart():
    Accelerator(cpu=True)  # it leaves its state to the whole process
    alone = dict(PartialState._shared_state)
    with start(2, CPU, gather_own) as processes:
        assert processes.gather([processes.number]) == [0, 1]
    assert PartialState._shared_state == alone and PartialState().num_processes == 1
    PartialState._reset_state()


def gather_own(processes, device):
    processes.gather([processes.number])


def tiny_adapter():
    from ibkit.device import generator

    model = tiny_model(CLIPTokenizer.from_pretrained(POCKET_PIPELINE / "tokenizer"))
    attach(model, "lora", "ddpo", {"rank": CONFIG.lora_rank}, generator(0, "lora"))
    return state(model, "ddpo")


def test_a_killed_process_ends_the_job_and_one_process_goes_on(tmp_path):
    with (
        pytest.raises(TrainingError, match="one of the 2 processes.*resume to continue"),
        start(2, CPU, die_in_epoch_two, tmp_path / "killed", CONFIG) as processes,
    ):
        train_tiny(processes, CPU, tmp_path / "killed", CONFIG)
    assert Checkpoints(tmp_path / "killed" / "checkpoints").latest()[0] == 2
    resumed, rows = train_tiny(Processes(), CPU, tmp_path / "killed", CONFIG)
    whole, _ = train_tiny(Processes(), CPU, tmp_path / "whole", CONFIG)
    assert len(rows) == 3 and difference(resumed, whole) <= 1e-6


def test_a_reward_that_fails_in_another_process_is_told_by_the_first(tmp_path):
    sentence = "the reward function failed with KeyError: 'no such word'; mend it and resume"
    with pytest.raises(TrainingError, match=sentence), start(2, CPU, refuse_a_picture, tmp_path, CONFIG) as processes:
        train_tiny(processes, CPU, tmp_path, CONFIG)


def test_whatever_fails_in_another_process_fails_here_even_below_a_launcher(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun's, whose server these processes do not use
    sentences = []
    with start(2, CPU, fail_in_turn) as processes:
        for _ in FAILURES:
            try:
                with processes.agree():
                    pass
            except TrainingError as error:
                sentences.append(str(error))
        assert processes.share("still together") == "still together"
    assert sentences == list(FAILURES)
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_processes_that_cannot_meet_say_why_and_leave_the_environment(monkeypatch):
    class Unmet(PartialState):
        def __init__(self, cpu):
            raise RuntimeError("the address is in use")

    monkeypatch.setattr("accelerate.PartialState", Unmet)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="the address is in use"), _joined(0, 2, 1, "cpu"):
        pass
    assert dict(os.environ) == before


def test_more_processes_than_pictures_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, images_per_epoch=1)
    with pytest.raises(ParameterError, match="1 images an epoch cannot be shared by 2 processes"):
        train_tiny(Processes(0, 2), CPU, tmp_path, config)


def test_one_gpu_by_its_number_is_refused():
    with pytest.raises(ParameterError, match="2 processes cannot train together on cuda:1 alone: use device='cuda'"):
        with start(2, torch.device("cuda:1"), train_tiny):
            pass


def test_an_accelerator_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ParameterError, match="2 processes cannot train together on mps"):
        with start(2, torch.device("mps"), train_tiny):
            pass
