"""The table of cards against what its makers say."""

import pytest
from comfyui_nibble.profiling import cards


@pytest.mark.parametrize("name, fp16, int8, four", [
    ("RTX 3090 24 GB", 71, 284, 568), ("RTX 4090 24 GB", 165.2, 660.6, 1321), ("RTX 5090 32 GB", 209.5, 838, 1676),
    ("A100 80 GB", 312, 624, 1248), ("H100 80 GB", 989.4, 1979, 989.4), ("T4 16 GB", 65, 130, 260),
    ("L4 24 GB", 121, 242, 485),
])  # fmt: skip
def test_rates_are_those_of_the_whitepapers(name, fp16, int8, four):
    """In 10^12 operations a second, dense; Hopper has no 4-bit mode."""
    card = cards.CARDS[name]
    for kind, value in (("fp16", fp16), ("int8", int8), ("four_bit", four)):
        assert card.rate(kind) / 1e12 == pytest.approx(value, rel=0.01)


def test_every_card_is_plausible():
    for card in cards.CARDS.values():
        box = float(card.name.split()[-2])
        assert 0.88 * box <= card.gib <= box, card.name
        assert 100 < card.bandwidth < 10_000 and card.architecture in cards.ARCHITECTURES
