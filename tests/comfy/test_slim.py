"""Slim UNet in a real ComfyUI: what is counted is what was promised, and only the clone is slim."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(inside):
    return inside("slim_demo")


def test_flops_fall_as_predicted(found):
    """FlopCounterMode over a whole evaluation of ComfyUI's model, before and after: equal to the operation."""
    for name, (counted, predicted, before) in found["flops"].items():
        assert counted == predicted, name
        assert 0 < predicted < before or name in ("skip", "relu")
    assert found["flops"]["skip"][0] == found["flops"]["skip"][2] and found["flops"]["relu"][0] == 0
    assert found["flops"]["pool"][0] < found["flops"]["pool more"][0]
    counted, predicted, *_ = found["sdxl"]
    assert counted == predicted > 0
    assert {"skip", "low rank", "relu", "pool"} == {name.split(": ")[1] for name in found["sdxl layers"]}
    assert found["sdxl layers"]["middle 0: relu"] == 2


def test_the_error_in_the_report_is_that_of_the_model(found):
    """Measured with switches on the original; the slimmed clone, sampled, is as far off."""
    for name, (real, reported) in {**found["errors"], "sdxl": found["sdxl"][2:]}.items():
        assert real == pytest.approx(reported, rel=1e-3), name
        assert real > 0.005, name
    assert found["errors"]["pool"][0] < found["errors"]["pool more"][0] < found["errors"]["skip"][0]
    assert found["errors"]["low rank"][0] < found["errors"]["separable"][0]


def test_a_model_without_blocks_is_refused(found):
    assert found["flux"] == "Slim UNet changes the blocks of SD 1.5, SD 2 and SDXL, and Flux has none"


def test_strength_0_is_the_model_itself(found):
    assert found["zero"]


def test_clones_are_kept_apart(found):
    """Originals and two slimmed clones in turn, unloaded and loaded again: each answers as before, bit by bit."""
    for key in ("originals", "variants", "originals after", "same names", "still the same"):
        assert found[key], key
    assert found["stand-ins left"] == 0
    once, twice, after, before = found["twice"]
    assert twice > once and after != before


def test_low_vram_and_dynamic_vram(inside):
    """Loaded in part, and by the dynamic patcher, in turn with the original: each answers as when loaded whole."""
    found = inside("slim_dynamic")
    assert found["low VRAM"] == found["dynamic"] == [True] * 6
    assert found["partly loaded"] and found["names"] and found["different"]
    kind, small = found["kept"]
    assert kind == "NibblePatcherDynamic" and small > 0  # weights that are moved at once, and given back in time


def test_loras_before_and_after(found):
    assert found["linear lora"] > 0.01
    assert found["linear hook"] < 1e-5
    *late, without = found["conv lora"]
    assert without == "" and len(late) == 2  # as a patch of the model, and as a hook on the prompt
    assert all("A LoRA after Slim UNet changes factored convolutions (1 weights)" in said for said in late)
    to_merged, to_original = found["merged first"]
    assert to_merged < 0.6 * to_original  # what was factored is the merged weight


def test_patches_that_were_there_stay(found):
    """An attn1 replacer that adds something still adds it under pool and relu, and all are called."""
    for op, (called, error, beside, reported) in found["chained"].items():
        assert called and error == pytest.approx(reported, rel=1e-3), op
        assert beside > 0.005 or op == "skip", op


def test_the_workflow(server):
    graph = json.loads((ROOT / "workflows" / "api" / "slim.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 8
    result = server.done(graph)
    shows = {n["inputs"]["source"][0]: id for id, n in graph.items() if n["class_type"] == "PreviewAny"}
    slim = next(id for id, n in graph.items() if n["class_type"] == "NibbleSlimUNet")
    report = result.text(shows[slim])
    assert "| **all** |" in report and report.count("| pool |") >= 3
    other = next(result.text(id) for source, id in shows.items() if source != slim)
    psnr = float(next(line for line in other.splitlines() if line.startswith("| PSNR")).split("|")[2])
    assert psnr > 15
    picture = next(id for id, n in graph.items() if n["class_type"] == "SaveImage")
    assert server.image(result, picture).std() > 0.05


def graph(loader: dict, **changes) -> dict:
    slim = {"strength": 0.5, "attention": "pool", "attention_levels": 1, "convolutions": "as it is", "conv_levels": 1,
            "blocks": "", "noise_levels": 1} | changes  # fmt: skip
    return {
        "model": loader,
        "demo": {"class_type": "NibbleLoadDemo", "inputs": {"precision": "16-bit", "rank": 16}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": "red apple"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "slim": {"class_type": "NibbleSlimUNet", "inputs": {"model": ["model", 0], "positive": ["text", 0],
                 "latent": ["latent", 0], **slim}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["slim", 1]}},
    }  # fmt: skip


DEMO = {"class_type": "NibbleLoadDemo", "inputs": {"precision": "16-bit", "rank": 16}}


def test_a_saved_model_is_the_whole_one(server):
    """Save Model knows nothing of stand-ins: the file is that of the model before it was slimmed."""
    loader = {"class_type": "NibbleLoadDemo", "inputs": {"precision": "4-bit", "rank": 16}}
    nodes = graph(loader, attention="skip", convolutions="low rank")
    for id, source in (("whole", "model"), ("slim one", "slim")):
        saver = {"class_type": "NibbleSaveModel", "inputs": {"model": [source, 0], "filename_prefix": f"t/{source}"}}
        nodes[id] = saver
    result = server.done(nodes)
    whole, slim = (load_file(server.base / "output" / result.text(id)) for id in ("whole", "slim one"))
    assert list(whole) == list(slim) and all(torch.equal(whole[k], slim[k]) for k in whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": "input 99: skip"}, "this model has no block 'input 99'; it has input 0, input 1"),
        ({"blocks": "input 1"}, "blocks, line 1: 'input 1' is not 'input 1: skip'"),
        ({"blocks": "input 3: slim"}, "input 3: 'slim' is none of as it is, pool, skip, relu, low rank, separable"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(changes, words, server):
    assert words in server.run(graph(DEMO, **changes)).error
