"""What the browser tests need of the machine: a ComfyUI, which tests/comfy/conftest.py finds and starts; a Chromium."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
GET_IT = (
    "needs a browser: pip install -e '.[test,browser]' and a Chromium (apt install chromium), or set CHROMIUM to one"
)


def of_comfyui():
    """tests/comfy/conftest.py as a module: how to find and start a server."""
    name = "nibble_comfyui"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE.parent / "comfy" / "conftest.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


def launch(playwright):
    """A headless Chromium. Without its sandbox: in containers, where tests run, it has no user namespaces."""
    return playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


def missing() -> str:
    """Why there can be no browser test here; "" where there can."""
    if importlib.util.find_spec("playwright") is None or chromium() is None:
        return GET_IT
    return "" if of_comfyui().COMFYUI else of_comfyui().GET_IT
