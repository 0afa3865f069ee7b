"""A domain with slots fixed: the same prompts as with those slots overridden, and a file that can be shared."""

import itertools

import pytest
from comfyui_nibble.prompts import bake, domain, expand, graph, reader, record, schema
from comfyui_nibble.prompts.reader import DomainError
from comfyui_nibble.prompts.spec import STYLES


def rebuilt(d, fixed, where="t"):
    """Through YAML and back."""
    return schema.parse(reader.parse(bake.to_yaml(bake.bake(d, fixed)), where), where)


@pytest.mark.parametrize("id", domain.shipped())
def test_nothing_fixed_is_the_same_domain(id):
    d = domain.load(id)
    again = rebuilt(d, {})
    for seed, style in itertools.product(range(50), STYLES):
        assert expand.resolve(again, "x", seed, style).positive == expand.resolve(d, "x", seed, style).positive
    assert (again.loras, again.presets, again.resolution) == (d.loras, d.presets, d.resolution)


@pytest.mark.parametrize("id", domain.shipped())
def test_one_slot_fixed_is_that_slot_overridden(id):
    d = domain.load(id)
    for name, slot in d.slots.items():
        own = [] if name in expand.holders(d) else ["of {my} own"]
        empty = [] if name in expand.always(d) else [""]
        for value in (slot.choices[0].name, slot.choices[-1].name, *own, *empty):
            given = expand.overrides_of(d, {name: value})
            again = rebuilt(d, given)
            assert name not in again.slots
            for seed, style in itertools.product(range(12), STYLES):
                old = expand.resolve(d, "x", seed, style, {name: value})
                new = expand.resolve(again, "x", seed, style)
                assert (new.positive, new.negative) == (old.positive, old.negative)


@pytest.mark.parametrize("id", domain.shipped())
def test_all_slots_fixed_is_one_prompt(id):
    d = domain.load(id)
    for seed in range(10):
        drawn = expand.choose(d, seed, {})
        again = rebuilt(d, drawn)
        assert not again.slots
        for style in STYLES:
            assert expand.expand(again, "a {b}", 99, style) == expand.expand(d, "a {b}", seed, style)
        chosen = expand.resolve(d, "x", seed).chosen
        for family in ("sdxl", "flux", "demo"):
            assert [lo.file for lo in expand.loras(again, family, {})] == [
                lo.file for lo in expand.loras(d, family, chosen)
            ]


def test_what_a_graph_says():
    found = {
        "1": {"class_type": "LoraLoader", "inputs": {"lora_name": "styles/ink.safetensors", "strength_model": 0.5,
                                                     "strength_clip": 1.0, "model": ["0", 0]}},
        "2": {"class_type": "NibbleLoraStack", "inputs": {"loras.lora0.lora_name": "a\\b.safetensors",
              "loras.lora0.strength": 0.25, "loras.lora1.lora_name": "c.safetensors", "loras.lora1.strength": 0.0}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": ["7", 0], "height": 512}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 832, "height": 1217}},
        "5": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lora-mix.safetensors"}},
        "6": "broken",
    }  # fmt: skip
    assert graph.loras(found) == [("ink.safetensors", 0.5), ("b.safetensors", 0.25)]
    assert graph.size(found) == (832, 1216)
    assert graph.size({}) is None


def test_a_record_is_read_back(small, tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    prompt = expand.resolve(small, "a {b} cup", 5, "tags", {"time": "night"})
    text = record.to_text(record.of(prompt, size=[512, 512]))
    assert record.parse(text)["subject"] == "a {b} cup"
    info = PngInfo()
    info.add_text(record.KEY, f'{{"7": {text}}}')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    found = record.read(tmp_path / "a.png")["7"]
    again = expand.resolve(small, found["subject"], found["seed"], found["style"], found["overrides"])
    assert again.positive == found["positive"] and again.hash == found["hash"]
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(DomainError, match=r"b\.png: no domain prompt is recorded in it"):
        record.read(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"x")
    with pytest.raises(DomainError, match=r"c\.png: it cannot be read as a picture"):
        record.read(tmp_path / "c.png")


@pytest.mark.parametrize("text", ["", "[]", "7", '{"domain": 1}', '{"domain": "a"', '{"domain":"a","subject":"b"}'])
def test_other_texts_are_no_records(text):
    with pytest.raises(DomainError, match="this is no record of a domain prompt; connect the 'chosen' output"):
        record.parse(text)
