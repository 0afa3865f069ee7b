"""ComfyUI's front end as its user sees it: what the browser tests and pictures.py do with it. Front end 1.49."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

VIEW = {"width": 1600, "height": 1000}
READY = "window.app?.graph && app.vueAppReady && app.extensionManager?.setting"
WAIT = 900_000  # ms; the longest workflow, one that trains, on two busy cores
FRAMES = 400  # ms, for what the front end does between frames
# The front end's own complaints on a ComfyUI without this pack: files of a user that do not exist yet, a graph asked
# for too early, looking up a model's size on the internet, which ComfyUI's headers forbid, and asking for a help page
# in the language before the page without one.
NOT_OURS = (
    r"404 .*/(user\.css|api/userdata)",
    r"ComfyApp graph accessed before initialization",
    r"(Connecting to|Fetch API cannot load) '?https://(huggingface\.co|civitai\.com)/.*missingModel",
    r"404 .*/docs/Nibble\w+/en\.md",
)


class Front:
    """One page. ``errors``: what the console has said since `settle` that is not the front end's own."""

    def __init__(self, browser, server):
        self.server = server
        self.added = 1000
        self.page = browser.new_page(viewport=VIEW)
        self.errors: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda e: self.errors.append(f"uncaught: {e}"))

    def _heard(self, message) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        ours = message.type == "error" or (message.type == "warning" and "nibble" in text.lower())
        if ours and not any(re.search(pattern, text) for pattern in NOT_OURS):
            self.errors.append(text)

    def close(self) -> None:
        self.page.close()

    def visit(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.page.wait_for_function(READY, timeout=60_000)

    def settle(self, settings: dict) -> None:
        """Opens the front end with ``settings``, which the server keeps."""
        for key, value in settings.items():
            self.server.post(f"/settings/{key}", value)
        self.visit()
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("app.extensionManager.command.execute('Comfy.ClearWorkflow')")

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    # Graphs

    def load(self, workflow: dict) -> None:
        """Opens a UI-format workflow, as dropping its file does."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function(
            "count => app.graph.nodes.length === count", arg=len(workflow["nodes"]), timeout=10_000
        )

    def unknown(self) -> list[str]:
        """Types in the graph that are not registered: the missing nodes."""
        return self.page.evaluate(
            "app.graph.nodes.map(n => n.type).filter(type => !(type in LiteGraph.registered_node_types))"
        )

    def prompt(self) -> dict:
        """What the front end would queue, in API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def add(self, type_: str, at: tuple[int, int] = (400, 250)) -> int:
        """A fresh node in an empty graph, at a place of the window in full size; returns its id, a new one: the front
        end remembers values of an id that a cleared graph has had.
        """
        self.page.evaluate("app.canvas.deselectAll()")
        self.added += 1
        self.page.evaluate(
            """([type, at, id]) => {
                app.graph.clear();
                Object.assign(app.canvas.ds, {scale: 1, offset: at});
                const node = LiteGraph.createNode(type);
                Object.assign(node, {id, pos: [0, 0]});
                app.graph.add(node);
                app.canvas.setDirty(true, true);
            }""",
            [type_, list(at), self.added],
        )
        self.page.wait_for_timeout(FRAMES)
        return self.added

    def select(self, node: int) -> None:
        self.page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
        self.page.wait_for_timeout(FRAMES)

    def look(self, node: int) -> None:
        """Puts ``node`` in the middle, in full size: the classic renderer hides widgets made of HTML when far away."""
        self.page.evaluate(
            """([id, width, height]) => {
                const {pos, size} = app.graph.getNodeById(id);
                const offset = [width / 2 - pos[0] - size[0] / 2, height / 2 - pos[1] - size[1] / 2];
                Object.assign(app.canvas.ds, {scale: 1, offset});
                app.canvas.setDirty(true, true);
            }""",
            [node, VIEW["width"], VIEW["height"]],
        )
        self.page.wait_for_timeout(FRAMES)

    def fit(self) -> None:
        self.page.evaluate("app.canvas.deselectAll()")
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(900)  # it glides there

    # Running

    def run(self) -> None:
        """Presses Run and waits for the end. Raises AssertionError with what the server says."""
        self.page.evaluate("""() => {
            window.ended = new Promise((resolve) => {
                for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                    app.api.addEventListener(name, (e) => resolve([name, e.detail?.exception_message]), {once: true});
            });
        }""")
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function("window.ended.then(() => true)", timeout=WAIT)
        ended, message = self.page.evaluate("window.ended")
        assert ended == "execution_success", f"{ended}: {message}"

    def image(self, node: int) -> np.ndarray:
        """The picture that ``node`` shows, (H, W, 3) in [0, 1]; in either renderer, once it has loaded."""
        # Classic: the node's own loaded <img>; Vue: the one inside the node's element.
        shown = """id => {
            const vue = document.querySelector(`[data-node-id="${id}"] .image-preview img, [data-node-id="${id}"] img`);
            const image = LiteGraph.vueNodesMode ? vue : app.graph.getNodeById(id)?.imgs?.[0];
            return image?.complete && image.naturalWidth ? image : null;
        }"""
        self.fit()  # the classic renderer asks for pictures of nodes in view only
        self.page.wait_for_function(shown, arg=node, timeout=20_000)
        data = self.page.evaluate(
            f"""async id => {{
                const bytes = new Uint8Array(await (await fetch(({shown})(id).src)).arrayBuffer());
                return btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(""));
            }}""",
            node,
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.float32) / 255

    # Panels

    def search(self, words: str) -> list[str]:
        """Titles of the nodes that the search box lists for ``words``, best first."""
        box = self.page.get_by_role("search")
        if not box.is_visible():
            self.command("Workspace.SearchBox.Toggle")
        box.locator("input[role=combobox]").first.fill(words)
        self.page.wait_for_timeout(350)  # it waits for the typing to stop
        return [text.splitlines()[0] for text in box.get_by_test_id("result-item").all_inner_texts()]

    def help(self, node: int):
        """Opens the help of ``node`` by the button above it; returns the page's locator."""
        self.select(node)
        self.page.get_by_test_id("info-button").click()
        page = self.page.locator(".node-help-content")
        page.locator("h1").wait_for(timeout=10_000)
        return page

    def sidebar(self, tab: str) -> None:
        self.page.locator(f".{tab}-tab-button").click()
