"""Attention maps: recording changes nothing and records the right rows; words, maps and overlap by hand."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from ibkit.adapt import attach
from ibkit.device import generator
from ibkit.errors import ModelError, ParameterError, ScoreError
from ibkit.model import attention
from ibkit.model.attention import AttentionRecord, auc, lift, mask_at, record_attention, token_positions
from ibkit.model.sample import Sampler, sample_latents

PROMPT = "a sks monster toy playing soccer"
SAMPLER = Sampler(3, 2.0)


def latents(model, prompts=(PROMPT, PROMPT), batch_size=32):
    return sample_latents(model, prompts, range(len(prompts)), SAMPLER, batch_size)


def processors(model):
    return [module.processor for _, module in attention.cross_attention_layers(model.unet)]


# --- words


@pytest.mark.parametrize(
    ("prompt", "words", "columns"),
    [
        (PROMPT, "sks", [2]),
        (PROMPT, "monster toy", [3, 4]),
        (PROMPT, "Monster  Toy", [3, 4]),
        (PROMPT, "toy", [4]),
        ("a sks cat on a beach", "a", [1, 5]),
        ("a cat, sleeping", "cat", [2]),  # the comma is a token of its own
    ],
)
def test_columns_of_a_word_begin_behind_the_start_mark(tiny, prompt, words, columns):
    assert token_positions(tiny, prompt, words) == columns


def test_a_word_of_several_tokens_has_several_columns(tiny):
    n = len(tiny.token_ids("zebrafish"))
    assert n > 1
    assert token_positions(tiny, "a zebrafish cat", "zebrafish") == list(range(2, 2 + n))
    assert token_positions(tiny, "a zebrafish cat", "cat") == [2 + n]


@pytest.mark.parametrize("word", ["dog", "so", "oy", "toy monster"])
def test_a_word_that_is_not_there_is_refused(tiny, word):
    with pytest.raises(ParameterError, match=f"does not have the word {word!r}"):
        token_positions(tiny, PROMPT, word)


def test_the_columns_are_those_of_the_padded_prompt_that_the_model_reads(tiny):
    ids = tiny.tokenizer(PROMPT, padding="max_length", max_length=tiny.tokenizer.model_max_length)["input_ids"]
    for word in ("sks", "monster toy", "playing soccer"):
        assert [ids[i] for i in token_positions(tiny, PROMPT, word)] == tiny.token_ids(word)


# --- recording


def with_lora(model):
    attach(model, "lora", "ddpo", {"rank": 2}, generator(0, "test"))
    with torch.no_grad():  # B starts at zero: an adapter that does nothing would prove nothing
        for name, p in model.unet.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator(1, name)))


def with_fused_kernel(model):
    model.unet.set_attn_processor(AttnProcessor2_0())


@pytest.mark.parametrize("change", [lambda model: None, with_lora, with_fused_kernel])
def test_recording_changes_no_picture(tiny, change):
    change(tiny)
    plain, before = latents(tiny), processors(tiny)
    with record_attention(tiny, PROMPT, ["sks"]) as record:
        recorded = latents(tiny)
    assert torch.equal(plain, recorded)
    assert processors(tiny) == before and torch.equal(plain, latents(tiny))
    assert len(record.maps) == len(record.layers) * SAMPLER.n_steps


def test_an_adapter_takes_part_in_what_is_recorded(tiny):
    with record_attention(tiny, PROMPT, ["sks"]) as without:
        latents(tiny)
    with_lora(tiny)
    with record_attention(tiny, PROMPT, ["sks"]) as adapted:
        latents(tiny)
    assert not torch.allclose(without.pictures(), adapted.pictures(), atol=1e-4)


def test_everything_is_put_back_after_an_exception(tiny):
    before, hooks = processors(tiny), len(tiny.unet._forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt), record_attention(tiny, PROMPT, ["sks"]) as record:
        raise KeyboardInterrupt
    assert processors(tiny) == before and len(tiny.unet._forward_pre_hooks) == hooks
    with pytest.raises(ModelError, match="no attention was recorded for any step"):
        record.pictures()


def test_two_records_at_once_are_refused(tiny):
    with record_attention(tiny, PROMPT, ["sks"]), pytest.raises(ModelError, match="already"):
        with record_attention(tiny, PROMPT, ["toy"]):
            pass
    assert not any(type(p).__name__ == "_Recorder" for p in processors(tiny))


def test_layers_are_in_the_order_in_which_they_run(tiny):
    ran = []
    for name, module in tiny.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with record_attention(tiny, PROMPT, ["sks"]) as record:
        tiny.predict_noise(torch.zeros(1, 4, 8, 8), torch.tensor([1]), [PROMPT])
    assert list(record.layers) == ran
    registered = [name for name, _ in tiny.unet.named_modules() if name.endswith("attn2")]
    assert registered != ran, "this model cannot tell the two orders apart"


def test_a_unet_without_cross_attention_is_refused():
    with pytest.raises(ModelError, match="no cross-attention"):
        attention.cross_attention_layers(torch.nn.Linear(1, 1))


def by_hand(model, x_t, t, prompt):
    """Probabilities of every layer from the outputs of its projections: name -> (N, h, places, L)."""
    seen, handles = {}, []
    for name, module in attention.cross_attention_layers(model.unet):
        for side in ("to_q", "to_k"):
            hook = lambda _, __, out, key=(name, side): seen.__setitem__(key, out)  # noqa: E731
            handles.append(getattr(module, side).register_forward_hook(hook))
    model.predict_noise(x_t, torch.full((len(x_t),), t), [prompt] * len(x_t))
    for handle in handles:
        handle.remove()
    result = {}
    for name, module in attention.cross_attention_layers(model.unet):
        q, k = seen[name, "to_q"], seen[name, "to_k"]
        d = q.shape[-1] // module.heads
        heads = [
            (q[..., i * d : (i + 1) * d] @ k[..., i * d : (i + 1) * d].transpose(1, 2) / d**0.5).exp()
            for i in range(module.heads)
        ]
        result[name] = torch.stack([a / a.sum(-1, keepdim=True) for a in heads], 1)
    return result


def test_recorded_maps_are_the_probabilities_by_hand(tiny):
    x_t = torch.randn(2, 4, 8, 8, generator=generator(0, "x"))
    expected = by_hand(tiny, x_t, 7, PROMPT)
    with record_attention(tiny, PROMPT, ["sks", "monster toy"]) as record, torch.no_grad():
        tiny.predict_noise(x_t, torch.tensor([7, 7]), [PROMPT] * 2)
    assert {t for _, _, t in record.maps} == {7}
    for (name, r, _), maps in record.maps.items():
        mean_over_heads = expected[name].mean(1)
        torch.testing.assert_close(maps[:, 0], mean_over_heads[..., 2].reshape(2, r, r))
        torch.testing.assert_close(maps[:, 1], mean_over_heads[..., 3:5].mean(-1).reshape(2, r, r))
        assert maps.dtype == torch.float32


def test_under_guidance_only_the_rows_with_the_prompt_are_recorded(tiny):
    with record_attention(tiny, PROMPT, ["sks"]) as guided:
        eps_hat = tiny.guided_noise(torch.ones(2, 4, 8, 8), torch.tensor([9, 9]), [PROMPT] * 2, 3.0)
    with record_attention(tiny, PROMPT, ["sks"]) as plain:
        tiny.predict_noise(torch.ones(2, 4, 8, 8), torch.tensor([9, 9]), [PROMPT] * 2)
    assert eps_hat.shape == (2, 4, 8, 8)
    for key, maps in plain.maps.items():
        torch.testing.assert_close(guided.maps[key], maps)


def test_of_several_prompts_and_batches_the_pictures_of_one_are_recorded_in_order(tiny):
    prompts = [PROMPT, "a dog", PROMPT, PROMPT]
    with record_attention(tiny, PROMPT, ["sks"]) as cut:
        latents(tiny, prompts, batch_size=3)
    with record_attention(tiny, PROMPT, ["sks"]) as whole:
        latents(tiny, prompts)
    assert whole.pictures().shape == (3, 1, 8, 8)
    torch.testing.assert_close(cut.pictures(), whole.pictures())


def test_timesteps_of_one_pass_are_kept_apart(tiny):
    x_t = torch.randn(1, 4, 8, 8, generator=generator(0, "x")).expand(3, -1, -1, -1)
    text = [PROMPT] * 3
    with record_attention(tiny, PROMPT, ["sks"]) as together:
        tiny.predict_noise(x_t, torch.tensor([5, 900, 5]), text)
    with record_attention(tiny, PROMPT, ["sks"]) as alone:
        tiny.predict_noise(x_t[:1], torch.tensor([900]), text[:1])
    assert together.timesteps == [900, 5]
    assert together.statistics(5).shape[0] == 2 and together.statistics(900).shape[0] == 1
    torch.testing.assert_close(together.statistics(900), alone.statistics(900))


# --- maps


def record(maps):
    return AttentionRecord(PROMPT, ("sks",), ("down", "mid", "up"), maps)


def test_pictures_are_summed_over_steps_and_averaged_over_layers_at_the_largest_size():
    flat = lambda r, value: torch.full((1, 1, r, r), value)  # noqa: E731
    made = record({("down", 4, 9): flat(4, 0.2), ("mid", 2, 9): flat(2, 0.4), ("down", 4, 1): flat(4, 0.1)})
    torch.testing.assert_close(made.pictures(), flat(4, 0.3 + 0.1))
    torch.testing.assert_close(made.pictures([9]), flat(4, 0.3))
    torch.testing.assert_close(made.pictures([9], layer="mid"), flat(4, 0.4))
    torch.testing.assert_close(made.pictures([9], resolution=4), flat(4, 0.2))
    torch.testing.assert_close(made.statistics(9), flat(4, 0.2))
    torch.testing.assert_close(made.statistics(9, resolution=2), flat(2, 0.4))
    with pytest.raises(ModelError, match="no attention was recorded for t = 1, mid"):
        made.pictures([1], layer="mid")
    with pytest.raises(ModelError, match="t = 5"):
        made.statistics(5)


def test_statistics_are_taken_at_16_where_there_is_one():
    sides = {("down", r, 1): torch.zeros(1, 1, r, r) for r in (64, 32, 16, 8)}
    assert record(sides).statistics_resolution == 16
    assert record({("mid", 8, 1): torch.zeros(1, 1, 8, 8)}).statistics_resolution == 8


def test_enlarging_keeps_the_place_and_no_probability_falls_below_zero():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 3] = 1.0
    large = attention.enlarge(maps, 16)
    assert large.min() == 0 and divmod(int(large.flatten().argmax()), 16) in {(0, 15), (1, 14), (0, 14), (1, 15)}


# --- overlap


def left_half(size=4):
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (0, 0, size // 2, size))
    return mask


def test_a_mask_is_averaged_over_places():
    torch.testing.assert_close(mask_at(left_half(), 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    one_pixel = Image.new("L", (4, 4), 0)
    one_pixel.putpixel((0, 0), 255)
    torch.testing.assert_close(mask_at(one_pixel, 2), torch.tensor([[0.25, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_all_or_nothing_is_refused(value):
    with pytest.raises(ScoreError, match="all or nothing"):
        mask_at(Image.new("L", (8, 8), value), 4)


def test_lift_by_hand():
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # a quarter of the area
    assert lift(torch.ones(2, 2), mask).item() == pytest.approx(1.0)
    assert lift(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), mask).item() == pytest.approx(4.0)
    assert lift(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), mask).item() == 0
    assert lift(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), mask).item() == pytest.approx((3 / 6) / 0.25)
    assert lift(torch.tensor([[3.0, 1.0], [1.0, 1.0]]) / 100, mask).item() == pytest.approx((3 / 6) / 0.25)
    with pytest.raises(ScoreError, match="lift is not defined"):
        lift(torch.zeros(2, 2), mask)


def test_auc_by_hand():
    mask = torch.tensor([[1.0, 0.5], [0.4, 0.0]])  # two places inside, at half and above
    assert auc(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), mask).item() == 1
    assert auc(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask).item() == 0
    assert auc(torch.ones(2, 2), mask).item() == 0.5
    # pairs (inside, outside): 3>2, 3>1, 1<2, 1=1 -> 2.5 of 4
    assert auc(torch.tensor([[3.0, 1.0], [2.0, 1.0]]), mask).item() == pytest.approx(2.5 / 4)
    both = auc(torch.stack([torch.ones(2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])]), mask)
    assert both.tolist() == [0.5, 1.0]
    with pytest.raises(ScoreError, match="AUC is not defined"):
        auc(torch.ones(2, 2), torch.full((2, 2), 0.3))
