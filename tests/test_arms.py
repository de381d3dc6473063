"""Arms: names, order, and looks that people can tell apart, whatever colours they see."""

import itertools

import numpy as np

from ibkit.evaluate.arms import COLOURS, FIXED, arms_of, label_of

# Full colour blindness on linear RGB, Machado, Oliveira and Fernandes 2009, table 1 (severity 1.0).
SEEN_BY = {
    "everybody else": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
FIRST, THEN = ("dreambooth", "lora_dreambooth", "neti", "mine"), ("", "+ddpo", "+dpok")
TWELVE = [first + then for first in FIRST for then in THEN]


def lab(colour, seen):
    """CIELAB of a colour as somebody sees it (sRGB, D65)."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(np.array(seen) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ linear / [0.95047, 1, 1.08883], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_told_apart_with_every_colour_blindness():
    for who, seen in SEEN_BY.items():
        for one, other in itertools.combinations(COLOURS, 2):
            assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 15, (who, one, other)
        assert all(np.linalg.norm(lab(colour, seen) - lab("#ffffff", seen)) > 15 for colour in COLOURS), who


def test_twelve_arms_have_twelve_looks():
    arms = arms_of(["base", *TWELVE]).values()
    assert len({(arm.colour, arm.marker) for arm in arms}) == len({(arm.colour, arm.hatch) for arm in arms}) == 13
    assert len({arm.colour for arm in list(arms)[:8]}) >= 6
    many = arms_of(f"method {i}" for i in range(60)).values()
    assert len({(arm.colour, arm.marker) for arm in many}) == 60


def test_the_papers_arms_look_alike_in_every_figure():
    alone = {name: arms_of([name])[name] for name in FIXED}
    together = arms_of([*FIXED, *TWELVE])
    for name, arm in alone.items():
        assert (arm.colour, arm.marker, arm.hatch) == (together[name].colour, together[name].marker, "")


def test_a_chain_stands_after_what_it_started_from():
    names = ["real", "neti+ddpo", "zeta", "dreambooth+ddpo", "neti", "base", "dreambooth", "alpha+ddpo", "alpha"]
    ordered = ["base", "dreambooth", "dreambooth+ddpo", "neti", "neti+ddpo", "alpha", "alpha+ddpo", "zeta", "real"]
    arms = arms_of(names)
    assert list(arms) == ordered and [arm.order for arm in arms.values()] == list(range(9))


def test_labels_come_from_the_records_and_the_paper():
    assert label_of("dreambooth+ddpo") == "InstructBooth" and label_of("dreambooth") == "DreamBooth"
    assert label_of("lora_dreambooth+ddpo") == "InstructBooth (LoRA)" and label_of("neti+ddpo") == "NeTI + DDPO"
    assert label_of("my_own") == "my own"
