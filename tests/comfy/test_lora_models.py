"""LoRAs on 4-bit layers and models inside ComfyUI's Python: exactness, switching, partial loading, saving, merging."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
import lora_files
from lora_graphs import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models(family, inside, tiny, tiny_4bit, tmp_path):
    """Switching, strengths, partial loading, saving and merging, each on every 4-bit layer of the model."""
    r = inside("lora_models", family, tiny(family), tiny_4bit(family), tmp_path)
    print(json.dumps(r))
    assert r["class"] == r["clone class"] == "NibblePatcher" and r["still 4-bit"]
    assert all(rank % 16 == 0 for rank in r["ranks"])
    assert r["same codes"] and r["same codes at the end"]
    assert r["a/b/a"] == [True, True] and r["removed"] and r["strength 0"] and r["order"]
    assert r["low-VRAM layers"] == r["layers"] and r["low-VRAM equal"] and r["then loaded"] and r["then unloaded"]
    assert r["saved"] == [True, True]
    assert r["merge error"] < 2e-3 and r["merge removed"]  # rounding to 16 bits
    assert r["merge low-VRAM"] < 1e-3 and r["merge saved"] < 1e-3


@pytest.mark.parametrize("family", ["sd15", "flux", "sd3"])
def test_layers(family, inside, tiny, tiny_4bit):
    """One layer at a time in float32: what is added is the LoRA to 1e-5, and no kind makes the layer worse."""
    r = inside("lora_layers", family, tiny(family), tiny_4bit(family))
    print(json.dumps(r))
    for exact in ("delta", "dequantized", "plus and minus", "rows inside", "columns", "swapped halves"):
        assert r[exact] < 1e-5, (exact, r[exact])
    assert r.get("tile-packed", [True]) == [True] and r["half a LoKr fits"] == [False]
    assert r["rows outside"] == 0 and r["codes shared"] == [True] and r["strength 0"] == [True]
    for kind in lora_files.KINDS:
        assert r[f"{kind}: changes"] == [True]
        assert r[f"{kind}: error beyond the unpatched"] < 1e-3
        assert r[f"{kind}: error beyond, 16-bit sides"] < 1e-3
        assert r[f"{kind}: against exact"] < 1e-6
    low_rank = {k for k in lora_files.KINDS if r[f"{k}: stays 4-bit"] == [True]}
    assert low_rank == {"lora", "loha", "lokr low"}


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_hooks(family, inside, tiny_4bit):
    """Three hooks of two kinds in turn, fresh and cached, over a plain model and over a LoRA."""
    r = inside("lora_hooks", family, tiny_4bit(family))
    for mode in ("MinVram", "MaxSpeed"):
        assert r[f"{mode}: groups"] == [True] * 7
        assert r[f"{mode}: none"] and r[f"{mode}: cleaned"] == [True, 0]
    assert r["MaxSpeed: cached"] == 3 and r["MinVram: cached"] == 0
    assert r["strength"] and r["over a LoRA"] < 1e-5 and r["under it"] and r["same codes"] == [True, True]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_dynamic_vram_as_far_as_a_cpu_goes(family, inside, tiny_4bit):
    """The dynamic patcher's own load and clone on a CPU: bit for bit the static one's pictures."""
    r = inside("lora_dynamic", family, tiny_4bit(family))
    assert r["claimed"] == r["clone"] == "NibblePatcherDynamic"
    assert r["no LoRA"] and r["a"] and r["b"] and r["a again"] and r["removed"] and r["nothing beside"]
    assert r["beside"] == r["dora functions"] > 0 and r["lowvram left"] == 0 and r["dora"][0]
    assert r["counted bytes"][0] and r["after freeing"] and r["saved"] == [16, 32]
    assert r["forced"] == [[True, True, 16], [True, True, 32]]
    assert r["delegate"] == ["NibblePatcher", True] and r["through the buffer"]


def test_merging_and_quantizing_again_adds_more_than_the_lora(inside, tiny):
    """docs/lora.md: a LoRA merged into 4-bit weights drowns in noise of its own size; ours adds next to none."""
    r = inside("lora_merge_table", tiny("flux"), tiny("sdxl"))
    print(json.dumps(r, indent=1))
    assert r["layers"] >= 16
    for name in ("nvfp4", "convrot_w4a4", "asym_w4a8_int8", "svdquant_w4a4, merged"):
        unpatched, patched, noise = r["rows"][name]
        assert noise > 1 and patched > 1.2 * unpatched, name
    for name in ("svdquant_w4a4, low rank", "awq_w4a16, low rank"):
        unpatched, patched, noise = r["rows"][name]
        assert noise < 5e-3 and patched < 1.01 * unpatched, name


@pytest.mark.parametrize("family", ["sd15", "flux", "sd3"])
def test_names(family, inside, tiny_4bit, tmp_path):
    """Every spelling gives the same weights; several of them ComfyUI's own loader does not take whole."""
    r = inside("lora_names", family, tiny_4bit(family), tmp_path)
    print(json.dumps(r))
    for spelling, report in r["reports"].items():
        total = int(report.split()[0])
        assert report == f"{total} keys: {total} applied to the model", spelling
        assert r["error"][spelling] < 1e-6, spelling
    assert r["stock takes"]["native, comfyui"] == r["layers"]
    assert r["stock takes"]["native, peft"] == 0
    if family == "sd15":
        report, equal, blocks = r["fused"]
        assert report == f"{3 * blocks} keys: {3 * blocks} applied to the model" and equal
