"""Every workflow of the gallery in the real front end: it opens whole, queues what its API twin says, and draws."""

import json

import gallery
import pytest
from comfyui_nibble.demo import recognise

FILES = sorted(p.stem for p in gallery.API.glob("*.json"))
# name -> (API name of the node whose picture is looked at, what it shows; None: none of the references)
SHOWS = {
    "calibrate": ("13", "red apple"),
    "compare": ("14", "red apple"),
    "domain": ("6", "red apple"),
    "domain-prompts": ("8", "fox face"),
    "few-step": ("8", "red apple"),
    "few-step-parts": ("9", "red apple"),
    "image-to-image": ("12", None),
    "image-prompt": ("16", "brown heart"),  # still a heart, in the apple's colours
    "inpaint": ("17", None),
    "lora-stack": ("11", "red apple"),
    "profile": ("8", "red apple"),
    "quickstart": ("7", "red apple"),
    "distill": ("14", "red apple"),
    "refine": ("16", "red apple"),
    "scores": ("11", "red apple"),
    "slim": ("13", "red apple"),
    "train-lora": ("11", "red apple"),
}
ON_THE_DEMO = [name for name in FILES if gallery.NOTES[name][1]]
SIDE = 128
REFERENCES = recognise.load()


def workflow(name: str) -> dict:
    return json.loads((gallery.GALLERY / f"{name}.json").read_text(encoding="utf-8"))


def number(name: str, node: str) -> int:
    """The id in the drawn workflow of an API twin's node."""
    return list(gallery.api(name)).index(node) + 1


def without_views(prompt: dict) -> dict:
    """Without what a widget of the front end keeps for itself, such as the pictures of its slider."""
    return {
        id: {**node, "inputs": {k: v for k, v in node["inputs"].items() if not isinstance(v, dict)}}
        for id, node in prompt.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_it_opens_and_queues_what_its_twin_says(front, name):
    """No missing node, no error of ours in the console, and every value and link where it belongs."""
    front.errors.clear()
    front.load(workflow(name))
    assert front.unknown() == []
    queued, graph = front.prompt(), gallery.api(name)
    found = {str(number(name, key)): queued[str(number(name, key))] for key in graph}
    assert set(queued) == set(found)
    for key, node in graph.items():
        given = found[str(number(name, key))]["inputs"]
        expected = {
            id: [str(number(name, value[0])), value[1]] if isinstance(value, list) else value
            for id, value in node["inputs"].items()
            if not isinstance(value, dict)  # what a widget of the front end keeps for itself
        }
        assert {id: given.get(id) for id in expected} == expected, f"{key}, {node['class_type']}"
    assert front.errors == []


def test_every_workflow_on_the_demo_model_is_looked_at():
    assert set(SHOWS) == set(ON_THE_DEMO)


@pytest.mark.parametrize("name", ON_THE_DEMO)
def test_it_runs_and_shows_what_was_asked_for(front, name):
    """And running it again would give the same: seeds are fixed in what is shared."""
    front.errors.clear()
    front.load(workflow(name))
    queued = front.prompt()
    front.run()
    assert without_views(front.prompt()) == without_views(queued), "running it has changed a value, for example a seed"
    node, caption = SHOWS[name]
    picture = front.image(number(name, node))
    pictures = [picture[-SIDE:, :SIDE]]
    if picture.shape[1] > SIDE:  # side by side: before, after, difference
        gap = (picture.shape[1] - 3 * SIDE) // 2
        pictures.append(picture[-SIDE:, SIDE + gap : 2 * SIDE + gap])
    assert all(p.std() > 0.05 for p in pictures)
    for shown in pictures if caption else ():
        assert REFERENCES.recognised(shown, caption), REFERENCES.names[REFERENCES.nearest(shown)]
    assert front.errors == []
