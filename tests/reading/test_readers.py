"""Every reader of text gives the same words whatever wrote the file, or one sentence with the file's name and line."""

import json

import pytest
from comfyui_nibble.headless import calibrate
from comfyui_nibble.lora import peft
from comfyui_nibble.prompts import domain, expand, sets
from comfyui_nibble.slim import choose
from comfyui_nibble.training import data

WORDS = ["a café — “crème brûlée”", "l’été, über alles", "plain words"]  # noqa: RUF001 - as word processors write
DOMAIN = """id: mine@1
title: {0}
description: x
example: {1}
prose: {{positive: ["{{subject}}, {{dish}}"], negative: []}}
tags: {{positive: ["{{subject}}, {{dish}}"], negative: []}}
slots:
  dish: {{list: dishes}}
"""


def pictures(folder) -> None:
    """The three that captions are for."""
    for picture in "abc":
        (folder / f"{picture}.png").touch()


def caption(folder, put) -> list[str]:
    pictures(folder)
    for picture, words in zip("abc", WORDS, strict=True):
        put(f"{picture}.txt", words.replace(" ", "\n", 1) + "\n")
    return [e.caption for e in data.examples(folder)]


def caption_jsonl(folder, put) -> list[str]:
    pictures(folder)
    rows = [{"file_name": f"{n}.png", "text": w} for n, w in zip("abc", WORDS, strict=True)]
    put("metadata.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return [e.caption for e in data.examples(folder)]


def caption_csv(folder, put) -> list[str]:
    pictures(folder)
    rows = [f'{n}.png,"{w.replace(" ", chr(10), 1)}"\n' for n, w in zip("abc", WORDS, strict=True)]
    put("metadata.csv", "file_name,caption\n" + "".join(rows))
    return [e.caption for e in data.examples(folder)]


def prompt_set(id: str, content: str):
    def read(folder, put) -> list[str]:
        return [e.text for e in sets.usable(sets.read(sets.FORMATS[id], put("prompts", content)))]

    return read


def dumped(value) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def own_domain(folder, put) -> list[str]:
    (folder / "lists").mkdir()
    put("lists/dishes.txt", f"# dishes\n{WORDS[0]}\n\n  {WORDS[1]}\n{WORDS[2]}\n")
    found = domain.load_file(put("mine.yaml", DOMAIN.format(WORDS[0], WORDS[1])))
    assert (found.title, found.example) == (WORDS[0], WORDS[1])
    return [c.name for c in found.slots["dish"].choices]


def prompt_list(folder, put) -> list[str]:
    found = calibrate.texts(put("prompts.txt", f"{WORDS[0]}\n\n{WORDS[1]} \n{WORDS[2]}"), None, 3, 0)
    return sorted(found, key=WORDS.index)


def adapter(folder, put) -> list[str]:
    put(peft.CONFIG, dumped({"lora_alpha": 3, "author": WORDS}))
    (found,) = peft.configs(folder / peft.WEIGHTS, None)
    return WORDS[: int(found.alpha)]


COCO = {"annotations": [{"image_id": i, "caption": w} for i, w in enumerate(WORDS)]}
ROWS = "".join(f'{i},"{w.replace(" ", chr(10), 1)}"\n' for i, w in enumerate(WORDS))
READERS = {
    "caption": caption,
    "caption jsonl": caption_jsonl,
    "caption csv": caption_csv,
    "set jsonl": prompt_set("jsonl", "".join(json.dumps(w, ensure_ascii=False) + "\n" for w in WORDS)),
    "set csv": prompt_set("csv", "id,prompt\n" + ROWS),
    "set text": prompt_set("text", "# mine\n" + "\n".join(WORDS)),
    "set COCO": prompt_set("COCO Captions", dumped(COCO)),
    "set MJHQ": prompt_set("MJHQ-30K", dumped({str(i): {"prompt": w} for i, w in enumerate(WORDS)})),
    "set sDCI": prompt_set(
        "sDCI", "".join(f"{i:04}: {w.replace(' ', chr(10) + '  ', 1)}\n" for i, w in enumerate(WORDS))
    ),
    "domain": own_domain,
    "prompt list": prompt_list,
    "adapter config": adapter,
}
ENCODINGS = {
    "UTF-8": ("utf-8", b""),
    "UTF-8 with mark": ("utf-8", b"\xef\xbb\xbf"),
    "UTF-16 LE": ("utf-16-le", b"\xff\xfe"),
    "UTF-16 BE": ("utf-16-be", b"\xfe\xff"),
    "UTF-16 LE without mark": ("utf-16-le", b""),
    "UTF-16 BE without mark": ("utf-16-be", b""),
    "UTF-32 LE": ("utf-32-le", b"\xff\xfe\0\0"),
    "Windows-1252": ("cp1252", b""),
}
ENDS = {"LF": "\n", "CR LF": "\r\n", "CR": "\r"}


def writer(folder, encode):
    """put(name, content): writes a file as ``encode`` has it, and gives its path."""

    def put(name: str, content: str):
        (folder / name).write_bytes(encode(content))
        return folder / name

    return put


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reader", READERS)
def test_the_same_words_whatever_wrote_them(reader, encoding, end, tmp_path):
    codec, mark = ENCODINGS[encoding]
    put = writer(tmp_path, lambda text: mark + text.replace("\n", ENDS[end]).encode(codec))
    assert READERS[reader](tmp_path, put) == WORDS


@pytest.mark.parametrize("space", ["\x0b", "\x0c", "\x85", "\u2028", "\u2029"], ids=ascii)
@pytest.mark.parametrize("reader", READERS)
def test_only_line_ends_end_a_line(reader, space, tmp_path):
    """What word processors and PDFs put between words is a space; the last one of each text is tried."""
    put = writer(tmp_path, lambda text: text.replace(" alles", f"{space}alles").encode())
    assert READERS[reader](tmp_path, put) == WORDS


DAMAGE = {
    "zero byte": lambda text: text.replace("plain", "pl\0ain").encode(),
    "escape": lambda text: text.replace("plain", "pl\x1bain").encode(),
    "picture": lambda text: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01",
    "no Windows-1252": lambda text: text.encode("cp1252").replace(b"plain", b"pl\x81in"),
    "Cyrillic": lambda text: text.replace("plain", "кошка").encode("cp1251", "ignore"),
    "Chinese": lambda text: text.encode("cp1252").replace(b"plain", "红色的猫".encode("gbk")),
    "two encodings": lambda text: text.encode("cp1252").replace(b"plain", b"pl\xe4in " + "pläin".encode()),
    "half a UTF-16": lambda text: b"\xff\xfe" + text.encode("utf-16-le")[:-1],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", [name for name in READERS if name != "adapter config"])  # which has no words
def test_what_is_no_text_is_refused_with_name_and_line(reader, damage, tmp_path):
    put = writer(tmp_path, DAMAGE[damage])
    with pytest.raises(ValueError, match=r"\b\w+(\.\w+)?, line \d+: this is .*\. Save the file as UTF-8( text)?$") as e:
        READERS[reader](tmp_path, put)
    assert "\ufffd" not in str(e.value) and str(tmp_path) not in str(e.value) and "\n" not in str(e.value)


CASES = {
    "unclosed quote": ("m.csv", 'file_name,text\nb.png,b\na.png,"red\nb.png,blue\n', "m.csv, line 3: it is not CSV"),
    "inner quote": ("m.csv", 'file_name,text\na.png,"a "red" cat"\n', "m.csv, line 2: it is not CSV"),
    "long field": ("m.csv", f"file_name,text\na.png,{'x' * 140_000}\n", "m.csv, line 2: it is not CSV (field larger"),
    "bare comma": ("m.csv", "file_name,text\na.png,a red, round cat\n", "m.csv, line 2: it has 3 fields"),
    "nested": ("m.jsonl", '{"file_name": "b.png"}\n' + "[" * 200_000, "m.jsonl, line 2: it is not JSON"),
    "endless number": ("m.jsonl", '{"text": ' + "9" * 5000 + "}", "m.jsonl, line 1: it is not JSON"),
    "no object": ("m.jsonl", '["a.png", "a cat"]', "m.jsonl, line 1: it is no object"),
    "number": ("m.jsonl", '\n{"file_name": "a.png", "text": 5}', "m.jsonl, line 2: the caption is no text"),
    "list": ("m.jsonl", '{"file_name": "a.png", "text": ["a"]}', "m.jsonl, line 1: the caption is no text"),
    "control": ("m.jsonl", r'{"file_name": "a.png", "text": "a\u0000b"}', "line 1: the caption has the control"),
    "surrogate": ("m.jsonl", r'{"file_name": "a.png", "text": "a\ud800b"}', "line 1: the caption has the control"),
    "long": ("a.txt", "word " * 3000, "a.txt: the caption has 14999 characters, at most 10000 are read. Shorten it"),
    "large": ("a.txt", " " * (2**20 + 1), "a.txt: larger than 1 MiB"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_caption_that_cannot_be_read_is_one_sentence(case, tmp_path):
    name, content, words = CASES[case]
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as e:
        data.examples(tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_table_is_read_only_for_pictures_without_a_caption(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "log.csv").write_text('"not closed')
    assert [e.caption for e in data.examples(tmp_path)] == ["a cat"]


SETS = {
    "unclosed quote": ("csv", 'prompt\none\n"two\nthree\n', "line 3: it is not CSV"),
    "long field": ("csv", f"prompt\n{'x' * 140_000}\n", "line 2: it is not CSV (field larger"),
    "bare comma": ("csv", "id,prompt\n1,a red, round cat\n", "line 2: it has 3 fields"),
    "number": ("jsonl", '"one"\n{"prompt": 5}\n', "line 2: its caption is no text"),
    "bare number": ("jsonl", '"one"\n5\n', "line 2: it is neither an object nor a text"),
    "nested": ("jsonl", '"one"\n' + "[" * 200_000, "line 2: it is not JSON"),
    "nested whole": ("COCO Captions", "[" * 200_000, "it is not JSON"),
    "YAML": ("sDCI", "0001: a\n  b\n# c\n0002: &x [1]\n", "line 4: anchors and aliases"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_cannot_be_read_is_one_sentence(case, tmp_path):
    id, content, words = SETS[case]
    (tmp_path / "mine").write_text(content)
    with pytest.raises(ValueError) as e:
        sets.read(sets.FORMATS[id], tmp_path / "mine")
    assert words in str(e.value) and str(e.value).startswith(f"mine cannot be read as {id}: ")
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_prompt_list_is_refused_with_name_and_line(tmp_path):
    path = tmp_path / "list.txt"
    for content, words in (
        ("one\n\n" + "x" * 2001, "list.txt, line 3: a prompt of 2001 characters; at most 2000 are allowed"),
        ("\n".join(map(str, range(4097))), "list.txt, line 4097: one prompt more than 4096, the most that are read"),
        (" \n", "list.txt: there is no prompt in it"),
        (" " * (2**24 + 1), "list.txt: larger than 16 MiB, the most that is read"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            calibrate.texts(path, None, 4, 0)
    with pytest.raises(ValueError, match=r"^away\.txt: there is no such file$"):
        calibrate.texts(tmp_path / "away.txt", None, 4, 0)


def test_typed_lines_follow_the_same_rule():
    assert expand.parse_overrides("a: x\u2028y\r\n\x0c\rb: z") == {"a": "x y", "b": "z"}
    with pytest.raises(ValueError, match="blocks, line 3: 'x y' is not"):
        choose._lines("input 1: skip\r\n\rx\u2028y")
