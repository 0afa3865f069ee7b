"""The gallery's UI workflows are their API twins, drawn; those on the demo model run, others are valid on a server."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import gallery
from workflow_tools import to_api

FILES = sorted(p.stem for p in gallery.API.glob("*.json"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def test_every_api_workflow_is_in_the_gallery():
    assert set(gallery.NOTES) == set(FILES)
    assert {p.stem for p in gallery.GALLERY.glob("*.json")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_drawn_workflow_is_its_twin(name, object_info):
    import json

    ui = json.loads((gallery.GALLERY / f"{name}.json").read_text(encoding="utf-8"))
    assert ui["version"] == 0.4 and any(n["type"] == "MarkdownNote" for n in ui["nodes"])
    back, graph = to_api(ui, object_info), gallery.api(name)
    ids = {key: str(i + 1) for i, key in enumerate(graph)}
    for key, node in graph.items():
        found = back[ids[key]]
        assert found["class_type"] == node["class_type"]
        for input_id, value in node["inputs"].items():
            expected = [ids[value[0]], value[1]] if isinstance(value, list) else value
            if not isinstance(value, dict):
                assert found["inputs"][input_id] == expected, (key, input_id)
    for node in ui["nodes"]:
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] and node["properties"]["ver"]
            assert len(node["widgets_values_named"]) <= len(node["widgets_values"])


@pytest.mark.parametrize("name", [n for n, (_, picture) in gallery.NOTES.items() if picture])
def test_a_thumbnail_shows_the_result(name):
    image = Image.open(gallery.GALLERY / f"{name}.jpg")
    assert max(image.size) <= gallery.THUMBNAIL and min(image.size) >= 64


def test_the_calibration_workflow_runs_as_it_is(server):
    """Before and after, the report, the chart, and a file that loads again."""
    graph = gallery.api("calibrate")
    graph["4"]["inputs"]["noise_levels"] = 3
    graph["2"]["inputs"]["count"] = 3
    result = server.done(graph)
    assert "are calibrated" in result.text("15") and "PSNR" in result.text("14")
    assert server.image(result, "13").shape[1] > 256
    assert (server.base / "output" / result.text("17")).stat().st_size < 22e6


@pytest.mark.parametrize("name", ["image-to-image", "inpaint"])
def test_pictures_are_drawn_over(name, server):
    """The second picture keeps what it should of the first, and shows what was asked for."""
    graph = gallery.api(name)
    result = server.done(graph)
    last = gallery.NOTES[name][1]
    before, after = server.image(result, "7"), server.image(result, last)
    assert np.abs(before - after).mean() > 0.02
    if name == "inpaint":
        y, height = graph["11"]["inputs"]["y"], graph["10"]["inputs"]["height"]
        assert np.array_equal(before[:y], after[:y])
        assert np.array_equal(before[y + height :], after[y + height :])
    else:
        red, green = (p[32:112, 24:104].mean((0, 1)) for p in (before, after))
        assert red[0] - red[1] > 0.2 and green[1] > green[0]


PATHS = {
    "ckpt_name": "checkpoints/",
    "adapter_name": "controlnet/",
    "file": "",
}  # inputs that name a file without a row of models -> where it lies


def needed(graph: dict) -> set[str]:
    """The model files that a workflow names, as folder/name; their links must be there."""
    out = set()
    for node in graph.values():
        rows = node["_meta"].get("models", [])
        for row in rows:
            assert row["url"].startswith("https://huggingface.co/")
            out.add(f"{row['directory']}/{row['name']}")
        out |= {PATHS[key] + value for key, value in node["inputs"].items() if key in PATHS}
    return out


@pytest.mark.parametrize(
    "name", ["controlnet-sketch", "controlnet-depth", "checkpoint-4bit", "convert", "load-nunchaku", "uni-controlnet"]
)
def test_workflows_with_models_to_get_are_valid(name, server):
    """ComfyUI takes the graph once files of these names are there."""
    graph, made = gallery.api(name), []
    for file in needed(graph):
        path = server.models(file.split("/")[0]) / file.split("/")[1]
        if not path.exists():
            save_file({"nothing": torch.zeros(1)}, path)
            made.append(path)
    picture = server.base / "input" / "example.png"
    picture.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(picture)
    try:
        server.wait(server.queue(graph))  # the stand-ins hold no model, so how it ends does not matter here
    finally:
        for path in [*made, picture]:
            path.unlink()


def test_every_node_stands_in_a_workflow(object_info):
    used = {n["class_type"] for name in FILES for n in gallery.api(name).values()}
    assert {id for id, info in object_info.items() if info["python_module"].endswith("ComfyUI-Nibble")} <= used
