"""docs/domains.md and the tables in the help pages are what the domain files give."""

import pytest
from comfyui_nibble.prompts import domain, expand, page, reader, schema

REMEDY = "python -m comfyui_nibble.prompts.page writes it anew"


def test_the_page_is_made_from_the_files():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), REMEDY


@pytest.mark.parametrize("path", page.HELP, ids=lambda p: p.stem)
def test_help_pages_show_every_domain_with_an_example(path):
    text = path.read_text(encoding="utf-8")
    assert text == page.with_table(text), REMEDY
    for d in map(domain.load, domain.shipped()):
        assert f"`{d.id}`" in text
        assert expand.expand(d, d.example, page.SEED) in text


def test_the_example_of_how_to_write_one_is_right(tmp_path):
    """The YAML in the page is a domain that loads and expands."""
    text = page.WRITING.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "steam.txt").write_text("thin steam\n")
    (tmp_path / "tea-shop.yaml").write_text(text)
    tea = domain.load_file(tmp_path / "tea-shop.yaml")
    fixed = {"light": "morning", "steam": "thin steam", "table": "on a woven mat"}
    assert expand.resolve(tea, "a cup of tea", 0, "prose", fixed).positive == (
        "A photograph of a cup of tea on a woven mat, with thin steam."
    )
    assert schema.parse(reader.parse(text.replace("list: steam", "choices: [a]"), "t"), "t").presets
