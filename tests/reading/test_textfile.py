"""The rules of text files one by one: encodings and how they are told apart, lines, csv, jsonl, names."""

import csv
import json
import tracemalloc

import pytest
from comfyui_nibble.reading import textfile
from comfyui_nibble.reading.names import MAX_SENTENCE, MAX_SHOWN, encodable, place, sentence, shown
from hypothesis import given, settings
from hypothesis import strategies as st

ALWAYS = settings(deadline=None, database=None, derandomize=True, max_examples=500)
PLAIN = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\u2028\u2029\ufeff"))


@ALWAYS
@given(PLAIN, st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]))
def test_any_text_with_a_mark_comes_back(text, encoding):
    assert textfile.decoded(text.encode(encoding), "x") == text


@ALWAYS
@given(PLAIN)
def test_any_utf8_comes_back(text):
    assert textfile.decoded(text.encode(), "x") == text


@ALWAYS
@given(st.binary(max_size=64))
def test_any_bytes_are_text_or_one_sentence(data):
    """And a text says what its bytes say: in one of the encodings they come back."""
    try:
        text = textfile.decoded(data, "x.txt")
    except ValueError as e:
        assert str(e).startswith("x.txt, line ") and "\n" not in str(e)
        return
    known = {data.decode(c, "ignore") for c in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")}
    assert text in {textfile.plain(k) for k in known} and not textfile.CONTROL.search(text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        (b"\xff\xfe", ""),
        (b"caf\xe9 \x93x\x94 \x96 \x85", "café “x” – …"),  # noqa: RUF001
        (b"\xab \xe9t\xe9\xa0\xbb", "« été\xa0»"),  # a no-break space as French has it; E9 A0 BB alone would be UTF-8
        ("Đường phố Hà Nội".encode("utf-16-le"), "Đường phố Hà Nội"),
        ("котёнок".encode(), "котёнок"),
        ("котёнок".encode("utf-16"), "котёнок"),
        ("a\ufeff b".encode(), "a b"),  # of a second file behind the first
    ],
)
def test_what_is_read(data, text):
    assert textfile.decoded(data, "x") == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"one\r\ntwo\rcat\0 x", "x, line 3: this is no text, it has the control character U+0000"),
        (b"cat\0", "x, line 1: this is no text, it has the control character U+0000"),  # not UTF-16 for a stray zero
        ("котёнок".encode("utf-16-le"), "x, line 1: this is "),
        ("котёнок".encode("cp1251"), "x, line 1: this is neither UTF-8 nor Windows-1252"),
        ("кот и пёс".encode("koi8-r"), "x, line 1: this is neither UTF-8 nor Windows-1252"),
        ("\n美しい猫、夜".encode("shift-jis"), "x, line 2: this is neither UTF-8 nor Windows-1252"),
        ("고양이".encode("euc-kr"), "x, line 1: this is neither UTF-8 nor Windows-1252"),
        ("γάτα".encode("cp1253"), "x, line 1: this is neither UTF-8 nor Windows-1252"),
        (
            "naïve\n".encode() + b"\xe9t\xe9",
            "x, line 1: this is neither UTF-8 nor Windows-1252, or the file is a mixture",
        ),
        ("été\n".encode() * 2 + b"caf\xc3", "x, line 1: this is neither"),  # cut within a letter
        (b"\xef\xbb\xbfa\n\xe9", "x, line 2: this is not UTF-8, as the file begins"),
        (b"\xff\xfea\0\n\0\0\xd8", "x, line 2: this is not UTF-16, as the file begins"),
        ("a\n\x92".encode(), "x, line 2: this is no text, it has the control character U+0092"),
    ],
)
def test_what_is_refused(data, words):
    with pytest.raises(ValueError) as e:
        textfile.decoded(data, "x")
    assert words in str(e.value)


def test_lines_and_their_numbers():
    text = " one\x0ctwo\r\n\r\n\tthree\u2028four \rfive\x1csix\n"
    assert list(textfile.numbered(text)) == [(1, "one two"), (3, "three four"), (4, "five\x1csix")]
    assert textfile.lines("") == textfile.lines(" \n\x0b") == []


def test_rows_of_csv():
    text = ' Name ,TEXT\r\na,"x\r\n""y"""\r\n\r\nb\r\nc,z,,\r\n'
    found = list(textfile.rows(text, "m.csv"))
    assert found == [(2, dict(name="a", text='x\n"y"')), (5, dict(name="b", text="")), (6, dict(name="c", text="z"))]
    assert list(textfile.rows("", "m.csv")) == list(textfile.rows("a,b\n", "m.csv")) == []


def test_csv_leaves_the_limit_of_the_process_alone():
    before = csv.field_size_limit()
    with pytest.raises(ValueError, match=r"^m\.csv, line 2: it is not CSV \(field larger than field limit"):
        list(textfile.rows("a\n" + "x" * (before + 1), "m.csv"))
    assert csv.field_size_limit() == before


def test_a_value_says_its_line():
    assert textfile.value('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match=r"^c\.json, line 2: it is not JSON \(Expecting value at character 4\)$"):
        textfile.value('{"a":\n   }', "c.json")
    with pytest.raises(ValueError, match=r"^c\.json: it is not JSON \(lists in lists without end"):
        textfile.value("[" * 100_000, "c.json")


@pytest.mark.parametrize("content", ["word " * 200_000, "😀 " + "x" * 1_000_000, "\n" * 1_000_000])
def test_a_large_caption_costs_little(content, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    assert _peak(lambda: textfile.caption_file(path)) < 32 * 2**20


def test_a_large_list_costs_its_text(tmp_path):
    (tmp_path / "m.csv").write_text("a,b\n" + "1,some words here\n" * 200_000)
    (tmp_path / "m.jsonl").write_text((json.dumps({"a": 1}) + "\n") * 300_000)
    size = 3.4 * 2**20
    csv_ = _peak(lambda: sum(1 for _ in textfile.rows(textfile.read(tmp_path / "m.csv", 2**26), "m")))
    jsonl = _peak(lambda: sum(1 for _ in textfile.values(textfile.read(tmp_path / "m.jsonl", 2**26), "m")))
    assert csv_ < 4 * size and jsonl < 4 * size


def _peak(run) -> int:
    tracemalloc.start()
    try:
        run()
    except ValueError as e:
        assert "characters, at most 10000 are read" in str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_what_cannot_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    for name in ("folder.txt", "gone.txt", "none\udcff.txt"):
        with pytest.raises(ValueError) as e:
            textfile.read(tmp_path / name, 10)
        assert str(e.value) == f"{shown(name)}: there is no such file"


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("plain.png", "plain.png"),
        ("été 😀 кот.png", "été 😀 кот.png"),
        ("caf\udce9.png", "caf\\udce9.png"),
        ("a\nb\x1b\u202e.png", "a\\nb\\x1b\\u202e.png"),
        (5, "5"),
    ],
)
def test_names_can_be_shown(name, seen):
    assert shown(name) == seen
    assert place(name, 3) == f"{seen}, line 3" and place("", 3) == "line 3" and place(name) == seen


def test_a_long_name_keeps_both_ends():
    seen = shown("begin" + "x" * 300 + ".safetensors")
    assert len(seen) <= MAX_SHOWN and seen.startswith("begin") and seen.endswith("x.safetensors") and "…" in seen
    assert shown("y" * MAX_SHOWN) == "y" * MAX_SHOWN


def test_a_message_is_one_line_of_a_sane_length():
    assert sentence("bad\n\tfile caf\udce9\x1b[0m.") == "bad file caf\\udce9\\x1b[0m."
    assert len(sentence("x" * 1_000_116)) <= MAX_SENTENCE


def test_any_text_can_be_made_encodable():
    assert encodable("a\n\tété 😀") == "a\n\tété 😀"
    assert encodable("caf\udce9 \ud83d") == "caf\\udce9 \\ud83d"
