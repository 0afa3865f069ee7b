"""Texts of the interface in two languages and the help pages, without a ComfyUI: they agree with each other.

tests/comfy/test_locales.py holds locales/en and the golden file to the schemas; so, through them, these are held, too.
"""

import re
import sys
import unicodedata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "comfy"))
import schemas
from schemas import LOCALES, PAGES, texts

EN = schemas.read(LOCALES / "en" / "nodeDefs.json")
VI = schemas.read(LOCALES / "vi" / "nodeDefs.json")
GOLDEN = schemas.read(schemas.GOLDEN)
READ_BY_COMFYUI = {"main.json", "nodeDefs.json", "settings.json", "commands.json"}
I18N_SYNTAX = set("{}@|")  # vue-i18n, through which the front end shows most texts, reads these as commands
# Names that Vietnamese artists use as they are; and names in capitals are types and formats.
KEPT = {"LoRA", "S(Z)", "cfg", "clip", "eta", "latent", "rank", "seed", "shift", "vae"}
VIETNAMESE = set("ăâđêôơưàáảãạằắẳẵặầấẩẫậèéẻẽẹềếểễệìíỉĩịòóỏõọồốổỗộờớởỡợùúủũụừứửữựỳýỷỹỵ")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
NODE = re.compile(r"\bNibble[A-Z]\w*")
SECTIONS = {
    "": ("Input", "Output", "Example", "What can go wrong"),
    "vi": ("Đầu vào", "Đầu ra", "Ví dụ", "Sự cố thường gặp"),
}
PAGES_IN = [(id, locale) for id in EN for locale in SECTIONS]


def places(field: str) -> list[str]:
    return [at for at in texts(EN) if at.endswith(f".{field}")]


@pytest.mark.parametrize("locale", ["en", "vi"])
def test_files_are_those_that_comfyui_reads_and_come_out_of_the_script_as_they_are(locale):
    files = set((LOCALES / locale).iterdir()) - {schemas.REVIEWED}
    assert {p.name for p in files} <= READ_BY_COMFYUI
    for path in files:
        assert path.read_text(encoding="utf-8") == schemas.dumped(schemas.read(path)), (
            f"{path.name}: indent by 1, UTF-8"
        )


def test_vietnamese_has_every_text_and_no_other():
    assert schemas.shortfalls(EN, VI) == []
    at = "nodeCategories"
    assert VI.keys() == EN.keys()
    assert (
        schemas.read(LOCALES / "vi" / "main.json")[at].keys() == schemas.read(LOCALES / "en" / "main.json")[at].keys()
    )


@pytest.mark.parametrize("id", EN)
def test_texts_are_whole_sentences_in_plain_characters(id):
    for defs in (EN, VI):
        for at, text in texts({id: defs[id]}).items():
            assert text and text == text.strip() == unicodedata.normalize("NFC", text), at
            assert not I18N_SYNTAX & set(text), at
            if at.endswith((".description", ".tooltip")):
                assert text.endswith((".", "?", "!")), f"{at} stops in the middle: {text}"


@pytest.mark.parametrize("id", EN)
def test_vietnamese_is_vietnamese(id):
    en, vi = texts({id: EN[id]}), texts({id: VI[id]})
    for at, text in en.items():
        kept = at.endswith(".name") and (text.isupper() or text in KEPT)
        assert kept or vi[at] != text, f"{at} is not translated"
    assert VIETNAMESE & set(VI[id]["description"].lower())


def test_display_names_tell_nodes_apart():
    for defs in (EN, VI):
        names = [node["display_name"] for node in defs.values()]
        assert len(set(names)) == len(names)
        assert all(name.endswith(" (Nibble)") for name in names)


@pytest.mark.parametrize("id", EN)
def test_numbers_and_choices_are_the_same_in_both_languages(id):
    """What a person types or chooses is not translated: figures, and options that a tooltip explains ('fast: ...')."""
    en, vi = texts({id: EN[id]}), texts({id: VI[id]})
    for at, text in en.items():
        assert set(NUMBER.findall(text)) <= set(NUMBER.findall(vi[at])), at
    for key, row in GOLDEN[id]["inputs"].items():
        at = f"{id}.inputs.{key}.tooltip"
        for option in map(str, row.get("options", row.get("listed", ()))):
            for form in (f"{option}:", f"'{option}'"):
                assert form not in en[at] or form in vi[at], f"{at}: {form}"


def test_vietnamese_was_looked_at_since_its_english_changed():
    remedy = "put it right in locales/vi, then `python tests/comfy/schemas.py --reviewed` and the node's id"
    assert schemas.unreviewed(EN, schemas.read(schemas.REVIEWED)) == [], remedy


def test_every_page_is_of_a_node():
    assert {p.stem for p in PAGES.glob("*.md")} == set(EN)
    assert {p.name for p in PAGES.iterdir() if p.is_dir()} <= set(EN)
    assert {p.name for p in PAGES.glob("*/*.md")} <= {"vi.md"}


def named(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def section(text: str, heading: str) -> str:
    """What stands under '## heading' (or its plural)."""
    found = re.search(rf"^## {heading}s?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no section {heading!r}"
    return found[1]


def listed_inputs(text: str) -> list[str]:
    """The names that an inputs section explains: first cells of a table, or bold words that begin a list entry."""
    cells = re.findall(r"^\| ([^|]+) \|", text, re.M)[1:]
    rows = [c for c in cells if not set(c) <= set("- ")] + re.findall(r"^- (\*\*.+?\*\*(?:, \*\*.+?\*\*)*)", text, re.M)
    return [name.strip(" *`") for row in rows for name in row.split(",")]


def page(id: str, locale: str = "") -> str:
    path = schemas.page(id, locale)
    assert path.is_file(), f"write {path.relative_to(schemas.ROOT)}"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("id, locale", PAGES_IN)
def test_help_page(id, locale):
    """Its title, sections, every input and output, and no name that is not there."""
    text = page(id, locale)
    defs = VI if locale else EN
    assert text.startswith(f"# {defs[id]['display_name']}\n")
    parts = [section(text, heading) for heading in SECTIONS[locale]]
    inputs, outputs = EN[id]["inputs"], EN[id].get("outputs", {})
    assert [key for key in inputs if not named(key, parts[0])] == []
    assert [name for name in listed_inputs(parts[0]) if name not in inputs] == []
    for slot, row in outputs.items():
        assert named(row["name"], parts[1]) or named(defs[id]["outputs"][slot]["name"], parts[1]), row["name"]
    assert set(NODE.findall(text)) <= set(EN)
    assert text == unicodedata.normalize("NFC", text)
    assert not re.search(r"/(?:home|root|work|tmp)/", text), "a path of somebody's machine"


@pytest.mark.parametrize("id", EN)
def test_vietnamese_page_holds_the_same_examples(id):
    """What stands in code style (options, file names, commands) is not translated."""
    en = page(id)
    assert [c for c in re.findall(r"`([^`\n]+)`", page(id, "vi")) if c not in en] == []
