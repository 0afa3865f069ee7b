"""ComfyUI's own front end in a real browser, against a real ComfyUI: `pytest -m browser`.

Playwright drives the system's Chromium: its own downloads are not needed. Every test with `front` runs in both
renderers: litegraph's canvas, and Vue ("Nodes 2.0").
"""

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "comfy")]
from front import Front  # noqa: E402
from real import launch, missing, of_comfyui  # noqa: E402

RENDERERS = {"classic": False, "vue": True}
# Few frames and no minimap: without a GPU every frame is drawn by the cores that the workflow runs on.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MaximumFps": 5}


def pytest_collection_modifyitems(items):
    why = missing()
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.browser)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI of its own: it keeps the browser's settings. Its cache holds every workflow, so that the second
    renderer shows what the first has computed.
    """
    comfyui = of_comfyui()
    running = comfyui.start(tmp_path_factory.mktemp("browser"), "--cache-lru", "200")
    shutil.copytree(comfyui.COMFYUI / "input", running.base / "input", dirs_exist_ok=True)  # the picture it comes with
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = launch(playwright)
        yield running
        running.close()


@pytest.fixture(scope="session", params=list(RENDERERS))
def front(request, server, browser):
    """The front end of ``server`` with one renderer, past its first start."""
    opened = Front(browser, server)
    opened.settle(SETTINGS | {"Comfy.VueNodes.Enabled": RENDERERS[request.param]})
    yield opened
    opened.close()
