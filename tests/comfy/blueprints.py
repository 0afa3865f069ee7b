"""Subgraph blueprints: subgraphs/<name>.json, which the front end's node library offers as one node each.

`python tests/comfy/gallery.py` writes them with the workflows. A blueprint is an API-format graph whose links to
`OUTSIDE` are its inputs.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from workflow_tools import COLUMN, _node, depth_of

OUTSIDE = "outside"
IN, OUT = -10, -20  # ids of a subgraph's ends, LiteGraph's


@dataclass(frozen=True)
class Blueprint:
    """``inputs``: name -> type of each input in order (widgets have a default in ``values``); ``outputs``: name ->
    (node, slot, type); ``graph``: API format, with [OUTSIDE, name] where an input goes.
    """

    title: str
    category: str
    description: str
    inputs: dict[str, str]
    values: dict[str, object]
    outputs: dict[str, tuple[str, int, str]]
    graph: dict[str, dict]


def node(kind: str, title: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def outside(name: str) -> list:
    return [OUTSIDE, name]


def sampler(model: list, title: str) -> dict:
    return node(
        "KSampler", title, model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
        seed=outside("seed"), steps=outside("steps"), cfg=outside("cfg"), sampler_name="dpmpp_2m", scheduler="karras",
        denoise=1.0,
    )  # fmt: skip


TEXTS = {
    "positive": node("CLIPTextEncode", "What to draw", clip=outside("clip"), text=outside("prompt")),
    "negative": node("CLIPTextEncode", "What to avoid", clip=outside("clip"), text=outside("negative prompt")),
    "latent": node(
        "EmptyLatentImage", "Size", width=outside("width"), height=outside("height"), batch_size=outside("pictures")
    ),
}
PARTS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
WORDS = {"prompt": "STRING", "negative prompt": "STRING", "width": "INT", "height": "INT", "pictures": "INT"}
SIZES = {"prompt": "", "negative prompt": "", "width": 512, "height": 512, "pictures": 1}

BLUEPRINTS = {
    "4-bit text to image": Blueprint(
        "4-bit text to image",
        "Nibble",
        "From a 4-bit model, its CLIP and VAE to pictures. The sampler finds the steps that belong to the model: one "
        "to eight for distilled ones and few-step LoRAs.",
        PARTS | WORDS | {"preset": "COMBO", "steps": "INT", "seed": "INT"},
        SIZES | {"preset": "auto", "steps": 0, "seed": 0},
        {"IMAGE": ("decode", 0, "IMAGE")},
        TEXTS
        | {
            "sample": node(
                "NibbleFewStepSampler",
                "Few-Step Sampler",
                model=outside("model"),
                positive=["positive", 0],
                negative=["negative", 0],
                latent_image=["latent", 0],
                preset=outside("preset"),
                steps=outside("steps"),
                seed=outside("seed"),
                denoise=1.0,
            ),
            "decode": node("VAEDecode", "VAE Decode", samples=["sample", 0], vae=outside("vae")),
        },
    ),
    "Calibrate and compare": Blueprint(
        "Calibrate and compare",
        "Nibble",
        "Makes a 4-bit model of a 16-bit one and shows both beside each other, drawn from the same noise.",
        PARTS
        | WORDS
        | {
            "calibration prompts": "STRING",
            "calibration": "COMBO",
            "rank": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "seed": "INT",
        },
        SIZES | {"calibration prompts": "", "calibration": "fast", "rank": 32, "steps": 25, "cfg": 4.0, "seed": 0},
        {
            "MODEL": ("calibrate", 0, "MODEL"),
            "comparison": ("compare", 4, "IMAGE"),
            "measures": ("compare", 0, "STRING"),
            "report": ("calibrate", 1, "STRING"),
        },
        TEXTS
        | {
            "calibrate": node(
                "NibbleCalibrate",
                "Calibrate to 4-bit",
                model=outside("model"),
                latent=["latent", 0],
                preset=outside("calibration"),
                target="svdquant_w4a4",
                rank=outside("rank"),
                budget_mib=0,
                noise_levels=8,
                cfg=outside("cfg"),
                seed=0,
                clip=outside("clip"),
                prompts=outside("calibration prompts"),
                negative="",
            ),
            "before": sampler(outside("model"), "16 bits"),
            "after": sampler(["calibrate", 0], "4 bits"),
            "first": node("VAEDecode", "VAE Decode, 16 bits", samples=["before", 0], vae=outside("vae")),
            "second": node("VAEDecode", "VAE Decode, 4 bits", samples=["after", 0], vae=outside("vae")),
            "compare": node(
                "NibbleCompareImages",
                "Compare Pictures",
                reference=["first", 0],
                candidate=["second", 0],
                reference_label="16-bit",
                candidate_label="4-bit",
                full_scale=0.25,
            ),
        },
    ),
}


def inner_links(blueprint: Blueprint) -> dict[str, dict]:
    """The graph without what comes from outside: what the layout goes by."""
    return {
        name: n | {"inputs": {k: v for k, v in n["inputs"].items() if not (isinstance(v, list) and v[0] == OUTSIDE)}}
        for name, n in blueprint.graph.items()
    }


def numbered(blueprint: Blueprint) -> dict[str, dict]:
    """The graph with each input of the subgraph as the slot that it is."""
    slots = {name: i for i, name in enumerate(blueprint.inputs)}

    def value(v):
        return [OUTSIDE, slots[v[1]]] if isinstance(v, list) and v[0] == OUTSIDE else v

    return {name: n | {"inputs": {k: value(v) for k, v in n["inputs"].items()}} for name, n in blueprint.graph.items()}


def draw(blueprint: Blueprint, object_info: dict, versions: dict[str, tuple[str, str]]) -> dict:
    """The blueprint as the front end stores one: a 0.4 workflow of a single node, and its definition."""
    depth, graph = depth_of(inner_links(blueprint)), numbered(blueprint)
    ids, links, nodes, heights = {OUTSIDE: IN} | {n: i + 1 for i, n in enumerate(graph)}, [], [], {}
    for order, name in enumerate(sorted(graph, key=lambda n: (depth[n], ids[n]))):
        drawn = _node(name, graph, object_info, versions, ids, links)
        y = heights.get(depth[name], 40)
        heights[depth[name]] = y + drawn["size"][1] + 60
        nodes.append(drawn | {"order": order, "pos": [40 + COLUMN * depth[name], y]})
    for slot, (source, output, type_) in enumerate(blueprint.outputs.values()):
        links.append([len(links) + 1, ids[source], output, OUT, slot, type_])
    for link in links:
        if link[1] != IN:
            next(n for n in nodes if n["id"] == link[1])["outputs"][link[2]]["links"].append(link[0])
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    right = 40 + COLUMN * (max(depth.values()) + 1)
    key = uuid.uuid5(uuid.NAMESPACE_URL, f"nibble/subgraphs/{blueprint.title}")
    definition = {
        "id": str(key), "version": 1, "revision": 0, "config": {}, "name": blueprint.title,
        "state": {"lastGroupId": 0, "lastNodeId": len(graph), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": IN, "bounding": [-240, 40, 160, 40 + 20 * len(blueprint.inputs)]},
        "outputNode": {"id": OUT, "bounding": [right, 40, 140, 40 + 20 * len(blueprint.outputs)]},
        "inputs": [
            {"id": str(uuid.uuid5(key, f"in/{n}")), "name": n, "type": t, "pos": [-120, 60 + 20 * i],
             "linkIds": [link[0] for link in links if link[1:3] == [IN, i]]}
            for i, (n, t) in enumerate(blueprint.inputs.items())
        ],
        "outputs": [
            {"id": str(uuid.uuid5(key, f"out/{n}")), "name": n, "type": t, "pos": [right + 20, 60 + 20 * i],
             "linkIds": [link[0] for link in links if link[3:5] == [OUT, i]]}
            for i, (n, (_, _, t)) in enumerate(blueprint.outputs.items())
        ],
        "widgets": [], "nodes": sorted(nodes, key=lambda n: n["id"]), "groups": [],
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "extra": {}, "category": blueprint.category, "description": blueprint.description,
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": 1, "last_link_id": 0, "links": [], "version": 0.4, "extra": {},
        "nodes": [_outer(blueprint, str(key), versions)], "definitions": {"subgraphs": [definition]},
    }  # fmt: skip


def _outer(blueprint: Blueprint, key: str, versions: dict[str, tuple[str, str]]) -> dict:
    """The one node that people see."""
    own, ver = versions["custom_nodes.ComfyUI-Nibble"]
    sockets = [
        {"name": n, "type": t, "link": None} | ({"widget": {"name": n}} if n in blueprint.values else {})
        for n, t in blueprint.inputs.items()
    ]
    return {
        "id": 1, "type": key, "pos": [40, 40], "size": [340, 60 + 26 * len(sockets)], "flags": {}, "order": 0,
        "mode": 0,
        "inputs": sockets, "title": blueprint.title,
        "outputs": [{"name": n, "type": t, "links": None} for n, (_, _, t) in blueprint.outputs.items()],
        "properties": {"proxyWidgets": [["-1", n] for n in blueprint.values], "cnr_id": own, "ver": ver},
        "widgets_values": list(blueprint.values.values()),
    }  # fmt: skip


def to_api(stored: dict, given: dict, object_info: dict) -> dict[str, dict]:
    """The API-format graph of a stored blueprint's inside, with ``given``: input -> value or link.

    Reads the file alone, as the front end does: links and widget values.
    """
    from workflow_tools import inputs_of, is_widget

    (inside,) = stored["definitions"]["subgraphs"]
    links = {link["id"]: link for link in inside["links"]}
    names, out = [row["name"] for row in inside["inputs"]], {}
    for n in inside["nodes"]:
        inputs = {k: v for k, v in n["widgets_values_named"].items() if v is not None}
        kinds = {name for name, t, o, _ in inputs_of(object_info[n["type"]]) if is_widget(t, o)}
        assert set(inputs) <= kinds
        for socket in n["inputs"]:
            link = links.get(socket.get("link"))
            if link is not None:
                own = [f"in{link['origin_id']}", link["origin_slot"]]
                inputs[socket["name"]] = given[names[link["origin_slot"]]] if link["origin_id"] == IN else own
        out[f"in{n['id']}"] = {"class_type": n["type"], "inputs": inputs}
    return out
