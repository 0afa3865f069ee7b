"""Expansion: same seed same text, slots that do not disturb each other, what a person types stays data."""

import pytest
from comfyui_nibble.prompts import batch, draw, expand, schema
from comfyui_nibble.prompts.reader import DomainError

SEEDS = range(400)


def test_same_seed_same_text(small):
    assert len({expand.expand(small, "x", 3) for _ in range(5)}) == 1
    assert len({expand.expand(small, "x", s) for s in SEEDS}) > 8


def test_a_draw_worked_by_hand():
    """SHA-256 of "7/light" starts with 54693fcd: 0x54693fcd / 2^32 = 0.3297, so 32 of 100."""
    assert draw.number(7, "light") >> 32 == 0x54693FCD
    assert draw.below(100, 7, "light") == 32
    assert draw.weighted("abc", [30, 2, 68], 7, "light") == "c"
    assert draw.weighted("abc", [30, 3, 67], 7, "light") == "b"


def test_weights_and_chances_are_kept(small):
    chosen = [expand.resolve(small, "x", s).chosen for s in range(4000)]
    drawings = sum(c["medium"] == "drawing" for c in chosen) / len(chosen)
    assert abs(drawings - 0.75) < 0.03
    nights = [c for c in chosen if c["time"] == "night"]
    assert abs(sum(bool(c["extra"]) for c in nights) / len(nights) - 0.5) < 0.04


def test_conditions_hold(small):
    for seed in SEEDS:
        prompt = expand.resolve(small, "x", seed)
        c = prompt.chosen
        assert not (c["extra"] and c["time"] != "night")
        assert not (c["extra"] == "stars" and c["medium"] != "drawing")
        assert ("The sky is dark." in prompt.positive) == (c["time"] == "night")


def test_another_slot_does_not_reshuffle_the_others(data, small):
    """Adding, removing and overriding a slot leaves every other choice as it was."""
    data["slots"] = {"mood": {"choices": ["calm", "wild"]}, **data["slots"]}
    data["tags"]["positive"].insert(0, "{mood}")
    more = schema.parse(data, "t")
    for seed in SEEDS:
        before, after = expand.resolve(small, "x", seed).chosen, expand.resolve(more, "x", seed).chosen
        assert {k: v for k, v in after.items() if k != "mood"} == before
        fixed = expand.resolve(small, "x", seed, overrides={"colour": "green"}).chosen
        assert {**fixed, "colour": ""} == {**before, "colour": ""}


def test_parts_are_joined_as_their_style_wants(small):
    fixed = {"medium": "photo", "time": "night", "extra": "a moon"}
    assert expand.always(small) == {"subject", "colour", "medium", "time"}
    assert expand.resolve(small, "a cup", 0, "tags", fixed).positive == "photo, a cup, night, a moon"
    prose = expand.resolve(small, "a cup", 0, "prose", fixed)
    assert prose.positive == "A photo of a cup at night, with a moon. The sky is dark."
    assert prose.negative == "blurry"
    day = expand.resolve(small, "a cup", 0, "prose", {**fixed, "time": "day", "extra": ""})
    assert day.positive == "A photo of a cup at bright noon"


@pytest.mark.parametrize("text", [
    "{light}", "{subject}", "{time}", "{0.__class__}", "a {b} c", "${x}", "{{x}}", "{%for%}", "__../list__", "{a|b}",
])  # fmt: skip
def test_what_a_person_types_is_data(text, small):
    fixed = {"medium": "drawing", "colour": text, "time": "day"}
    assert expand.resolve(small, text, 1, "tags", fixed).positive == f"{text} drawing, {text}, noon"


def test_hidden_characters_go_and_visible_ones_stay(small):
    typed = "a\u202e cup\x00\nof \ufefftea\u2066 \U0001f9d1\u200d\U0001f680 (red:1.2)"
    assert expand.resolve(small, typed, 1).subject == "a cup of tea \U0001f9d1\u200d\U0001f680 (red:1.2)"


def test_triggers_come_last_or_where_the_domain_says(data, small):
    assert expand.resolve(small, "x", 1, "tags", {"extra": ""}, "inky").positive.endswith(", inky")
    data["tags"]["positive"].insert(0, "{trigger}")
    first = schema.parse(data, "t")
    assert expand.resolve(first, "x", 1, "tags", trigger="inky").positive.startswith("inky, ")
    assert "inky" not in expand.resolve(first, "x", 1, "tags").positive


def test_loras_fit_family_and_choices(small):
    assert [lora.file for lora in expand.loras(small, "sdxl", {"medium": "drawing"})] == ["ink.safetensors"]
    assert expand.loras(small, "sdxl", {"medium": "photo"}) == []
    assert expand.loras(small, "flux", {"medium": "drawing"}) == []


def test_sizes_follow_the_family(small):
    assert [small.size(f) for f in ("sd15", "sd2", "sdxl", "flux_schnell", "demo")] == [
        (512, 768), (512, 768), (1024, 1024), (1024, 1024), (128, 128)]  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"overrides": {"lite": "x"}}, "test@1 has no slot 'lite'; its slots are medium, colour, time, extra"),
        ({"subject": "x" * 2001}, "the subject has 2001 characters; at most 2000"),
        ({"subject": " \u200b\n"}, "the subject is empty"),
        ({"overrides": {"time": "x" * 3000}}, "the override of 'time' has 3000 characters"),
        ({"overrides": {"colour": " "}}, "test@1: slot 'colour' is part of other texts and cannot be empty"),
        ({"style": "haiku"}, "style 'haiku' is none of auto, prose, tags"),
        ({"overrides": {f"s{i}": "" for i in range(50)}}, "50 overrides; at most 40"),
    ],
)
def test_errors_name_the_place(kwargs, words, small):
    with pytest.raises(DomainError) as caught:
        expand.resolve(small, **{"subject": "x", "seed": 1, **kwargs})
    assert words in str(caught.value)


def test_overrides_as_they_are_typed():
    assert expand.parse_overrides("# note\n light : window \n\nextra:\n") == {"light": "window", "extra": ""}
    with pytest.raises(DomainError, match="overrides, line 2: 'no colon' is not 'slot: choice'"):
        expand.parse_overrides("a: b\nno colon")
    with pytest.raises(DomainError, match="line 2: slot 'a' is there twice"):
        expand.parse_overrides("a: b\na: c")


def test_a_prompt_never_loses_its_subject(data):
    data["prose"]["positive"][0] = "A {medium} of {subject} with {extra}"
    d, lost = schema.parse(data, "t"), 0
    for seed in SEEDS:
        try:
            assert "a cup" in expand.expand(d, "a cup", seed)
        except DomainError as e:
            assert "test@1, prose: a part with the subject was left out" in str(e)
            lost += 1
    assert lost > 100


def test_a_slot_that_holds_the_subject_keeps_it(data):
    data["slots"]["colour"]["choices"].append("{subject} coloured")
    with pytest.raises(DomainError, match=r"slot 'colour' holds the subject; set it to one of red, blue, \{subject\}"):
        expand.resolve(schema.parse(data, "t"), "x", overrides={"colour": "green"})


def test_all_combinations_by_hand(small):
    """photo: day, night, night+moon; drawing: 2 colours x (day, night, night+moon, night+stars). Two subjects."""
    tags = batch.every(small, [], "tags")
    assert len(tags) == 2 * (3 + 2 * 4)
    assert {expand.expand(small, "a cup", s, "tags") for s in range(600)} == {
        p.positive for p in tags if p.subject == "a cup"
    }
    assert len(batch.every(small, ["x"], "tags", {"medium": "photo", "time": "day"})) == 1
    with pytest.raises(DomainError, match=r"test@1 has more than 5 combinations"):
        batch.every(small, [], "tags", limit=5)


def test_combinations_that_are_alike_still_end(data):
    """Slots that no text names multiply the combinations, not the prompts."""
    data["slots"] |= {f"unused{i}": {"choices": [str(n) for n in "abcdefghij"]} for i in range(8)}
    with pytest.raises(DomainError, match="more than"):
        batch.every(schema.parse(data, "t"), [], "tags")


def test_unique_prompts_for_calibration(small):
    found = [p.positive for p in batch.unique(small, 12, 5)]
    assert len(set(found)) == len(found) == 12
    assert found == [p.positive for p in batch.unique(small, 12, 5)]
    assert found != [p.positive for p in batch.unique(small, 12, 6)]
    assert found[:6] == [p.positive for p in batch.unique(small, 6, 5)]
    assert len(batch.unique(small, 500, 5, "tags")) == 22
    subjects = [p.subject for p in batch.samples(small, [], 10)]
    assert subjects.count("a cup") == subjects.count("a dog") == 5
    with pytest.raises(DomainError, match="0 prompts wanted; from 1 to 4096"):
        batch.unique(small, 0)
