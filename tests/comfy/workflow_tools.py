"""UI-format workflows (0.4) from API-format ones and back, by a server's /object_info.

The gallery's JSON is written by `to_ui`; tests run every gallery file through `to_api`, so both must stay true.
"""

from __future__ import annotations

import uuid

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL = "control_after_generate"
COLUMN, ROW, WIDTH = 340, 40, 300
# Nodes that show what they made grow once they ran, and must not cover what lies below.
GROWS = {
    "SaveImage": 260, "PreviewImage": 260, "ImageCompare": 260, "NibbleCompareImages": 280, "NibbleProfiler": 620,
    "PreviewAny": 160, "LoadImage": 260, "NibbleCalibrate": 60,
}  # fmt: skip


def inputs_of(info: dict) -> list[tuple[str, str, dict, bool]]:
    """(name, type, options, optional) of a node's inputs in the order the front end shows them."""
    out = []
    for kind in ("required", "optional"):
        declared = info["input"].get(kind, {})
        for name in info.get("input_order", {}).get(kind, declared):
            spec = declared[name]
            options = spec[1] if len(spec) > 1 else {}
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            out.append((name, type_, options, kind == "optional"))
    return out


def is_widget(type_: str, options: dict) -> bool:
    return type_ in WIDGETS and not options.get("forceInput")


def has_control(name: str, type_: str, options: dict) -> bool:
    """Whether the front end adds a 'control after generate' widget behind this one: unasked, too, behind a seed."""
    return type_ == "INT" and bool(options.get(CONTROL, name in ("seed", "noise_seed")))


def to_api(ui: dict, object_info: dict) -> dict:
    """The API-format prompt of a UI-format workflow, as the front end would post it."""
    links = {link[0]: link for link in ui["links"]}
    out = {}
    for node in ui["nodes"]:
        if node["type"] not in object_info or node.get("mode", 0) != 0:
            continue
        sockets = {s["name"]: s.get("link") for s in node.get("inputs", [])}
        values, at, inputs = node.get("widgets_values", []), 0, {}
        for name, type_, options, _ in inputs_of(object_info[node["type"]]):
            if is_widget(type_, options):
                inputs[name] = values[at]
                at += 2 if has_control(name, type_, options) or options.get("image_upload") else 1
            if sockets.get(name) is not None:
                _, source, slot, *_ = links[sockets[name]]
                inputs[name] = [str(source), slot]
        for name, link in sockets.items():  # dotted names of dynamic inputs
            if "." in name and link is not None:
                _, source, slot, *_ = links[link]
                inputs[name] = [str(source), slot]
        out[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return out


def depth_of(api: dict) -> dict[str, int]:
    """Node -> how many links deep it lies; columns of the drawing."""
    depth: dict[str, int] = {}

    def visit(name: str) -> int:
        if name not in depth:
            sources = [v[0] for v in api[name]["inputs"].values() if isinstance(v, list)]
            depth[name] = 1 + max((visit(s) for s in sources), default=-1)
        return depth[name]

    for name in api:
        visit(name)
    return depth


def to_ui(
    api: dict,
    object_info: dict,
    versions: dict[str, tuple[str, str]],
    notes: list[str] = (),
    models: dict | None = None,
) -> dict:
    """A drawn UI-format workflow of ``api``.

    ``versions``: python module prefix of a node -> (cnr_id, ver); ``notes`` become Note nodes; ``models``: API node
    name -> list of properties.models rows.
    """
    depth, ids = depth_of(api), {name: i + 1 for i, name in enumerate(api)}
    heights: dict[int, int] = {}
    nodes, links = [], []
    for order, name in enumerate(sorted(api, key=lambda n: (depth[n], ids[n]))):
        node = _node(name, api, object_info, versions, ids, links)
        node["order"] = order
        y = heights.get(depth[name], 40)
        node["pos"] = [40 + COLUMN * depth[name], y]
        heights[depth[name]] = y + node["size"][1] + 60
        if models and name in models:
            node["properties"]["models"] = models[name]
        nodes.append(node)
    for link in links:
        source = next(n for n in nodes if n["id"] == link[1])
        source["outputs"][link[2]]["links"].append(link[0])
    for i, text in enumerate(notes):
        y = max(heights.values()) + 20 + 180 * i
        nodes.append(_note(len(ids) + 1 + i, text, y, len(nodes)))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "nibble/" + "/".join(api))), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": sorted(nodes, key=lambda n: n["id"]),
        "links": links, "groups": [], "config": {}, "extra": {"ds": {"scale": 0.8, "offset": [0, 0]}}, "version": 0.4,
    }  # fmt: skip


def _node(name: str, api: dict, object_info: dict, versions, ids: dict[str, int], links: list) -> dict:
    kind = api[name]["class_type"]
    info, given = object_info[kind], api[name]["inputs"]
    sockets, values, named = [], [], {}
    for key, type_, options, optional in inputs_of(info):
        value = given.get(key, options.get("default"))
        widget = is_widget(type_, options)
        if isinstance(value, list) or (not widget and type_ not in ("COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3")):
            sockets.append(_socket(key, type_, value, ids, links, ids[name], len(sockets), widget, optional))
        if widget:
            plain = options.get("default") if isinstance(value, list) else value
            values.append(plain)
            named[key] = plain
            if has_control(key, type_, options):
                values.append("fixed")
            elif options.get("image_upload"):
                values.append("image")
    for key, value in given.items():
        if "." in key and isinstance(value, list):
            sockets.append(_socket(key, "*", value, ids, links, ids[name], len(sockets), False, True))
    module = info.get("python_module", "nodes")
    cnr_id, ver = next(v for prefix, v in versions.items() if module.startswith(prefix))
    outputs = [
        {"name": n, "type": t, "links": [], "slot_index": i}
        for i, (n, t) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]
    lines = sum(3 if o.get("multiline") else 1 for _, t, o, _ in inputs_of(info) if is_widget(t, o))
    return {
        "id": ids[name], "type": kind, "title": api[name].get("_meta", {}).get("title", info["display_name"]),
        "pos": [0, 0],
        "size": [WIDTH, 40 + 24 * max(len(sockets), len(outputs)) + 28 * lines + GROWS.get(kind, 0)],
        "flags": {}, "order": 0, "mode": 0,
        "inputs": sockets, "outputs": outputs,
        "properties": {"Node name for S&R": kind, "cnr_id": cnr_id, "ver": ver},
        "widgets_values": values, "widgets_values_named": named,
    }  # fmt: skip


def _socket(key, type_, value, ids, links, target: int, slot: int, widget: bool, optional: bool) -> dict:
    out = {"name": key, "type": type_, "link": None}
    if widget:
        out["widget"] = {"name": key}
    elif optional:
        out["shape"] = 7
    if isinstance(value, list):
        out["link"] = len(links) + 1
        links.append([out["link"], ids[value[0]], value[1], target, slot, type_])
    return out


def _note(number: int, text: str, y: int, order: int) -> dict:
    return {
        "id": number, "type": "MarkdownNote", "pos": [40, y], "size": [620, 160], "flags": {}, "order": order,
        "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text],
        "color": "#432", "bgcolor": "#653",
    }  # fmt: skip
