"""Graphs of the domain nodes in API format, and a domain of a person's own."""

import pytest

MINE = """
id: tea-shop@3
title: Tea shop
description: A cup of tea.
style: tags
example: a cup
prose: {positive: ["A photo of {subject} at {time}."], negative: [blurry]}
tags: {positive: ["photo of {subject}", "{time}"], negative: [lowres]}
slots: {time: {choices: [morning, noon, evening]}}
loras: [{file: gone.safetensors, family: sd15, link: "https://huggingface.co/x/gone", strength: 0.5}]
resolution: {sd15: [192, 128]}
calibration: [a cup, a pot]
"""


def prompt_node(**changed) -> dict:
    inputs = dict(domain="food@1", subject="a pear", seed=3, style="tags", overrides="", triggers="none")
    return {"class_type": "NibbleDomainPrompt", "inputs": {**inputs, **changed}}


def show(node: str, slot: int) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": [node, slot]}}


def graph(node: dict, *slots: int) -> dict:
    return {"n": node, **{f"show{s}": show("n", s) for s in slots}}


@pytest.fixture(scope="module")
def own(server):
    """own(name, text): a domain of a person's own in the server's models folder."""

    def put(name: str, text: str) -> str:
        folder = server.models("nibble_domains")
        (folder / f"{name}.yaml").write_text(text)
        return f"user/{name}"

    return put
