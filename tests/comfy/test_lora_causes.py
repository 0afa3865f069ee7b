"""Files that are odd in one way each, through this pack's nodes, inside ComfyUI's Python (inside/lora_causes.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
from lora_odd import ALONE, TYPES, cases


@pytest.fixture(scope="module", params=["16-bit", "4-bit"])
def found(request, inside, tiny, tiny_4bit):
    return inside("lora_causes", (tiny_4bit if request.param == "4-bit" else tiny)("flux"))


@pytest.mark.parametrize("name", cases(64, 64))
def test_each_cause_has_its_status(name, found):
    right, status, why = found["cases"][name]
    assert right, (status, why)


def test_kinds_that_name_no_layer(found):
    assert found["alone"] == dict.fromkeys(ALONE, True)


def test_a_file_of_a_kind_that_is_not_read(found):
    """The nodes that apply refuse it, and the one that inspects says the same: by its name, not as a missing half."""
    key = "lora_unet_double_blocks_0_img_attn_proj.ia3_l"
    start = "ia3.safetensors: none of its 1 keys fits: it holds IA3, a kind that is not read, the model is FLUX.1"
    assert found["of IA3 only"].startswith(start) and key in found["of IA3 only"]
    lines = found["inspected"].splitlines()
    assert lines[0] == "**ia3.safetensors**: holds IA3, a kind that is not read; no LoRA layer"
    assert lines[2] == f"- of a kind that is not read: {key} (IA3)"


def test_numbers_of_every_type(found):
    assert len(found["types"]) == 2 * len(TYPES) and max(found["types"].values()) < 1e-5, found["types"]


def test_any_subset_of_keys_is_accounted_for_once_and_what_is_reported_is_there(found):
    assert found["wrong subsets"] == [] and found["errors"] == []


def test_what_comfyui_does_not_take_is_said(found):
    """It drops a patch whose weight is not in the model's state dict, without an error."""
    word, weight = "for a weight that ComfyUI does not patch", "diffusion_model.double_blocks.0.img_attn.proj.weight"
    for text in (found["dropped"], found["would drop"]):
        assert f"3 applied to the model, 3 {word}" in text, text
        assert f"- {word}: lora_unet_double_blocks_0_img_attn_proj." in text
        assert f"({weight} is not in the model's state dict)" in text
    assert (
        f"none of its 3 keys fits: it looks like a LoRA for FLUX.1, the model is FLUX.1 (3 {word} ({weight}"
        in (found["all dropped"])
    )


def test_comfyuis_own_loader_refuses_what_does_not_fit_a_4_bit_model(found):
    if "stock" not in found:
        pytest.skip("a 16-bit model is ComfyUI's own")
    for name, said in found["stock"].items():
        what = "holds NaN or infinity for" if name.startswith("alpha") else "does not fit (diffusion_model.double_bl"
        assert said.startswith(f"The LoRA {what}"), (name, said)
    assert found["stock errors"] == []
