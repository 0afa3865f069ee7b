"""What stands between ComfyUI and every node: values, texts, errors, fingerprints and log lines."""

import pytest

MARK = "caf\\udce9"  # what is left of a byte that is not UTF-8


@pytest.fixture(scope="module")
def found(inside):
    return inside("checked_nodes")


def test_every_number_is_finite_and_within_its_bounds(found):
    """ComfyUI lets NaN pass (it is neither below nor above), and anything that comes through a link."""
    assert len(found["numbers"]) > 80 and len(found["refused"]) > 800
    assert [row for row in found["refused"] if row[4]] == []
    for node, name, what, said, _ in found["refused"]:
        assert said.startswith(f"ValueError: {name} is ") and "Set it to a" in said, (node, what, said)
        assert len(said) < 400


def test_the_bounds_themselves_and_other_spellings_of_numbers_are_accepted(found):
    assert [row for row in found["accepted"] if row[3] or not row[4]] == []
    assert any("18446744073709551615" in row[2] for row in found["accepted"])  # a seed is more than a float can tell


def test_a_choice_that_comes_through_a_link_is_one_of_the_list(found):
    assert len(found["choices"]) > 100 and not any(row[3] for row in found["choices"])
    for _, name, said, _ in found["choices"]:
        assert said.startswith(f"ValueError: {name}: ") and "is not in its list." in said
        assert len(said) < 900 and said.isprintable()


def test_a_text_is_one_that_can_be_written(found):
    assert len(found["texts"]) > 100 and not any(row[3] for row in found["texts"])
    for _, name, said, _ in found["texts"]:
        assert said.startswith(f"ValueError: {name}: ") and ("U+D" in said or "is no text" in said)


def test_a_value_of_another_type_is_a_sentence(found):
    assert len(found["types"]) > 150 and not any(row[4] for row in found["types"])
    for _, name, kind, said, _ in found["types"]:
        assert said.startswith(f"ValueError: {name}") and (kind in said or "neither true nor false" in said), said


def test_a_value_of_the_right_type_comes_through_whoever_made_it(found):
    assert len(found["good"]) > 50 and [row for row in found["good"] if not row[3]] == []


def test_comfyui_sees_the_nodes_as_before(found):
    assert all(found["asynchronous"].values()) and found["interrupt"]
    assert not found["validators"]  # one that takes all inputs would switch ComfyUI's own checks off


def test_fingerprints_are_hashes_and_never_raise(found):
    """ComfyUI writes them into every saved picture: Will it Fit? put the names of all saved runs there."""
    assert len({row[0] for row in found["fingerprints"]}) >= 12
    for node, right, said in found["fingerprints"]:
        assert right, (node, said)
        assert said == "nan" or set(said) <= set("0123456789abcdef")


def test_what_a_node_returns_can_be_written_everywhere(found):
    text, texts, same, ui = found["out"]
    assert (text, texts) == (MARK + "\n", ["a", "\\ud800"])
    assert same  # what is no text is passed on as it is
    assert ui == {"text": [MARK], "n": [{"é\udce9": 1}]}


TOLD = {
    "surrogate": ("ValueError", f"{MARK}.png: bad"),
    "lines": ("ValueError", "one two\\x1b[31m"),
    "cause": ("ValueError", "fine"),
    "causes": ("ValueError", "fine"),
    "context": ("ValueError", "fine"),
    "odd cause": ("ValueError", "fine"),
    "odd": ("ValueError", f"odd {MARK}"),
    "key": ("KeyError", "'caf\\udce9'"),
    "empty": ("AssertionError", "AssertionError"),
    "note": ("ValueError", "fine"),
    "circle": ("ValueError", f"circle {MARK}"),
    "long chain": ("ValueError", f"{MARK} 2999"),
    "file": ("FileNotFoundError", f"[Errno 2] No such file or directory: {MARK}.png"),
    "two files": ("OSError", "[Errno 18] Invalid cross-device link: one.bin -> two.bin"),
    "paths": ("RuntimeError", "cannot open ComfyUI-Nibble/models/a.bin, …/b.bin or …/c.bin, see https://a.b/c/d and "
              "input/sub/e.png"),
    "encode": ("ValueError", "fine"),
    "memory": ("Huge", f"CUDA out of memory. Tried to allocate {MARK}"),
    "group": ("ValueError", f"{MARK} (1 sub-exception)"),
}  # fmt: skip


def test_an_error_is_one_line_that_can_be_logged_with_all_it_came_from(found):
    for name, row in found["raised"].items():
        assert row["writable"] and row["where"], name
        assert len(row["text"]) <= 2000 and row["text"].isprintable() and row["text"], name
        assert found["secret"] not in row["text"]
        if name in TOLD:
            assert (row["type"], row["text"]) == TOLD[name]
    assert {"long", "too long", "syntax"} <= set(found["raised"]) - set(TOLD)
    assert found["raised"]["long"]["text"].startswith("begin x") and found["raised"]["long"]["text"].endswith("x end")
    assert found["raised"]["memory"]["oom"]  # ComfyUI frees memory for exceptions of this type
    assert f"ValueError: {MARK}" in found["raised"]["cause"]["printed"]
    assert f"OSError: {MARK}" in found["raised"]["context"]["printed"]


def test_log_lines_can_be_written_and_come_once(found):
    lines = found["log"].splitlines()
    assert sum(line.startswith(MARK) for line in lines) == 3 and "ValueError: " + MARK in lines
    assert all(len(line) <= 2000 for line in lines) and f"{found['secret']}/x.png" not in found["log"]
