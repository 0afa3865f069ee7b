"""Subgraph blueprints: the stored files are what the code draws, ComfyUI lists them, and their insides run."""

import json
import sys
from pathlib import Path

import pytest
from comfyui_nibble.demo import recognise

sys.path.insert(0, str(Path(__file__).parent))
import gallery
from blueprints import BLUEPRINTS, draw, to_api

FOLDER = gallery.ROOT / "subgraphs"
DEMO = {"class_type": "NibbleLoadDemo", "inputs": {"precision": "16-bit", "rank": 16}}
GIVEN = {"model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2], "prompt": "red apple", "negative prompt": "",
         "width": 128, "height": 128, "pictures": 1}  # fmt: skip


def stored(title: str) -> dict:
    return json.loads((FOLDER / f"{title}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.mark.parametrize("title", BLUEPRINTS)
def test_the_file_is_what_the_code_draws(title, info):
    assert stored(title) == json.loads(json.dumps(draw(BLUEPRINTS[title], info, gallery.versions())))
    (inside,) = stored(title)["definitions"]["subgraphs"]
    ends = {row["id"] for row in inside["nodes"]} | {-10, -20}
    assert all({link["origin_id"], link["target_id"]} <= ends for link in inside["links"])
    for row in (*inside["inputs"], *inside["outputs"]):
        assert row["linkIds"], row["name"]


def test_comfyui_lists_them(server):
    listed = {row["name"] for row in server.get("/global_subgraphs").values() if "Nibble" in row["info"]["node_pack"]}
    assert listed == set(BLUEPRINTS) == {p.stem for p in FOLDER.glob("*.json")}


def test_text_to_image_draws_the_caption(server, info):
    inside = to_api(stored("4-bit text to image"), GIVEN | {"preset": "lcm_lora_sd15", "steps": 4, "seed": 7}, info)
    inside |= {"demo": DEMO, "lora": {"class_type": "LoraLoaderModelOnly", "inputs": {
        "model": ["demo", 0], "lora_name": "nibble_demo_lcm.safetensors", "strength_model": 1.0}}}  # fmt: skip
    decode = next(k for k, n in inside.items() if n["class_type"] == "VAEDecode")
    sampler = next(n for n in inside.values() if n["class_type"] == "NibbleFewStepSampler")
    sampler["inputs"]["model"] = ["lora", 0]
    inside["save"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "t/blueprint"}}
    assert recognise.load().recognised(server.image(server.done(inside), "save"), "red apple")


def test_calibrate_and_compare_gives_both_pictures(server, info):
    more = {"calibration prompts": "red apple\nfox face", "calibration": "fast", "rank": 16, "steps": 8, "cfg": 3.0,
            "seed": 7}  # fmt: skip
    inside = to_api(stored("Calibrate and compare"), GIVEN | more, info) | {"demo": DEMO}
    compare = next(k for k, n in inside.items() if n["class_type"] == "NibbleCompareImages")
    inside["save"] = {"class_type": "SaveImage", "inputs": {"images": [compare, 4], "filename_prefix": "t/blueprint"}}
    inside["text"] = {"class_type": "PreviewAny", "inputs": {"source": [compare, 0]}}
    result = server.done(inside)
    assert server.image(result, "save").shape[1] > 256 and "PSNR" in result.text("text")
