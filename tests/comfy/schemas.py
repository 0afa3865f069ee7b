"""What a running server says about this pack's nodes, for locales/en, locales/vi and tests/golden/schema.json.

`python tests/comfy/schemas.py` starts ComfyUI on an empty folder, writes locales/en and the golden file anew, and says
what locales/vi lacks or has too much. It never writes a translation. Once the Vietnamese of a node whose English
changed has been looked at, `python tests/comfy/schemas.py --reviewed NibbleLoadModel ...` notes that it belongs to the
new English.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

from workflow_tools import inputs_of

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
GOLDEN = ROOT / "tests" / "golden" / "schema.json"
REVIEWED = LOCALES / "vi" / "reviewed.json"  # node -> hash of the English that its Vietnamese was made from
PAGES = ROOT / "web" / "docs"
MODULE = "custom_nodes.ComfyUI-Nibble"
REMEDY = "run `python tests/comfy/schemas.py`"
# Of an input's options, what saved workflows depend on; the last two decide how many widget values a node has.
FROZEN = ("default", "min", "max", "options", "forceInput", "control_after_generate")
GROWS = ("prefix", "names", "min", "max")  # of an input that grows: they make its keys
LISTED = "listed"  # in place of the options of a combo that lists files: those that are always there
GENERATED = ("<!-- domains", "<!-- end of domains -->")  # a table in help pages that is no text to translate


def ours(object_info: dict) -> dict[str, dict]:
    """This pack's nodes, by id."""
    return {id: info for id, info in sorted(object_info.items()) if info["python_module"] == MODULE}


def english(nodes: dict[str, dict]) -> dict[str, dict]:
    """locales/en/nodeDefs.json, in the front end's form: outputs by slot number, inputs by id with dots as '_'."""
    out = {}
    for id, info in nodes.items():
        inputs = {
            key.replace(".", "_"): {"name": options.get("display_name") or key, "tooltip": options.get("tooltip") or ""}
            for key, _, options, _ in inputs_of(info)
        }
        pairs = zip(info["output_name"], info.get("output_tooltips") or [], strict=True)
        outputs = {str(slot): {"name": name, "tooltip": tip or ""} for slot, (name, tip) in enumerate(pairs)}
        texts = {"display_name": info["display_name"], "description": info["description"]}
        out[id] = texts | {"inputs": inputs} | ({"outputs": outputs} if outputs else {})
    return out


def categories(object_info: dict) -> list[str]:
    """The parts of our categories that core has not, which are ours to translate (main.json, nodeCategories)."""

    def parts(nodes) -> set[str]:
        return {part for info in nodes for part in info["category"].split("/")}

    core = (i for i in object_info.values() if not i["python_module"].startswith("custom_nodes"))
    return sorted(parts(ours(object_info).values()) - parts(core))


def frozen(nodes: dict[str, dict], lists: dict[tuple[str, str], list]) -> dict[str, dict]:
    """What saved workflows depend on: ids, order, types, defaults, limits, option strings.

    ``lists``: (node, input) of the combos that list files -> the options which are always there.
    """
    out = {}
    for id, info in nodes.items():
        inputs = {}
        for key, type_, options, optional in inputs_of(info):
            row = {"type": type_} | {k: options[k] for k in FROZEN if k in options}
            if (id, key) in lists:
                row.pop("options")
                row[LISTED] = lists[id, key]
            if "template" in options:
                row |= {k: options["template"][k] for k in GROWS if k in options["template"]}
            inputs[key] = row | ({"optional": True} if optional else {})
        out[id] = {"inputs": inputs, "outputs": info["output"]}
    return out


def options_of(nodes: dict[str, dict]) -> dict[tuple[str, str], list]:
    """(node, input) -> the options of every combo."""
    return {
        (id, key): options["options"]
        for id, info in nodes.items()
        for key, _, options, _ in inputs_of(info)
        if "options" in options
    }


def listing(before: dict[str, dict], after: dict[str, dict]) -> dict[tuple[str, str], list]:
    """The combos that show other options once there are files -> the options that were there without."""
    now = options_of(after)
    return {at: options for at, options in options_of(before).items() if now[at] != options}


def lists_of(golden: dict[str, dict]) -> dict[tuple[str, str], list]:
    """The same from the golden file."""
    rows = ((id, key, row) for id, node in golden.items() for key, row in node["inputs"].items())
    return {(id, key): row[LISTED] for id, key, row in rows if LISTED in row}


def texts(defs: dict, at: str = "") -> dict[str, str]:
    """Every text of a nodeDefs.json by its place, such as NibbleInspect.inputs.file.tooltip."""
    out = {}
    for key, value in defs.items():
        here = f"{at}.{key}" if at else key
        out |= texts(value, here) if isinstance(value, dict) else {here: value}
    return out


def digest(node: dict) -> str:
    """Short hash of a node's English texts."""
    return hashlib.sha256(json.dumps(node, sort_keys=True).encode()).hexdigest()[:12]


def page(id: str, locale: str = "") -> Path:
    """The help page of a node, where the front end looks for it."""
    return PAGES / id / f"{locale}.md" if locale else PAGES / f"{id}.md"


def page_digest(id: str) -> str:
    """Short hash of a node's English help page, without its generated table; empty when there is none."""
    if not page(id).is_file():
        return ""
    text = page(id).read_text(encoding="utf-8")
    start, _, rest = text.partition(GENERATED[0])
    return hashlib.sha256((start + rest.partition(GENERATED[1])[2]).encode()).hexdigest()[:12]


def shortfalls(en: dict, other: dict) -> list[str]:
    """What a translation lacks or has too much, one line each."""
    want, have = texts(en), texts(other)
    missing = [f"missing: {at} ({want[at]})" for at in want if not have.get(at, "").strip()]
    return missing + [f"stale: {at}" for at in have if at not in want]


def unreviewed(en: dict, reviewed: dict) -> list[str]:
    """Nodes whose English is not the one that their Vietnamese was made from."""
    return [id for id, node in en.items() if reviewed.get(id, {}).get("texts") != digest(node)]


def unreviewed_pages(en: dict, reviewed: dict) -> list[str]:
    """The same for help pages."""
    return [id for id in en if reviewed.get(id, {}).get("page") != page_digest(id)]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def dumped(value) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumped(value), encoding="utf-8")


def fill(server) -> None:
    """Puts a file of each kind into every folder that a node could list."""
    from comfyui_nibble.profiling.report import FORMAT

    below = [f"models/{name}" for name in server.get("/models")]
    for folder in [*below, "input", "input/probe", "output", "output/nibble"]:
        path = server.base / folder
        path.mkdir(parents=True, exist_ok=True)
        for ending in ("safetensors", "gguf", "yaml", "txt", "png"):
            (path / f"probe.{ending}").write_bytes(b"")
        (path / "probe.json").write_text(json.dumps({"format": FORMAT}))


def ask() -> tuple[dict, dict]:
    """/object_info of a ComfyUI without any files, and of the same with files."""
    from conftest import start

    with tempfile.TemporaryDirectory() as base:
        server = start(Path(base))
        try:
            empty = server.get("/object_info")
            assert ours(empty), f"the pack did not load:\n{server.tail(200)}"
            fill(server)
            return empty, server.get("/object_info")
        finally:
            server.process.terminate()
            server.process.wait(30)


def refresh() -> None:
    """Writes what follows from the schemas, and prints what a person has to do."""
    empty, filled = ask()
    nodes = ours(empty)
    en = english(nodes)
    write(LOCALES / "en" / "nodeDefs.json", en)
    write(LOCALES / "en" / "main.json", {"nodeCategories": {part: part for part in categories(empty)}})
    write(GOLDEN, frozen(nodes, listing(nodes, ours(filled))))
    vi, reviewed = read(LOCALES / "vi" / "nodeDefs.json"), read(REVIEWED)
    lines = shortfalls(en, vi)
    lines += [f"English changed, look at locales/vi: {id}" for id in unreviewed(en, reviewed) if id in vi]
    lines += [f"English changed, look at web/docs/{id}/vi.md" for id in unreviewed_pages(en, reviewed)]
    lines += [f"no Vietnamese help page: web/docs/{id}/vi.md" for id in en if not page(id, "vi").is_file()]
    print(f"{len(en)} nodes written to locales/en and {GOLDEN.name}", *lines, sep="\n")


def review(ids: list[str]) -> None:
    """Notes that the Vietnamese of these nodes belongs to the English of now."""
    en, reviewed = read(LOCALES / "en" / "nodeDefs.json"), read(REVIEWED)
    reviewed = {id: row for id, row in reviewed.items() if id in en}
    for id in ids:
        reviewed[id] = {"texts": digest(en[id]), "page": page_digest(id)}
    write(REVIEWED, dict(sorted(reviewed.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reviewed", nargs="+", metavar="NODE", help="their Vietnamese belongs to the English of now")
    given = parser.parse_args()
    if given.reviewed:
        review(given.reviewed)
    else:
        refresh()


if __name__ == "__main__":
    main()
