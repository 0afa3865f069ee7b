"""The domains that come with the pack: complete, within their encoders' windows, with LoRAs and presets there are."""

import pytest
from comfyui_nibble import demo
from comfyui_nibble.families.spec import MAX_TOKENS
from comfyui_nibble.prompts import batch, check, domain, expand
from comfyui_nibble.prompts.spec import STYLES, TAGS

WANTED = {"anime", "architecture-exterior", "childrens-book", "emoji", "fashion-lookbook", "food", "game-asset",
          "interior-design", "landscape", "logo-icon", "marketing-poster", "packshot", "portrait",
          "product-photo"}  # fmt: skip
SHIPPED = domain.shipped()


def test_all_are_there():
    assert {i.partition("@")[0] for i in SHIPPED} == WANTED


@pytest.mark.parametrize("id", SHIPPED)
def test_complete_and_named_by_its_file(id):
    d = domain.load(id)
    assert d.id == id
    assert d.description.endswith(".") and len(d.calibration) >= 20
    assert len(set(d.calibration)) == len(d.calibration)
    assert {"sd15", "sdxl"} <= set(d.resolution)
    assert all(d.texts[style]["positive"] for style in STYLES)
    assert d.example in expand.expand(d, d.example)
    assert not d.based_on


@pytest.mark.parametrize("id", SHIPPED)
def test_nothing_is_wrong_with_it(id):
    """1,000 samples of each style within the window by the count that is never too low, and every slot in use."""
    found = check.check(domain.load(id), 1000)
    assert found.problems == ()
    assert found.longest[TAGS] <= MAX_TOKENS[TAGS]
    assert min(found.unique.values()) > 100


@pytest.mark.parametrize("id", SHIPPED)
def test_every_choice_comes_up(id):
    """Weights, chances and conditions leave nothing that can never be drawn."""
    d = domain.load(id)
    drawn = {(s, c) for p in batch.samples(d, [], 6000) for s, c in p.chosen.items() if c}
    assert {(s.name, c.name) for s in d.slots.values() for c in s.choices} - drawn == set()


@pytest.mark.parametrize("id", SHIPPED)
def test_sentences_read_well(id):
    """No double spaces or stops, no space before a stop; prose ends in one; no 'a apple' before a fixed word."""
    for p in batch.samples(domain.load(id), [], 500, 7):
        text = expand.resolve(domain.load(id), p.subject, p.seed, "prose").positive
        for wrong in ("  ", " ,", " .", "..", ",,", ",.", "{", "}", " a an ", " a a "):
            assert wrong not in text, text
        assert text[0].isupper()


@pytest.mark.parametrize("id", SHIPPED)
def test_presets_are_in_the_table(id):
    presets = pytest.importorskip("comfyui_nibble.sampling.presets", reason="needs sampling/").PRESETS
    alike = {"demo": "sd15"}
    for family, preset in domain.load(id).presets.items():
        assert presets[preset].family == alike.get(family, family)


@pytest.mark.parametrize("id", SHIPPED)
def test_loras_say_where_they_are(id):
    for lora in domain.load(id).loras:
        assert lora.link == "shipped" or lora.link.startswith("https://huggingface.co/")
        if lora.link == "shipped":
            assert lora.file in {path.name for path in demo.LORAS.values()}


def test_emoji_stays_close_to_what_the_demo_model_learned():
    """Its tag texts are phrases of the training captions; with the style LoRA's trigger as there, at the end."""
    dataset = pytest.importorskip("comfyui_nibble.demo.dataset")
    d = domain.load("emoji")
    learned = {p.format(c="fox", s="animal") for p in dataset.PHRASES}
    assert {p.positive for p in batch.every(d, ["fox"], "tags")} <= learned
    lora = next(lo for lo in d.loras if lo.family == "demo")
    assert lora.trigger == dataset.STYLE_TRIGGER
    with_trigger = expand.resolve(d, "fox", 3, "tags", trigger=lora.trigger).positive
    assert with_trigger == f"{expand.expand(d, 'fox', 3, 'tags')}, {dataset.STYLE_TRIGGER}"
    assert d.size("demo") == (dataset.SIZE, dataset.SIZE)
