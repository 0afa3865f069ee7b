"""Every layout that a layer can have x every way in which ComfyUI and this pack put a LoRA on it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import layout_files as files

LAYOUTS = [*files.LAYOUTS, *files.MIXED]
WAYS = ("LoraLoader", "LoraLoaderModelOnly", "second", "second added", "Apply LoRA", "LoRA Stack", "hook", "hook over",
        "ModelMergeSimple", "half", "negative", "not loaded")  # fmt: skip
LAYERS = 13


@pytest.fixture(scope="module")
def done(tiny, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora layouts")
    listed = {}
    for layout in LAYOUTS:
        listed[layout] = str(files.write(tiny("flux"), folder / f"{layout}.safetensors", layout))
    (folder / "list.json").write_text(json.dumps(listed))
    loras = folder / "loras"
    loras.mkdir()
    out = inside("lora_matrix", "flux", folder / "list.json", tiny("flux"), loras)
    print(json.dumps(out, indent=1))
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_change_is_that_of_the_float_model(layout, way, done):
    """Its direction: 4-bit activations turn it by a few degrees at most. A LoRA that is lost has cosine 0, one that is
    merged and rounded again has drowned.
    """
    assert done[layout]["cosine"][way] > 0.93


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comfyui_finds_every_layer(layout, done):
    """In its LoRA key map: before a LoRA, and while one is loaded."""
    found = done[layout]
    assert (found["layers"], found["keys before"], found["keys loaded"]) == (LAYERS, LAYERS, LAYERS)
    assert found["class"] == "NibblePatcher"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ways_agree_and_leave_nothing_behind(layout, done):
    found = done[layout]
    assert found["same as loaded"] and found["hook same"] and found["hook clean"] and found["removed"]
    assert found["saved"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_says_what_the_layers_hold(layout, done):
    said, held = done[layout]["report"]
    assert said == held and said["grown"] == LAYERS and said["dense"] == 0
    said, held = done[layout]["report dora"]
    assert said == held and said["grown"] == 0 and said["dense"] == LAYERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comfyui_counts_what_a_lora_adds(layout, done):
    """Loaded whole and in part, to the few bytes of the layers' marks."""
    loaded, size, real = done[layout]["bytes"]
    assert loaded == size and abs(real - size) < 100 * LAYERS
    counted, real = done[layout]["half loaded"]
    assert counted > 0 and abs(real - counted) < 100 * LAYERS


@pytest.fixture(scope="module")
def core_layers(tiny, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("core layers")
    for layout in ("promoted", "fp8", "int8 rotated", "nvfp4", "convrot", "awq", "svdquant"):
        files.write(tiny("flux"), folder / f"{layout}.safetensors", layout)
    out = inside("core_layers", "flux", folder, tiny("flux"))
    print(json.dumps(out, indent=1))
    return out


@pytest.mark.parametrize("layout", ["fp8", "int8 rotated", "nvfp4", "convrot"])
def test_apply_lora_on_a_model_of_comfyuis_own_loader(layout, core_layers):
    """As if this pack had loaded it: a branch, once for all LoRAs, and the loader's own MODEL stays what it was."""
    found = core_layers[f"stock {layout}"]
    assert found["class"] == ["ModelPatcher", "NibblePatcher"] and found["one twin"] == 1
    assert found["as ours"] and found["untouched"] and found["half"] and found["cosine"] > 0.93
    assert "13 quantized layers take it into their low-rank branch" in found["report"]


def test_awq_of_a_newer_comfyui_takes_a_lora(core_layers):
    """ComfyUI cannot quantize to it, and would raise NotImplementedError while it samples."""
    cosine, as_ours = core_layers["awq of ComfyUI"]
    assert cosine > 0.93 and as_ours


def test_what_cannot_be_rebuilt_is_refused_or_said(core_layers):
    assert core_layers["compiled"].startswith("This model is compiled, and a LoRA on it needs other layers")
    kind, line = core_layers["other modules"]
    assert kind == "ModelPatcher" and "13 quantized layers are not this pack's: it is merged into them" in line


def test_arguments_of_a_newer_comfyui(core_layers):
    """A lost one may be an activation or a residual: refused where nobody knows it, passed on where ComfyUI may."""
    assert (
        "more than its input (residual), which this version of Nibble does not know. Update" in core_layers["argument"]
    )
    assert core_layers["passed on"] == {"residual": "r"}


def test_entries_that_are_no_weights_pass_through(core_layers):
    found = core_layers["opaque"]
    assert found["kept"] == ['{"attention": "int8"}', "torch.int64"] and found["calibrated"] == "NibblePatcher"
    assert min(found["LoRA in it"], found["LoRA on 4 bits"]) > 0.93 and found["merge"]
    assert found["rebuilt"] > 0.99


def test_a_layer_of_dynamic_vram_that_runs_on_the_cpu(core_layers):
    found = core_layers["_v"]
    assert len(found) > 5
    for same, apart, without, _ in found:
        assert same and apart == 0 and not without, found


def test_nothing_is_cast_padded_or_moved_twice(core_layers):
    assert core_layers["cast at load"] == 1 and core_layers["cast on forward"] == 0 and core_layers["as before"]
    assert core_layers["factors"] == [1, True]
