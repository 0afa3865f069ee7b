"""Who gets which operation."""

import pytest
from comfyui_nibble.slim.choose import Slimming, UNetBlock, Wish, choose

# As SD 1.5 is built, shortened: three levels, attention at the upper two and in the middle.
PLACES = [
    UNetBlock(("input", 0), 0, False, False),
    UNetBlock(("input", 1), 0, True, True),
    UNetBlock(("input", 2), 1, False, True),
    UNetBlock(("input", 3), 1, True, True),
    UNetBlock(("input", 4), 2, False, True),
    UNetBlock(("middle", 0), 2, True, True),
    UNetBlock(("output", 0), 2, False, True),
    UNetBlock(("output", 1), 1, True, True),
    UNetBlock(("output", 2), 0, True, True),
]


def chosen(**wish) -> dict[str, tuple[str, str]]:
    found = choose(PLACES, Wish(**({"strength": 0.5} | wish)))
    return {f"{key[0]} {key[1]}": (c.attention, c.convolutions) for key, c in found.items()}


def test_attention_from_the_top_and_convolutions_from_the_bottom():
    assert chosen(attention="pool") == {"input 1": ("pool", ""), "output 2": ("pool", "")}
    assert set(chosen(attention="skip", attention_levels=2)) == {"input 1", "input 3", "output 1", "output 2"}
    assert chosen(convolutions="low rank") == dict.fromkeys(("input 4", "middle 0", "output 0"), ("", "low rank"))
    assert len(chosen(convolutions="separable", conv_levels=9)) == 8
    assert chosen(attention="pool", attention_levels=0, convolutions="low rank", conv_levels=0) == {}


def test_levels_without_attention_do_not_count():
    places = [UNetBlock(("input", 1), 0, False, True), UNetBlock(("input", 2), 1, True, True)]
    assert choose(places, Wish(0.5, attention="skip")) == {("input", 2): Slimming("skip", "")}


def test_single_blocks_are_as_a_person_says():
    text = "# mine\ninput 1: as it is\n  middle   0 : relu, separable\n\noutput 1: skip"
    assert chosen(attention="pool", blocks=text) == {
        "output 2": ("pool", ""), "middle 0": ("relu", "separable"), "output 1": ("skip", ""),
    }  # fmt: skip


def test_strength_0_chooses_nothing():
    assert chosen(strength=0, attention="skip", blocks="input 1: skip") == {}


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"strength": 1.0}, "strength is 1; it goes from 0 to below 1"),
        ({"attention": "slim"}, "'slim' is none of as it is, pool, skip, relu"),
        ({"convolutions": "pool"}, "'pool' is none of as it is, low rank, separable"),
        ({"blocks": "input 9: skip"}, "this model has no block 'input 9'; it has input 0, input 1"),
        ({"blocks": "input 1 skip"}, "blocks, line 1: 'input 1 skip' is not 'input 1: skip'"),
        ({"blocks": "input 2: skip"}, "input 2 has nothing for 'skip'"),
        ({"blocks": "input 1: tidy"}, "input 1: 'tidy' is none of as it is, pool"),
        ({"blocks": "input 1: skip\n" * 300}, "blocks has 300 lines; at most 200 are read"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(wish, words):
    with pytest.raises(ValueError, match=words):
        chosen(**wish)
