"""Pictures of the front end, by one command: `python tests/browser/pictures.py [PART ...]`, or `make pictures`.

quickstart, profiler and sidebar: docs/images/<part>.png, for the README and docs. nodes: web/docs/<NodeId>.png, and
links: a line in each help page that shows it. thumbnails: workflows/<name>.jpg of those that need a download, which
have no result to show: their graph. Needs what the browser tests need.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "comfy")]
import gallery  # noqa: E402
from front import Front  # noqa: E402
from real import launch, missing, of_comfyui  # noqa: E402

IMAGES, PAGES = ROOT / "docs" / "images", ROOT / "web" / "docs"
COLOURS = 64  # a node is flat areas and text: a palette keeps it at some kilobytes
MARGIN = 12
AWAY = (1000, 980)  # where the mouse points at nothing
WITHOUT_RESULT = [name for name, (_, picture) in gallery.NOTES.items() if picture is None]
LOADERS = {
    "NibbleLoadCheckpoint": "checkpoints", "NibbleInspect": "", "NibbleConvert": "",
    "CheckpointLoaderSimple": "checkpoints", "UNETLoader": "diffusion_models", "NibbleLoadModel": "diffusion_models",
    "CLIPLoader": "text_encoders", "DualCLIPLoader": "text_encoders", "VAELoader": "vae",
    "NibbleUniControlGlobal": "controlnet", "CLIPVisionLoader": "clip_vision", "LoraLoaderModelOnly": "loras",
    "ControlNetLoader": "controlnet",
}  # fmt: skip
CANVAS = {"x": 160, "y": 100, "width": 1280, "height": 800}  # what no panel of the window covers
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.VueNodes.Enabled": True, "Comfy.RightSidePanel.IsOpen": False,
}  # fmt: skip
ALT = {"": "The node {title} as ComfyUI shows it", "vi": "Node {title} trong ComfyUI"}


def save(path: Path, data: bytes, colours: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if colours:
        image = image.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size / 1024:.0f} KiB")


def opened(front: Front, name: str) -> None:
    """The workflow ``name`` after its run, whole in view."""
    front.load(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    front.run()
    front.page.wait_for_timeout(8000)  # until the notice of the run has gone
    front.fit()


def quickstart(front: Front) -> None:
    opened(front, "quickstart")
    save(IMAGES / "quickstart.png", front.page.screenshot())


def profiler(front: Front) -> None:
    """The profiler's node with its widget, by itself."""
    opened(front, "profile")
    number = front.page.evaluate("app.graph.nodes.find(n => n.type === 'NibbleProfiler').id")
    only(front, number)
    save(IMAGES / "profiler.png", around(front, number))


def stand_ins(base: Path) -> None:
    """Empty files in place of the models that the gallery names: no node shall be shown as one that lacks its file."""
    for name in WITHOUT_RESULT:
        for node in gallery.api(name).values():
            for value in node["inputs"].values() if node["class_type"] in LOADERS else ():
                if str(value).endswith(".safetensors"):
                    path = base / "models" / LOADERS[node["class_type"]] / value
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
    example = base / "input" / "example.png"
    example.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (512, 512), "black").save(example)


def thumbnails(front: Front) -> None:
    for name in WITHOUT_RESULT:
        front.load(json.loads((gallery.GALLERY / f"{name}.json").read_text(encoding="utf-8")))
        front.fit()
        front.page.mouse.move(*AWAY)
        front.page.wait_for_timeout(400)
        image = Image.open(io.BytesIO(front.page.screenshot(clip=CANVAS))).convert("RGB")
        image.thumbnail((gallery.THUMBNAIL, gallery.THUMBNAIL))
        image.save(gallery.GALLERY / f"{name}.jpg", quality=85, optimize=True)


def sidebar(front: Front) -> None:
    opened(front, "profile")
    front.sidebar("nibble-runs")
    runs = front.page.locator(".nibble-run")
    runs.last.locator("summary").click()
    runs.last.locator(".nibble-row").first.wait_for()
    front.fit()
    save(IMAGES / "history.png", front.page.screenshot())
    front.sidebar("nibble-runs")


def nodes(front: Front) -> None:
    """Every node of the pack as it is when it is new, its advanced inputs shown."""
    total = 0
    for node, info in sorted(front.server.get("/object_info").items()):
        if not info["python_module"].endswith("ComfyUI-Nibble"):
            continue
        number = front.add(node)
        advanced = front.page.locator(f"[data-node-id='{number}']").get_by_test_id("advanced-inputs-button")
        if advanced.count():
            advanced.click()
            front.page.evaluate("app.canvas.deselectAll()")
        front.page.mouse.move(*AWAY)
        front.page.wait_for_timeout(400)
        save(PAGES / f"{node}.png", around(front, number), COLOURS)
        total += (PAGES / f"{node}.png").stat().st_size
    print(f"all nodes: {total / 1024:.0f} KiB")


def links(_: Front) -> None:
    """Puts each picture under the title of the node's pages, once. The front end resolves it from web/docs for both."""
    for picture in sorted(PAGES.glob("*.png")):
        for locale, page in (("", picture.with_suffix(".md")), ("vi", PAGES / picture.stem / "vi.md")):
            head, rest = page.read_text(encoding="utf-8").split("\n", 1)
            if f"]({picture.name})" not in rest:
                alt = ALT[locale].format(title=head.lstrip("# ").strip())
                page.write_text(f"{head}\n\n![{alt}]({picture.name})\n{rest}", encoding="utf-8")


def only(front: Front, number: int) -> None:
    """Hides the other nodes and shows this one in full size."""
    front.page.evaluate(
        """number => {
            for (const node of [...app.graph.nodes]) if (node.id != number) app.graph.remove(node);
            const node = app.graph.getNodeById(number);
            Object.assign(app.canvas.ds, {scale: 1, offset: [400 - node.pos[0], 120 - node.pos[1]]});
            app.canvas.deselectAll();
            app.canvas.setDirty(true, true);
        }""",
        number,
    )
    front.page.wait_for_timeout(800)


def around(front: Front, number: int) -> bytes:
    """A picture of the window where a node is, with a margin. Vue's renderer only: its nodes are elements."""
    box = front.page.locator(f"[data-node-id='{number}']").bounding_box()
    clip = {
        "x": box["x"] - MARGIN, "y": box["y"] - MARGIN,
        "width": box["width"] + 2 * MARGIN, "height": box["height"] + 2 * MARGIN,
    }  # fmt: skip
    return front.page.screenshot(clip=clip)


PARTS = {"quickstart": quickstart, "profiler": profiler, "sidebar": sidebar, "nodes": nodes, "links": links,
         "thumbnails": thumbnails}  # fmt: skip


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all but the last when none is named")
    parts = parser.parse_args().parts or [part for part in PARTS if part != "thumbnails"]
    if missing():
        sys.exit(missing())
    with tempfile.TemporaryDirectory() as base, sync_playwright() as playwright:
        if "thumbnails" in parts:
            stand_ins(Path(base))
        server = of_comfyui().start(Path(base))
        try:
            front = Front(launch(playwright), server)
            front.settle(SETTINGS)
            for part in parts:
                PARTS[part](front)
            front.close()
        finally:
            server.process.terminate()
            server.process.wait(30)


if __name__ == "__main__":
    main()
