"""The front end's part keeps out of ComfyUI's way: no HTML from data, nothing global, no one else's code."""

import re
from pathlib import Path

import pytest

WEB = Path(__file__).parents[1] / "web"
SCRIPTS = sorted(WEB.glob("*.js"))
FOREIGN = {"../../scripts/app.js", "../../scripts/api.js"}
HTML = r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write"
RUNS_TEXT = r"\beval\b|new Function|setTimeout\(\s*[\"'`]|import\("
GLOBAL = r"\bwindow\b|globalThis|document\.addEventListener|\.prototype\b|localStorage"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
@pytest.mark.parametrize("pattern", [HTML, RUNS_TEXT, GLOBAL])
def test_a_script_does_without(path, pattern):
    assert re.findall(pattern, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_needs_only_comfyuis_app_and_api_and_its_neighbours(path):
    imported = re.findall(r'from "([^"]+)"', path.read_text(encoding="utf-8"))
    own = {f"./{p.name}" for p in SCRIPTS}
    assert set(imported) <= FOREIGN | own


def test_every_class_in_the_scripts_style_is_ours():
    css = (WEB / "nibble.css").read_text(encoding="utf-8")
    rules = re.sub(r"\{[^}]*\}|/\*.*?\*/", " ", css, flags=re.S)
    assert {c for c in re.findall(r"\.([a-zA-Z][\w-]*)", rules) if not c.startswith("nibble-")} == set()
    assert "var(--input-text" in css and "var(--comfy-input-bg" in css
