"""A wrong domain file is told what is wrong and where, in one sentence."""

import pytest
from comfyui_nibble.prompts import domain, reader, schema
from comfyui_nibble.prompts.reader import DomainError

TOO_DEEP = {f"s{i}": {"choices": [f"{{s{i + 1}}}" if i < 8 else "end"]} for i in range(9)}
WRONG = [
    ("id", "no version", "id: 'no version' is not name@version"),
    ("id", "x@0", "id: 'x@0' is not name@version"),
    ("title", "", "title: must be a text of 1 to 600 characters"),
    ("title", 7, "title: must be a text of 1 to 600 characters; put quotes around a number"),
    ("extra", 1, "the file: unknown key 'extra'; known are based_on, calibration"),
    ("style", "haiku", "style: 'haiku' is none of prose, tags"),
    ("prose", ["x"], "prose: must be a mapping of keys, got list"),
    ("prose", {"positive": ["no mark"]}, "prose.positive: {subject} is nowhere in it"),
    ("tags", {"positive": ["{subject}", "{lite}"]}, "tags.positive[2]: there is no slot 'lite'; there are medium"),
    ("tags", {"positive": ["{subject} {0.x}"]}, "tags.positive[1]: '{0.x}' at character 11 is not a slot like {light}"),
    ("tags", {"positive": ["{subject} }"]}, "tags.positive[1]: '}' at character 11 is not a slot"),
    ("tags", {"positive": [{"text": "{subject}", "if": 1}]}, "tags.positive[1]: unknown key 'if'"),
    ("tags", {"positive": ["{subject}"], "negative": "x"}, "tags.negative: must be a list"),
    ("slots", [], "slots: must be a mapping of keys, got list"),
    ("slots", {"Bad Name": {"choices": ["x"]}}, "slots: 'Bad Name' is no slot name"),
    ("slots", {"subject": {"choices": ["x"]}}, "slots: 'subject' is no slot name"),
    ("slots.time", {"choices": []}, "slots.time: needs 1 to 2000 choices"),
    ("slots.time", {}, "slots.time: give either 'choices' or 'list'"),
    ("slots.time", {"choices": ["a", "a"]}, "slots.time: the choice 'a' is there twice"),
    ("slots.time", {"choices": ["a", 3]}, "slots.time.choices[2]: must be a mapping of keys, got int"),
    ("slots.time", {"choices": [{"name": "a", "prose": "a"}]}, "slots.time.choices[1].tags: must be a text"),
    ("slots.time", {"choices": [{"name": "a", "text": "a", "tags": "a"}]}, "slots.time.choices[1]: give either 'text'"),
    ("slots.time", {"choices": ["a"], "chance": 0}, "slots.time.chance: must be a whole number from 1 to 100"),
    ("slots.time", {"choices": [{"text": "a", "weight": -1}]}, "choices[1].weight: must be a whole number from 1"),
    ("slots.time", {"list": "../../etc/passwd"}, "slots.time.list: '../../etc/passwd' is not a list's name, no path"),
    ("slots.time", {"list": "nope"}, "slots.time.list: there is no list 'nope'"),
    ("slots.time", {"choices": ["a"], "when": {"moon": "a"}}, "slots.time: there is no slot 'moon'"),
    ("slots.time", {"choices": ["a"], "when": {"colour": "pink"}}, "slots.time.when: slot 'colour' has no choice 'pin"),
    ("slots.time", {"choices": ["a"], "when": {"extra": "stars"}}, "goes in a circle: "),
    ("slots.time", {"choices": ["{extra} x"]}, "goes in a circle: "),
    ("slots.colour", {"choices": ["x"], "chance": 50}, "slots.medium.choices[2]: slot 'colour' may be empty"),
    ("slots", TOO_DEEP, "slots.s0: more than 6 slots deep: s0 -> s1 -> s2 -> s3 -> s4 -> s5 -> s6"),
    ("loras", [{"file": "../x.safetensors", "family": "sdxl"}], "loras[1].file: '../x.safetensors' is not the name of"),
    ("loras", [{"file": "x.ckpt", "family": "sdxl"}], "loras[1].file: 'x.ckpt' is not the name of"),
    ("loras", [{"file": "x.safetensors", "family": "sd9"}], "loras[1].family: 'sd9' is none of demo, sd15"),
    ("loras", [{"file": "x.safetensors", "family": "sdxl", "link": "http://evil/x"}], "loras[1].link: 'http://evil/x'"),
    ("loras", [{"file": "x.safetensors", "family": "sdxl", "strength": "9"}], "loras[1].strength: must be a number"),
    ("presets", {"sd9": "x"}, "presets: unknown key 'sd9'"),
    ("presets", {"sdxl": "a b"}, "presets.sdxl: 'a b' is not a preset's id"),
    ("resolution", {"sdxl": [100]}, "resolution.sdxl: must be [width, height]"),
    ("resolution", {"sdxl": [1001, 1000]}, "resolution.sdxl: width and height must be multiples of 8"),
    ("resolution", {"sdxl": [8, 99999]}, "resolution.sdxl: must be a whole number from 64 to 4096"),
    ("calibration", ["ok", ""], "calibration[2]: must be a text"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_every_error_names_file_and_place(key, value, words, data):
    home, _, name = key.rpartition(".")
    (data[home] if home else data)[name] = value
    with pytest.raises(DomainError) as caught:
        schema.parse(data, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: !!python/object/apply:os.system ['echo hi']", "mine.yaml, line 2: tags (!) are not allowed"),
        ("a: !!str x", "line 1: tags (!) are not allowed"),
        ("a: &x [1]\nb: *x", "line 1: anchors and aliases"),
        ("a: 1\nb: *x", "line 2: anchors and aliases"),
        ("a:\n  <<: {b: 1}", "line 2: a key must be a plain text"),
        ("a: 1\na: 2", "line 2: the key 'a' is there twice"),
        ("? [a, b]\n: 1", "line 1: a key must be a plain text"),
        ("[" * 5000, "line 1: more than 12 levels"),
        ("- " * 5000 + "x", "line 1: more than 12 levels"),
        ("[" + "a, " * 30000 + "a]", "line 1: more than 20000 values"),
        ("x" * 300_000, "larger than 256 KiB"),
        ("a: [", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("--- a\n--- b", "line 2: but found another document"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(text, words):
    with pytest.raises(DomainError) as caught:
        reader.parse(text, "mine.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")


def test_texts_stay_texts():
    """YAML 1.1 would make booleans, dates and base-60 numbers of these."""
    read = reader.parse("[no, on, yes, 2024-01-02, 12:30:00, 0x1F, 1e3, ~, null, .inf, 012, 7, -7, 0.5, '7']", "t")
    assert read == ["no", "on", "yes", "2024-01-02", "12:30:00", "0x1F", "1e3", "~", "null", ".inf", "012", 7, -7, 0.5,
                    "7"]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "line 1: this is not UTF-16"),
        ("title: a\n\u202eb".encode(), "line 2: hidden character U+202E"),
        (b"ab\0", "line 1: this is no text, it has the control character U+0000"),
        (b"x" * (256 * 1024 + 1), "larger than 256 KiB"),
    ],
)
def test_files_that_are_not_what_they_seem(content, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(DomainError) as caught:
        domain.load_file(path)
    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_folder_or_nothing_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "gone.yaml"):
        with pytest.raises(DomainError, match="there is no such file"):
            domain.load_file(path)


def test_hash_is_of_what_is_said(data, small):
    """Not of key order; of every text in it."""
    assert schema.parse(dict(reversed(data.items())), "t").hash == small.hash
    data["slots"]["time"]["choices"][1] = "midnight"
    data["prose"]["positive"][2]["when"] = {"time": "midnight"}
    data["slots"]["extra"]["when"] = {"time": "midnight"}
    assert schema.parse(data, "t").hash != small.hash


LISTED = """
id: mine@1
title: Mine
description: Has a list.
example: x
prose: {positive: ["{subject} in {colour}"]}
tags: {positive: ["{subject}", "{colour}"]}
slots: {colour: {list: %s}}
"""


def test_lists_are_beside_the_domain_or_shipped(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(LISTED % "hues")
    with pytest.raises(DomainError, match=r"slots\.colour\.list: there is no list 'hues'; write lists/hues\.txt"):
        domain.load_file(path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "hues.txt").write_text("# two\nred {x}\n\n  blue \n")
    loaded = domain.load_file(path)
    assert [c.name for c in loaded.slots["colour"].choices] == ["red {x}", "blue"]
    path.write_text(LISTED % "colours")
    assert len(domain.load_file(path).slots["colour"].choices) > 20


def test_a_list_never_takes_the_place_of_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(LISTED % "colours")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "colours.txt").write_text("red\n")
    with pytest.raises(DomainError, match="the list 'colours' beside the domain has the name of a shipped one"):
        domain.load_file(tmp_path / "mine.yaml")


def test_a_changed_list_changes_the_hash(tmp_path):
    (tmp_path / "mine.yaml").write_text(LISTED % "hues")
    (tmp_path / "lists").mkdir()
    hashes = set()
    for content in ("red\n", "red\nblue\n", "# note\nred\nblue"):
        (tmp_path / "lists" / "hues.txt").write_text(content)
        hashes.add(domain.load_file(tmp_path / "mine.yaml").hash)
    assert len(hashes) == 2


def test_names_and_versions(tmp_path):
    for version in (1, 2, 10):
        text = (LISTED % "colours").replace("mine@1", f"mine@{version}")
        (tmp_path / f"mine@{version}.yaml").write_text(text)
    assert domain.load("mine", tmp_path).version == 10
    assert domain.load("mine@2", tmp_path).version == 2
    with pytest.raises(DomainError, match=r"unknown domain 'nope'; there are mine@1, mine@10, mine@2"):
        domain.load("nope", tmp_path)
    with pytest.raises(DomainError, match=r"unknown domain '\.\./mine@1'"):
        domain.load("../mine@1", tmp_path)
