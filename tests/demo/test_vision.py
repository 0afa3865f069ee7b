"""The shipped vision tower and IP-Adapters: what they are, what they know, and the losses that made them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.demo import dataset, evaluate, image_prompt, parts, tower
from comfyui_nibble.headless import pipeline
from comfyui_nibble.image_prompt import attach
from comfyui_nibble.image_prompt import read as read_adapter
from comfyui_nibble.metrics.features import paired_cosine
from PIL import Image
from safetensors.torch import load_file

FIGURES = json.loads((demo.ROOT / "training.json").read_text(encoding="utf-8"))
WEIGHTS = demo.VISION / "model.safetensors"
NEW = 8  # pictures that the tests draw


@pytest.fixture(scope="module")
def vision():
    return tower.load()[0]


@pytest.fixture(scope="module")
def pipe():
    return pipeline.load_pipeline(demo.MODEL, "cpu")


@pytest.fixture(scope="module")
def flat(vision):
    """(captions, pictures (48, 3, 128, 128) in [0, 1], their embeddings) of the shipped flat-style emoji."""
    lines = (demo.PICTURES / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    opened = [np.asarray(Image.open(demo.PICTURES / r["file_name"]).convert("RGB"), np.float32) / 255 for r in rows]
    pictures = torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2)
    return [r["text"] for r in rows], pictures, tower.embeddings(vision, pictures)


@pytest.fixture(scope="module")
def called(pipe, flat):
    """Projected text features of the captions."""
    return tower.pooled(pipe.text_encoder, pipe.tokenizer, flat[0], "cpu") @ tower.load()[1].t()


def test_the_files_are_small_and_of_the_published_layouts():
    assert WEIGHTS.stat().st_size <= 6e6
    config = json.loads((demo.VISION / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "clip_vision_model"
    assert {k: config[k] for k in parts.VISION} == parts.VISION
    assert load_file(WEIGHTS)[demo.TEXT_PROJECTION].shape == (parts.TEXT["hidden_size"],) * 2
    assert sum(p.stat().st_size for p in demo.IP_ADAPTERS.values()) <= 1.5e6
    read = {which: read_adapter(load_file(path)) for which, path in demo.IP_ADAPTERS.items()}
    assert {which: a.layers[0].to_k_ip.adds_to_base for which, a in read.items()} == {"plain": False, "lora": True}
    assert all(a.image_proj.tokens == image_prompt.TOKENS for a in read.values())


def test_captions_and_pictures_find_each_other(flat, called):
    """Among the 48, by cosine, in both directions; and a stranger's caption is farther away than the picture's own."""
    captions, _, seen = flat
    rows = list(range(len(captions)))
    assert tower.first(seen, called, rows) >= 0.9 and tower.first(called, seen, rows) >= 0.9
    own, strange = paired_cosine(seen, called).mean(), paired_cosine(seen, called.roll(1, 0)).mean()
    print("CLIP-T own", float(own), "strange", float(strange))
    assert own > strange + 0.2


def test_a_picture_is_known_under_augmentation(vision, flat):
    _, pictures, seen = flat
    again = tower.augmented(tower.resized(pictures, tower.STORED), torch.Generator().manual_seed(3))
    assert tower.first(tower.embeddings(vision, again), seen, list(range(len(seen)))) >= 0.9


@pytest.fixture(scope="module")
def drawn(pipe, vision, flat):
    """{(adapter or None, with text?): embeddings of 8 pictures in 25 steps}; weight 0.5 with text and 1 without."""
    captions, shown = flat[0][:NEW], flat[2][:NEW]
    pictures = {(None, True): evaluate.draw(pipe, captions, evaluate.STEPS, evaluate.GUIDANCE)}
    for which, path in demo.IP_ADAPTERS.items():
        adapter = read_adapter({k: v.float() for k, v in load_file(path).items()})
        attach(pipe.unet, adapter)
        pictures[which, True] = image_prompt.draw(pipe, adapter, captions, shown, 0.5)
        pictures[which, False] = image_prompt.draw(pipe, adapter, [""] * NEW, shown, 1.0)
    return {k: tower.embeddings(vision, torch.from_numpy(p).permute(0, 3, 1, 2).float()) for k, p in pictures.items()}


@pytest.mark.parametrize("which", list(demo.IP_ADAPTERS))
def test_a_picture_prompt_brings_the_picture_nearer(which, drawn, flat, called):
    """With text, CLIP-I rises and CLIP-T stays within a tenth of what the text alone gives."""
    shown = flat[2][:NEW]
    before, after = (float(paired_cosine(drawn[k, True], shown).mean()) for k in (None, which))
    text = [float(paired_cosine(drawn[k, True], called[:NEW]).mean()) for k in (None, which)]
    print(which, "CLIP-I", before, after, "CLIP-T", text)
    assert after > before
    assert abs(text[1] / text[0] - 1) <= 0.1


@pytest.mark.parametrize("which", list(demo.IP_ADAPTERS))
def test_a_picture_is_enough(which, drawn, flat):
    """Without a text, what is drawn is near its own picture prompt and far from the others'."""
    seen, shown = drawn[which, False], flat[2][:NEW]
    own, strange = float(paired_cosine(seen, shown).mean()), float(paired_cosine(seen, shown.roll(1, 0)).mean())
    print(which, "own", own, "strange", strange)
    assert own > strange + 0.2


def test_the_loss_is_its_formula():
    """Against the three sums written out, and lower for features that match."""
    torch.manual_seed(0)
    views, vendors, n, emoji, d = 2, 2, 3, 5, 4
    unit = torch.nn.functional.normalize
    texts, pick, scale = unit(torch.randn(emoji, d), dim=-1), torch.tensor([4, 0, 2]), torch.tensor(7.0)
    seen = unit(torch.randn(views, vendors, n, d), dim=-1)
    rows = [(v, k, i) for v in range(views) for k in range(vendors) for i in range(n)]

    def share(x, right, all_):
        return -(scale * x @ right - torch.stack([scale * x @ y for y in all_]).logsumexp(0))

    to_text = sum(share(seen[r], texts[pick[r[2]]], texts) for r in rows) / len(rows)
    every = [seen[r] for r in rows]
    to_picture = sum(share(texts[pick[i]], seen[r], every) for i in range(n) for r in rows if r[2] == i) / len(rows)
    pairs = [(k, i) for k in range(vendors) for i in range(n)]
    same = sum(share(seen[0][p], seen[1][p], [seen[1][q] for q in pairs]) for p in pairs)
    same = (same + sum(share(seen[1][p], seen[0][p], [seen[0][q] for q in pairs]) for p in pairs)) / (2 * len(pairs))
    expected = (to_text + to_picture) / 2 + tower.SAME_PICTURE * same
    assert torch.allclose(tower.contrast(seen, texts, pick, scale), expected, rtol=1e-5)
    matching = texts[pick].expand(views, vendors, n, d)
    assert tower.contrast(matching, texts, pick, scale) < tower.contrast(seen, texts, pick, scale)


def test_views_are_a_function_of_the_generator(flat):
    pictures = tower.resized(flat[1][:4], tower.STORED)
    one, two, other = (tower.augmented(pictures, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    side = parts.VISION["image_size"]
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (4, 3, side, side) and one.min() >= 0 and one.max() <= 1


def test_what_is_left_out_of_training_prompts():
    """The picture alone, the text alone, neither."""
    text, picture = image_prompt.dropped(40_000, torch.Generator().manual_seed(0))
    shares = [float(x.float().mean()) for x in (text & ~picture, picture & ~text, text & picture)]
    wanted = [image_prompt.NO_TEXT, image_prompt.NO_PICTURE, image_prompt.NEITHER]
    assert shares == pytest.approx(wanted, abs=0.01)


def test_a_tower_learns_a_handful(pipe, monkeypatch):
    """From nothing to the right caption of 8 colours, with the shipped losses and the pack's own trainer."""
    monkeypatch.setattr(tower, "TOWER", dataclasses.replace(tower.TOWER, steps=24, batch=32, warmup=4, ema=0.8))
    g = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 3, 1, 1, generator=g) * 2 - 1
    pictures = torch.stack([colours.expand(-1, -1, 128, 128), colours.flip(2).expand(-1, -1, 128, 128).clone()])
    pictures[1, :, :, 32:96, 32:96] = 1.0
    emoji = [dataset.Emoji("", (name,), (), "thing") for name in evaluate.NAMED[:8]]
    texts = tower.Texts(emoji, pipe.text_encoder, pipe.tokenizer, "cpu")
    model, projection, _ = tower.learn(texts, pictures, None, "cpu")
    names = tower.pooled(pipe.text_encoder, pipe.tokenizer, [e.captions[0] for e in emoji], "cpu") @ projection.t()
    found = tower.first(tower.embeddings(model, (pictures[0] + 1) / 2), names, list(range(8)))
    print(found)
    assert found >= 0.75


def test_training_an_adapter_leaves_the_model_alone(pipe, monkeypatch):
    """Three steps of the LoRA variant: its own tensors move, nothing of the denoiser does."""
    plan = dataclasses.replace(image_prompt.PLANS["lora"], steps=3, batch=4, warmup=1)
    monkeypatch.setitem(image_prompt.PLANS, "lora", plan)
    g = torch.Generator().manual_seed(0)
    emoji = [dataset.Emoji("", (name,), (), "thing") for name in evaluate.NAMED]
    latents, seen = torch.randn(20, 4, 16, 16, generator=g), torch.randn(20, 4, 128, generator=g)
    batches = image_prompt.Batches(emoji, pipe.tokenizer, latents, seen)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    adapter, _ = image_prompt.learn("lora", pipe.unet, pipe.text_encoder, batches, None, "cpu")
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    moved = [n for n, p in adapter.named_parameters() if n.endswith("up.weight") and bool(p.any())]
    assert len(moved) == 4 * len(adapter.layers)
    x, ids, given = batches(6, torch.Generator().manual_seed(1))
    assert x.shape == (6, 4, 16, 16) and ids.shape == (6, 77) and given.shape == (6, 128)
    assert all(
        torch.equal(a, b) for a, b in zip((x, ids, given), batches(6, torch.Generator().manual_seed(1)), strict=True)
    )


def test_the_recorded_figures_hold_and_stand_on_the_page():
    page = (demo.ROOT / "README.md").read_text(encoding="utf-8")
    found = FIGURES["tower"]
    assert found["top1_caption_to_picture"] >= 0.6 and found["top1_augmented_picture_to_caption"] >= 0.6
    for name in ("caption_to_picture", "held_out_caption_to_picture", "picture_to_caption",
                 "augmented_picture_to_caption", "augmented_picture_to_picture"):  # fmt: skip
        assert f"{found[f'top1_{name}']:.1%}" in page, name
    for which, path in demo.IP_ADAPTERS.items():
        plan = image_prompt.PLANS[which]
        assert FIGURES[plan.name]["steps"] == plan.steps and FIGURES[plan.name]["bytes"] == path.stat().st_size
