"""A small domain that uses everything a domain can: weights, chances, conditions, nesting, parts, LoRAs."""

import copy

import pytest
from comfyui_nibble.prompts import schema

DATA = {
    "id": "test@1", "title": "Test", "description": "A test.", "example": "a cup",
    "prose": {"positive": ["A {medium} of {subject} at {time}", ", with {extra}.",
                           {"text": "The sky is dark.", "when": {"time": ["night"]}}], "negative": ["blurry"]},
    "tags": {"positive": ["{medium}", "{subject}", "{time}", "{extra}"], "negative": ["lowres", "blurry"]},
    "slots": {
        "medium": {"choices": ["photo", {"name": "drawing", "text": "{colour} drawing", "weight": 3}]},
        "colour": {"choices": ["red", "blue"]},
        "time": {"choices": [{"name": "day", "prose": "bright noon", "tags": "noon"}, "night"]},
        "extra": {"chance": 50, "when": {"time": ["night"]},
                  "choices": ["a moon", {"name": "stars", "text": "stars", "when": {"medium": "drawing"}}]},
    },
    "loras": [{"file": "ink.safetensors", "family": "sdxl", "link": "https://huggingface.co/a/ink", "strength": 0.5,
               "trigger": "inky", "when": {"medium": ["drawing"]}}],
    "presets": {"sdxl": "lightning_sdxl"}, "resolution": {"sd15": [512, 768]}, "calibration": ["a cup", "a dog"],
}  # fmt: skip


@pytest.fixture
def data():
    """A fresh copy, to change."""
    return copy.deepcopy(DATA)


@pytest.fixture
def small(data):
    """The domain it describes."""
    return schema.parse(data, "test.yaml")
