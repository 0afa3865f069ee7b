"""Data sets from files: every format, its broken kin, and two parts that share nothing."""

import json

import pytest
from comfyui_nibble.prompts import calibration, domain, sets, sets_words

COCO = {
    "images": [{"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A plate of  pizza\non a table."},
        {"image_id": 7, "id": 2, "caption": "A pizza."},
        {"image_id": 8, "id": 3, "caption": "A man rides a horse."},
        {"image_id": 9, "id": 4},
    ],
}
MJHQ = {
    "aa": {"category": "food", "prompt": "a croissant, studio light"},
    "bb": {"category": "people", "prompt": "an old fisherman eats pizza"},
}
SDCI = (
    "# comment\n0001: A plain text of\n  two lines, with commas\n0002: 'quoted: with a colon, it''s fine'\n"
    '"0003": |\n  a block\n  text\n0004: [1, 2]\n'
)
JSONL = '{"prompt": "one", "id": 3}\n\n{"caption": ["two", "deux"], "category": "food"}\n"three"\n{"other": 1}\n'
CSV = 'Image,Caption\na.jpg,"one, with a comma"\nb.jpg,\nc.jpg,two\n'
GOOD = {
    "COCO Captions": (json.dumps(COCO), ["A plate of pizza on a table.", "A man rides a horse."]),
    "MJHQ-30K": (json.dumps(MJHQ), ["a croissant, studio light", "an old fisherman eats pizza"]),
    "sDCI": (SDCI, ["A plain text of two lines, with commas", "quoted: with a colon, it's fine", "a block text"]),
    "jsonl": (JSONL, ["one", "two", "three"]),
    "csv": (CSV, ["one, with a comma", "two"]),
    "text": ("# comment\none\n\n two \none\n", ["one", "two"]),
}
BROKEN = {
    "COCO Captions": ("[]", 'has no list "annotations"'),
    "MJHQ-30K": ("[" * 100_000, "it is not JSON"),
    "sDCI": ("a: &x [1]\n", "anchors and aliases"),
    "jsonl": ('{"prompt": "one"}\nnot json\n', "line 2: it is not JSON"),
    "csv": ("a,b\n1,2\n", "its first line names no column prompt, caption, text"),
    "text": ("# only a comment\n", "has no prompt that can be read as text"),
}


def read(tmp_path, id: str, content: str) -> list[sets.Entry]:
    path = tmp_path / sets.FORMATS[id].usual
    path.write_text(content, encoding="utf-8")
    return sets.read(sets.FORMATS[id], path)


@pytest.mark.parametrize("id", sets.FORMATS)
def test_a_file_of_each_format_is_read(id, tmp_path):
    content, expected = GOOD[id]
    assert [e.text for e in sets.usable(read(tmp_path, id, content))] == expected


@pytest.mark.parametrize("id", sets.FORMATS)
def test_a_broken_one_is_refused_in_a_sentence(id, tmp_path):
    content, words = BROKEN[id]
    with pytest.raises(ValueError, match=words) as e:
        read(tmp_path, id, content)
    assert sets.FORMATS[id].usual in str(e.value) and "Choose another set or file" in str(e.value)


@pytest.mark.parametrize("id", sets.FORMATS)
def test_a_missing_file_is_named_with_its_address(id):
    row = sets.FORMATS[id]
    said = sets.missing(row, row.usual)
    assert row.usual in said
    assert f"published at {row.address}" in said if row.address else "file of your own" in said
    assert not row.address or row.address.startswith("https://")


def test_a_file_over_the_cap_is_not_read(tmp_path):
    row = sets.Format("text", "x.txt", "", 1, sets.FORMATS["text"].read)
    (tmp_path / "x.txt").write_bytes(b"a\n" * (sets.MIB // 2 + 1))
    with pytest.raises(ValueError, match=r"x\.txt: larger than 1 MiB"):
        sets.read(row, tmp_path / "x.txt")


def entries(n: int) -> list[sets.Entry]:
    return [sets.Entry(str(i), f"prompt number {i}") for i in range(n)]


def test_the_parts_share_nothing_and_follow_the_seed():
    found = sets.drawn(entries(50), None, "", (16, 30), 3)
    assert (len(found.calibration), len(found.evaluation)) == (16, 30)
    assert not set(found.calibration) & set(found.evaluation)
    assert found == sets.drawn(entries(50)[::-1], None, "", (16, 30), 3)  # the file's order does not count
    assert found.calibration != sets.drawn(entries(50), None, "", (16, 30), 4).calibration


def test_a_larger_calibration_set_leaves_evaluation_as_it_is():
    small, large = (sets.drawn(entries(50), None, "", (n, 20), 0) for n in (8, 24))
    assert small.evaluation == large.evaluation
    assert large.calibration[:8] == small.calibration


def test_short_sets_give_what_there_is():
    found = sets.drawn(entries(5), None, "", (3, 9), 0)
    assert len(found.calibration) == 3 and len(found.evaluation) == 2
    none = sets.drawn(entries(5), None, "", (9, 9), 0)
    assert len(none.calibration) == 5 and none.evaluation == ()
    assert sets.drawn(entries(5), None, "", (0, 0), 0).evaluation == ()


def test_one_caption_a_picture_and_no_repeats():
    rows = [sets.Entry("a", "Red  apple"), sets.Entry("a", "a second one"), sets.Entry("b", "red apple"),
            sets.Entry("c", "\u202ehidden\x00"), sets.Entry("d", "x" * 2001), sets.Entry("e", " ")]  # fmt: skip
    assert [e.text for e in sets.usable(rows)] == ["Red apple", "hidden"]


def test_the_output_is_what_calibrate_reads():
    found = sets.drawn(entries(50), None, "", (16, 8), 0)
    assert calibration.lines("\n".join(found.calibration)) == list(found.calibration)


def test_a_domain_filters_by_category_or_words(tmp_path):
    food, portrait = domain.load("food"), domain.load("portrait")
    mjhq, coco = (read(tmp_path, id, GOOD[id][0]) for id in ("MJHQ-30K", "COCO Captions"))

    def found(rows, wanted, words=""):
        return [e.text for e in sets.matching(sets.usable(rows), wanted, words)]

    assert found(mjhq, food) == ["a croissant, studio light"]  # the category decides, not the pizza
    assert found(coco, food) == ["A plate of pizza on a table."]
    assert found(coco, portrait) == ["A man rides a horse."]
    assert found(coco, None, "horses, dog") == ["A man rides a horse."]
    assert found(coco, food, "horse") == []
    with pytest.raises(ValueError, match=r"none of the 2 prompts belongs to food@1 and has any of the words"):
        sets.drawn(coco, food, "horse", (1, 1), 0)


@pytest.mark.parametrize("id", domain.shipped())
def test_every_shipped_domain_knows_its_own_words(id):
    """And they are words of one form, so that they can match."""
    one = domain.load(id)
    vocabulary = sets_words.vocabulary(one)
    assert len(vocabulary) >= 2
    assert all(sets_words.words(w) == {w} for w in vocabulary)
    assert all(sets_words.belongs(one, f"there is a {w} here") for w in vocabulary)
    assert not sets_words.belongs(one, "of the and with")


def test_the_table_names_domains_that_exist():
    shipped = {id.partition("@")[0] for id in domain.shipped()}
    assert set(sets_words.DOMAINS) <= shipped
    assert {kind for kind, _ in sets_words.DOMAINS.values()} - {""} <= sets_words.MJHQ


def test_the_shipped_prompts_fall_into_domains():
    """On real prompts, of people, places and things: the food words find food."""
    lines = calibration.lines(calibration.LIST.read_text(encoding="utf-8"))
    food = [line for line in lines if sets_words.belongs(domain.load("food"), line)]
    assert 5 <= len(food) < len(lines) / 3
    assert any("ramen" in line for line in food) and not any("bicycle" in line for line in food)
