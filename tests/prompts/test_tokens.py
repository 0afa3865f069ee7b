"""The count of CLIP tokens without CLIP. tests/comfy/test_prompts.py holds it against ComfyUI's own tokenizer."""

import pytest
from comfyui_nibble.prompts import tokens


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 2),
        ("a photo of a cat", 7),
        ("A PHOTO, of a cat.", 9),
        ("it's 2024", 2 + 2 + 4),  # it 's 2 0 2 4
        ("\u00e9", 2 + 2),  # two bytes, at most two tokens
        ("cats (red:1.2)", 2 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1),  # cats ( red : 1 . 2 )
        ("a" * 8000, 8002),
    ],
)
def test_counted_by_hand(text, count):
    assert tokens.clip_bound(text) == count


def test_cutting_the_vocabulary_never_lowers_the_count(monkeypatch):
    """What makes the count safe: fewer merges, as many tokens or more. Here with the shipped merges cut further."""
    text = "watercolour illustration of a whimsical hedgehog, architecture, unbelievably ornate lighthouses"
    ranks, counts = tokens._ranks(), []
    for keep in (len(ranks), 8000, 4000, 1000, 100, 0):
        cut = {pair: rank for pair, rank in ranks.items() if rank < keep}
        monkeypatch.setattr(tokens, "_ranks", lambda cut=cut: cut)
        tokens._word.cache_clear()
        counts.append(tokens.clip_bound(text))
    tokens._word.cache_clear()
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert counts[-1] == 2 + sum(not c.isspace() for c in text)
