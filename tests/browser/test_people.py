"""What people do in the front end: a newcomer's first minutes, finding a node, reading its help, seeing a run."""

import json
import time
from pathlib import Path

import gallery
import pytest
from comfyui_nibble.demo import recognise
from front import Front
from real import of_comfyui
from words import WORDS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schema.json").read_text(encoding="utf-8"))
NEWCOMER, MINUTES = {"width": 1280, "height": 800}, 2
FIRST_SCREENS = 20  # of the search box's list


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def profiled(front):
    """The front end after the profile workflow has run."""
    front.load(json.loads((gallery.GALLERY / "profile.json").read_text(encoding="utf-8")))
    front.run()
    front.run()  # everything is cached now but what always runs
    return front


def test_a_newcomers_walk(tmp_path, browser):
    """Start ComfyUI, choose Quickstart among the templates that it opens with, queue, see the picture: nothing to
    download, in two minutes. The one test with a clock, because this is what it is about.
    """
    begun = time.monotonic()
    server = of_comfyui().start(tmp_path)
    try:
        front = Front(browser, server)
        front.page.set_viewport_size(NEWCOMER)
        front.visit()
        templates = front.page.get_by_role("dialog")
        templates.get_by_text("ComfyUI-Nibble").click()
        templates.get_by_text("quickstart", exact=True).click()
        front.page.wait_for_function("app.graph.nodes.some(n => n.type === 'NibbleLoadDemo')")
        templates.wait_for(state="hidden")
        front.run()
        picture = front.image(front.page.evaluate("app.graph.nodes.find(n => n.type === 'SaveImage').id"))
        took = time.monotonic() - begun
        assert recognise.load().recognised(picture, "red apple")
        print(f"{took:.0f} s from start to picture")
        assert front.errors == []
        assert took < 60 * MINUTES, f"{took:.0f} s from start to picture"
        front.close()
    finally:
        server.process.terminate()
        server.process.wait(30)


def test_words_are_known_for_every_node():
    assert set(WORDS) == set(GOLDEN)
    assert all(len(set(words)) == 2 for words in WORDS.values())


def test_the_search_finds_every_node_by_two_everyday_words(front, object_info):
    found = {word: front.search(word)[:FIRST_SCREENS] for word in sorted({w for two in WORDS.values() for w in two})}
    front.page.keyboard.press("Escape")
    missed = [
        (node, word, found[word])
        for node, words in WORDS.items()
        for word in words
        if object_info[node]["display_name"] not in found[word]
    ]
    assert missed == []


def test_help_opens_for_every_node(front, object_info):
    """The page that ships, with its picture loaded where it has one."""
    front.errors.clear()
    for node in GOLDEN:
        page = front.help(front.add(node))
        title = object_info[node]["display_name"]
        page.locator("h1", has_text=title).wait_for(timeout=10_000)
        assert page.locator("h2", has_text="What can go wrong").count() == 1, node
        for image in page.locator("img").all():
            front.page.wait_for_function("image => image.complete", arg=image.element_handle())
            assert image.evaluate("image => image.naturalWidth") > 0, node
    assert front.errors == []


def test_the_profilers_widget_shows_the_run(profiled):
    """Totals, a row a node that ran, what was cached, and memory; as text, and in view."""
    widget = profiled.page.locator(".nibble-widget")
    assert widget.locator(".nibble-totals").inner_text().startswith("quickstart")
    assert "GiB" in widget.locator(".nibble-totals").inner_text()
    titles = widget.locator(".nibble-row .nibble-title").all_inner_texts()
    assert "Profile this Run (Nibble)" in titles
    assert "cached" in widget.inner_text() and "KSampler" in widget.inner_text()
    assert widget.locator("svg polygon").count() == 1
    profiled.look(profiled.page.evaluate("app.graph.nodes.find(n => n.type === 'NibbleProfiler').id"))
    widget.wait_for(timeout=10_000)
    box = widget.bounding_box()
    assert box["width"] > 100 and box["height"] > 50
    assert profiled.errors == []


def test_the_sidebar_shows_the_history(profiled, server):
    """Newest first, and a click opens the run with its nodes and steps."""
    profiled.sidebar("nibble-runs")
    runs = profiled.page.locator(".nibble-run")
    runs.first.wait_for(timeout=10_000)
    saved = server.get("/nibble/runs")["runs"]
    assert runs.count() == len(saved) >= 2
    oldest = saved[-1]
    runs.last.locator("summary").click()
    runs.last.locator(".nibble-row").first.wait_for(timeout=10_000)
    assert runs.last.locator(".nibble-row").count() == oldest["ran"]
    assert "x" in " ".join(runs.last.locator(".nibble-steps").all_inner_texts())
    profiled.page.locator(".nibble-again").click()
    profiled.page.wait_for_timeout(1000)
    runs.last.locator(".nibble-row").first.wait_for(timeout=10_000)  # what was open stays open
    profiled.sidebar("nibble-runs")
    assert profiled.errors == []


def test_texts_of_a_run_stay_texts(front, server):
    """A label that is HTML is shown, not run."""
    label = "<img src=x onerror=\"document.title='run'\">"
    run = {**server.get(f"/nibble/runs/{server.get('/nibble/runs')['runs'][0]['name']}"), "label": label}
    (server.base / "output" / "nibble" / "hostile_00001_.json").write_text(json.dumps(run), encoding="utf-8")
    front.sidebar("nibble-runs")
    front.page.locator(".nibble-again").click()
    shown = front.page.locator(".nibble-run .nibble-label", has_text="onerror").first
    shown.wait_for(timeout=10_000)
    assert shown.inner_text() == label and shown.locator("img").count() == 0
    assert front.page.title() != "run"
    front.sidebar("nibble-runs")


def test_vietnamese_shows(front, object_info):
    """Titles and help in Vietnamese, where the front end offers the language."""
    offered = front.page.evaluate("app.ui.settings.settingsParamLookup['Comfy.Locale'].options.map(o => o.value ?? o)")
    if "vi" not in offered:
        pytest.skip(f"this front end has no Vietnamese, only {', '.join(offered)}; the server has it ready in /i18n")
    front.settle({"Comfy.Locale": "vi"})
    texts = json.loads((gallery.ROOT / "locales" / "vi" / "nodeDefs.json").read_text(encoding="utf-8"))
    node = front.add("NibbleProfiler")
    title = front.page.evaluate("id => app.graph.getNodeById(id).title", node)
    front.settle({"Comfy.Locale": "en"})
    assert title == texts["NibbleProfiler"]["display_name"]
