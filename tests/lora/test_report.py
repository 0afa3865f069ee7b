"""The report accounts for every key once, guesses what a file is for, and reads well."""

import json

import lora_files
import pytest
import torch
from comfyui_nibble.lora.keys import kind_of, split
from comfyui_nibble.lora.read import group, read
from comfyui_nibble.lora.report import KeyReport, describe


def shapes(file: dict) -> dict:
    return {k: tuple(t.shape) for k, t in file.items()}


def file_of(paths: dict, spelling: str = "kohya") -> dict:
    return lora_files.spell(lora_files.factors(paths), spelling, alpha=4.0)


CASES = {
    "looks like a LoRA for SD1.5-class UNet": {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (64, 768)},
    "looks like a LoRA for SD2-class UNet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (64, 1024)},
    "looks like a LoRA for SDXL UNet": {"input_blocks.4.1.transformer_blocks.0.attn2.to_k": (64, 2048)},
    "looks like a LoRA for a UNet (SD1.x, SD2.x or SDXL)": {"up_blocks.1.resnets.0.conv1": (64, 64)},
    "looks like a LoRA for FLUX.1": {"double_blocks.0.img_attn.qkv": (192, 64)},
    "looks like a LoRA for Stable Diffusion 3": {"joint_blocks.0.x_block.attn.qkv": (192, 64)},
    "looks like a LoRA for Stable Diffusion 3 or FLUX.1": {"transformer_blocks.0.attn.add_q_proj": (64, 64)},
    "looks like a LoRA for Qwen-Image": {
        f"transformer_blocks.0.{n}": (64, 64) for n in ("attn.add_q_proj", "img_mlp.x")
    },
    "its names tell no model family": {"some.layer": (64, 64)},
}


@pytest.mark.parametrize("family", CASES)
def test_says_what_a_file_is_for(family):
    assert describe(shapes(file_of(CASES[family])))[0] == family


def test_a_text_encoder_file_says_so():
    file = {k.replace("lora_unet_", "lora_te_"): v for k, v in file_of({"text_model.x": (8, 8)}).items()}
    assert describe(shapes(file))[0] == "changes a text encoder only"


@pytest.mark.parametrize("kind", lora_files.KINDS)
def test_kinds(kind):
    file = {f"a{end}": t for end, t in lora_files.kind(kind, 64, 64).items()}
    expected = {"dora": "lora", "dora columns": "lora", "lokr low": "lokr"}.get(kind, kind)
    assert describe(shapes(file))[1] == {expected: 1}


def test_every_suffix_belongs_to_one_role():
    for key, (target, role) in {
        "x.lora_A.default.weight": ("x", "down"),
        "x.lora_B.style_2.weight": ("x", "up"),
        "x.lora_magnitude_vector.default.weight": ("x", "magnitude"),
        "x.lora_B.bias": ("x", "up_b"),
        "x_lora.up.weight": ("x", "up"),
    }.items():
        assert split(key) == (target, role)
    assert split("model.weight") is None and split(".alpha") is None
    assert kind_of({"down", "up", "alpha"}) == "lora" and kind_of({"down", "alpha"}) == ""


def test_a_second_spelling_of_a_half_is_not_lost():
    grouped, rest = group(["a.alpha", "a.lora_down.weight", "a.lora_up.weight", "a.lora_A.weight", "junk"])
    whole = {"alpha": "a.alpha", "down": "a.lora_down.weight", "up": "a.lora_up.weight"}
    assert grouped == [("a", whole), ("a", {"alpha": "a.alpha", "down": "a.lora_A.weight"})] and rest == ("junk",)


def test_text_and_json_count_every_key():
    status = {"a": "model", "b": "model", "c": "unknown", "d": "shape", "e": "broken", "f": "other part"}
    status |= {f"u{i}": "unknown" for i in range(9)}
    report = KeyReport("x.safetensors", "looks like a LoRA for FLUX.1", {"lora": 3}, (4, 8), status, ("a note",))
    lines = report.text().splitlines()
    assert lines[0] == "**x.safetensors**: looks like a LoRA for FLUX.1; 3 lora, rank 4 to 8"
    assert lines[1] == (
        "15 keys: 2 applied to the model, 1 for a part that is not connected, 10 unknown to this model, "
        "1 of another shape than the layer, 1 with NaN or infinity"
    )
    assert "- unknown to this model: c, u0, u1, u2, u3, u4 and 4 more" in lines
    assert lines[-1] == "- a note"
    assert json.loads(report.to_json())["keys"] == status
    assert sum(report.count(s) for s in set(status.values())) == len(status)


def test_nan_is_an_error_that_names_the_key():
    file = file_of({"a": (8, 8)})
    file["lora_unet_a.lora_up.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"lora_unet_a\.lora_up\.weight holds NaN or infinity"):
        read(file)
