"""A real server's nodes against what is written about them: English texts, frozen ids, help pages, search words."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import schemas
from schemas import LOCALES, REMEDY, read

EN = read(LOCALES / "en" / "nodeDefs.json")
GOLDEN = read(schemas.GOLDEN)


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def nodes(object_info, server):
    found = schemas.ours(object_info)
    assert found, f"the pack did not load:\n{server.tail(200)}"
    return found


def test_english_is_what_the_schemas_say(nodes, object_info):
    now = schemas.english(nodes)
    assert [id for id in now.keys() | EN.keys() if now.get(id) != EN.get(id)] == [], REMEDY
    own = read(LOCALES / "en" / "main.json")["nodeCategories"]
    assert own == {part: part for part in schemas.categories(object_info)}, REMEDY


def test_ids_order_defaults_and_options_are_frozen(nodes):
    """A change breaks workflows that people saved: it needs a line in CHANGELOG.md and a node replacement."""
    now = schemas.frozen(nodes, schemas.lists_of(GOLDEN))
    assert set(now) ^ set(GOLDEN) == set(), REMEDY
    for id, row in GOLDEN.items():
        assert schemas.dumped(now[id]) == schemas.dumped(row), f"{id}: {REMEDY}"  # as text: order counts


def test_options_that_are_always_there_are_there(nodes):
    options = schemas.options_of(nodes)
    for at, always in schemas.lists_of(GOLDEN).items():
        assert [o for o in always if o not in options[at]] == [], at


def test_nodes_can_be_found(nodes):
    """A category of ours, a description, and everyday words to search for."""
    for id, info in nodes.items():
        assert info["category"].startswith("Nibble/"), id
        assert info["name"] == id
        aliases = info["search_aliases"] or []
        assert len(aliases) >= 2, id
        assert len({a.lower() for a in aliases}) == len(aliases), id
        assert not info["deprecated"] and not info["api_node"], id


def test_inputs_that_grow_have_tooltips_on_what_grows(nodes):
    for id, info in nodes.items():
        for key, _, options, _ in schemas.inputs_of(info):
            for inner in options.get("template", {}).get("input", {}).values():
                assert all(spec[1]["tooltip"] for spec in inner.values()), f"{id}.{key}"


@pytest.mark.parametrize("locale", ["en", "vi"])
def test_comfyui_serves_the_texts(server, locale):
    served = server.get("/i18n")[locale]
    assert served["nodeDefs"] == read(LOCALES / locale / "nodeDefs.json")
    assert served["nodeCategories"] == read(LOCALES / locale / "main.json")["nodeCategories"]


@pytest.mark.parametrize("id", EN)
def test_comfyui_serves_the_help_pages(server, id):
    """Where the front end looks: docs/<id>/<locale>.md, then docs/<id>.md."""
    base = f"/extensions/{schemas.MODULE.partition('.')[2]}/docs/{id}"
    for tail, locale in ((".md", ""), ("/vi.md", "vi")):
        assert server.get(base + tail, raw=True).decode() == schemas.page(id, locale).read_text(encoding="utf-8")
