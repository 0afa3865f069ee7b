"""The gallery's UI workflows are their API twins, drawn; those on the demo model run, others are valid on a server."""

import sys
from pathlib import Path

import pytest
from PIL import Image

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
